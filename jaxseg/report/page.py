"""`report/`: an index.html with curves, example pictures and tables; every figure is also a PNG."""

import html
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxseg.files import replacing
from jaxseg.report import pictures

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
      examples: see `pictures.plot_examples` and, where classes are asked for, `pictures.plot_queries`.
      names: of the masks' values.
      asked: the values that are asked for.
      config: is shown as it is.
    """
    captions = {}
    if pictures.plot_curves(metrics, folder / "curves.png"):
        captions["curves.png"] = "Training"
    pictures.plot_examples(examples, folder / "examples.png", names=names)
    several = "per_class" in result
    errors = "orange: wrong" if several else "orange: missed, blue: wrongly taken"
    captions["examples.png"] = f"Best, median and worst images ({errors})"
    if asked:
        pictures.plot_queries(examples, folder / "queries.png", names=names, asked=asked)
        captions["queries.png"] = "Masks and attention of every class asked for"
    if several:
        values = {n: result["per_class"].get(n, {}).get("iou") for n in names}
        pictures.plot_bars(values, folder / "classes.png", label="IoU")
        captions["classes.png"] = "IoU by class"
        pictures.plot_confusion(np.array(result["confusion"]), names, folder / "confusion.png")
        captions["confusion.png"] = "Confusion matrix"
    else:
        values = {n: v["foreground_iou"] for n, v in sorted(result["categories"].items())}
        pictures.plot_bars(values, folder / "categories.png", label="foreground IoU")
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
    shown = "".join(
        f'<h2>{html.escape(caption)}</h2><img src="{name}" alt="{html.escape(caption)}">'
        for name, caption in captions.items()
    )
    body = (
        f"<h1>{html.escape(title)}</h1><p>{html.escape(lead)}</p>"
        f"<table><tr>{''.join(f'<th>{c}</th>' for c in head)}</tr>{lines}</table>"
        f"{shown}<h2>Config</h2><pre>{html.escape(config)}</pre>"
    )
    with replacing(path) as temporary:
        temporary.write_text(_PAGE.format(title=html.escape(title), body=body), encoding="utf-8")
