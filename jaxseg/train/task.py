"""The interface between the training loop and what is learned."""

from collections.abc import Mapping
from typing import Any, Protocol

import jax


class Learned(Protocol):
    """What the loop needs of a task: parameters, a loss of a batch, and an extra state.

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
