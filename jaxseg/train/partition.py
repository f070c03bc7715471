"""Where arrays live: one mesh with one `data` axis over every device of every process.

Batches are split over the axis. Parameters are replicated, or split as well (`fsdp`: each tensor
along its largest dimension that the device count divides), and XLA gathers them where needed.
"""

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

PARAMETER_LAYOUTS = ("replicated", "fsdp")
# Tensors smaller than this cost more to gather than they save.
_FSDP_MIN_SIZE = 2**10


def make_mesh() -> Mesh:
    """A mesh over all devices with the axis `data`."""
    return jax.make_mesh((jax.device_count(),), ("data",), axis_types=(AxisType.Auto,))


def replicated(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Splits the first dimension over the devices."""
    return NamedSharding(mesh, PartitionSpec("data"))


def tree_sharding(mesh: Mesh, tree: Any, layout: str) -> Any:
    """A sharding for every leaf (array or `ShapeDtypeStruct`) of `tree`.

    Args:
      mesh: from `make_mesh`.
      tree: any pytree of things with a `shape`.
      layout: one of `PARAMETER_LAYOUTS`.
    """
    if layout not in PARAMETER_LAYOUTS:
        raise ValueError(f"sharding.params is {layout!r}; allowed: {', '.join(PARAMETER_LAYOUTS)}")
    count = mesh.devices.size

    def leaf(x) -> NamedSharding:
        divisible = [i for i, n in enumerate(x.shape) if n % count == 0]
        if layout == "replicated" or not divisible or np.prod(x.shape) < _FSDP_MIN_SIZE:
            return replicated(mesh)
        axis = max(divisible, key=lambda i: x.shape[i])
        return NamedSharding(mesh, PartitionSpec(*[None] * axis, "data"))

    return jax.tree.map(leaf, tree)


def abstract(mesh: Mesh, tree: Any, layout: str) -> Any:
    """`tree` as `ShapeDtypeStruct`s that know where they belong, see `tree_sharding`."""
    return jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
        tree,
        tree_sharding(mesh, tree, layout),
    )


def put_batch(mesh: Mesh, batch: Mapping[str, np.ndarray]) -> dict[str, jax.Array]:
    """Makes global arrays of this process's share of a batch; the shares of all processes are equal."""
    sharding = batch_sharding(mesh)
    return {k: jax.make_array_from_process_local_data(sharding, v) for k, v in batch.items()}


def put_tree(tree: Any, shardings: Any) -> Any:
    """Places a host tree, equal on every process, according to `shardings`."""

    def leaf(x, sharding):
        x = np.asarray(x)
        return jax.make_array_from_callback(x.shape, sharding, lambda index: x[index])

    return jax.tree.map(leaf, tree, shardings)


def gather(mesh: Mesh, tree: Any) -> Any:
    """Host copies of a tree that is on the mesh, whole on every process."""
    whole = jax.jit(lambda x: x, out_shardings=replicated(mesh))
    return jax.device_get(whole(tree))
