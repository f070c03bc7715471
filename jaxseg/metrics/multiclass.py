"""Metrics of multi-class segmentation, as sums that merge by addition and are divided once at the end.

`image_counts` runs on the device and counts for each image; the counts of images, batches, devices
and processes add up (`jaxseg.metrics.add`); `summarize` runs on the host and divides.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxseg.ops.boundary import boundary_width


def _histogram(cells_BxHxW: jax.Array, length: int) -> jax.Array:
    """How often each of 0..length-1 occurs in each image, int32 `B x length`."""

    # Scattered additions: exact, and on a CPU many times as fast as one-hot products or sorting.
    def one_image(cells_N: jax.Array) -> jax.Array:
        return jnp.zeros(length, jnp.int32).at[cells_N].add(1, mode="drop")

    return jax.vmap(one_image)(cells_BxHxW.reshape(len(cells_BxHxW), -1))


def confusion(
    prediction_BxHxW: jax.Array, labels_BxHxW: jax.Array, valid_BxHxW: jax.Array, *, classes: int
) -> jax.Array:
    """Confusion matrix of each image, int32 `B x K x K` (true class, predicted class).

    Args:
      prediction_BxHxW, labels_BxHxW: integer class ids.
      valid_BxHxW: boolean; a pixel counts where it holds and both ids lie in 0..K-1.
      classes: K.
    """
    p, t = (_ids(ids, valid_BxHxW, classes) for ids in (prediction_BxHxW, labels_BxHxW))
    cells = jnp.where((p < classes) & (t < classes), t * classes + p, classes**2)
    return _histogram(cells, classes**2).reshape(-1, classes, classes)


def _ids(ids_BxHxW: jax.Array, valid_BxHxW: jax.Array, classes: int) -> jax.Array:
    """Class ids as int32, with `classes` where void: a class of its own that counts nowhere."""
    ids = ids_BxHxW.astype(jnp.int32)
    return jnp.where(valid_BxHxW.astype(bool) & (ids >= 0) & (ids < classes), ids, classes)


def _by_class(mask_BxHxW: jax.Array, ids_BxHxW: jax.Array, classes: int) -> jax.Array:
    """Number of the mask's pixels of each class, int32 `B x K`."""
    return _histogram(jnp.where(mask_BxHxW, ids_BxHxW, classes), classes)


def _window(x_BxHxW, radius: int, start, combine, *, outside) -> jax.Array:
    """Combines each square of side `2 radius + 1`; the image is surrounded by `outside`."""
    side = 2 * radius + 1
    x = jnp.pad(x_BxHxW, ((0, 0), (radius, radius), (radius, radius)), constant_values=outside)
    start = jnp.asarray(start, x.dtype)
    for window in ((1, side, 1), (1, 1, side)):
        x = lax.reduce_window(x, start, combine, window, (1, 1, 1), "valid")
    return x


def _boundary(ids_BxHxW: jax.Array, width: int, classes: int) -> jax.Array:
    """Pixels that are a boundary pixel of their own class's mask, for all classes at once.

    A pixel survives the erosion of its class's mask just where the whole window has its class, so
    that one minimum and one maximum take the place of K erosions.
    """
    ids = ids_BxHxW.astype(jnp.int16)  # a third of the time of int32 on a CPU
    least = _window(ids, width, classes, lax.min, outside=-1)
    most = _window(ids, width, -1, lax.max, outside=-1)
    return least != most


def _near(contour_BxHxW: jax.Array, ids_BxHxW, other_ids_BxHxW, radius: int, classes: int):
    """Pixels of `other_ids` that have a contour pixel of their own class within the window."""
    near = jnp.zeros(contour_BxHxW.shape, bool)
    for first in range(0, classes, 32):  # one bit a class: 32 dilations at once
        bit, other = ids_BxHxW - first, other_ids_BxHxW - first
        inside = contour_BxHxW & (bit >= 0) & (bit < 32)
        bits = jnp.where(inside, jnp.uint32(1) << jnp.clip(bit, 0, 31).astype(jnp.uint32), 0)
        bits = _window(bits.astype(jnp.uint32), radius, 0, lax.bitwise_or, outside=0)
        hit = (bits >> jnp.clip(other, 0, 31).astype(jnp.uint32)) & 1
        near |= (hit == 1) & (other >= 0) & (other < 32)
    return near


