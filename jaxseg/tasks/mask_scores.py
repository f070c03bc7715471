"""Scores and pictures of a run that predicts masks, on one split."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from jaxseg.data.reader import Reader
from jaxseg.evaluate import masks
from jaxseg.evaluate.scoring import Evaluation
from jaxseg.train.state import ScoredState, TrainState, merge_params


class MaskEvaluator:
    """Scores states on one split.

    Args:
      task: a `tasks.masks.MaskTask`, for the images of this split.
      reader: of the split.
      inference: how images are predicted, if not once and whole.
      mesh: all devices.
    """

    def __init__(self, task: Any, reader: Reader, inference: masks.Inference | None, mesh: Mesh):
        self._task, self._reader, self._mesh = task, reader, mesh
        self._inference = inference
        self._step = masks.make_step(task, mesh, inference)

    def __call__(
        self, state: TrainState | ScoredState, frozen: Mapping[str, Any], *, label: str = "evaluate"
    ) -> Evaluation:
        """The scores of the whole split.

        Args:
          state: on the mesh.
          frozen: the frozen parameters, on the mesh.
          label: of the progress.
        """
        params = self._task.predicting(merge_params(state.best_params, frozen), state.extra)
        metrics, images = masks.evaluate(
            *(self._task, params, self._reader.eval_batches()),
            mesh=self._mesh,
            total=len(self._reader),
            label=label,
            inference=self._inference,
            step=self._step,
        )
        # Of images and masks, which need not be the files' own.
        metrics = {"scored_size": list(self._task.size), **metrics}
        if (how := self._inference) is not None:
            options = dict(scales=list(how.scales), flip=how.flip, window=list(how.window))
            metrics["inference"] = {**options, "overlap": how.overlap}

        def report(folder: Path, **page: Any) -> None:
            self._report(folder, params, images, **page)

        return Evaluation(metrics, report)

    def _report(self, folder: Path, params, images, **page: Any) -> None:
        """Pictures of the best, median and worst images, the curves and the table."""
        from jaxseg.report import page as pages
        from jaxseg.report import pictures

        picked = pictures.pick_examples(images)
        batches = self._reader.subset([index for _, index, _ in picked])
        options = dict(mesh=self._mesh, inference=self._inference)
        examples = list(masks.predictions(self._task, params, batches, **options))
        if jax.process_index() != 0:
            return
        labels = [f"{label}\nIoU {iou:.3f}" for label, _, iou in picked]
        pages.write(
            folder,
            examples=list(zip(labels, examples, strict=True)),
            names=self._task.names,
            asked=self._task.asked,
            **page,
        )
