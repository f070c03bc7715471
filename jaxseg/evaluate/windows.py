"""Where windows lie on an axis, and what they count where they overlap: of every window user here.

Two ways: `cover` by a stride, every pixel of a window counting, for images in memory (`inference`);
`plan` evenly, on a grid and without the margins that see a window's end, for strips of images of any
size (`tiles`). Each sums in an order of its own, so that results stay what they are to the last bit.
"""

import dataclasses
import itertools

import numpy as np

BLENDS = ("hann", "uniform")


@dataclasses.dataclass(frozen=True)
class Span:
    """One window on one axis.

    Attributes:
      start: where the window begins.
      first: from where on its prediction counts.
      weights: float32, what it counts from `first` on; those of all windows sum to one everywhere.
    """

    start: int
    first: int
    weights: np.ndarray

    @property
    def stop(self) -> int:
        return self.first + len(self.weights)


def cover(length: int, window: int, *, stride: int, blend: str) -> list[Span]:
    """Lays windows on an axis `stride` apart, the last one shifted back to end with it.

    Args:
      length: of the image, at least the window's.
      window: their length.
      stride: at most the window's length, so that no pixel is left out.
      blend: see `window_weights`.

    Raises:
      ValueError: there is no such blend.
    """
    starts = window_starts(length, window, stride)
    weights = window_weights(starts, window, blend)
    return [Span(int(s), int(s), w) for s, w in zip(starts, weights, strict=True)]


def window_starts(length: int, window: int, stride: int) -> np.ndarray:
    """Where the windows on an axis start: `stride` apart, the last one shifted back to end with it."""
    if length <= window:
        return np.zeros(1, int)
    return np.append(np.arange(0, length - window, stride), length - window)


def window_weights(starts: np.ndarray, window: int, blend: str) -> np.ndarray:
    """Weights of the windows on an axis, float32 `windows x window`: in every pixel they sum to 1."""
    if blend not in BLENDS:
        raise ValueError(f"blend is {blend!r}: allowed are {', '.join(BLENDS)}")
    # Half-pixel centres: no weight is 0, so the border of an image has one too.
    profile = np.sin(np.pi * (np.arange(window) + 0.5) / window) ** 2
    profile = profile if blend == "hann" else np.ones(window)
    pixels = starts[:, None] + np.arange(window)
    total = np.bincount(pixels.ravel(), np.tile(profile, len(starts)))
    return (profile / total[pixels]).astype(np.float32)


def plan(
    length: int, window: int, *, overlap: int, margin: int = 0, multiple: int = 1
) -> tuple[list[Span], int]:
    """Lays windows on an axis, evenly, as few as the overlap allows.

    Where two meet, the weight goes over from one to the next like half a cosine, in the middle of
    their overlap and over `overlap - 2 * margin` pixels; so what lies within `margin` of a
    window's end never counts, but at the ends of the image.

    Args:
      length: of the image; windows cover it up to the next multiple.
      window: their length; if the image is shorter it is that, up to the next multiple.
      overlap: least number of pixels that neighbours share.
      margin: pixels that see a window's end: half the receptive field.
      multiple: all windows start at multiples of it.

    Returns:
      (list of `Span`, length of the windows).

    Raises:
      ValueError: the numbers do not fit each other.
    """
    if min(length, window, multiple) < 1 or window % multiple or overlap % multiple:
        raise ValueError(
            f"image of {length}, window {window}, overlap {overlap}: window and overlap must be "
            f"multiples of {multiple}, and an image has pixels"
        )
    if margin < 0 or not 2 * margin <= overlap < window:
        raise ValueError(
            f"overlap {overlap}, window {window}, margin {margin}: allowed are "
            "0 <= 2 * margin <= overlap < window"
        )
    covered = -(-length // multiple) * multiple
    window = min(window, covered)
    spare = (covered - window) // multiple
    gaps = -(-spare * multiple // (window - overlap)) if spare else 0
    starts = [i * spare // gaps * multiple for i in range(gaps)] + [covered - window]
    half = (overlap - 2 * margin) / 2
    middles = [(a + b + window) / 2 for a, b in itertools.pairwise(starts)]

    def rise(middle: float, at: np.ndarray) -> np.ndarray:
        t = np.clip((at + 0.5 - middle) / (2 * half) + 0.5, 0, 1) if half else at + 0.5 > middle
        return np.sin(np.pi / 2 * t) ** 2

    spans = []
    for i, start in enumerate(starts):
        first = int(np.floor(middles[i - 1] - half)) if i else 0
        stop = int(np.ceil(middles[i] + half)) if i < gaps else covered
        at = np.arange(first, stop)
        weights = rise(middles[i - 1], at) if i else np.ones(len(at))
        # A later rise is never above an earlier one, so however they overlap the sum is one.
        weights = weights - rise(middles[i], at) if i < gaps else weights
        spans.append(Span(start, first, weights.astype(np.float32)))
    return spans, window
