"""How a run is scored: the options of `config.eval`, and what an evaluation gives."""

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, ClassVar

from jaxseg.evaluate.masks import Inference
from jaxseg.options import OptionError, option

SPLITS = ("train", "val", "test")


@dataclasses.dataclass(frozen=True)
class Scoring:
    """What every task is scored by."""

    split: str = option("test", choices=SPLITS)
    batch: int = option(16, low=1, high=2**20)
    checkpoint: str = option("latest", "or best", choices=("latest", "best"))
    report: bool = option(True, "whether pictures and pages are written")

    # Of the split, those that are scored; () for all.
    categories: ClassVar[tuple[str, ...]] = ()


@dataclasses.dataclass(frozen=True)
class MaskScoring(Scoring):
    """What masks are scored by."""

    scales: tuple[float, ...] = option(
        (1.0,), "relative sizes at which images are predicted, and averaged", high=8, least=1
    )
    flip: bool = option(False, "average with the mirrored image")
    window: tuple[int, int] = option(
        (0, 0),
        "predict windows of (height, width), blended; (0, 0) = whole images",
        low=0,
        length=2,
    )
    overlap: float = option(0.5, "of the windows", low=0, high=0.9)

    def __post_init__(self):
        if any(self.window) and not all(self.window):
            raise OptionError(f"window is {self.window}; allowed: (0, 0), or two sizes above 0")
        if not self.scales or min(self.scales) <= 0:
            raise OptionError(f"scales is {self.scales}; allowed: numbers above 0, at most 8")

    def inference(self, multiple: int) -> Inference | None:
        """How images are predicted, if not once and whole.

        Args:
          multiple: sizes of images that the network sees are multiples of it.
        """
        if any(side % multiple for side in self.window):
            raise OptionError(
                f"eval.window is {self.window}; allowed: multiples of the stride {multiple}"
            )
        how = Inference(tuple(self.scales), self.flip, tuple(self.window), self.overlap)
        return None if how == Inference(overlap=self.overlap) else how


@dataclasses.dataclass(frozen=True)
class BinaryScoring(MaskScoring):
    """What masks of one class are scored by."""

    categories: tuple[str, ...] = option((), "to evaluate on; empty = those of data.categories")


@dataclasses.dataclass(frozen=True)
class ClassScoring(MaskScoring):
    """What masks of several classes are scored by."""

    split: str = option("val", choices=SPLITS)


@dataclasses.dataclass(frozen=True)
class FeatureScoring(Scoring):
    """What learning without labels is scored by."""

    train_split: str = option("train", "whose labelled images k-NN compares with", choices=SPLITS)
    limit: int = option(
        2000, "images of each split, evenly spaced, that k-NN compares; 0 = all", low=0
    )
    resolution: int = option(
        0,
        "shorter side of the images that the backbone sees; 0 = that of data.size",
        low=0,
        high=4096,
    )
    crop: float = option(
        1.0,
        "share of the sides that k-NN and the probe see; 0.875 is the field's for ImageNet",
        low=0.05,
        high=1,
    )
    k: int = option(20, "of k-NN", low=1, high=2**20)
    temperature: float = option(0.07, "of k-NN", low=1e-3, high=1e3)


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """What an evaluator gives of a state.

    Attributes:
      metrics: of the split, as in `eval.json`; numbers among them are the scores.
      report: `report(folder, title=, result=, metrics=, config=)` writes the pictures and the page: of what
        is in `eval.json`, the rows of `metrics.jsonl`, and the config as text.
      keep: `keep(workdir, step)` keeps what later analyses want of a state in training.
    """

    metrics: Mapping[str, Any]
    report: Callable[..., None]
    keep: Callable[[Path, int], None] = lambda workdir, step: None

    @property
    def scores(self) -> dict[str, float]:
        """The scores of the whole split, without tables."""
        return {k: v for k, v in self.metrics.items() if isinstance(v, float)}


def summary(result: Mapping[str, Any]) -> str:
    """What is printed of an `eval.json`."""
    rows = [f"{result['split']} at step {result['step']}, {result['images']} images"]
    rows += [f"  {k:22s} {v:.4f}" for k, v in result.items() if isinstance(v, float)]
    if "coarse" in result:
        rows.append(f"  {'coarse iou':22s} {result['coarse']['iou']:.4f}")
    return "\n".join(rows)
