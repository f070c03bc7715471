"""Scores of images of any size from a function that scores batches: by windows, at several scales.

Both turn a `Predict` into scores of the images' own size, on the host, and take and return what a
`Predict` does, so that they compose: `multi_scale(partial(sliding_window, predict, ...), x)`. They
average what `predict` gives. Averages should be of probabilities, not of logits: an overconfident
window would otherwise outvote the others.
"""

import itertools
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import jax
import numpy as np

from jaxseg.evaluate.windows import cover
from jaxseg.ops.resize import resize_bilinear

# Float images `B x H x W x 3` in [0, 1] -> scores `B x H x W x K`, an array of NumPy or JAX.
Predict = Callable[[np.ndarray], Any]

_resize = jax.jit(partial(resize_bilinear, antialias=True), static_argnums=1)


def sliding_window(
    predict: Predict,
    image_BxHxWx3: np.ndarray,
    *,
    window: tuple[int, int],
    overlap: float = 0.5,
    stride: tuple[int, int] | None = None,
    blend: str = "hann",
    batch: int = 4,
) -> np.ndarray:
    """Scores of images of any size from overlapping windows, float32 `B x H x W x K`.

    All windows lie inside the image; a smaller image is continued by its border. `predict` only ever
    sees `batch x window x 3`, so it compiles once; the device holds one batch of windows, the host the
    scores.

    Args:
      predict: gives the scores of windows.
      image_BxHxWx3: uint8, or float in [0, 1].
      window: (height, width).
      overlap: share of a window that the next one covers again, in [0, 1).
      stride: pixels from one window to the next, instead of the overlap.
      blend: how windows are weighted where they overlap, before the weights are divided by their
        sum: "hann" (least at the window's border, so that there are no seams) or "uniform".
      batch: windows at a time; the last ones are filled up with repetitions.

    Raises:
      ValueError: an option is out of its range, or the scores do not have the window's size.
    """
    height, width = _check_image(image_BxHxWx3)
    stride = _strides(window, overlap, stride)
    if batch < 1:
        raise ValueError(f"batch is {batch}: it must be at least 1")
    image = _pad(image_BxHxWx3, tuple(map(max, (height, width), window)))
    rows, columns = (
        cover(n, w, stride=s, blend=blend)
        for n, w, s in zip(image.shape[1:3], window, stride, strict=True)
    )
    places = list(itertools.product(range(len(image)), rows, columns))
    out = None
    for group in _groups(places, batch):
        parts = [image[b, y.start : y.stop, x.start : x.stop] for b, y, x in group]
        parts += [parts[-1]] * (batch - len(group))
        scores = _scores(predict, _to_float(np.stack(parts)))
        if out is None:
            out = np.zeros((*image.shape[:3], scores.shape[-1]), np.float32)
        for (b, y, x), part in zip(group, scores, strict=False):
            weighted = part * y.weights[:, None, None] * x.weights[None, :, None]
            out[b, y.start : y.stop, x.start : x.stop] += weighted
    return out[:, :height, :width]


def multi_scale(
    predict: Predict,
    image_BxHxWx3: np.ndarray,
    *,
    scales: Sequence[float] = (0.5, 0.75, 1.0, 1.25, 1.5),
    flip: bool = True,
    multiple: int = 16,
) -> np.ndarray:
    """Mean of the scores at several scales, and of the mirrored images, float32 `B x H x W x K`.

    Args:
      predict: gives the scores; it sees one size for each scale.
      image_BxHxWx3: uint8, or float in [0, 1].
      scales: factors on height and width. Images and scores are resized bilinearly, with
        antialiasing when they shrink.
      flip: whether to add, at each scale, the scores of the images mirrored left to right.
      multiple: the resized heights and widths are rounded to multiples of it, at least one.

    Raises:
      ValueError: there is no scale, or one is not positive, or `multiple` is not.
    """
    size = _check_image(image_BxHxWx3)
    if not scales or min(scales) <= 0 or multiple < 1:
        raise ValueError(f"scales {scales}, multiple {multiple}: they must be positive, and some")
    image = _to_float(image_BxHxWx3)
    total = 0.0
    for scale in scales:
        seen = tuple(max(round(n * scale / multiple), 1) * multiple for n in size)
        resized = np.asarray(_resize(image, seen))
        scores = _scores(predict, resized)
        if flip:
            mirrored = _scores(predict, np.ascontiguousarray(resized[:, :, ::-1]))
            scores = 0.5 * (scores + mirrored[:, :, ::-1])
        total = total + np.asarray(_resize(scores, size))
    return total / len(scales)


def _scores(predict: Predict, image_BxHxWx3: np.ndarray) -> np.ndarray:
    scores = np.asarray(predict(image_BxHxWx3), np.float32)
    if scores.ndim != 4 or scores.shape[:3] != image_BxHxWx3.shape[:3]:
        raise ValueError(
            f"the scores of images {image_BxHxWx3.shape} have the shape {scores.shape}: "
            "they must be [B, H, W, K] of the same B, H and W"
        )
    return scores


def _check_image(image: np.ndarray) -> tuple[int, int]:
    kind = np.dtype(image.dtype)
    if image.ndim != 4 or not (kind == np.uint8 or np.issubdtype(kind, np.floating)):
        raise ValueError(
            f"expected uint8 or float images of shape [B, H, W, 3], got {kind} of {image.shape}"
        )
    return image.shape[1:3]


def _to_float(image: np.ndarray) -> np.ndarray:
    image = np.asarray(image)
    return image.astype(np.float32) / (255.0 if image.dtype == np.uint8 else 1.0)


def _pad(image: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Continues the border of images below and to the right, up to `size`."""
    (h, w), image = image.shape[1:3], np.asarray(image)
    return np.pad(image, ((0, 0), (0, size[0] - h), (0, size[1] - w), (0, 0)), mode="edge")


def _strides(window, overlap, stride) -> tuple[int, int]:
    if stride is None:
        if not 0 <= overlap < 1:
            raise ValueError(f"overlap is {overlap}: it must lie in [0, 1)")
        stride = tuple(max(round(n * (1 - overlap)), 1) for n in window)
    if not all(1 <= s <= n for s, n in zip(stride, window, strict=True)):
        raise ValueError(f"stride {stride}: it must lie between 1 and the window, {window}")
    return stride


def _groups(items: Sequence, size: int) -> Iterator[Sequence]:
    for start in range(0, len(items), size):
        yield items[start : start + size]
