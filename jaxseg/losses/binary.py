"""Losses for binary segmentation.

Every function takes `logits`, `labels` and `valid` of one shape, `B x ...` (the dimensions after the
first are an image's pixels), and returns one float32 value an image, shape `B`. Labels lie in
[0, 1]; pixels where `valid` is 0 count nowhere, and an image without a valid pixel gives 0 with zero
gradients.
"""

import jax
import jax.numpy as jnp


def _pixels(logits, labels, valid) -> list[jax.Array]:
    arrays = (logits, labels, valid)
    logits, labels, valid = (jnp.asarray(a, jnp.float32).reshape(a.shape[0], -1) for a in arrays)
    # Before any arithmetic: the gradient of a masked result would still be NaN.
    return [jnp.where(valid > 0, logits, 0.0), labels, valid]


def _masked_mean(values_BxN: jax.Array, valid_BxN: jax.Array) -> jax.Array:
    total = jnp.where(valid_BxN > 0, values_BxN, 0.0).sum(-1)
    return total / jnp.maximum((valid_BxN > 0).sum(-1), 1)


def bce(logits: jax.Array, labels: jax.Array, valid: jax.Array) -> jax.Array:
    """Sigmoid binary cross-entropy in nats, the mean over an image's valid pixels."""
    import optax  # here, see train/optim.py

    logits, labels, valid = _pixels(logits, labels, valid)
    return _masked_mean(optax.sigmoid_binary_cross_entropy(logits, labels), valid)


def focal(
    logits: jax.Array,
    labels: jax.Array,
    valid: jax.Array,
    *,
    gamma: float = 2.0,
    alpha: float = 0.25,
) -> jax.Array:
    """Focal loss, `-alpha_t (1 - p_t)^gamma log p_t` (Lin et al., ICCV 2017, eq. 5), mean of pixels."""
    import optax  # here, see train/optim.py

    logits, labels, valid = _pixels(logits, labels, valid)
    values = optax.losses.sigmoid_focal_loss(logits, labels, alpha=alpha, gamma=gamma)
    return _masked_mean(values, valid)


def overlap(logits, labels, valid) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """(|PL|, |P|, |L|, whether there is a valid pixel) of each image, `B`; P are probabilities."""
    logits, labels, valid = _pixels(logits, labels, valid)
    inside = valid > 0
    probability = jnp.where(inside, jax.nn.sigmoid(logits), 0.0)
    labels = jnp.where(inside, labels, 0.0)
    any_valid = inside.any(-1)
    return (probability * labels).sum(-1), probability.sum(-1), labels.sum(-1), any_valid


def dice(
    logits: jax.Array, labels: jax.Array, valid: jax.Array, *, smooth: float = 1.0
) -> jax.Array:
    """Soft Dice loss, `1 - (2 |PL| + s) / (|P| + |L| + s)`, over an image's pixels (Milletari 2016).

    `smooth` is counted in pixels: it makes an image without foreground have the loss 0 at P = 0.
    """
    both, predicted, true, any_valid = overlap(logits, labels, valid)
    loss = 1.0 - (2.0 * both + smooth) / (predicted + true + smooth)
    return jnp.where(any_valid, loss, 0.0)


def jaccard(
    logits: jax.Array, labels: jax.Array, valid: jax.Array, *, smooth: float = 1.0
) -> jax.Array:
    """Soft Jaccard (IoU) loss, `1 - (|PL| + s) / (|P| + |L| - |PL| + s)` (Rahman and Wang 2016)."""
    both, predicted, true, any_valid = overlap(logits, labels, valid)
    loss = 1.0 - (both + smooth) / (predicted + true - both + smooth)
    return jnp.where(any_valid, loss, 0.0)
