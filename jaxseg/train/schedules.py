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
    """`start` in the first epoch, `end` from epoch `epochs` - 1 on, evenly spaced in between.

    Constant within an epoch, as DINO warms its teacher temperature up.
    """

    def value(step):
        epoch = jnp.floor(jnp.asarray(step, jnp.float32) / steps_per_epoch)
        share = epoch / (epochs - 1) if epochs > 1 else jnp.ones(())
        return start + (end - start) * jnp.clip(share, 0.0, 1.0)

    return value
