"""The linear probe: multinomial logistic regression on frozen features."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxseg.evaluate.rank import check_features, check_labels

_PRECISION = jax.lax.Precision.HIGHEST
_L2 = (1.0, 1e-1, 1e-2, 1e-3, 1e-4)  # tried where none is given
_CONVERGED = 1e-5  # gradient norm at which training ends early


def probe_predict(
    train_NxD: np.ndarray,
    train_labels_N: np.ndarray,
    test_MxD: np.ndarray,
    *,
    classes: int,
    epochs: int = 100,
    l2: float | None = None,
) -> np.ndarray:
    """Trains the probe and classifies test features.

    Features are standardised by the training features' mean and deviation. The loss is convex and
    the training is L-BFGS over all of them at once, from 0: no learning rate, no order, no seed.

    Args:
      train_NxD, test_MxD: features.
      train_labels_N: int, 0 to `classes` - 1.
      classes: number of classes.
      epochs: L-BFGS steps at most.
      l2: l2 / 2 times the squared norm of the kernel is added to the mean cross-entropy; scikit-learn
        calls 1 / (N l2) `C`. None: of 1, 0.1, ... 1e-4 the one that is best on a tenth of the
        training features when trained on the others (the larger of equals), which takes six
        trainings instead of one.

    Returns:
      int [M], the predicted classes.

    Raises:
      ValueError: arrays do not fit or are not finite, or `epochs` or `l2` is out of range.
    """
    train = check_features(train_NxD, "train features")
    test = check_features(test_MxD, "test features")
    if train.shape[1] != test.shape[1]:
        raise ValueError(
            f"train features have {train.shape[1]} dimensions, the test features {test.shape[1]}"
        )
    labels = check_labels(train_labels_N, len(train), classes=classes, what="train labels")
    if epochs < 1 or (l2 is not None and not l2 >= 0):
        raise ValueError(f"epochs {epochs} and l2 {l2}: allowed are 1 or more, and 0 or more")
    mean, std = train.mean(axis=0, dtype=np.float64), train.std(axis=0, dtype=np.float64)
    # A dimension that does not vary tells nothing; divided by its rounding errors it would.
    scale = np.where(std > 1e-6 * np.abs(mean), 1 / np.maximum(std, 1e-30), 0.0)
    train, test = (((x - mean) * scale).astype(np.float32) for x in (train, test))
    fit = functools.partial(_fit, train, labels.astype(np.int32), classes=classes, epochs=epochs)
    if l2 is None:
        l2 = _choose_l2(fit, train, labels)
    return _predict(fit(np.ones(len(train), np.float32), l2), test)


def _choose_l2(fit: Callable, train_NxD: np.ndarray, labels_N: np.ndarray) -> float:
    held = np.random.default_rng(0).permutation(len(train_NxD))[: len(train_NxD) // 10]
    if not len(held):
        return _L2[len(_L2) // 2]
    weights = np.ones(len(train_NxD), np.float32)
    weights[held] = 0

    def score(l2: float) -> float:
        return (_predict(fit(weights, l2), train_NxD[held]) == labels_N[held]).mean()

    return max(_L2, key=score)  # The first, which is the largest, of equals.


def _predict(params: tuple[jax.Array, jax.Array], x_NxD: np.ndarray) -> np.ndarray:
    kernel, bias = params
    return np.asarray(jnp.matmul(x_NxD, kernel, precision=_PRECISION) + bias).argmax(axis=1)


def linear_probe(
    train_NxD: np.ndarray,
    train_labels_N: np.ndarray,
    test_MxD: np.ndarray,
    test_labels_M: np.ndarray,
    *,
    classes: int,
    epochs: int = 100,
    l2: float | None = None,
) -> float:
    """Share of the test features that `probe_predict` classifies rightly; same arguments and errors."""
    test_labels = check_labels(test_labels_M, len(test_MxD), classes=classes, what="test labels")
    options = dict(classes=classes, epochs=epochs, l2=l2)
    predictions = probe_predict(train_NxD, train_labels_N, test_MxD, **options)
    return float((predictions == test_labels).mean())


@functools.partial(jax.jit, static_argnames="classes")
def _fit(
    x_NxD, labels_N, weights_N, l2, *, classes: int, epochs: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Returns (kernel [D, classes], bias [classes])."""

    def loss(params):
        kernel, bias = params
        logits = jnp.matmul(x_NxD, kernel, precision=_PRECISION) + bias
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels_N)
        return (losses * weights_N).sum() / weights_N.sum() + 0.5 * l2 * (kernel * kernel).sum()

    optimizer = optax.lbfgs()
    value_and_grad = optax.value_and_grad_from_state(loss)

    def step(carry):
        params, state, _, done = carry
        value, grad = value_and_grad(params, state=state)
        updates, state = optimizer.update(
            grad, state, params, value=value, grad=grad, value_fn=loss
        )
        return optax.apply_updates(params, updates), state, optax.tree.norm(grad), done + 1

    def unfinished(carry):
        return (carry[2] > _CONVERGED) & (carry[3] < epochs)

    params = jnp.zeros((x_NxD.shape[1], classes)), jnp.zeros(classes)
    carry = params, optimizer.init(params), jnp.inf, 0
    return jax.lax.while_loop(unfinished, step, carry)[0]
