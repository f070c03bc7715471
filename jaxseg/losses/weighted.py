"""A sum of losses, as every kind of segmentation is trained with."""

import inspect
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxseg.options import OptionError

Loss = Callable[..., jax.Array]
# How losses are given: a name or a function; several of them; with their weights; under names.
Losses = Any


def weighted(losses: Losses, known: Mapping[str, Loss]) -> dict[str | Loss, float]:
    """Losses as `{name or function: weight}`.

    Args:
      losses: a name, a function, a sequence of these, or a mapping: from a name or function to its
        weight, or from a name of one's own to a function, or to (function, weight).
      known: those that have names.

    Raises:
      OptionError: an unknown name, a weight that is none, or nothing to be trained on.
    """
    if isinstance(losses, str) or callable(losses):
        losses = [losses]
    found: dict[str | Loss, float] = {}
    for loss, weight in _pairs(losses):
        if not (callable(loss) or loss in known):
            raise OptionError(
                f"losses has {loss!r}; allowed: {', '.join(known)}, and functions of (logits, labels, valid)"
            )
        if callable(loss):
            _check_call(loss)
        number = not isinstance(weight, bool | str) and np.ndim(weight) == 0
        if not number or not 0 <= float(weight) < np.inf:
            raise OptionError(
                f"losses gives {_name(loss)} the weight {weight!r}; allowed: 0 or more"
            )
        found[loss] = found.get(loss, 0.0) + float(weight)
    if not any(found.values()):
        raise OptionError(f"losses is {losses!r}; allowed: at least one of a weight above 0")
    return found


def _pairs(losses: Any) -> Iterator[tuple[Any, Any]]:
    if not isinstance(losses, Mapping | tuple | list):
        raise OptionError(
            f"losses is a {type(losses).__name__}; allowed: a name, a function, or several with weights"
        )
    named = losses.items() if isinstance(losses, Mapping) else ((loss, 1.0) for loss in losses)
    for key, value in named:
        inner = value if isinstance(losses, Mapping) else key
        if isinstance(inner, tuple | list) and len(inner) == 2:
            yield tuple(inner)
        elif callable(value):
            yield value, 1.0
        else:
            yield key, value


def _check_call(loss: Loss) -> None:
    try:
        signature = inspect.signature(loss)
    except ValueError:  # of functions that are built in
        return
    try:
        signature.bind("logits", "labels", "valid")
    except TypeError as error:
        raise OptionError(
            f"losses has {_name(loss)}{signature}; allowed: functions of (logits, labels, valid)"
        ) from error


def _name(loss: Any) -> str:
    return loss if isinstance(loss, str) else getattr(loss, "__name__", type(loss).__name__)


def weighted_sum(
    known: Mapping[str, Loss],
    weights: Mapping[str | Loss, float],
    logits: jax.Array,
    labels: jax.Array,
    valid: jax.Array,
) -> jax.Array:
    """Sum of losses, each times its weight; those of weight 0 are skipped.

    Args:
      known: losses by name.
      weights: of each, by name or as a function of (logits, labels, valid), which gives a value for each
        image, `B`, or one number: then it is called on every image by itself.
      logits, labels, valid: see the losses. Functions see labels of 0 where `valid` does not hold; images
        without a valid pixel count nothing, and are shown to them as if all were valid.

    Returns:
      One value an image, shape `B`, float32.

    Raises:
      ValueError: a name that `known` does not have, or a function that gives something else.
    """
    if unknown := sorted(name for name in weights if not callable(name) and name not in known):
        raise ValueError(f"unknown losses {unknown}; allowed are {sorted(known)}")
    terms = []
    for loss, weight in weights.items():
        if not weight:
            continue
        if callable(loss):
            terms.append(weight * _of_function(loss, logits, labels, valid))
        else:
            terms.append(weight * known[loss](logits, labels, valid))
    return sum(terms, jnp.zeros(logits.shape[0], jnp.float32))


def _of_function(loss: Loss, logits: jax.Array, labels: jax.Array, valid: jax.Array) -> jax.Array:
    """Nothing, with zero gradients, for images without a valid pixel, by which functions would divide."""
    some = valid.any(tuple(range(1, valid.ndim)))
    labels = jnp.where(valid, labels, jnp.zeros_like(labels))
    valid = valid | ~some.reshape(-1, *[1] * (valid.ndim - 1))
    return jnp.where(some, _by_image(loss, logits, labels, valid), 0.0)


def _by_image(loss: Loss, *arrays: jax.Array) -> jax.Array:
    shape = jnp.shape(jax.eval_shape(loss, *arrays))
    if shape == (len(arrays[0]),):
        return loss(*arrays)
    if shape == ():
        return jax.vmap(lambda *one: loss(*(x[None] for x in one)))(*arrays)
    raise OptionError(
        f"losses has {_name(loss)}, which gives an array of {shape} for {len(arrays[0])} images; allowed: "
        "one value an image, or one number"
    )
