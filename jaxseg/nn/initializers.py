"""Parameter initialisers that Flax does not have."""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp


def uniform_fan_in(fan_in: int) -> Callable[..., jax.Array]:
    """Initialiser U(+-1 / sqrt(fan_in)), for weights and biases alike (the default in torch)."""
    bound = 1.0 / math.sqrt(fan_in)

    def init(key: jax.Array, shape: tuple[int, ...], dtype=jnp.float32) -> jax.Array:
        return jax.random.uniform(key, shape, dtype, -bound, bound)

    return init
