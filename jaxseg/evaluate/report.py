"""`report/`: an index.html with curves, example pictures and tables; every figure is also a PNG."""

import html
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np

matplotlib.use("agg")  # Reports are made where there is no screen.
import matplotlib.pyplot as plt

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
    rows: Sequence[tuple[str, np.ndarray, np.ndarray, np.ndarray]], path: Path
) -> None:
    """Rows of image | mask | prediction | error.

    Args:
      rows: (label, image uint8 HxWx3, mask uint8 HxW, prediction bool HxW).
      path: of the PNG.
    """
    height, width = rows[0][1].shape[:2]
    figure, axes = plt.subplots(
        len(rows), 4, figsize=(12, 3 * len(rows) * height / width + 0.5), squeeze=False
    )
    for axis, title in zip(axes[0], ("image", "mask", "prediction", "error"), strict=True):
        axis.set_title(title)
    for (label, image, mask, prediction), line in zip(rows, axes, strict=True):
        void = np.where(mask == 255, 128, mask * 255).astype(np.uint8)
        pictures = (image, void, overlay(image, prediction), error_picture(image, mask, prediction))
        for axis, picture in zip(line, pictures, strict=True):
            axis.imshow(picture, cmap="gray", vmin=0, vmax=255)
            axis.set_xticks([])
            axis.set_yticks([])
        line[0].set_ylabel(label)
    figure.tight_layout()
    _save(figure, path)


def plot_curves(metrics: Sequence[Mapping[str, float]], path: Path) -> bool:
    """Loss, and validation scores where there are any; False if there is nothing to plot."""
    loss = [(r["step"], r["loss"]) for r in metrics if "loss" in r]
    scores = {
        key: [(r["step"], r[f"val_{key}"]) for r in metrics if f"val_{key}" in r]
        for key in ("iou", "foreground_iou", "boundary_iou", "knn", "rotation_accuracy")
    }
    scores = {key: points for key, points in scores.items() if points}
    if not loss:
        return False
    figure, axes = plt.subplots(
        1, 2 if scores else 1, figsize=(11 if scores else 6, 3.5), squeeze=False
    )
    axes[0, 0].plot(*np.array(loss).T, color="#0072b2", linewidth=1)
    held_out = [(r["step"], r["val_loss"]) for r in metrics if "val_loss" in r]
    if held_out:
        axes[0, 0].plot(*np.array(held_out).T, color="#e69f00", marker=".", label="validation")
        axes[0, 0].legend()
    axes[0, 0].set(xlabel="step", ylabel="training loss", yscale="log")
    for key, points in scores.items():
        axes[0, 1].plot(*np.array(points).T, marker=".", label=key.replace("_", " "))
    if scores:
        axes[0, 1].set(xlabel="step", ylabel="validation score")
        axes[0, 1].legend()
    for axis in axes.flat:
        axis.grid(alpha=0.3)
    figure.tight_layout()
    _save(figure, path)
    return True


def plot_categories(result: Mapping[str, Any], path: Path) -> None:
    """Bars of foreground IoU by category."""
    names = sorted(result["categories"])
    values = [result["categories"][n]["foreground_iou"] or 0.0 for n in names]
    figure, axis = plt.subplots(figsize=(7, 0.35 * len(names) + 1.2))
    axis.barh(names, values, color="#009e73")
    for row, value in enumerate(values):
        axis.text(value, row, f" {value:.3f}", va="center")
    axis.set(xlim=(0, 1.1), xlabel="foreground IoU")
    axis.invert_yaxis()
    figure.tight_layout()
    _save(figure, path)


def _save(figure, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _table(result: Mapping[str, Any]) -> list[list[str]]:
    def cell(value) -> str:
        return "" if value is None else f"{value:.4f}" if isinstance(value, float) else str(value)

    rows = [("all", result), *sorted(result["categories"].items())]
    head = [key.replace("_", " ") for key in ("category", *_COLUMNS)]
    return [head, *([name, *(cell(row.get(key)) for key in _COLUMNS)] for name, row in rows)]


def write(
    folder: Path,
    *,
    title: str,
    result: Mapping[str, Any],
    metrics: Sequence[Mapping[str, float]],
    examples: Sequence[tuple[str, np.ndarray, np.ndarray, np.ndarray]],
    config: str,
) -> None:
    """Writes the figures and `index.html`.

    Args:
      folder: is created.
      title: of the page.
      result: what `eval.json` holds.
      metrics: the rows of `metrics.jsonl`.
      examples: see `plot_examples`.
      config: is shown as it is.
    """
    captions = {}
    if plot_curves(metrics, folder / "curves.png"):
        captions["curves.png"] = "Training"
    plot_examples(examples, folder / "examples.png")
    captions["examples.png"] = "Best, median and worst images (orange: missed, blue: wrongly taken)"
    plot_categories(result, folder / "categories.png")
    captions["categories.png"] = "Foreground IoU by category"
    write_page(
        folder / "index.html",
        title=title,
        lead=f"Split {result['split']}, step {result['step']}.",
        table=_table(result),
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
    path.write_text(_PAGE.format(title=html.escape(title), body=body))
