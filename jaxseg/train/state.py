"""What a run carries from step to step."""

from collections.abc import Mapping
from typing import Any

import flax.struct
import flax.traverse_util
import jax

Params = Mapping[str, Any]


class TrainState(flax.struct.PyTreeNode):
    """Everything that a step reads and writes; all of it is in every checkpoint.

    Attributes:
      step: int32 scalar, the number of finished steps.
      params: the parameters that are trained.
      average: exponential moving average of `params`, or None.
      extra: what the task carries from step to step beside them (DINO: teacher and centre), or None.
      opt_state: the optimiser's state over `params`.
    """

    step: jax.Array
    params: Params
    average: Params | None
    extra: Any
    opt_state: Any

    @property
    def best_params(self) -> Params:
        """The parameters to evaluate: the average where there is one."""
        return self.params if self.average is None else self.average


class ScoredState(flax.struct.PyTreeNode):
    """What evaluation reads of a `TrainState`: all but the optimiser's state."""

    step: jax.Array
    params: Params
    average: Params | None
    extra: Any

    @property
    def best_params(self) -> Params:
        """As in `TrainState`."""
        return self.params if self.average is None else self.average


def split_params(params: Params, frozen: tuple[str, ...]) -> tuple[Params, Params]:
    """Splits a tree into (trained, frozen): frozen are the paths that begin with one of `frozen`.

    Args:
      params: nested dict.
      frozen: path prefixes such as `("backbone",)` or `("backbone/blocks_0",)`.
    """
    flat = flax.traverse_util.flatten_dict(params, sep="/")

    def is_frozen(path: str) -> bool:
        return any(path == p or path.startswith(p + "/") for p in frozen)

    parts = ({k: v for k, v in flat.items() if is_frozen(k) == side} for side in (False, True))
    return tuple(flax.traverse_util.unflatten_dict(part, sep="/") for part in parts)


def merge_params(trained: Params, frozen: Params) -> Params:
    """Inverse of `split_params`."""
    flat = flax.traverse_util.flatten_dict(trained) | flax.traverse_util.flatten_dict(frozen)
    return flax.traverse_util.unflatten_dict(flat)
