"""A sum of losses, as every kind of segmentation is trained with."""

from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp


def weighted_sum(
    losses: Mapping[str, Callable[..., jax.Array]],
    weights: Mapping[str, float],
    logits: jax.Array,
    labels: jax.Array,
    valid: jax.Array,
) -> jax.Array:
    """Sum of the `losses` named in `weights`, each times its weight; those of weight 0 are skipped.

    Returns:
      One value an image, shape `B`, float32.

    Raises:
      ValueError: a name that `losses` does not have.
    """
    if unknown := sorted(set(weights) - set(losses)):
        raise ValueError(f"unknown losses {unknown}; allowed are {sorted(losses)}")
    terms = [w * losses[name](logits, labels, valid) for name, w in weights.items() if w]
    return sum(terms, jnp.zeros(logits.shape[0], jnp.float32))
