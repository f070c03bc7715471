"""Scores of what is learned without labels: the loss on held-out images, and k-NN of the features."""

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from jaxseg.data.image_files import DataError
from jaxseg.data.reader import Reader, Reading
from jaxseg.data.source import Source, Splits, categories_of
from jaxseg.evaluate import features, knn, rank, snapshots
from jaxseg.evaluate.scoring import Evaluation, FeatureScoring
from jaxseg.evaluate.whole_images import WholeImages
from jaxseg.train import partition
from jaxseg.train.state import ScoredState, TrainState

log = logging.getLogger(__name__)

# Of the memory for examples, what each of the two splits that are read may keep.
MEMORY_SHARE = 0.25


def knn_reference(data: Splits, scoring: FeatureScoring, held_out: Source) -> Source | None:
    """The images with classes that those of `held_out` are compared with; None where it makes no sense.

    Raises:
      DataError: the splits have different classes.
    """
    names = categories_of(held_out)
    if len(names) < 2:
        return None
    if scoring.train_split == scoring.split:
        log.warning(
            "no k-NN: config.eval.split and config.eval.train_split are both %s, where every image would "
            "find itself",
            scoring.split,
        )
        return None
    reference = data.split(scoring.train_split)
    if names != categories_of(reference):
        here, there = set(names), set(categories_of(reference))
        raise DataError(
            f"the classes of the splits {scoring.split} and {scoring.train_split} must be the "
            f"same, in the same order: only the one has {sorted(here - there)}, only the other "
            f"{sorted(there - here)}"
        )
    return reference


def labelled(found: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The rows that have a class; images that lie in no class's folder have category -1."""
    return {k: v[found["category"] >= 0] for k, v in found.items()}


class FeatureEvaluator:
    """Scores states: loss on held-out images, and k-NN of the backbone's features.

    Args:
      task: a `tasks.pretext.PretextTask`.
      data: has the splits of `scoring`.
      scoring: what is scored, and how.
      reading: how images are read.
      size: (H, W) of the canvas.
      seed: of the crops.
      mesh: all devices.

    Raises:
      DataError: there is no such split, or something is wrong with it.
    """

    def __init__(
        self,
        task: Any,
        data: Splits,
        scoring: FeatureScoring,
        *,
        reading: Reading,
        size: tuple[int, int],
        seed: int,
        mesh: Mesh,
    ):
        self._task, self._scoring, self._mesh = task, scoring, mesh
        self._canvas = size
        held_out = data.split(scoring.split)
        options = dict(
            reading=reading,
            batch=scoring.batch,
            seed=seed,
            leave_out=("mask",),
            memory_share=MEMORY_SHARE,
        )
        self._held_out = Reader(held_out, size, **options)
        self._names = categories_of(held_out)
        reference = knn_reference(data, scoring, held_out)
        self._reference = None if reference is None else Reader(reference, size, **options)
        backbone = task.backbone
        self._seen = WholeImages(
            backbone.module, backbone.normalization, scoring.resolution, scoring.crop
        )
        self._embed = features.Gatherer(self._seen.embed, mesh)
        rng = jax.random.key(seed)

        def score(state, batch):
            # A padding row's index is 0; it counts for nothing.
            batch = {**batch, "row": batch["index"]}
            params = state.best_params
            loss, found = task.loss(params, state.extra, batch, rng, state.step, train=False)
            return {"loss": loss, **found["scores"]}, batch["valid"].sum()

        self._score = jax.jit(score)

    def __call__(
        self, state: TrainState | ScoredState, frozen: Mapping[str, Any], *, label: str = ""
    ) -> Evaluation:
        """The scores of the split; the features of its images are kept in training."""
        limit = self._scoring.limit
        batches, count = self._held_out.spread(limit)
        scores = self._scores(state, batches)
        backbone = self._task.backbone_variables(state.best_params, state.extra)
        batches, count = self._held_out.spread(limit)
        found = self._embed(backbone, batches, total=count)
        metrics = {
            "images": len(found["cls"]),
            **scores,
            "rankme": rank.rankme(found["cls"]),
            "embedding_std": rank.embedding_std(found["cls"]),
        }
        if self._reference is not None:
            metrics |= self._knn(backbone, found, limit)

        def keep(workdir: Path, step: int) -> None:
            if jax.process_index() == 0:
                size = self._seen.size(self._canvas)
                snapshots.keep(workdir, step, found, self._names, size)

        return Evaluation(metrics, _report, keep)

    def _knn(self, backbone, found, limit: int) -> dict[str, Any]:
        batches, count = self._reference.spread(limit)
        train = labelled(self._embed(backbone, batches, total=count))
        queries = labelled(found)
        if not len(train["cls"]) or not len(queries["cls"]):
            return {}
        k = min(self._scoring.k, len(train["cls"]))
        accuracy = knn.knn_accuracy(
            train["cls"],
            train["category"],
            queries["cls"],
            queries["category"],
            k=k,
            temperature=self._scoring.temperature,
            classes=len(self._names),
        )[k]
        return {"knn": accuracy, "k": k, "train_images": len(train["cls"])}

    def _scores(self, state: TrainState | ScoredState, batches) -> dict[str, float]:
        """Mean loss and scores; an example's crops follow from the seed and its index alone."""
        parts = [
            jax.device_get(self._score(state, partition.put_batch(self._mesh, batch)))
            for batch in batches
        ]
        total = sum(n for _, n in parts)
        return {key: float(sum(s[key] * n for s, n in parts) / total) for key in parts[0][0]}


def _report(folder: Path, *, metrics, **_: Any) -> None:
    """The curves of the training."""
    from jaxseg.report import pictures

    if jax.process_index() == 0:
        pictures.plot_curves(metrics, folder / "curves.png")
