"""Multi-class losses against loops over pixels in float64, properties, and finite differences."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxseg.losses import MULTICLASS, multiclass_loss
from jaxseg.losses import multiclass as mc

CLASSES, VOID = 5, 255
WEIGHTS = np.array([0.5, 2.0, 1.0, 0.25, 3.0])


def _case(seed=0, shape=(3, 6, 7), classes=CLASSES):
    """Class 4 occurs nowhere; void pixels hold the label 255."""
    rng = np.random.default_rng(seed)
    logits = (2 * rng.normal(size=(*shape, classes))).astype(np.float32)
    valid = rng.random(shape) < 0.7
    labels = np.where(valid, rng.integers(0, classes - 1, shape), VOID).astype(np.uint8)
    return logits, labels, valid


def _softmax(x):
    e = np.exp(x.astype(np.float64) - x.max())
    return e / e.sum()


def _jaccard_step(truth, missed):
    """Jaccard loss of the prediction that is wrong at the pixels `missed`."""
    wrong = np.zeros(len(truth), bool)
    wrong[list(missed)] = True
    predicted = truth ^ wrong
    return 1 - (truth & predicted).sum() / (truth | predicted).sum()


def _lovasz(errors, truth):
    """The Lovasz extension by its definition: the set function's steps in falling order of errors."""
    order, total, before = np.argsort(-errors), 0.0, 0.0
    for i in range(len(order)):
        after = _jaccard_step(truth, order[: i + 1])
        total += max(errors[order[i]], 0) * (after - before)
        before = after
    return total


def _slow(name, logits, labels, valid, *, weights=(1,) * CLASSES, smoothing=0.0):
    p = np.array([_softmax(x) for x, v in zip(logits, valid, strict=True) if v])
    y = labels[valid].astype(int)
    if not len(y):
        return 0.0
    classes = p.shape[1]
    true_p = np.array([p[i, y[i]] for i in range(len(y))])
    if name in ("cross_entropy", "focal", "hard_pixels"):
        values = []
        for i in range(len(y)):
            target = np.full(classes, smoothing / classes)
            target[y[i]] += 1 - smoothing
            value = -sum(weights[c] * target[c] * np.log(p[i, c]) for c in range(classes))
            values.append(value * ((1 - true_p[i]) ** 2 if name == "focal" else 1))
        kept = list(range(len(y)))
        if name == "hard_pixels":
            kept = [i for i in np.argsort(true_p) if true_p[i] < 0.1]
            least = int(np.ceil(0.45 * len(y)))
            kept = kept if len(kept) >= least else list(np.argsort(true_p)[:least])
        return sum(values[i] for i in kept) / sum(weights[y[i]] for i in kept)
    losses = []
    for c in sorted(set(y)):
        truth = y == c
        if name == "dice":
            overlap = (2 * p[truth, c].sum() + 1) / (p[:, c].sum() + truth.sum() + 1)
            losses.append(1 - overlap)
        else:
            losses.append(_lovasz(np.where(truth, 1 - p[:, c], p[:, c]), truth))
    return np.mean(losses)


@functools.cache
def _loss(name, **options):
    if name == "hard_pixels":
        options = {"threshold": 0.1, "keep": 0.45} | options
    return jax.jit(functools.partial(MULTICLASS[name], **options))


@functools.cache
def _value_and_grad(name):
    return jax.jit(jax.value_and_grad(lambda *a: _loss(name)(*a).sum()))


@pytest.mark.parametrize("name", MULTICLASS)
def test_equals_loops(name):
    logits, labels, valid = _case()
    labels[2], valid[2] = VOID, False
    got = _loss(name)(logits, labels, valid)
    want = [
        _slow(name, x.reshape(-1, CLASSES), y.ravel(), v.ravel())
        for x, y, v in zip(logits, labels, valid, strict=True)
    ]
    assert got.dtype == jnp.float32
    np.testing.assert_allclose(got, want, rtol=2e-5)


@pytest.mark.parametrize(
    "name, smoothing",
    [("cross_entropy", 0.0), ("cross_entropy", 0.2), ("focal", 0.0), ("hard_pixels", 0.2)],
)
def test_class_weights_and_label_smoothing_equal_loops(name, smoothing):
    logits, labels, valid = _case(seed=1)
    smoothed = {"label_smoothing": smoothing} if smoothing else {}
    got = _loss(name, **smoothed)(logits, labels, valid, class_weights=WEIGHTS)
    want = [
        _slow(name, x[v], y[v], v[v], weights=WEIGHTS, smoothing=smoothing)
        for x, y, v in zip(logits, labels, valid, strict=True)
    ]
    np.testing.assert_allclose(got, want, rtol=2e-5)


