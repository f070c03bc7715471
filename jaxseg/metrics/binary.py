"""Metrics of binary segmentation, as sums that merge by addition and are divided once at the end.

`counts` runs on the device and gives a dict of sums for each category; the sums of batches, devices
and processes add up; `summarize` runs on the host and divides.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxseg.ops.boundary import boundary_width, mask_boundary


def image_counts(
    prediction_BxHxW: jax.Array, mask_BxHxW: jax.Array, valid_BxHxW: jax.Array
) -> dict[str, jax.Array]:
    """Counts for each image.

    Args:
      prediction_BxHxW: boolean, predicted foreground.
      mask_BxHxW: boolean, true foreground.
      valid_BxHxW: boolean, the pixels that count.

    Returns:
      `confusion` int32 `B x 2 x 2` (true class, predicted class) and `boundary` int32 `B x 2`
      (intersection and union of the two boundaries, Cheng et al. 2021, width 2 % of the diagonal).
    """
    p, t, v = (a.astype(bool) for a in (prediction_BxHxW, mask_BxHxW, valid_BxHxW))
    cells = [(~t & ~p), (~t & p), (t & ~p), (t & p)]
    confusion = jnp.stack([(c & v).sum((1, 2), dtype=jnp.int32) for c in cells], -1)
    width = boundary_width(*p.shape[1:])
    edge_p, edge_t = mask_boundary(p & v, width), mask_boundary(t & v, width)
    both = (edge_p & edge_t).sum((1, 2), dtype=jnp.int32)
    either = (edge_p | edge_t).sum((1, 2), dtype=jnp.int32)
    return {"confusion": confusion.reshape(-1, 2, 2), "boundary": jnp.stack([both, either], -1)}


def add(a: Mapping[str, np.ndarray] | None, b: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Adds two sets of sums on the host, in int64 and float64, so that no count overflows."""
    wide = {
        k: np.asarray(v).astype(np.float64 if np.asarray(v).dtype.kind == "f" else np.int64)
        for k, v in b.items()
    }
    return wide if a is None else {k: a[k] + wide[k] for k in wide}


def _ratio(numerator: float, denominator: float) -> float | None:
    return float(numerator / denominator) if denominator else None


def _mean(values: Sequence[float | None]) -> float | None:
    present = [v for v in values if v is not None]
    return sum(present) / len(present) if present else None


def scores(confusion_2x2: np.ndarray) -> dict[str, float | None]:
    """Scores of one confusion matrix (true class, predicted class; background first).

    `iou`, `precision` and `recall` are means over background and foreground (a class that occurs
    neither in truth nor in prediction is left out); `foreground_*` are those of the object alone.
    A score without any pixel to count is None.
    """
    c = np.asarray(confusion_2x2, np.float64)
    hit, true, predicted = np.diag(c), c.sum(1), c.sum(0)
    iou = [_ratio(h, t + p - h) for h, t, p in zip(hit, true, predicted, strict=True)]
    precision = [_ratio(h, p) for h, p in zip(hit, predicted, strict=True)]
    recall = [_ratio(h, t) for h, t in zip(hit, true, strict=True)]
    return {
        "accuracy": _ratio(hit.sum(), c.sum()),
        "iou": _mean(iou),
        "foreground_iou": iou[1],
        "precision": _mean(precision),
        "recall": _mean(recall),
        "foreground_precision": precision[1],
        "foreground_recall": recall[1],
    }


def summarize(sums: Mapping[str, np.ndarray], categories: Sequence[str]) -> dict[str, Any]:
    """Divides the sums of a whole split.

    Args:
      sums: for each of the C categories `confusion` `C x 2 x 2`, `boundary` `C x 2`, `loss` `C x 2`
        (sum and normaliser), `images` `C`; a key with the prefix `coarse_` holds the same at the
        token grid, where the model predicts there.
      categories: C names.

    Returns:
      The pooled scores, and the same under `categories` for each category with images.
    """

    def one(rows) -> dict[str, Any]:
        pick = {k: np.asarray(v)[rows].sum(0) for k, v in sums.items()}
        result = {
            "images": int(pick["images"]),
            "loss": _ratio(*pick["loss"]),
            **scores(pick["confusion"]),
            "boundary_iou": _ratio(*pick["boundary"]),
        }
        if "coarse_confusion" in pick:
            result["coarse"] = scores(pick["coarse_confusion"])
        return result

    everything = one(np.arange(len(categories)))
    present = [i for i in range(len(categories)) if sums["images"][i]]
    everything["categories"] = {categories[i]: one(np.array([i])) for i in present}
    return everything