def boundary_widths(height: int, width: int) -> tuple[int, int]:
    """(width of boundaries, distance of contours that still match) in an image of this size."""
    return boundary_width(height, width), boundary_width(height, width, ratio=0.0075)


def boundary_counts(
    prediction_BxHxW: jax.Array,
    labels_BxHxW: jax.Array,
    valid_BxHxW: jax.Array,
    *,
    classes: int,
    width: int | None = None,
) -> jax.Array:
    """Intersection and union of each class's predicted and true boundary, int32 `B x K x 2`.

    Boundary IoU of Cheng et al., CVPR 2021: the pixels of a class's mask within 2 % of the diagonal
    of its contour. Void pixels and what is outside the image belong to no mask, as in
    `metrics.image_counts`. The arguments are those of `confusion`; `width` stands in for the 2 %.
    """
    p, t = (_ids(ids, valid_BxHxW, classes) for ids in (prediction_BxHxW, labels_BxHxW))
    width = width or boundary_widths(*p.shape[1:])[0]
    edge_p, edge_t = (_boundary(ids, width, classes) for ids in (p, t))
    both = _by_class(edge_p & edge_t & (p == t), t, classes)
    either = _by_class(edge_p, p, classes) + _by_class(edge_t, t, classes) - both
    return jnp.stack([both, either], -1)


def contour_counts(
    prediction_BxHxW: jax.Array,
    labels_BxHxW: jax.Array,
    valid_BxHxW: jax.Array,
    *,
    classes: int,
    radius: int | None = None,
) -> jax.Array:
    """Counts for the boundary F score of each class, int32 `B x K x 4`.

    After Csurka et al., BMVC 2013: predicted contour pixels near a true one of the class, predicted
    contour pixels, true contour pixels near a predicted one, true contour pixels. Contours are one
    pixel wide and inside the mask; near is within 0.75 % of the diagonal on both axes. The arguments
    are those of `confusion`; `radius` stands in for the 0.75 %.
    """
    p, t = (_ids(ids, valid_BxHxW, classes) for ids in (prediction_BxHxW, labels_BxHxW))
    radius = radius or boundary_widths(*p.shape[1:])[1]
    contour_p, contour_t = (_boundary(ids, 1, classes) for ids in (p, t))
    counts = [
        _by_class(contour_p & _near(contour_t, t, p, radius, classes), p, classes),
        _by_class(contour_p, p, classes),
        _by_class(contour_t & _near(contour_p, p, t, radius, classes), t, classes),
        _by_class(contour_t, t, classes),
    ]
    return jnp.stack(counts, -1)


def course_multiclass(confusion_BxKxK: jax.Array, *, background: int = 0) -> jax.Array:
    """Sums for the Freiburg course's multi-class mIoU, float32 `B x 2` (value, 1 if it counts).

    An image's value is the mean over the classes other than background that occur in its truth or
    prediction of `intersection / (union + 1)`; the 1 is the course's. Images without such a class
    do not count (the course's data has none).
    """
    hit = jnp.diagonal(confusion_BxKxK, axis1=1, axis2=2)
    union = confusion_BxKxK.sum(1) + confusion_BxKxK.sum(2) - hit
    counted = (union > 0) & (jnp.arange(hit.shape[-1]) != background)
    total = jnp.where(counted, hit / (union + 1.0), 0.0).sum(-1)
    number = counted.sum(-1)
    return jnp.stack([total / jnp.maximum(number, 1), (number > 0).astype(jnp.float32)], -1)


def course_attention(intersection_BxQ: jax.Array, union_BxQ: jax.Array) -> jax.Array:
    """Sums for the course's class-conditioned mIoU, float32 `B x 2` (value, 1).

    An image's value pools the foreground of its Q queries: `sum intersections / (sum unions + 1)`;
    the 1 is the course's, by which an image without any foreground has the value 0.
    """
    value = intersection_BxQ.sum(-1) / (union_BxQ.sum(-1) + 1.0)
    return jnp.stack([value, jnp.ones_like(value)], -1)


