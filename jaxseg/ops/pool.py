"""Pooling with a gradient that is fast on CPUs."""

import jax
import jax.numpy as jnp


def max_pool(x_BxHxWxC: jax.Array) -> jax.Array:
    """2x2 max pooling, `B x floor(H/2) x floor(W/2) x C`; the gradient goes to the first of equal pixels.

    On a CPU the gradient of `nn.max_pool`, with the same values, takes 50 times as long. That of
    `jnp.max` asks which pixels equal the maximum: where XLA computes them once more with another
    rounding, none does, and it is NaN.
    """

    def larger(a: jax.Array, b: jax.Array) -> jax.Array:
        return jnp.where(a >= b, a, b)

    h, w = (n // 2 * 2 for n in x_BxHxWxC.shape[1:3])
    x = larger(x_BxHxWxC[:, :h, 0:w:2], x_BxHxWxC[:, :h, 1:w:2])
    return larger(x[:, 0::2], x[:, 1::2])
