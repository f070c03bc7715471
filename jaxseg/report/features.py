"""Pictures of what a backbone has learnt: confusion, spectrum, neighbours, t-SNE, PCA, attention."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from jaxseg.evaluate import attention_maps, embedding, knn, pca, rank
from jaxseg.ops.resize import resize_bilinear
from jaxseg.report import figures
from jaxseg.report.palette import overlay

_LEGEND = 20  # classes at most
_OUTLINE = "#ff40ff"
_KEPT = "#40e0ff"  # seen on all of "inferno"


def plot_confusion(
    labels: np.ndarray, predictions: np.ndarray, names: Sequence[str], path: str | Path
) -> None:
    """The share of each class (row) that was predicted as each class (column), in per cent.

    Args:
      labels, predictions: int [N], indices into `names`.
      names: of the classes; numbers are written in up to 20 of them.
      path: of the PNG.

    Raises:
      ValueError: lengths differ, or a label has no name.
    """
    share = 100 * knn.confusion(labels, predictions, classes=len(names))
    side = min(14.0, 2.2 + 0.5 * len(names))
    figure = Figure(figsize=(side, side), layout="constrained")
    axis = figure.subplots()
    axis.imshow(share, cmap="Blues", vmin=0, vmax=100)
    axis.set(xlabel="predicted as, % of the class", ylabel="class")
    if len(names) <= 20:
        ticks = [figures.written(name) for name in names]
        axis.set_xticks(range(len(names)), ticks, rotation=90)
        axis.set_yticks(range(len(names)), ticks)
        for (row, column), value in np.ndenumerate(share):
            color = "white" if value > 60 else figures.PLAIN
            axis.text(column, row, f"{value:.0f}", ha="center", va="center", color=color, size=8)
    axis.set_title(f"accuracy {np.mean(np.equal(labels, predictions)):.3f}")
    figures.save(figure, path)


def plot_spectrum(features: Mapping[str, np.ndarray], path: str | Path) -> None:
    """The singular values of some features over their rank, as a share of their sum.

    Args:
      features: {label: [N, D]}; the legend gives the RankMe of each.
      path: of the PNG.

    Raises:
      ValueError: there are none; see `rank.check_features`.
    """
    if not features:
        raise ValueError("no features to plot the spectrum of")
    lines = {}
    for label, x in features.items():
        values = rank.singular_values(rank.check_features(x, label))
        share = np.maximum(values / max(values.sum(), 1e-30), 1e-8)
        lines[f"{label}: RankMe {rank.rankme(x):.1f}"] = (np.arange(1, len(values) + 1), share)
    figures.plot_lines(
        lines,
        path,
        xscale="log",
        yscale="log",
        xlabel="rank",
        ylabel="share of the singular values",
    )


def plot_neighbors(
    images: Sequence[np.ndarray],
    queries: Sequence[int],
    neighbors_QxK: np.ndarray,
    path: str | Path,
    *,
    labels: np.ndarray | None = None,
    names: Sequence[str] = (),
) -> None:
    """Rows of query | neighbours, framed in green where the class is the query's, else in orange.

    Args:
      images: indexed by row; uint8 HxWx3, of any sizes.
      queries: rows, [Q].
      neighbors_QxK: of `neighbors.nearest`.
      path: of the PNG.
      labels: int [N]; None for plain frames.
      names: of the classes; numbers if empty.

    Raises:
      ValueError: there are no queries, or as many neighbours do not fit them.
    """
    neighbors = np.asarray(neighbors_QxK)
    if neighbors.ndim != 2 or len(neighbors) != len(queries) or not neighbors.size:
        raise ValueError(f"neighbours of shape {neighbors.shape} for {len(queries)} queries")
    titles = ("query", *(str(i + 1) for i in range(neighbors.shape[1])))
    figure, axes = figures.make_grid(len(queries), len(titles), titles=titles, aspect=1.15)
    for query, others, line in zip(queries, neighbors, axes, strict=True):
        for axis, row in zip(line, (query, *others), strict=True):
            axis.imshow(images[row])
            color = figures.PLAIN
            if labels is not None:
                name = names[labels[row]] if names else str(labels[row])
                axis.set_xlabel(figures.written(name), fontsize=7)
                if axis is not line[0]:
                    color = figures.RIGHT if labels[row] == labels[query] else figures.WRONG
            figures.set_frame(axis, color)
    figures.save(figure, path)


def plot_tsne(
    snapshots: Sequence[tuple[str, np.ndarray, np.ndarray | None]],
    names: Sequence[str],
    path: str | Path,
    *,
    panels: int = 6,
    points: int = 2000,
    seed: int = 0,
) -> list[str]:
    """One panel for each of some snapshots, coloured by class.

    Args:
      snapshots: (label, features [N, D], classes int [N] or None), in the order of the training and
        of the same images in the same order.
      names: of the classes; empty if there are none. A legend names up to 20.
      path: of the PNG.
      panels: at most so many are laid out, evenly picked, the first and the last among them.
      points: at most so many images are laid out, drawn by `seed`, the same in every panel.
      seed: see `embedding.tsne`.

    Returns:
      The labels of the panels.

    Raises:
      ValueError: snapshots are of different images; see `embedding.tsne`.
    """
    count = embedding.check_count([x for _, x, _ in snapshots])
    picked = np.unique(np.linspace(0, len(snapshots) - 1, panels).round().astype(int))
    shown = [snapshots[i] for i in picked]
    labels = shown[0][2]
    if labels is not None:
        labels = rank.check_labels(labels, count, classes=len(names))
    if any(not np.array_equal(labels, other) for _, _, other in shown[1:]):
        raise ValueError("the snapshots' labels differ: need the same images in the same order")
    rows = np.sort(np.random.default_rng(seed).permutation(count)[:points])
    layouts = embedding.tsne([x[rows] for _, x, _ in shown], seed=seed)
    columns = min(3, len(shown))
    figure, axes = figures.make_grid(-(-len(shown) // columns), columns, inch=3.6)
    colors = figures.class_colors(max(len(names), 1))
    for axis in axes.flat[len(shown) :]:
        axis.set_axis_off()
    for axis, layout, (label, _, _) in zip(axes.flat, layouts, shown, strict=False):
        color = figures.PLAIN if labels is None else colors[labels[rows]]
        axis.scatter(*layout.T, c=color, s=max(2.0, min(20.0, 8000 / len(rows))), linewidths=0)
        axis.set_title(label.replace("$", r"\$"))
        axis.set_aspect("equal", adjustable="datalim")
    present = [] if labels is None else np.unique(labels[rows])
    if 0 < len(present) <= _LEGEND:
        for index in present:
            name = figures.written(names[index])
            axes[0, 0].scatter([], [], color=colors[index], label=name)
        # A letter takes about 0.07 inches, and the colour with its gaps 0.5.
        longest = max(len(figures.written(names[index])) for index in present)
        columns = int(figure.get_figwidth() / (0.5 + 0.07 * longest))
        figure.legend(loc="outside lower center", ncols=min(max(columns, 1), 10), fontsize=9)
    figures.save(figure, path)
    return [label for label, _, _ in shown]


def plot_pca(
    images: Sequence[np.ndarray],
    tokens: Sequence[np.ndarray],
    path: str | Path,
    *,
    columns: int = 4,
) -> None:
    """Pairs of image and its `pca.pca_rgb`, upsampled bilinearly to the image.

    Args:
      images: uint8 HxWx3.
      tokens: of each image, see `pca.pca_rgb`.
      path: of the PNG.
      columns: pairs in a row at most.

    Raises:
      ValueError: lengths differ; see `pca.pca_rgb`.
    """
    if len(images) != len(tokens):
        raise ValueError(f"{len(images)} images for the tokens of {len(tokens)}")
    rgb, share = pca.pca_rgb(tokens)
    columns = min(columns, len(images))
    figure, axes = figures.make_grid(
        -(-len(images) // columns),
        2 * columns,
        titles=("image", "PCA") * columns,
        aspect=figures.common_aspect(images),
    )
    for axis in axes.flat[2 * len(images) :]:
        axis.set_axis_off()
    for i, image in enumerate(images):
        axes.flat[2 * i].imshow(image)
        colors = np.asarray(resize_bilinear(rgb[i][None], image.shape[:2])[0])
        axes.flat[2 * i + 1].imshow(np.clip(colors, 0, 1))
    parts = ", ".join(f"{value:.0%}" for value in share)
    figure.supxlabel(f"red, green, blue hold {parts} of the variance", fontsize=9)
    figures.save(figure, path)


def plot_attention(
    images: Sequence[np.ndarray],
    attentions: Sequence[np.ndarray],
    masks: Sequence[np.ndarray] | None,
    path: str | Path,
    *,
    mass: float = 0.6,
) -> None:
    """Rows of image | mean of the heads | each head | what the best head keeps.

    The best head is that of the highest Jaccard index with the mask, whose outline is drawn in pink;
    where there is no mask, what the mean of the heads keeps is shown instead. Each map has its own
    scale from 0 to its maximum, and what it keeps is outlined.

    Args:
      images: uint8 HxWx3.
      attentions: [heads, h, w] for each.
      masks: HxW for each, see `attention_maps.head_jaccard`; or None.
      path: of the PNG.
      mass: see `attention_maps.keep_mass`.

    Raises:
      ValueError: lengths differ; see `attention_maps.keep_mass`.
    """
    lengths = {len(x) for x in (images, attentions, masks) if x is not None}
    if len(lengths) != 1 or not len(images):
        raise ValueError(
            f"{len(images)} images, {len(attentions)} attention maps and "
            f"{'no' if masks is None else len(masks)} masks: need as many of each, at least one"
        )
    heads = len(attentions[0])
    titles = ["image", "mean", *(f"head {i}" for i in range(heads)), f"{mass:.0%} of mass"]
    aspect = figures.common_aspect(images)
    figure, axes = figures.make_grid(len(images), heads + 3, titles=titles, inch=1.7, aspect=aspect)
    for row, (image, attention) in enumerate(zip(images, attentions, strict=True)):
        mask = None if masks is None else masks[row]
        mean = np.mean(attention, axis=0)
        axes[row, 0].imshow(image)
        for axis, values in zip(axes[row, 1:-1], (mean, *attention), strict=True):
            axis.imshow(values, cmap="inferno", vmin=0)
            _outline_mass(axis, attention_maps.keep_mass(values, mass))
        best, label = _best(attention, mean, mask, mass)
        axes[row, -1].imshow(
            overlay(
                image,
                attention_maps.upsample(attention_maps.keep_mass(best, mass), image.shape[:2]),
            )
        )
        box = dict(facecolor="white", alpha=0.8, linewidth=0, pad=1)
        place = dict(transform=axes[row, -1].transAxes, va="bottom", fontsize=7, bbox=box)
        axes[row, -1].text(0.02, 0.03, label, **place)
        foreground = None if mask is None else (mask != 0) & (mask != attention_maps.VOID)
        if foreground is not None and foreground.any():
            outline = attention_maps.upsample(foreground, image.shape[:2])
            axes[row, 0].contour(outline, levels=[0.5], colors=_OUTLINE, linewidths=1)
    legend = f"blue line: what holds {mass:.0%} of a map"
    if masks is not None:
        legend += "; pink line: the object; last column: the best head and its Jaccard index"
    figure.supxlabel(legend, fontsize=9)
    figures.save(figure, path)


def _outline_mass(axis, kept_hw: np.ndarray) -> None:
    """Draws the border of the kept patches into a map of one pixel a patch."""
    if kept_hw.all():
        return
    h, w = kept_hw.shape
    edges = attention_maps.upsample(kept_hw, (8 * h, 8 * w))
    where = (-0.5, w - 0.5, -0.5, h - 0.5)
    axis.contour(edges, levels=[0.5], colors=_KEPT, linewidths=0.8, extent=where)


def _best(attention, mean, mask, mass) -> tuple[np.ndarray, str]:
    """(the map to show thresholded, what it is)."""
    scores = (
        np.full(1, np.nan)
        if mask is None
        else attention_maps.head_jaccard(attention, mask, mass=mass)
    )
    if np.isnan(scores).any():
        return mean, "mean of the heads"
    head = int(scores.argmax())
    return attention[head], f"head {head}: {scores[head]:.2f}"
