"""Losses: pure functions from logits, labels and a validity mask to one value an image.

A new one is a file here and a line below; its weight is `config.loss.NAME`.
"""

import functools
import inspect
from collections.abc import Mapping

import jax

from jaxseg.losses.weighted import Loss, weighted_sum
from jaxseg.options import listed


class _Binary:
    from jaxseg.losses.binary import bce, dice, focal, jaccard
    from jaxseg.losses.multiclass import lovasz_hinge as lovasz


class _Multiclass:
    from jaxseg.losses.multiclass import cross_entropy, dice, focal, hard_pixels, lovasz_softmax


# By their names in configs. Of one class: `loss(logits, labels, valid)`, all `B x ...`.
BINARY: dict[str, Loss] = listed(_Binary)
# Of several: logits `B x ... x K`, labels and valid `B x ...`; perhaps `class_weights`, `label_smoothing`.
MULTICLASS: dict[str, Loss] = listed(_Multiclass)


def __getattr__(name: str) -> Loss:
    """A loss by its own name, as in `jaxseg.losses.dice`."""
    if name not in (BINARY | MULTICLASS):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    one, several = BINARY.get(name), MULTICLASS.get(name)

    # Of two of one name the shape of the logits says which is meant.
    @functools.wraps(several or one)
    def by_shape(logits: jax.Array, labels: jax.Array, valid: jax.Array, **options) -> jax.Array:
        return (one if logits.ndim == labels.ndim else several)(logits, labels, valid, **options)

    globals()[name] = by_shape if one and several else one or several
    return globals()[name]


def binary_loss(
    logits: jax.Array, labels: jax.Array, valid: jax.Array, *, weights: Mapping[str, float]
) -> jax.Array:
    """The `weighted_sum` of `BINARY`."""
    return weighted_sum(BINARY, weights, logits, labels, valid)


def multiclass_loss(
    logits: jax.Array,
    labels: jax.Array,
    valid: jax.Array,
    *,
    weights: Mapping[str, float],
    class_weights: jax.Array | None = None,
    label_smoothing: float = 0.0,
) -> jax.Array:
    """The `weighted_sum` of `MULTICLASS`.

    `class_weights` `K` and `label_smoothing` reach the losses that have arguments of these names; the
    overlap losses weigh classes equally by themselves.
    """
    given = {"class_weights": class_weights, "label_smoothing": label_smoothing}
    losses = {}
    for name, loss in MULTICLASS.items():
        taken = given.keys() & inspect.signature(loss).parameters.keys()
        losses[name] = functools.partial(loss, **{key: given[key] for key in taken})
    return weighted_sum(losses, weights, logits, labels, valid)
