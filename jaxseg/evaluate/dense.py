"""Scores of a split, exact on any number of devices and processes and with a short last batch."""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from jaxseg import metrics
from jaxseg.tasks import DenseTask
from jaxseg.train import partition
from jaxseg.train.writers import Progress


def evaluate(
    task: DenseTask,
    params: Mapping[str, Any],
    batches: Iterable[Mapping[str, np.ndarray]],
    *,
    mesh: Mesh,
    total: int,
    label: str = "evaluate",
) -> tuple[dict[str, Any], list[tuple[int, float]]]:
    """Evaluates `params` on all batches.

    Args:
      task: gives the sums of a batch and summarises them.
      params: the whole parameter tree, on the mesh.
      batches: this process's shares; every process gives the same number.
      mesh: from `partition.make_mesh`.
      total: number of examples, for the progress.
      label: for the progress.

    Returns:
      (metrics, [(example index, its foreground IoU or -1)]), the same on every process.
    """
    step = jax.jit(task.sums, out_shardings=partition.replicated(mesh))
    sums, images, done = None, [], 0
    progress = Progress(label, total)
    for batch in batches:
        batch_sums, values = jax.device_get(step(params, partition.put_batch(mesh, batch)))
        sums = metrics.add(sums, batch_sums)
        rows = zip(values["index"], values["foreground_iou"], values["valid"], strict=True)
        images += [(int(index), float(iou)) for index, iou, valid in rows if valid]
        done = len(images)
        progress.update(done)
    progress.close()
    return task.summarize(sums), images


def probabilities(
    task: Any,
    params: Mapping[str, Any],
    batches: Iterable[Mapping[str, np.ndarray]],
    *,
    mesh: Mesh,
) -> Iterator[tuple[dict[str, np.ndarray], np.ndarray]]:
    """Yields (image and mask, foreground probability `H x W`) of each valid example, in order.

    The same on every process.
    """

    def step(params, batch):
        logits, _ = task.logits(params, batch)
        shown = {k: batch[k] for k in ("image", "mask", "index", "valid") if k in batch}
        return shown, jax.nn.sigmoid(logits[..., 0])

    step = jax.jit(step, out_shardings=partition.replicated(mesh))
    for batch in batches:
        shown, probability = jax.device_get(step(params, partition.put_batch(mesh, batch)))
        for row in np.flatnonzero(shown["valid"]):
            yield {k: v[row] for k, v in shown.items()}, probability[row]
