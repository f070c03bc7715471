"""The closed-form classifier against scikit-learn's solutions of the same problems."""

import numpy as np
import pytest
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from sklearn.linear_model import Ridge

from jaxseg.train import ridge


def _examples(rng, images=6, tokens=40, channels=5, outputs=2):
    """Images whose shares follow their features; two images a group."""
    direction = rng.normal(size=(channels, outputs))
    for i in range(images):
        x = rng.normal(size=(tokens, channels))
        share = 1 / (1 + np.exp(-x @ direction - rng.normal(size=(tokens, outputs))))
        yield x, share, rng.uniform(0, 1, tokens), i // 2


def _fit(examples, penalty):
    return ridge.fit(lambda i, _: examples[i], len(examples), penalty=penalty)


def _regression(examples, penalty):
    """scikit-learn's ridge regression of 2 share - 1, each group weighing the same."""
    totals = {g: sum(w.sum() for *_, w, h in examples if h == g) for *_, g in examples}
    x = np.concatenate([np.concatenate([x, np.ones((len(x), 1))], 1) for x, *_ in examples])
    y = np.concatenate([2 * share - 1 for _, share, _, _ in examples])
    w = np.concatenate([w / totals[g] / len(totals) for *_, w, g in examples])
    # The bias is penalised like the rest here: one more column, no intercept.
    alpha = penalty * np.trace((w[:, None] * x).T @ x) / x.shape[1]
    return Ridge(alpha=alpha, fit_intercept=False).fit(x, y, sample_weight=w).coef_.T


def _iou(found, share, weights):
    """Mean IoU of two classes of which each token holds a share."""
    ious = []
    for inside, taken in ((share, found), (1 - share, ~found)):
        both = sum(w * p for w, p, t in zip(weights, inside, taken, strict=True) if t)
        either = sum(w * (1.0 if t else p) for w, p, t in zip(weights, inside, taken, strict=True))
        ious.append(both / either)
    return np.mean(ious)


def test_is_ridge_regression_with_the_best_threshold_for_groups_left_out():
    examples = list(_examples(np.random.default_rng(0)))
    kernel, bias = _fit(examples, 1e-2)
    whole = _regression(examples, 1e-2)

    def scores(solution, x):
        return np.concatenate([x, np.ones((len(x), 1))], 1) @ solution

    squares = [[], [], []]
    for x, share, w, group in examples:
        squares[group] += [(w[:, None] * (2 * share - 1 - scores(whole, x)) ** 2, w)]
    residual = np.mean(
        [sum(e.sum(0) for e, _ in g) / sum(w.sum() for _, w in g) for g in squares], 0
    )
    for k in range(2):
        best = []
        for group in range(3):
            others = _regression([e for e in examples if e[3] != group], 1e-2)
            x, share, w = (
                np.concatenate([e[i] for e in examples if e[3] == group]) for i in range(3)
            )
            unseen = scores(others, x)[:, k]
            best += [[_iou(unseen > t, share[:, k], w) for t in ridge.THRESHOLDS]]
        want = whole[:, k] * 2 / residual[k]
        want[-1] -= ridge.THRESHOLDS[np.argmax(np.mean(best, 0))] * 2 / residual[k]
        np.testing.assert_allclose([*kernel[:, k], bias[k]], want, rtol=1e-5, atol=1e-6)


def test_log_odds_are_those_of_discriminant_analysis():
    """Up to a constant: where they cross zero is chosen otherwise."""
    rng = np.random.default_rng(1)
    label = rng.integers(0, 2, 20000)
    x = rng.normal(size=(20000, 3)) + np.outer(label, [0.5, 1.0, 0.0])
    parts = np.split(np.arange(20000), 4)
    examples = [(x[p], label[p, None], np.ones(5000), i) for i, p in enumerate(parts)]
    kernel, bias = _fit(examples, 1e-9)
    model = LinearDiscriminantAnalysis().fit(x, label)
    got, want = (x @ kernel)[:, 0], model.decision_function(x)
    np.testing.assert_allclose(got - got.mean(), want - want.mean(), atol=0.05)
    # For two classes of one size and shape that is the same place, to the nearest thresholds.
    assert abs(got.mean() + bias[0] - want.mean()) < 0.2


def test_of_unseen_objects_more_is_found():
    """Each group's objects look half like all others' and half like none: the zero moves down."""
    rng = np.random.default_rng(2)
    examples = []
    for group in range(5):
        look = np.eye(8)[0] + 2 * np.eye(8)[group + 1]
        for _ in range(4):
            share = (rng.random(100) < 0.3).astype(float)[:, None]
            x = share * look + 0.3 * rng.normal(size=(100, 8))
            examples.append((x, share, np.ones(100), group))
    kernel, bias = _fit(examples, 1e-3)
    alone = _regression(examples, 1e-3)
    # Zero of the regression alone and of the result, along the look that all share.
    assert -bias / kernel[0] < -alone[-1] / alone[0] - 0.05


def test_tokens_without_weight_count_nowhere():
    examples = list(_examples(np.random.default_rng(4)))
    spoiled = [
        (np.where(w[:, None] < 0.5, 1e3, x), np.where(w[:, None] < 0.5, -9, y), w * (w >= 0.5), g)
        for x, y, w, g in examples
    ]
    clean = [(x, y, w * (w >= 0.5), g) for x, y, w, g in examples]
    for got, want in zip(_fit(spoiled, 0.1), _fit(clean, 0.1), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-5)


def test_one_image_is_enough():
    kernel, bias = _fit(list(_examples(np.random.default_rng(5), images=1)), 1e-2)
    assert np.isfinite(kernel).all() and np.isfinite(bias).all()


def test_nothing_labelled():
    with pytest.raises(ValueError, match="no training image has a labelled pixel"):
        _fit([(np.ones((4, 2)), np.ones((4, 1)), np.zeros(4), 0)], 0.1)
