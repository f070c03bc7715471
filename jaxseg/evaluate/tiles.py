"""Prediction in overlapping windows, for images of any size in bounded memory and without seams."""

import itertools
from collections.abc import Callable, Iterator

import numpy as np

from jaxseg.evaluate.windows import Span, plan


def default_overlap(window: tuple[int, int], stride: int) -> tuple[int, int]:
    """(overlap, margin) for windows of (height, width) of a network that sees its whole window.

    Three eighths of the shorter side, in whole strides; half of that blends, the rest is margin.
    """
    overlap = min(window) * 3 // 8 // stride * stride
    overlap = overlap or (stride if min(window) > stride else 0)
    return overlap, overlap // 4


def predict_tiles(
    read_rows: Callable[[int, int], np.ndarray],
    size: tuple[int, int],
    predict_windows: Callable[[np.ndarray], np.ndarray],
    *,
    window: tuple[int, int],
    overlap: int,
    margin: int = 0,
    multiple: int = 1,
    batch: int = 1,
    finish: Callable[[np.ndarray], np.ndarray] = lambda block: block,
) -> Iterator[np.ndarray]:
    """Predicts an image in windows; gives the result from top to bottom.

    The windows' predictions are blended (see `plan`). Where `margin` is at least half the network's
    receptive field, the result is that of the whole image at once.

    Memory: beside one row of windows of the image, and what `finish` makes of it, `overlap - 2 *
    margin` rows of K floats. Images are continued, by their last pixels, to the next `multiple`.

    Args:
      read_rows: `read_rows(start, stop)` gives uint8 `(stop - start) x W x 3`; it is asked for every
        row once, from top to bottom.
      size: (height, width) of the image.
      predict_windows: uint8 `batch x h x w x 3` to float `batch x h x w x K`; h and w are `window`,
        or less if the image is smaller. May return while it computes, as JAX does.
      window: (height, width).
      overlap, margin, multiple: see `plan`; of rows and of columns.
      batch: number of windows predicted together; the last batch is filled up with zeros.
      finish: turns final predictions, float32 `h x w x K` of any h and w, into what is kept of
        them, `h x w [x C]` of any dtype: e.g. the class ids.

    Yields:
      Strips of what `finish` returns, `rows x width [x C]`: together, the image.

    Raises:
      ValueError: the numbers do not fit each other.
    """
    options = {"overlap": overlap, "margin": margin, "multiple": multiple}
    rows, height = plan(size[0], window[0], **options)
    columns, width = plan(size[1], window[1], **options)
    windows = _windows(read_rows, size, rows, columns, (height, width))
    predictions = _predictions(windows, predict_windows, batch)
    above = None
    for row, row_after in itertools.zip_longest(rows, rows[1:]):
        ready = (row_after.first if row_after else row.stop) - row.first
        strip, below = [], []
        for block in _blend_columns(predictions, row, columns):
            if above is not None:
                shared = above.pop(0)
                block[: len(shared)] += shared
            strip.append(finish(block[:ready]))
            below.append(block[ready:].copy())
        above = below
        strip = np.concatenate(strip, axis=1)
        yield strip[: size[0] - row.first, : size[1]]


def _blend_columns(
    predictions: Iterator[np.ndarray], row: Span, columns: list[Span]
) -> Iterator[np.ndarray]:
    """Yields, from left to right, the weighted sums of one row of windows, `h x w x K`."""
    from_left = None
    for column, column_after in itertools.zip_longest(columns, columns[1:]):
        top, left = row.first - row.start, column.first - column.start
        block = next(predictions)[top : top + len(row.weights), left : left + len(column.weights)]
        block = block * (row.weights[:, None] * column.weights)[..., None]
        if from_left is not None:
            block[:, : from_left.shape[1]] += from_left
        ready = (column_after.first if column_after else column.stop) - column.first
        yield block[:, :ready]
        from_left = block[:, ready:]


def _windows(read_rows, size, rows, columns, window) -> Iterator[np.ndarray]:
    """Yields every window of the image, row by row, as uint8 `h x w x 3`."""
    height, width = size
    (window_height, window_width), read = window, 0
    strip = None
    for row in rows:
        bottom = row.start + window_height
        fresh = read_rows(read, min(bottom, height))
        padding = (0, max(0, bottom - height)), (0, columns[-1].stop - width), (0, 0)
        fresh = np.pad(fresh, padding, mode="edge") if np.any(padding) else fresh
        kept = None if strip is None else strip[len(strip) - (read - row.start) :]
        strip = fresh if kept is None else np.concatenate([kept, fresh])
        read = min(bottom, height)
        for column in columns:
            yield strip[:, column.start : column.start + window_width]


def _predictions(windows, predict_windows, batch: int) -> Iterator[np.ndarray]:
    """Yields the float32 prediction of every window; computes the next batch meanwhile."""
    pending, count = None, 0
    while chunk := list(itertools.islice(windows, batch)):
        images = np.zeros((batch, *chunk[0].shape), np.uint8)
        images[: len(chunk)] = chunk
        ahead = predict_windows(images)
        if pending is not None:
            yield from np.asarray(pending, np.float32)[:count]
        pending, count = ahead, len(chunk)
    if pending is not None:
        yield from np.asarray(pending, np.float32)[:count]