@pytest.mark.parametrize("name", MULTICLASS)
def test_void_pixels_count_nowhere(name):
    logits, labels, valid = _case(seed=2)
    poisoned = logits.copy()
    poisoned[~valid] = np.resize([np.nan, np.inf, -np.inf], poisoned[~valid].shape)
    value, gradient = _value_and_grad(name)(logits, labels, valid)
    for logits_, labels_, valid_ in [
        (poisoned, labels, valid),
        (logits, np.where(valid, labels, 3).astype(np.uint8), valid),
        (logits, labels, np.ones_like(valid)),  # a label of 255 is void by itself
    ]:
        value_, gradient_ = _value_and_grad(name)(logits_, labels_, valid_)
        np.testing.assert_array_equal(value_, value)
        np.testing.assert_array_equal(gradient_, gradient)
    np.testing.assert_array_equal(gradient[~valid], 0.0)


@pytest.mark.parametrize("name", MULTICLASS)
def test_nothing_valid_gives_zero_and_zero_gradients(name):
    logits = np.full((3, 6, 7, CLASSES), np.nan, np.float32)
    labels = np.full((3, 6, 7), VOID, np.uint8)
    value, gradient = _value_and_grad(name)(logits, labels, np.zeros((3, 6, 7), bool))
    assert value == 0.0
    np.testing.assert_array_equal(gradient, 0.0)


@pytest.mark.parametrize("name", MULTICLASS)
def test_extreme_logits_stay_finite(name):
    logits = np.zeros((3, 6, 7, CLASSES), np.float32)
    logits[0, ..., 0], logits[1, ..., 1], logits[2, ..., 1] = 1e4, 1e4, -1e4
    labels = np.zeros((3, 6, 7), np.uint8)
    value, gradient = _value_and_grad(name)(logits, labels, labels == 0)
    assert np.isfinite(value) and np.isfinite(gradient).all()


@pytest.mark.parametrize("name", MULTICLASS)
def test_gradients_equal_finite_differences(name):
    logits, labels, valid = _case(seed=5)
    gradient = _value_and_grad(name)(logits, labels, valid)[1][0]

    def slow(x):
        return _slow(name, x.reshape(-1, CLASSES), labels[0].ravel(), valid[0].ravel())

    for index in np.random.default_rng(0).permutation(gradient.size)[:60]:
        moved = np.zeros(gradient.size)
        moved[index] = 1e-6
        moved = moved.reshape(gradient.shape)
        want = (slow(logits[0] + moved) - slow(logits[0] - moved)) / 2e-6
        np.testing.assert_allclose(gradient.ravel()[index], want, atol=2e-5)


def test_focal_at_gamma_zero_is_the_cross_entropy():
    logits, labels, valid = _case(seed=3)
    focal = _loss("focal")(logits, labels, valid, gamma=0.0, class_weights=WEIGHTS)
    ce = _loss("cross_entropy")(logits, labels, valid, class_weights=WEIGHTS)
    np.testing.assert_allclose(focal, ce, rtol=1e-6)


def test_a_fractional_gamma_has_finite_gradients_at_saturation():
    logits = jnp.array([[[100.0, 0.0], [0.0, 100.0]]])
    arguments = (jnp.zeros((1, 2), int), jnp.ones((1, 2), bool))
    gradient = jax.jit(jax.grad(lambda x: mc.focal(x, *arguments, gamma=0.5).sum()))(logits)
    assert np.isfinite(gradient).all()


def test_lovasz_softmax_of_hard_predictions_is_one_minus_the_mean_iou():
    _, labels, valid = _case(seed=4)
    prediction = np.random.default_rng(0).integers(0, CLASSES, labels.shape)
    got = _loss("lovasz_softmax")(1e4 * np.eye(CLASSES, dtype="f4")[prediction], labels, valid)
    for i in range(3):
        p, t = prediction[i][valid[i]], labels[i][valid[i]]
        ious = [((p == c) & (t == c)).sum() / ((p == c) | (t == c)).sum() for c in set(t)]
        np.testing.assert_allclose(got[i], 1 - np.mean(ious), rtol=1e-6)


