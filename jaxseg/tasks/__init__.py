"""What is learned: a task makes parameters, a training loss and evaluation sums of a batch.

A task is any object with the four methods of `Task`. Adding one is a file here, a line in
`jaxseg/experiment.py` and a config.
"""

from collections.abc import Mapping
from typing import Any, Protocol

import jax


class Task(Protocol):
    """The interface between the training loop and what is learned."""

    def init(self, rng: jax.Array) -> Mapping[str, Any]:
        """Makes the whole parameter tree from a key, without looking at data."""

    def loss(
        self, params: Mapping[str, Any], batch: Mapping[str, jax.Array], rng: jax.Array
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """The scalar loss of a global batch, and scalars to log."""

    def sums(
        self, params: Mapping[str, Any], batch: Mapping[str, jax.Array]
    ) -> tuple[dict[str, jax.Array], dict[str, jax.Array]]:
        """Evaluation: sums over the valid examples by category, and values of each example."""

    def summarize(self, sums: Mapping[str, Any]) -> dict[str, Any]:
        """The metrics of a split, from its added `sums`."""
