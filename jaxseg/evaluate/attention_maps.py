"""What the CLS token looks at in the last block: maps, their mass, and their Jaccard index.

After "visualize_attention" and the VOC12 Jaccard of Caron et al., ICCV 2021: a head's mask is the
patches that hold 60 % of its attention, and the best head counts for each image. All that is not
background counts as one object, where VOC12's are taken one by one.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

VOID = 255


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
