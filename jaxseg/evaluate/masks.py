"""Scores of a split, exact on any number of devices and processes and with a short last batch."""

import dataclasses
from collections.abc import Iterable, Iterator, Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from jaxseg.evaluate.inference import Predict, multi_scale, sliding_window
from jaxseg.metrics import binary as metrics
from jaxseg.train import partition
from jaxseg.train.writers import Progress


@dataclasses.dataclass(frozen=True)
class Inference:
    """Prediction by windows, at several scales and mirrored; one process only.

    Attributes:
      scales, flip: see `inference.multi_scale`.
      window, overlap: see `inference.sliding_window`; (0, 0) for whole images.
    """

    scales: tuple[float, ...] = (1.0,)
    flip: bool = False
    window: tuple[int, int] = (0, 0)
    overlap: float = 0.5

    def __call__(self, predict: Predict, image_BxHxWx3: np.ndarray, *, stride: int) -> np.ndarray:
        """The scores of images, from those of `predict`; see `evaluate.inference`."""
        if tuple(self.window) != (0, 0):
            options = dict(window=tuple(self.window), overlap=self.overlap)
            predict = partial(sliding_window, predict, **options)
        options = dict(scales=self.scales, flip=self.flip, multiple=stride)
        return multi_scale(predict, image_BxHxWx3, **options)

    def scores(self, task: Any, mesh: Mesh):
        """A function `(params, batch) -> scores B x H x W x K` of the batch's images, on the host."""
        score = jax.jit(
            lambda params, image: task.scores(task.logits(params, {"image": image * 255.0})[0]),
            out_shardings=partition.replicated(mesh),
        )

        def scores(params, batch):
            images = np.asarray(batch["image"])
            return self(partial(score, params), images, stride=task.network.multiple)

        return scores

    def step(self, task: Any, mesh: Mesh):
        """What takes the place of `task.sums`: `(params, batch on the mesh) -> (sums, images)`."""
        scores = self.scores(task, mesh)
        count = jax.jit(
            lambda scores, batch: task.count(task.from_scores(scores), {}, batch),
            out_shardings=partition.replicated(mesh),
        )
        return lambda params, batch: count(scores(params, batch), batch)


def make_step(task: Any, mesh: Mesh, inference: Inference | None = None):
    """`(params, batch on the mesh) -> (sums, images)`, to be given to `evaluate` again and again."""
    if inference is not None:
        return inference.step(task, mesh)
    return jax.jit(task.sums, out_shardings=partition.replicated(mesh))


def evaluate(
    task: Any,
    params: Mapping[str, Any],
    batches: Iterable[Mapping[str, np.ndarray]],
    *,
    mesh: Mesh,
    total: int,
    label: str = "evaluate",
    inference: Inference | None = None,
    step: Any = None,
) -> tuple[dict[str, Any], list[tuple[int, float]]]:
    """Evaluates `params` on all batches.

    Args:
      task: gives the sums of a batch and summarises them.
      params: what `task.predicting` gives, on the mesh.
      batches: this process's shares; every process gives the same number.
      mesh: from `partition.make_mesh`.
      total: number of examples, for the progress.
      label: for the progress.
      inference: how images are predicted, if not once and whole.
      step: what `make_step` gave for these; None to make and compile it.

    Returns:
      (metrics, [(example index, its IoU or -1)]), the same on every process.
    """
    step = step or make_step(task, mesh, inference)
    sums, images, done = None, [], 0
    progress = Progress(label, total)
    for batch in batches:
        batch_sums, values = jax.device_get(step(params, partition.put_batch(mesh, batch)))
        sums = metrics.add(sums, batch_sums)
        rows = zip(values["index"], values["iou"], values["valid"], strict=True)
        images += [(int(index), float(iou)) for index, iou, valid in rows if valid]
        done = len(images)
        progress.update(done)
    progress.close()
    return task.summarize(sums), images


def predictions(
    task: Any,
    params: Mapping[str, Any],
    batches: Iterable[Mapping[str, np.ndarray]],
    *,
    mesh: Mesh,
    inference: Inference | None = None,
) -> Iterator[dict[str, np.ndarray]]:
    """Yields image, mask, `prediction` (uint8 `H x W`) and the head's attention if it has any.

    Of each valid example, in order; the same on every process. `attention` and `answers` are
    `Q x h x w` and `Q x H x W`, of a task that is asked for classes (once and whole, whatever
    `inference` says).
    """

    def step(params, batch):
        logits, aux = task.logits(params, batch)
        shown = {k: batch[k] for k in ("image", "mask", "index", "valid") if k in batch}
        asked = {k: jnp.swapaxes(aux[k], 0, 1) for k in ("attention", "answers") if k in aux}
        return {**shown, **asked, "prediction": task.decide(logits)}

    step = jax.jit(step, out_shardings=partition.replicated(mesh))
    scores = inference.scores(task, mesh) if inference is not None else None
    for batch in batches:
        batch = partition.put_batch(mesh, batch)
        shown = jax.device_get(step(params, batch))
        if scores is not None:
            shown["prediction"] = np.asarray(task.decide(task.from_scores(scores(params, batch))))
        for row in np.flatnonzero(shown["valid"]):
            yield {k: v[row] for k, v in shown.items()}
