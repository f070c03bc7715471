"""Features of many images: a backbone applied to a source, gathered on the host."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from jaxseg.train import partition


class Gatherer:
    """Applies a function to all images of a source; compiled once, for as many calls as wanted.

    Args:
      compute: `compute(params, batch) -> {name: [B, ...]}`.
      mesh: all devices.
    """

    def __init__(
        self,
        compute: Callable[[Any, Mapping[str, jax.Array]], Mapping[str, jax.Array]],
        mesh: Mesh,
    ):
        def step(params, batch):
            kept = {k: batch[k] for k in ("index", "category", "valid")}
            return {**compute(params, batch), **kept}

        self._step = jax.jit(step, out_shardings=partition.replicated(mesh))
        self._mesh = mesh

    def __call__(
        self,
        params: Any,
        batches: Iterable[Mapping[str, np.ndarray]],
        *,
        total: int,
        label: str = "",
    ) -> dict[str, np.ndarray]:
        """Goes through all batches, in order.

        Args:
          params: on the mesh.
          batches: this process's share, from `loader.eval_batches`.
          total: number of examples, for the progress that is shown under `label` (none if empty).

        Returns:
          {name: [N, ...]} of the valid examples, and their `index` and `category`; the same on every
          process.
        """
        parts: list[dict[str, np.ndarray]] = []
        progress = None
        if label:
            # Imported here: what draws the bar is needed only where one is seen.
            from jaxseg.train.writers import Progress

            progress = Progress(label, total)
        done = 0
        for batch in batches:
            out = jax.device_get(self._step(params, partition.put_batch(self._mesh, batch)))
            valid = out.pop("valid")
            parts.append({k: v[valid] for k, v in out.items()})
            done += int(valid.sum())
            if progress:
                progress.update(done)
        if progress:
            progress.close()
        return {k: np.concatenate([part[k] for part in parts]) for k in parts[0]}
