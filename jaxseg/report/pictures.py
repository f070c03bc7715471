"""Pictures of a run: examples with their masks, curves, bars and confusion; a PNG each."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from jaxseg.report.figures import save, written
from jaxseg.report.palette import MISSED, VOID_COLOR, colorize, error_picture, overlay, palette


def pick_examples(
    images: Sequence[tuple[int, float]], each: int = 2
) -> list[tuple[str, int, float]]:
    """The best, median and worst images as (label, example index, IoU), without repeats.

    Images that rightly show nothing (IoU -1) are left out, unless there are no others.
    """
    shown = [pair for pair in images if pair[1] >= 0] or images
    ranked = sorted(shown, key=lambda pair: (-pair[1], pair[0]))
    middle = max(0, len(ranked) // 2 - each // 2)
    groups = {
        "best": ranked[:each],
        "median": ranked[middle : middle + each],
        "worst": ranked[-each:],
    }
    picked, seen = [], set()
    for label, rows in groups.items():
        for index, iou in rows:
            if index not in seen:
                seen.add(index)
                picked.append((label, index, iou))
    return picked


def plot_examples(
    rows: Sequence[tuple[str, Mapping[str, np.ndarray]]], path: Path, *, names: Sequence[str] = ()
) -> None:
    """Rows of image | mask | prediction | error.

    Args:
      rows: (label, {image uint8 HxWx3, mask uint8 HxW, prediction uint8 HxW}).
      path: of the PNG.
      names: of the masks' values; more than two get colours and a legend.
    """
    height, width = rows[0][1]["image"].shape[:2]
    figure = Figure(figsize=(12, 3 * len(rows) * height / width + 0.8))
    axes = figure.subplots(len(rows), 4, squeeze=False)
    draw = _class_pictures if len(names) > 2 else _object_pictures
    for axis, title in zip(axes[0], ("image", "mask", "prediction", "error"), strict=True):
        axis.set_title(title)
    for (label, shown), line in zip(rows, axes, strict=True):
        pictures = draw(shown["image"], shown["mask"], shown["prediction"])
        for axis, picture in zip(line, pictures, strict=True):
            axis.imshow(picture, cmap="gray", vmin=0, vmax=255)
            axis.set_xticks([])
            axis.set_yticks([])
        line[0].set_ylabel(label)
    if len(names) > 2:
        _legend(figure, names)
    else:
        figure.tight_layout()
    save(figure, path)


def _object_pictures(image, mask, prediction) -> tuple[np.ndarray, ...]:
    void = np.where(mask == 255, 128, mask * 255).astype(np.uint8)
    found = prediction.astype(bool)
    return image, void, overlay(image, found), error_picture(image, mask, found)


def _class_pictures(image, mask, prediction) -> tuple[np.ndarray, ...]:
    wrong = (image * 0.35).astype(np.uint8)
    wrong[(mask != prediction) & (mask != 255)] = MISSED
    return image, colorize(mask), colorize(prediction), wrong


def plot_queries(
    rows: Sequence[tuple[str, Mapping[str, np.ndarray]]],
    path: Path,
    *,
    names: Sequence[str],
    asked: Sequence[int],
) -> None:
    """For each image and class asked for: the mask that is answered, and below it the attention.

    Args:
      rows: as in `plot_examples`, with `answers` `Q x H x W` (probabilities) and `attention` `Q x h x w`.
      path: of the PNG.
      names, asked: of the masks' values, and which of them are asked for.
    """
    height, width = rows[0][1]["image"].shape[:2]
    columns = 2 + len(asked)
    figure = Figure(figsize=(2 * columns, 4 * len(rows) * height / width + 0.5))
    axes = figure.subplots(2 * len(rows), columns, squeeze=False)
    for axis in axes.flat:
        axis.axis("off")
    for number, (_, shown) in enumerate(rows):
        above, below = axes[2 * number], axes[2 * number + 1]
        above[0].imshow(shown["image"])
        above[1].imshow(colorize(shown["mask"]))
        above[1].set_title("truth", fontsize="small")
        for q, value in enumerate(asked):
            present = "present" if (shown["mask"] == value).any() else "absent"
            above[2 + q].imshow(overlay(shown["image"], shown["answers"][q] >= 0.5))
            above[2 + q].set_title(f"{written(names[value])}? ({present})", fontsize="small")
            below[2 + q].imshow(shown["attention"][q], cmap="magma")
    figure.tight_layout()
    save(figure, path)


def plot_comparison(
    rows: Sequence[tuple[float, Mapping[str, Any]]], path: Path, *, names: Sequence[str]
) -> None:
    """For each image: the image, the truth, and the mask of every method.

    Args:
      rows: (share of pixels that differ, {name, image, mask, masks: {method: uint8 HxW}}).
      path: of the PNG.
      names: of the masks' values.
    """
    methods = list(rows[0][1]["masks"])
    columns = 2 + len(methods)
    figure = Figure(figsize=(3 * columns, 2.4 * len(rows) + 0.8))
    axes = figure.subplots(len(rows), columns, squeeze=False)
    for (share, shown), line in zip(rows, axes, strict=True):
        pictures = [shown["image"], colorize(shown["mask"])]
        pictures += [colorize(shown["masks"][m]) for m in methods]
        name = written(shown["name"])
        titles = [f"{name}\n{share:.0%} differ", "truth", *map(written, methods)]
        for axis, picture, title in zip(line, pictures, titles, strict=True):
            axis.imshow(picture)
            axis.set_title(title, fontsize="small")
            axis.axis("off")
    _legend(figure, names)
    save(figure, path)


def plot_method_bars(values: Mapping[str, Mapping[str, float | None]], path: Path) -> None:
    """Grouped bars: for each class one bar of each method."""
    names = list(next(iter(values.values())))
    figure = Figure(figsize=(max(7, 0.9 * len(names)), 3.8))
    axis = figure.subplots()
    width = 0.8 / len(values)
    for number, (method, scores) in enumerate(values.items()):
        places = np.arange(len(names)) + (number - (len(values) - 1) / 2) * width
        axis.bar(places, [scores[n] or 0.0 for n in names], width, label=written(method))
    axis.set_xticks(range(len(names)), map(written, names), rotation=30, ha="right")
    axis.set(ylabel="IoU", ylim=(0, 1))
    axis.legend(fontsize="small")
    figure.tight_layout()
    save(figure, path)


def _legend(figure, names: Sequence[str]) -> None:
    """Lays the figure out above a legend of the classes' colours."""
    colors = palette(len(names)) / 255
    patches = [Patch(color=c, label=written(n)) for c, n in zip(colors, names, strict=True)]
    patches.append(Patch(color=np.array(VOID_COLOR) / 255, label="void"))
    figure.legend(handles=patches, loc="lower center", ncols=7, fontsize="small")
    lines = -(-len(patches) // 7)
    figure.tight_layout(rect=(0, (0.1 + 0.2 * lines) / figure.get_figheight(), 1, 1))


def plot_confusion(confusion: np.ndarray, names: Sequence[str], path: Path) -> None:
    """The confusion matrix `K x K` (true, predicted), as shares of each true class."""
    counts = np.asarray(confusion, np.float64)
    shares = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    side = 0.45 * len(names) + 2.5
    figure = Figure(figsize=(side, side))
    axis = figure.subplots()
    axis.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    if len(names) <= 24:
        for i, j in np.ndindex(*shares.shape):
            if counts[i].sum() and shares[i, j] >= 0.005:
                color = "white" if shares[i, j] > 0.5 else "black"
                text = f"{100 * shares[i, j]:.0f}"
                axis.text(j, i, text, ha="center", va="center", fontsize=7, color=color)
    ticks = [written(name) for name in names]
    axis.set_xticks(range(len(names)), ticks, rotation=90)
    axis.set_yticks(range(len(names)), ticks)
    axis.set(xlabel="predicted", ylabel="true", title="share of the true class, %")
    figure.tight_layout()
    save(figure, path)


def plot_curves(metrics: Sequence[Mapping[str, float]], path: Path) -> bool:
    """Loss, validation scores and the signs of a collapse, where there are any; False without a loss."""

    def courses(names: Sequence[str], prefix: str = "") -> dict[str, list[tuple[int, float]]]:
        found = {n: [(r["step"], r[prefix + n]) for r in metrics if prefix + n in r] for n in names}
        return {n.replace("_", " "): points for n, points in found.items() if points}

    loss = courses(["loss"]).get("loss")
    if not loss:
        return False
    scores = courses(
        ("miou", "iou", "foreground_iou", "boundary_iou", "knn", "rotation_accuracy"), "val_"
    )
    signs = courses(("teacher_entropy", "teacher_kl", "feature_spread"))
    panels = [points for points in (scores, signs) if points]
    figure = Figure(figsize=(6 + 5 * len(panels), 3.5))
    axes = figure.subplots(1, 1 + len(panels), squeeze=False)
    axes[0, 0].plot(*np.array(loss).T, color="#0072b2", linewidth=1, label="training")
    held_out = courses(["loss"], "val_").get("loss")
    if held_out:
        axes[0, 0].plot(*np.array(held_out).T, color="#e69f00", marker=".", label="validation")
        axes[0, 0].legend()
    values = [value for _, value in loss]
    scale = "log" if max(values) > 5 * min(values) > 0 else "linear"
    axes[0, 0].set(xlabel="step", ylabel="loss", yscale=scale)
    for axis, panel in zip(axes[0, 1:], panels, strict=True):
        style = dict(marker=".") if panel is scores else dict(linewidth=1)
        for name, points in panel.items():
            axis.plot(*np.array(points).T, label=name, **style)
        axis.set(
            xlabel="step", ylabel="validation score" if panel is scores else "signs of a collapse"
        )
        axis.legend()
    if signs:
        _mark_collapse(axes[0, -1], metrics)
    for axis in axes.flat:
        axis.grid(alpha=0.3)
    figure.tight_layout()
    save(figure, path)
    return True


def _mark_collapse(axis, metrics: Sequence[Mapping[str, Any]]) -> None:
    """A line where each mode of `train.collapse` was first named."""
    named: dict[str, int] = {}
    for row in metrics:
        if "collapse" in row:
            named.setdefault(row["collapse"], row["step"])
    for mode, step in named.items():
        axis.axvline(step, color="#d55e00", linestyle="--", linewidth=1)
        axis.text(step, 0.5, f" {mode}", color="#d55e00", transform=axis.get_xaxis_transform())


def plot_bars(values: Mapping[str, float | None], path: Path, *, label: str) -> None:
    """A bar for each name; a value of None has none."""
    figure = Figure(figsize=(7, 0.35 * len(values) + 1.2))
    axis = figure.subplots()
    axis.barh(range(len(values)), [v or 0.0 for v in values.values()], color="#009e73")
    axis.set_yticks(range(len(values)), map(written, values))
    for row, value in enumerate(values.values()):
        axis.text(value or 0.0, row, " absent" if value is None else f" {value:.3f}", va="center")
    axis.set(xlim=(0, 1.1), xlabel=label)
    axis.invert_yaxis()
    figure.tight_layout()
    save(figure, path)
