"""What a head may leave to be solved for, in place of being trained."""

import dataclasses
from collections.abc import Callable

import jax


@dataclasses.dataclass(frozen=True)
class Solved:
    """Parameters that are solved for before the first step, and then rest.

    They are the kernel and bias of a linear classifier of tokens, by `train.ridge`.

    Attributes:
      path: of the two in the parameters, as in "head/prior".
      inputs: tokens `B x h x w x C` of the cached features `B x h x w x C`.
      penalty: of the regression.
    """

    path: str
    inputs: Callable[[jax.Array], jax.Array]
    penalty: float
