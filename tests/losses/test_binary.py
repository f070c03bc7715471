"""Losses against slow NumPy loops over the formulas of the papers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxseg.losses import BINARY, binary, binary_loss


def _numpy_loss(name, logits, labels, valid):
    if name == "lovasz":
        return _numpy_lovasz(logits[valid], labels[valid])
    p = 1 / (1 + np.exp(-logits.astype(np.float64)))
    pairs = [(pi, li) for pi, li, vi in zip(p.flat, labels.flat, valid.flat, strict=True) if vi]
    if not pairs:
        return 0.0
    both = sum(pi * li for pi, li in pairs)
    predicted, true = sum(pi for pi, _ in pairs), sum(li for _, li in pairs)
    if name == "bce":
        return -np.mean([np.log(pi if li else 1 - pi) for pi, li in pairs])
    if name == "focal":
        terms = [
            -0.25 * (1 - pi) ** 2 * np.log(pi) if li else -0.75 * pi**2 * np.log(1 - pi)
            for pi, li in pairs
        ]
        return np.mean(terms)
    if name == "dice":
        return 1 - (2 * both + 1) / (predicted + true + 1)
    return 1 - (both + 1) / (predicted + true - both + 1)


def _numpy_lovasz(logits, labels):
    """Berman et al., CVPR 2018, eq. 7: hinge errors, largest first, times the growth of the loss."""
    order = sorted(range(len(logits)), key=lambda i: -(1 - (2 * labels[i] - 1) * logits[i]))
    wrong, total, before = set(), 0.0, 0.0
    positive = {i for i, label in enumerate(labels) if label}
    for i in order:
        wrong.add(i)
        # Jaccard loss if exactly the pixels in `wrong` were predicted wrongly.
        loss = 1 - len(positive - wrong) / len(positive | wrong)
        total += max(0.0, 1 - (2 * labels[i] - 1) * logits[i]) * (loss - before)
        before = loss
    return total


@pytest.mark.parametrize("name", BINARY)
def test_matches_numpy(name):
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(3, 4, 5)).astype(np.float32) * 3
    labels = rng.integers(0, 2, (3, 4, 5))
    valid = rng.random((3, 4, 5)) < 0.7
    got = BINARY[name](jnp.array(logits), jnp.array(labels), jnp.array(valid))
    want = [_numpy_loss(name, logits[i], labels[i], valid[i]) for i in range(3)]
    np.testing.assert_allclose(got, want, rtol=1e-5)


@pytest.mark.parametrize("name", BINARY)
def test_void_pixels_count_nowhere(name):
    rng = np.random.default_rng(1)
    logits = jnp.array(rng.normal(size=(2, 6)), jnp.float32)
    labels = jnp.array(rng.integers(0, 2, (2, 6)))
    valid = jnp.array([[1, 1, 1, 1, 0, 0]] * 2)
    loss = BINARY[name]
    poisoned = logits.at[:, 4:].set(jnp.inf)
    np.testing.assert_array_equal(loss(logits, labels, valid), loss(poisoned, labels, valid))


@pytest.mark.parametrize("name", BINARY)
def test_nothing_valid_gives_zero_and_zero_gradients(name):
    logits = jnp.array([[3.0, -2.0, 100.0]])
    loss, grad = jax.value_and_grad(
        lambda x: BINARY[name](x, jnp.ones((1, 3)), jnp.zeros((1, 3))).sum()
    )(logits)
    assert loss == 0.0
    np.testing.assert_array_equal(grad, 0.0)


@pytest.mark.parametrize("name", BINARY)
def test_extreme_logits_stay_finite(name):
    logits = jnp.array([[1e4, -1e4, 1e4, -1e4]])
    labels = jnp.array([[1, 0, 0, 1]])
    value, grad = jax.value_and_grad(lambda x: BINARY[name](x, labels, jnp.ones((1, 4))).sum())(
        logits
    )
    assert np.isfinite(value) and np.isfinite(grad).all()


def test_binary_loss_weighs_its_terms():
    logits, labels = jnp.array([[0.3, -1.0]]), jnp.array([[1, 0]])
    valid = jnp.ones((1, 2))
    got = binary_loss(logits, labels, valid, weights={"bce": 2.0, "dice": 0.5, "focal": 0.0})
    want = 2 * binary.bce(logits, labels, valid) + 0.5 * binary.dice(logits, labels, valid)
    np.testing.assert_allclose(got, want, rtol=1e-6)
