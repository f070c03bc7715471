"""`report/`: an index.html with curves, example pictures and tables; every figure is also a PNG."""

import html
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np

matplotlib.use("agg")  # Reports are made where there is no screen.
import matplotlib.pyplot as plt
from matplotlib.patches import Patch

from jaxseg.report.figures import written
from jaxseg.report.palette import VOID_COLOR, colorize, palette
from jaxseg.files import replacing

_PAGE = """<!doctype html><html lang="en"><meta charset="utf-8"><title>{title}</title>
<style>body{{font:15px/1.5 system-ui,sans-serif;max-width:1100px;margin:2em auto;padding:0 1em;
color:#222}}img{{max-width:100%}}table{{border-collapse:collapse}}td,th{{padding:.25em .8em;
text-align:right;border-bottom:1px solid #ddd}}td:first-child,th:first-child{{text-align:left}}
code{{background:#f3f3f3;padding:.1em .3em}}</style><body>{body}</body></html>
"""
_COLUMNS = (
    "images",
    "loss",
    "accuracy",
    "iou",
    "foreground_iou",
    "precision",
    "recall",
    "boundary_iou",
)
# Colour-blind safe: orange where foreground was missed, blue where background was taken.
_MISSED, _ADDED, _OVERLAY = (230, 159, 0), (0, 114, 178), (0, 200, 120)


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


def error_picture(image: np.ndarray, mask: np.ndarray, prediction: np.ndarray) -> np.ndarray:
    """Darkened uint8 image with missed foreground in orange and wrong foreground in blue."""
    picture = (image * 0.35).astype(np.uint8)
    picture[(mask == 1) & ~prediction] = _MISSED
    picture[(mask == 0) & prediction] = _ADDED
    return picture


def overlay(image: np.ndarray, prediction: np.ndarray, *, opacity: float = 0.5) -> np.ndarray:
    """The uint8 image with the predicted foreground tinted and outlined."""
    tinted = image.astype(np.float32)
    tinted[prediction] = (1 - opacity) * tinted[prediction] + opacity * np.array(_OVERLAY)
    inside = np.pad(prediction, 1, mode="edge")
    core = inside[:-2, 1:-1] & inside[2:, 1:-1] & inside[1:-1, :-2] & inside[1:-1, 2:]
    tinted[prediction & ~core] = 255
    return tinted.astype(np.uint8)


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
    figure, axes = plt.subplots(
        len(rows), 4, figsize=(12, 3 * len(rows) * height / width + 0.8), squeeze=False
    )
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
    _save(figure, path)


def _object_pictures(image, mask, prediction) -> tuple[np.ndarray, ...]:
    void = np.where(mask == 255, 128, mask * 255).astype(np.uint8)
    found = prediction.astype(bool)
    return image, void, overlay(image, found), error_picture(image, mask, found)


def _class_pictures(image, mask, prediction) -> tuple[np.ndarray, ...]:
    wrong = (image * 0.35).astype(np.uint8)
    wrong[(mask != prediction) & (mask != 255)] = _MISSED
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
    figure, axes = plt.subplots(
        2 * len(rows),
        columns,
        figsize=(2 * columns, 4 * len(rows) * height / width + 0.5),
        squeeze=False,
    )
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
    _save(figure, path)


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
    figure, axes = plt.subplots(
        len(rows), columns, figsize=(3 * columns, 2.4 * len(rows) + 0.8), squeeze=False
    )
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
    _save(figure, path)


def plot_method_bars(values: Mapping[str, Mapping[str, float | None]], path: Path) -> None:
    """Grouped bars: for each class one bar of each method."""
    names = list(next(iter(values.values())))
    figure, axis = plt.subplots(figsize=(max(7, 0.9 * len(names)), 3.8))
    width = 0.8 / len(values)
    for number, (method, scores) in enumerate(values.items()):
        places = np.arange(len(names)) + (number - (len(values) - 1) / 2) * width
        axis.bar(places, [scores[n] or 0.0 for n in names], width, label=written(method))
    axis.set_xticks(range(len(names)), map(written, names), rotation=30, ha="right")
    axis.set(ylabel="IoU", ylim=(0, 1))
    axis.legend(fontsize="small")
    figure.tight_layout()
    _save(figure, path)


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
    figure, axis = plt.subplots(figsize=(side, side))
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
    _save(figure, path)


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
    figure, axes = plt.subplots(
        1, 1 + len(panels), figsize=(6 + 5 * len(panels), 3.5), squeeze=False
    )
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
    _save(figure, path)
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
    figure, axis = plt.subplots(figsize=(7, 0.35 * len(values) + 1.2))
    axis.barh(range(len(values)), [v or 0.0 for v in values.values()], color="#009e73")
    axis.set_yticks(range(len(values)), map(written, values))
    for row, value in enumerate(values.values()):
        axis.text(value or 0.0, row, " absent" if value is None else f" {value:.3f}", va="center")
    axis.set(xlim=(0, 1.1), xlabel=label)
    axis.invert_yaxis()
    figure.tight_layout()
    _save(figure, path)