def image_counts(
    prediction_BxHxW: jax.Array,
    labels_BxHxW: jax.Array,
    valid_BxHxW: jax.Array,
    *,
    classes: int,
    background: int | None = None,
    widths: tuple[int, int] | None = None,
) -> dict[str, jax.Array]:
    """All counts of each image, with a leading `B`: what `summarize` takes, summed over images.

    `confusion`, `boundary`, `contour` and, where there is a background class, `course_multiclass`.
    An image in larger arrays, with void around it, counts as it does alone if `widths` are the
    `boundary_widths` of its own size.
    """
    arguments = (prediction_BxHxW, labels_BxHxW, valid_BxHxW)
    width, radius = widths or (None, None)
    counts = {
        "confusion": confusion(*arguments, classes=classes),
        "boundary": boundary_counts(*arguments, classes=classes, width=width),
        "contour": contour_counts(*arguments, classes=classes, radius=radius),
    }
    if background is not None:
        counts["course_multiclass"] = course_multiclass(counts["confusion"], background=background)
    return counts


def _ratio(numerator: float, denominator: float) -> float | None:
    return float(numerator / denominator) if denominator else None


def _mean(values: Sequence[float | None]) -> float | None:
    present = [v for v in values if v is not None]
    return sum(present) / len(present) if present else None


def _boundary_f(near_p: int, p: int, near_t: int, t: int) -> float | None:
    if not p or not t:
        return 0.0 if p or t else None
    precision, recall = near_p / p, near_t / t
    return float(2 * precision * recall / (precision + recall)) if near_p else 0.0


def summarize(
    sums: Mapping[str, np.ndarray], classes: Sequence[str], *, background: int | None
) -> dict[str, Any]:
    """Divides the sums of a whole split.

    Args:
      sums: `confusion` `K x K`; and, where they are to be reported, `boundary` `K x 2`, `contour`
        `K x 4`, `course_multiclass` and `course_attention` `2`, `loss` `2` (sum and number), `images`.
      classes: K names.
      background: id of the background class, or None where there is none.

    Returns:
      Plain Python values, None where nothing is there to divide by. A class is absent (`absent`)
      if it occurs neither in truth nor in prediction: it is in no mean, and its scores are None.
      `miou`, `f1`, `boundary_iou` and `boundary_f` are means over the others, so that a class that
      is only predicted counts as 0 (VOC's convention); `mean_accuracy` and `recall` over the classes
      with true pixels, `precision` over those with predicted ones. `fwiou` weighs the IoUs by true
      pixels. `course_*_miou` are the Freiburg course's own definitions.

    Raises:
      ValueError: sums that are not of K classes.
    """
    table = np.asarray(sums["confusion"])
    if table.shape != (len(classes), len(classes)):
        raise ValueError(f"a confusion matrix {table.shape} for {len(classes)} classes")
    hit, true, predicted = (
        a.astype(np.float64) for a in (table.diagonal(), table.sum(1), table.sum(0))
    )
    union = true + predicted - hit
    rows = []
    for c in range(len(classes)):
        recall = _ratio(hit[c], true[c])
        row = {
            "iou": _ratio(hit[c], union[c]),
            "accuracy": recall,
            "precision": _ratio(hit[c], predicted[c]),
            "recall": recall,
            "f1": _ratio(2 * hit[c], true[c] + predicted[c]),
            "pixels": int(true[c]),
        }
        if "boundary" in sums:
            row["boundary_iou"] = _ratio(*np.asarray(sums["boundary"])[c])
        if "contour" in sums:
            row["boundary_f"] = _boundary_f(*np.asarray(sums["contour"])[c])
        rows.append(row)

    def mean(key: str) -> float | None:
        return _mean([row[key] for row in rows])

    result = {"images": int(sums["images"])} if "images" in sums else {}
    if "loss" in sums:
        result["loss"] = _ratio(*sums["loss"])
    result["miou"] = mean("iou")
    if background is not None:
        others = [row["iou"] for c, row in enumerate(rows) if c != background]
        result["miou_without_background"] = _mean(others)
    present = union > 0
    weighted = (true[present] * hit[present] / union[present]).sum()
    result |= {
        "pixel_accuracy": _ratio(hit.sum(), true.sum()),
        "mean_accuracy": mean("accuracy"),
        "fwiou": _ratio(weighted, true.sum()),
        **{key: mean(key) for key in ("precision", "recall", "f1")},
        **{key: mean(key) for key in ("boundary_iou", "boundary_f") if key in rows[0]},
    }
    for name in ("course_multiclass", "course_attention"):
        if name in sums:
            result[f"{name}_miou"] = _ratio(*sums[name])
    result["absent"] = [name for name, here in zip(classes, present, strict=True) if not here]
    result["per_class"] = dict(zip(classes, rows, strict=True))
    result["confusion"] = table.astype(int).tolist()
    return result
