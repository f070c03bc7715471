"""The closed-form classifier against scikit-learn's solutions of the same problems."""

import numpy as np
import pytest
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from sklearn.linear_model import Ridge

from jaxseg.train import ridge


def _examples(rng, images=3, tokens=40, channels=5, outputs=2):
    for _ in range(images):
        x = rng.normal(size=(tokens, channels))
        yield x, rng.uniform(-1, 1, (tokens, outputs)), rng.uniform(0, 1, tokens)


def test_is_ridge_regression_times_two_over_the_residual():
    examples = list(_examples(np.random.default_rng(0)))
    kernel, bias = ridge.fit(examples, penalty=1e-2)
    x, y, w = (np.concatenate(parts) for parts in zip(*examples, strict=True))
    # The bias is penalised like the rest here: one more column, no intercept.
    x = np.concatenate([x, np.ones((len(x), 1))], 1)
    moments = (w[:, None] * x).T @ x / w.sum()
    alpha = 1e-2 * np.trace(moments) / len(moments) * w.sum()
    model = Ridge(alpha=alpha, fit_intercept=False).fit(x, y, sample_weight=w)
    residual = np.average((y - model.predict(x)) ** 2, axis=0, weights=w)
    want = 2 * model.coef_ / residual[:, None]
    np.testing.assert_allclose(np.vstack([kernel, bias]), want.T, rtol=1e-5, atol=1e-6)


def test_log_odds_are_those_of_discriminant_analysis():
    rng = np.random.default_rng(1)
    label = rng.integers(0, 2, 20000)
    x = rng.normal(size=(20000, 3)) + np.outer(label, [0.5, 1.0, 0.0])
    targets = 2.0 * label[:, None] - 1
    kernel, bias = ridge.fit([(x, targets, np.ones(len(x)))], penalty=1e-9)
    model = LinearDiscriminantAnalysis().fit(x, label)
    np.testing.assert_allclose(x @ kernel + bias, model.decision_function(x)[:, None], atol=0.05)


def test_tokens_without_weight_count_nowhere():
    examples = list(_examples(np.random.default_rng(2)))
    spoiled = [
        (np.where(w[:, None] < 0.5, 1e3, x), np.where(w[:, None] < 0.5, -9, y), w * (w >= 0.5))
        for x, y, w in examples
    ]
    clean = [(x, y, w * (w >= 0.5)) for x, y, w in examples]
    for got, want in zip(
        ridge.fit(spoiled, penalty=0.1), ridge.fit(clean, penalty=0.1), strict=True
    ):
        np.testing.assert_allclose(got, want, rtol=1e-5)


def test_nothing_labelled():
    with pytest.raises(ValueError, match="no training image has a labelled pixel"):
        ridge.fit([(np.ones((4, 2)), np.ones((4, 1)), np.zeros(4))], penalty=0.1)
