"""Numbers that change over a run, as functions of the step."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

Schedule = Callable[[jax.Array | int], jax.Array]


def cosine(start: float, end: float, steps: int) -> Schedule:
    """end + (start - end) (1 + cos(pi step / steps)) / 2: `start` at step 0, `end` from `steps` on."""

    def value(step):
        share = jnp.clip(jnp.asarray(step, jnp.float32) / max(steps, 1), 0.0, 1.0)
        return end + (start - end) * 0.5 * (1.0 + jnp.cos(jnp.pi * share))

    return value


def staircase(start: float, end: float, epochs: int, steps_per_epoch: float) -> Schedule:
    """linspace(start, end, epochs), one value an epoch, and `end` afterwards.

    So DINO warms its teacher temperature up: over one epoch it is `start` in that epoch.
    """

    def value(step):
        epoch = jnp.floor(jnp.asarray(step, jnp.float32) / steps_per_epoch)
        share = jnp.where(epoch < epochs, epoch / max(epochs - 1, 1), 1.0)
        return start + (end - start) * share

    return value
