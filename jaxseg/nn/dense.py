"""The linear layer on tokens and maps."""

import flax.linen as nn
import jax


class Dense(nn.Dense):
    """`flax.linen.Dense` on [..., D], as one product of two matrices.

    Flax keeps the leading axes, and XLA's CPU backend then takes twice as long for the kernel's gradient.
    """

    def __call__(self, x: jax.Array) -> jax.Array:
        return super().__call__(x.reshape(-1, x.shape[-1])).reshape(*x.shape[:-1], self.features)
