"""What the CLS token looks at in the last block: maps, their mass, and their Jaccard index.

After "visualize_attention" and the VOC12 Jaccard of Caron et al., ICCV 2021: a head's mask is the
patches that hold 60 % of its attention, and the best head counts for each image. All that is not
background counts as one object, where VOC12's are taken one by one.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxseg.report import figures
from jaxseg.report.report import overlay

VOID = 255
_OUTLINE = "#ff40ff"
_KEPT = "#40e0ff"  # seen on all of "inferno"


def cls_attention(attention_BxhxQxN: np.ndarray, grid_hw: tuple[int, int]) -> np.ndarray:
    """The CLS query's attention to the patches, [B, heads, h, w].

    What went to CLS itself and to registers is dropped, so a map does not sum to 1.

    Args:
      attention_BxhxQxN: of `ViT`, query by key; of the queries the first, CLS, suffices.
      grid_hw: (h, w) of the patches, which are the last keys.

    Raises:
      ValueError: there are no h*w patches behind a CLS token.
    """
    attention, (h, w) = np.asarray(attention_BxhxQxN), grid_hw
    if attention.ndim != 4 or not attention.shape[2] or attention.shape[3] <= h * w:
        raise ValueError(
            f"attention has shape {attention.shape}: need [B, heads, Q, N] with N > {h}*{w} patches"
        )
    return attention[:, :, 0, -h * w :].reshape(*attention.shape[:2], h, w)


def keep_mass(attention_hw: np.ndarray, mass: float = 0.6) -> np.ndarray:
    """The patches of highest attention that together hold at least `mass` of it.

    As the reference: in rising order, those whose cumulative share exceeds 1 - mass.

    Args:
      attention_hw: [..., h, w], not negative; leading axes are maps of their own.
      mass: above 0, at most 1.

    Returns:
      bool [..., h, w].

    Raises:
      ValueError: a map is negative, not finite or all 0, or mass is out of range.
    """
    attention = np.asarray(attention_hw, np.float64)
    if attention.ndim < 2 or not attention.size:
        raise ValueError(f"attention has shape {attention.shape}: need [..., h, w]")
    if not 0 < mass <= 1:
        raise ValueError(f"mass is {mass}: allowed is above 0, up to 1")
    flat = attention.reshape(*attention.shape[:-2], -1)
    total = flat.sum(axis=-1, keepdims=True)
    if not (np.isfinite(total).all() and (flat >= 0).all() and (total > 0).all()):
        raise ValueError("attention must be finite, not negative, and not 0 everywhere")
    order = np.argsort(flat, axis=-1, kind="stable")
    cumulative = np.cumsum(np.take_along_axis(flat, order, axis=-1) / total, axis=-1)
    kept = np.zeros(flat.shape, bool)
    # The last sum is 1 but for rounding, and is kept for every mass.
    above = cumulative > 1 - mass
    above[..., -1] = True
    np.put_along_axis(kept, order, above, axis=-1)
    return kept.reshape(attention.shape)


def upsample(mask_hw: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """[..., h, w] to [..., H, W] by the nearest patch; any sizes."""
    rows, columns = (
        ((np.arange(n) + 0.5) * m / n).astype(int)
        for n, m in zip(size, mask_hw.shape[-2:], strict=True)
    )
    return mask_hw[..., rows[:, None], columns]


def has_foreground(mask_HxW: np.ndarray) -> bool:
    """Whether a mask has anything but background, 0, and void, 255."""
    return bool(((mask_HxW != 0) & (mask_HxW != VOID)).any())


def head_jaccard(
    attention_hxhxw: np.ndarray, mask_HxW: np.ndarray, *, mass: float = 0.6
) -> np.ndarray:
    """Jaccard index of each head's `keep_mass` with the foreground, over pixels that are not void.

    Args:
      attention_hxhxw: [heads, h, w].
      mask_HxW: 0 background, 255 void, else foreground; of the area that the attention is of.
      mass: see `keep_mass`.

    Returns:
      float [heads], 0 to 1; NaN if the mask has no foreground.

    Raises:
      ValueError: see `keep_mass`.
    """
    mask = np.asarray(mask_HxW)
    if mask.ndim != 2 or not mask.size or np.ndim(attention_hxhxw) != 3:
        raise ValueError(
            f"attention {np.shape(attention_hxhxw)} and mask {mask.shape}: need [heads, h, w] and "
            "[H, W]"
        )
    foreground, counts = (mask != 0) & (mask != VOID), mask != VOID
    if not has_foreground(mask):
        return np.full(len(attention_hxhxw), np.nan)
    kept = upsample(keep_mass(attention_hxhxw, mass), mask.shape) & counts
    return (kept & foreground).sum(axis=(1, 2)) / (kept | foreground).sum(axis=(1, 2))


def attention_jaccard(
    attention_Nxhxhxw: Sequence[np.ndarray], masks: Sequence[np.ndarray], *, mass: float = 0.6
) -> dict[str, Any]:
    """How well the heads' attention finds the foreground.

    Args:
      attention_Nxhxhxw: [heads, h, w] for each image; sizes may differ, heads may not.
      masks: see `head_jaccard`, one for each image. Those without foreground do not count.
      mass: see `keep_mass`.

    Returns:
      `best_head`: mean over images of the best head of each; `per_head`: mean over images of each
      head; `mean_attention`: of the mean of the heads' maps; `whole_image`: of a mask that covers
      everything, what a map must exceed to be worth something; `images`: that counted.

    Raises:
      ValueError: lengths differ, or no mask has foreground; see `head_jaccard`.
    """
    if len(attention_Nxhxhxw) != len(masks):
        raise ValueError(f"{len(attention_Nxhxhxw)} attention maps for {len(masks)} masks")
    rows, whole = [], []
    for attention, mask in zip(attention_Nxhxhxw, masks, strict=True):
        maps = np.concatenate([attention, np.mean(attention, axis=0, keepdims=True)])
        rows.append(head_jaccard(maps, mask, mass=mass))
        whole.append(head_jaccard(np.ones((1, 1, 1)), mask, mass=1.0)[0])
    scores = np.array([row for row in rows if not np.isnan(row).any()])
    if not len(scores):
        raise ValueError(f"none of {len(masks)} masks has foreground to compare attention with")
    return {
        "best_head": float(scores[:, :-1].max(axis=1).mean()),
        "per_head": scores[:, :-1].mean(axis=0).tolist(),
        "mean_attention": float(scores[:, -1].mean()),
        "whole_image": float(np.nanmean(whole)),
        "images": len(scores),
    }


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
      masks: HxW for each, see `head_jaccard`; or None.
      path: of the PNG.
      mass: see `keep_mass`.

    Raises:
      ValueError: lengths differ; see `keep_mass`.
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
            _outline_mass(axis, keep_mass(values, mass))
        best, label = _best(attention, mean, mask, mass)
        axes[row, -1].imshow(overlay(image, upsample(keep_mass(best, mass), image.shape[:2])))
        box = dict(facecolor="white", alpha=0.8, linewidth=0, pad=1)
        place = dict(transform=axes[row, -1].transAxes, va="bottom", fontsize=7, bbox=box)
        axes[row, -1].text(0.02, 0.03, label, **place)
        foreground = None if mask is None else (mask != 0) & (mask != VOID)
        if foreground is not None and foreground.any():
            outline = upsample(foreground, image.shape[:2])
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
    edges = upsample(kept_hw, (8 * h, 8 * w))
    where = (-0.5, w - 0.5, -0.5, h - 0.5)
    axis.contour(edges, levels=[0.5], colors=_KEPT, linewidths=0.8, extent=where)


def _best(attention, mean, mask, mass) -> tuple[np.ndarray, str]:
    """(the map to show thresholded, what it is)."""
    scores = np.full(1, np.nan) if mask is None else head_jaccard(attention, mask, mass=mass)
    if np.isnan(scores).any():
        return mean, "mean of the heads"
    head = int(scores.argmax())
    return attention[head], f"head {head}: {scores[head]:.2f}"
