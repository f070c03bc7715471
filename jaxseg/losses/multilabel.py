"""Losses for multi-label segmentation: K independent sigmoid channels, each a binary problem.

Every loss takes `logits` and `labels` `B x ... x K`, labels in [0, 1], and `valid` of that shape or
`B x ...` for all channels, and returns one float32 value an image, shape `B`: the mean of the
binary loss over the channels with a valid pixel. An image without one gives 0 with zero gradients.
"""

import functools
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp

from jaxseg.losses import multiclass, segmentation
from jaxseg.losses.weighted import weighted_sum


def per_channel(
    loss: Callable[..., jax.Array],
    logits: jax.Array,
    labels: jax.Array,
    valid: jax.Array,
    **options: float,
) -> jax.Array:
    """Mean of a binary loss over the channels; `options` are passed to the loss.

    Raises:
      ValueError: shapes that do not belong together.
    """
    if labels.shape != logits.shape or valid.shape not in (logits.shape, logits.shape[:-1]):
        raise ValueError(
            f"logits {logits.shape} need labels of that shape and valid with or without the "
            f"channels, found {labels.shape} and {valid.shape}"
        )
    if valid.ndim < logits.ndim:
        valid = jnp.broadcast_to(valid[..., None], logits.shape)
    batch, channels = logits.shape[0], logits.shape[-1]

    def rows(array: jax.Array) -> jax.Array:
        return array.reshape(batch, -1, channels).swapaxes(1, 2).reshape(batch * channels, -1)

    inside = rows(valid).astype(bool)
    # Before any arithmetic: the gradient of a masked result would still be NaN.
    logits = jnp.where(inside, rows(logits).astype(jnp.float32), 0.0)
    labels = jnp.where(inside, rows(labels), 0)
    values = loss(logits, labels, inside, **options).reshape(batch, channels)
    counted = inside.any(-1).reshape(batch, channels)
    return jnp.where(counted, values, 0.0).sum(-1) / jnp.maximum(counted.sum(-1), 1)


bce = functools.partial(per_channel, segmentation.bce)
dice = functools.partial(per_channel, segmentation.dice)
focal = functools.partial(per_channel, segmentation.focal)
jaccard = functools.partial(per_channel, segmentation.jaccard)
lovasz_hinge = functools.partial(per_channel, multiclass.lovasz_hinge)

MULTILABEL: dict[str, Callable[..., jax.Array]] = {
    "bce": bce,
    "dice": dice,
    "focal": focal,
    "jaccard": jaccard,
    "lovasz_hinge": lovasz_hinge,
}


def multilabel_loss(
    logits: jax.Array, labels: jax.Array, valid: jax.Array, *, weights: Mapping[str, float]
) -> jax.Array:
    """The `weighted_sum` of `MULTILABEL`."""
    return weighted_sum(MULTILABEL, weights, logits, labels, valid)
