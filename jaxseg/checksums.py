"""Trees of arrays with a checksum of every leaf: TensorStore does not notice a flipped byte."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp


class CheckpointError(ValueError):
    """No usable checkpoint where one is needed."""


@jax.jit
def checksum(tree: Any) -> Any:
    """A uint32 for each leaf: the wrapped sum of its bits, weighted by position so that swaps show."""

    def leaf(x):
        bits = jax.lax.bitcast_convert_type(x, jnp.uint32) if x.dtype.itemsize == 4 else x
        bits = bits.astype(jnp.uint32).reshape(-1)
        weights = jax.lax.iota(jnp.uint32, bits.size) * jnp.uint32(2654435761) | jnp.uint32(1)
        return (bits * weights).sum(dtype=jnp.uint32)

    return jax.tree.map(leaf, tree)


def with_checksums(tree: Any) -> dict[str, Any]:
    """What is saved of a tree: `{"tree": tree, "sum": its checksums}`."""
    return {"tree": tree, "sum": checksum(tree)}


def verified(path: Path, restored: Mapping[str, Any]) -> Any:
    """The tree of what `with_checksums` gave, read back.

    Raises:
      CheckpointError: a checksum differs; it names `path` and the leaf.
    """
    same = jax.tree.map(lambda a, b: bool(a == b), checksum(restored["tree"]), restored["sum"])
    bad = [jax.tree_util.keystr(k) for k, ok in jax.tree_util.tree_leaves_with_path(same) if not ok]
    if bad:
        raise CheckpointError(
            f"{path}: the checksum of {bad[0]} does not match: the file is damaged"
        )
    return restored["tree"]


def first_line(error: Exception) -> str:
    """The first line of a message: TensorStore's go on for dozens."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else repr(error)
