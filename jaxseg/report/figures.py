"""What all pictures share. Figures are objects of their own: no pyplot state, no screen needed."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from jaxseg.files import replacing

# Colour-blind safe.
RIGHT, WRONG, PLAIN = "#009e73", "#d55e00", "#444444"
_INCH = 1.5  # the side of a picture in a grid
_TALLEST = 3.0  # cells of a grid are at most so many times as high as wide, or as wide as high
_LETTERS = 24  # of a name, at most


def make_grid(
    rows: int, columns: int, *, titles: Sequence[str] = (), inch: float = _INCH, aspect: float = 1.0
) -> tuple[Figure, np.ndarray]:
    """A figure of rows x columns axes without ticks for pictures of height / width `aspect`."""
    figure = Figure(
        figsize=(inch * columns + 0.6, inch * rows * aspect + 0.5), layout="constrained"
    )
    axes = figure.subplots(rows, columns, squeeze=False)
    for axis in axes.flat:
        axis.set(xticks=[], yticks=[])
    for axis, title in zip(axes[0], titles, strict=False):
        axis.set_title(title, fontsize=9)
    return figure, axes


def common_aspect(images: Sequence[np.ndarray]) -> float:
    """Height / width of the cells for images [H, W, ...]: their median, so that one panorama spoils none."""
    median = np.median([image.shape[0] / image.shape[1] for image in images])
    return float(np.clip(median, 1 / _TALLEST, _TALLEST))


def written(name: str) -> str:
    """A name as matplotlib writes it: no formula between $, no entry left out for its _, not endless."""
    name = name if len(name) <= _LETTERS else f"{name[: _LETTERS - 9]}…{name[-8:]}"
    return (" " if name.startswith("_") else "") + name.replace("$", r"\$")


def set_frame(axis: Axes, color: str, *, width: float = 3) -> None:
    """Frames a picture."""
    for spine in axis.spines.values():
        spine.set(color=color, linewidth=width)


def class_colors(count: int) -> np.ndarray:
    """Float [count, 4] RGBA; neighbouring classes differ as far as the count allows."""
    if count <= 10:
        return matplotlib.colormaps["tab10"](np.arange(count))
    if count <= 20:
        return matplotlib.colormaps["tab20"](np.arange(count))
    return matplotlib.colormaps["turbo"](np.linspace(0, 1, count))


def save(figure: Figure, path: str | Path) -> None:
    """Writes the figure whole or not at all, making the folder if needed."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    FigureCanvasAgg(figure)
    with replacing(path) as temporary:
        figure.savefig(temporary, dpi=110)


def plot_lines(
    lines: Mapping[str, tuple[np.ndarray, np.ndarray]], path: str | Path, **axis_options: Any
) -> None:
    """Lines {label: (x, y)} in one pair of axes; the options are those of `Axes.set`."""
    figure = Figure(figsize=(7, 4), layout="constrained")
    axis = figure.subplots()
    for label, (x, y) in lines.items():
        axis.plot(x, y, label=label)
    axis.set(**axis_options)
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8)
    save(figure, path)
