"""Several runs on the same images with the same metric: one table, and pictures of where they differ."""

import heapq
import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxseg import assembly
from jaxseg.data.image_files import VOID
from jaxseg.data.source import example_of
from jaxseg.metrics import multiclass as metrics
from jaxseg.metrics.binary import add
from jaxseg.predict import check_masks
from jaxseg.predictor import Predictor
from jaxseg.report import page, pictures
from jaxseg.run import restore
from jaxseg.schema import ConfigError
from jaxseg.tasks.masks import background
from jaxseg.train.writers import Progress, write_json

log = logging.getLogger(__name__)

_PICTURES = 8
# Masks are counted in arrays whose sides are multiples of this.
_ROUND = 256
_COLUMNS = ("miou", "miou_without_background", "pixel_accuracy", "mean_accuracy", "boundary_iou")


def compare(workdirs: Sequence[Path], overrides: Mapping[str, Any], output: Path) -> dict[str, Any]:
    """Scores runs on all images of the first one's `eval.split`, at the images' own sizes.

    Writes `comparison.json` and `report/comparison.html` into `output`.

    Args:
      workdirs: of at least two runs that predict the same classes.
      overrides: of every run's config, such as `eval.split`.
      output: a folder, which is created.

    Returns:
      What is written to `comparison.json`: `{"split", "images", "methods": {name: scores}}`; the
      first method is "always background", or always the most frequent class where there is none.

    Raises:
      ConfigError: fewer than two runs, or runs of different classes.
    """
    if len(workdirs) < 2:
        raise ConfigError("--mode=compare needs --workdirs=A,B with at least two runs")
    for path in workdirs:
        check_masks(path, overrides)
    runs = {
        name: restore(path, overrides)
        for name, path in zip(_names(workdirs), workdirs, strict=True)
    }
    first = next(iter(runs.values()))
    split = first.scoring.split
    source = assembly.make_data(first.config).split(split)
    names = assembly.names_in(source, first.config.task)
    for name, run in runs.items():
        if tuple(run.task.names) != names:
            raise ConfigError(
                f"the run {name} predicts {', '.join(run.task.names)}; the data of the first run hold "
                f"{', '.join(names)}: only runs of the same classes can be compared"
            )
    try:
        (output / "report").mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"cannot write to --workdir={output}: {error}") from error
    predictors = {name: Predictor(run) for name, run in runs.items()}
    sums, differing = _score(source, predictors, names)
    empty = background(names)
    methods = {n: metrics.summarize(s, names, background=empty) for n, s in sums.items()}
    result = {"split": split, "images": len(source), "methods": methods}
    if jax.process_index() == 0:
        _write(output, result, differing, names, runs)
    return result


def _names(workdirs: Sequence[Path]) -> list[str]:
    """A name for each run: its folder's, or the path where those are not unique."""
    names = [path.resolve().name for path in workdirs]
    if len(set(names)) == len(names):
        return names
    paths = [str(path) for path in workdirs]
    if len(set(paths)) < len(paths):
        raise ConfigError(f"--workdirs names a run twice: {', '.join(paths)}")
    return paths


def _score(source, predictors: Mapping[str, Predictor], names: Sequence[str]):
    """(sums of each method, [(share of pixels that differ, example)] of the most different images)."""
    count = jax.jit(metrics.image_counts, static_argnames=("classes", "background", "widths"))
    options = dict(classes=len(names), background=background(tuple(names)))
    constant = _most_frequent(source, names)
    sums: dict[str, Any] = dict.fromkeys((f"always {names[constant]}", *predictors))
    most: list[tuple[float, int, dict[str, Any]]] = []
    progress = Progress("compare", len(source))
    for index in range(len(source)):
        example = example_of(source, index)
        image, mask = example["image"], example["mask"]
        masks = {n: p.predict(image) for n, p in predictors.items()}
        everything = {f"always {names[constant]}": np.full_like(mask, constant), **masks}
        widths, truth = metrics.boundary_widths(*mask.shape), _padded(mask)
        for name, prediction in everything.items():
            counts = count(_padded(prediction), truth, truth != VOID, widths=widths, **options)
            total = jax.tree.map(lambda x: np.asarray(x).sum(0), counts)
            sums[name] = add(sums[name], total)
        stack = np.stack(list(masks.values()))
        share = float(((stack != stack[0]).any(0) & (mask != VOID)).mean())
        shown = {"name": example["name"], "image": image, "mask": mask, "masks": masks}
        entry = (share, -index, shown)
        (heapq.heappush if len(most) < _PICTURES else heapq.heappushpop)(most, entry)
        progress.update(index + 1)
    progress.close()
    return sums, [(share, shown) for share, _, shown in sorted(most, key=lambda e: -e[0])]


def _padded(mask: np.ndarray) -> np.ndarray:
    """A batch of one mask, with void around it: so that few shapes are compiled."""
    sides = [(0, -side % _ROUND) for side in mask.shape]
    return np.pad(mask, sides, constant_values=VOID)[None]


def _most_frequent(source, names: Sequence[str]) -> int:
    """The background, or the class with most pixels in (at most 100) images."""
    empty = background(tuple(names))
    if empty is not None:
        return empty
    step = max(1, len(source) // 100)
    masks = (example_of(source, i)["mask"] for i in range(0, len(source), step))
    return int(sum(np.bincount(m.ravel(), minlength=256) for m in masks)[: len(names)].argmax())


def _write(output: Path, result, differing, names, runs) -> None:
    write_json(output / "comparison.json", result)
    methods = result["methods"]
    head = ["method", *(c.replace("_", " ") for c in _COLUMNS), *names]
    table = [head] + [
        [
            name,
            *(page.cell(scores.get(c)) for c in _COLUMNS),
            *(page.cell(scores["per_class"][n]["iou"]) for n in names),
        ]
        for name, scores in methods.items()
    ]
    for row in table:
        print("  ".join(f"{c:>10s}" if i else f"{c:24s}" for i, c in enumerate(row[:6])))
    pictures.plot_comparison(differing, output / "report" / "comparison.png", names=names)
    pictures.plot_method_bars(
        {m: {n: s["per_class"][n]["iou"] for n in names} for m, s in methods.items()},
        output / "report" / "comparison_classes.png",
    )
    page.write_page(
        output / "report" / "comparison.html",
        title="Comparison",
        lead=f"{result['images']} images of split {result['split']}, at their own sizes; IoU by class.",
        table=table,
        captions={
            "comparison_classes.png": "IoU by class",
            "comparison.png": "Images on which the methods differ most",
        },
        config=json.dumps({n: r.config.to_dict() for n, r in runs.items()}, indent=2),
    )