def test_lovasz_gradients_keep_their_digits_in_a_large_image():
    # One error step at rank r of a class with G pixels: 1 / union, whatever the image's size.
    pixels, errors = 400_000, np.linspace(1, 0.5, 400_000, dtype=np.float32)[None]
    truth = np.arange(pixels)[None] % 2 == 0

    def loss(errors_):
        return mc._lovasz(errors_, truth, np.ones_like(truth)).sum()

    gradient = jax.jit(jax.grad(loss))(errors)[0]
    unions = truth.sum() + np.cumsum(~truth[0])
    np.testing.assert_allclose(gradient[truth[0]], 1 / unions[truth[0]], rtol=1e-6)


def test_hard_pixels_keep_the_hard_ones_and_at_least_a_share():
    probability = np.array([[0.9, 0.2, 0.8, 0.95, 0.6, 0.99]])
    logits = np.log(np.stack([probability, 1 - probability], -1))
    labels, valid = np.zeros((1, 6), int), np.ones((1, 6), bool)
    loss = _loss("hard_pixels")
    kept = loss(logits, labels, valid, threshold=0.7, keep=0.1)
    np.testing.assert_allclose(kept, -np.log([0.2, 0.6]).mean(), rtol=1e-5)
    kept = loss(logits, labels, valid, threshold=0.7, keep=0.6)
    np.testing.assert_allclose(kept, -np.log([0.2, 0.6, 0.8, 0.9]).mean(), rtol=1e-5)


@pytest.mark.parametrize("foreground", [True, False])
def test_lovasz_hinge_equals_its_definition(foreground):
    rng = np.random.default_rng(6)
    logits = 2 * rng.normal(size=(2, 5, 6)).astype(np.float32)
    labels = (rng.random((2, 5, 6)) < 0.4) * foreground
    valid = rng.random((2, 5, 6)) < 0.8
    got = jax.jit(mc.lovasz_hinge)(np.where(valid, logits, np.nan), labels, valid)
    for i in range(2):
        x, truth = logits[i][valid[i]], labels[i][valid[i]] > 0
        errors = np.where(truth, 1 - x, 1 + x)
        want = _lovasz(errors, truth) if foreground else max(errors.max(), 0)
        np.testing.assert_allclose(got[i], want, rtol=1e-5)


def test_multiclass_loss_weighs_its_terms_and_passes_the_options_on():
    case = _case(seed=7)
    options = {"class_weights": WEIGHTS, "label_smoothing": 0.1}
    weights = {"cross_entropy": 2.0, "dice": 0.5, "focal": 0.0}
    got = jax.jit(functools.partial(multiclass_loss, weights=weights, **options))(*case)
    ce = _loss("cross_entropy", label_smoothing=0.1)(*case, class_weights=WEIGHTS)
    want = 2 * ce + 0.5 * _loss("dice")(*case)
    np.testing.assert_allclose(got, want, rtol=1e-6)


def test_unknown_losses_and_wrong_shapes_are_errors():
    logits, labels, valid = _case()
    with pytest.raises(ValueError, match=r"unknown losses \['ce'\]; allowed are .*cross_entropy"):
        multiclass_loss(logits, labels, valid, weights={"ce": 1.0})
    with pytest.raises(ValueError, match=r"labels and valid of shape \(3, 6, 7\)"):
        mc.cross_entropy(logits, labels[..., :2], valid[..., :2])


def test_class_weights():
    # Three images; class 1 is in two of them, class 3 in none.
    counts = np.array([[60, 40, 0, 0], [50, 0, 50, 0], [10, 190, 0, 0]])
    frequency = np.array([120 / 400, 230 / 300, 50 / 100])
    want = [*(0.5 / frequency), 1.0]
    np.testing.assert_allclose(mc.class_weights(counts, "median_frequency"), want, rtol=1e-6)
    want = [*(1 / np.log(1.02 + np.array([120, 230, 50]) / 400)), 1.0]
    np.testing.assert_allclose(mc.class_weights(counts, "inverse_log"), want, rtol=1e-6)
    np.testing.assert_array_equal(mc.class_weights(counts, "none"), 1.0)
    np.testing.assert_array_equal(mc.class_weights(0 * counts, "inverse_log"), 1.0)


def test_bad_class_weights_are_errors():
    with pytest.raises(ValueError, match="unknown class weights 'balanced'; allowed are"):
        mc.class_weights(np.ones((2, 3)), "balanced")
    with pytest.raises(ValueError, match="must be N x K"):
        mc.class_weights(np.ones(3), "none")
