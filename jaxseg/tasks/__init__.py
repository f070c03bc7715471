"""What is learned: a task makes parameters, and a loss of a batch.

A task is any object with the four methods of `Task`; CONTRIBUTING.md says where to register one. Those
that predict masks are `dense.DenseTask`s, those that learn without labels are `PretextTask`s.
"""

from collections.abc import Mapping
from typing import Any, Protocol

import flax.linen as nn
import jax


class Task(Protocol):
    """The interface between the training loop and what is learned.

    Batches hold arrays whose first axis is the example; `row` is an example's place in the global
    batch and `valid` is False for padding.
    """

    def init(self, rng: jax.Array) -> Mapping[str, Any]:
        """Makes the whole parameter tree from a key, without looking at data."""

    def init_extra(self, params: Mapping[str, Any]) -> Any:
        """What else is carried from step to step, at the start; None for nothing."""

    def loss(
        self,
        params: Mapping[str, Any],
        extra: Any,
        batch: Mapping[str, jax.Array],
        rng: jax.Array,
        step: jax.Array,
    ) -> tuple[jax.Array, Any]:
        """(scalar loss, tree of statistics) of a batch, each a mean over its valid examples.

        The batch may be a part of the global one: the loop averages loss, gradient and statistics
        over the parts. So what is random must follow from `rng` and `row`.
        """

    def update_extra(
        self, extra: Any, statistics: Any, params: Mapping[str, Any], step: jax.Array
    ) -> tuple[Any, dict[str, jax.Array]]:
        """(the extra state after a step, scalars to log), from the step's statistics and result.

        `params` are those after the step, without the frozen ones.
        """


class PretextTask(Task, Protocol):
    """What learning without labels adds, so that `jaxseg/pretrain.py` can score it.

    Attributes:
      backbone: gives `cls` [B, D] of normalised images.

    `loss` takes `train=` besides: False where held-out images are scored, which then depends on no
    other image. Its statistics hold `scores`, scalars to report beside the loss.
    """

    backbone: nn.Module

    def backbone_variables(self, params: Mapping[str, Any], extra: Any) -> dict[str, Any]:
        """What `backbone.apply` takes of the network to be judged."""