def _save(figure, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def cell(value: float | int | None) -> str:
    """A number in a table; nothing for None."""
    return "" if value is None else f"{value:.4f}" if isinstance(value, float) else str(value)


def _table(result: Mapping[str, Any], names: Sequence[str]) -> list[list[str]]:
    """The head, and a line of each category or class, that of all first."""
    if "per_class" in result:
        parts = result["per_class"]
        columns = ("iou", "accuracy", "precision", "recall", "boundary_iou", "pixels")
        everything = {
            **{k: result.get(k) for k in ("precision", "recall", "boundary_iou")},
            "iou": result["miou"],
            "accuracy": result["mean_accuracy"],
        }
        rows = [("mean", everything), *((n, parts.get(n, {})) for n in names)]
    else:
        columns = _COLUMNS
        rows = [("all", result), *sorted(result["categories"].items())]
    head = [key.replace("_", " ") for key in ("class", *columns)]
    return [head, *([name, *(cell(row.get(key)) for key in columns)] for name, row in rows)]


def write(
    folder: Path,
    *,
    title: str,
    result: Mapping[str, Any],
    metrics: Sequence[Mapping[str, float]],
    examples: Sequence[tuple[str, Mapping[str, np.ndarray]]],
    names: Sequence[str],
    asked: Sequence[int] = (),
    config: str,
) -> None:
    """Writes the figures and `index.html`.

    Args:
      folder: is created.
      title: of the page.
      result: what `eval.json` holds.
      metrics: the rows of `metrics.jsonl`.
      examples: see `plot_examples` and, where classes are asked for, `plot_queries`.
      names: of the masks' values.
      asked: the values that are asked for.
      config: is shown as it is.
    """
    captions = {}
    if plot_curves(metrics, folder / "curves.png"):
        captions["curves.png"] = "Training"
    plot_examples(examples, folder / "examples.png", names=names)
    several = "per_class" in result
    errors = "orange: wrong" if several else "orange: missed, blue: wrongly taken"
    captions["examples.png"] = f"Best, median and worst images ({errors})"
    if asked:
        plot_queries(examples, folder / "queries.png", names=names, asked=asked)
        captions["queries.png"] = "Masks and attention of every class asked for"
    if several:
        values = {n: result["per_class"].get(n, {}).get("iou") for n in names}
        plot_bars(values, folder / "classes.png", label="IoU")
        captions["classes.png"] = "IoU by class"
        plot_confusion(np.array(result["confusion"]), names, folder / "confusion.png")
        captions["confusion.png"] = "Confusion matrix"
    else:
        values = {n: v["foreground_iou"] for n, v in sorted(result["categories"].items())}
        plot_bars(values, folder / "categories.png", label="foreground IoU")
        captions["categories.png"] = "Foreground IoU by category"
    write_page(
        folder / "index.html",
        title=title,
        lead=f"Split {result['split']}, step {result['step']}.",
        table=_table(result, names),
        captions=captions,
        config=config,
    )


def write_page(
    path: Path,
    *,
    title: str,
    table: Sequence[Sequence[str]],
    captions: Mapping[str, str],
    config: str,
    lead: str = "",
) -> None:
    """Writes a page of a table (its first row is the head) and pictures.

    Args:
      path: of the page.
      title, lead: are shown above.
      table: rows of cells.
      captions: {file name of a picture beside the page: what it shows}.
      config: is shown as it is.
    """
    head, *rows = [[html.escape(cell) for cell in row] for row in table]
    lines = "".join(f"<tr>{''.join(f'<td>{c}</td>' for c in row)}</tr>" for row in rows)
    pictures = "".join(
        f'<h2>{html.escape(caption)}</h2><img src="{name}" alt="{html.escape(caption)}">'
        for name, caption in captions.items()
    )
    body = (
        f"<h1>{html.escape(title)}</h1><p>{html.escape(lead)}</p>"
        f"<table><tr>{''.join(f'<th>{c}</th>' for c in head)}</tr>{lines}</table>"
        f"{pictures}<h2>Config</h2><pre>{html.escape(config)}</pre>"
    )
    with replacing(path) as temporary:
        temporary.write_text(_PAGE.format(title=html.escape(title), body=body), encoding="utf-8")
