"""COCO's two ways to store a region, polygons and run lengths, as masks: the same pixels as its own.

A region is (top, left, bool crop): where its bounding box lies in the image, and what is set in it.
"""

from collections.abc import Sequence

import numpy as np

_FINE = 5  # polygons are drawn on a grid this many times as fine as the pixels
_FARTHEST = 1e9  # coordinates beyond this are damage

Region = tuple[int, int, np.ndarray]


def polygon(numbers: Sequence[float]) -> np.ndarray:
    """Makes the float64 Nx2 array of (x, y) of a stored polygon x0, y0, x1, y1, ...

    Raises:
      ValueError: if these are not three or more points, or a coordinate is not finite or beyond 1e9.
    """
    points = np.array(numbers, np.float64)
    if points.ndim != 1 or len(points) % 2 or len(points) < 6:
        raise ValueError(
            f"a polygon has {points.size} coordinates: allowed are x, y of three or more points, so "
            "an even number of at least 6"
        )
    if not (np.abs(points) <= _FARTHEST).all():
        raise ValueError(f"a polygon has a coordinate that is not within +-{_FARTHEST:g}")
    return points.reshape(-1, 2)


def fill(polygons: Sequence[np.ndarray], size: tuple[int, int]) -> Region:
    """The union of polygons, each filled by COCO's rule; what is outside the image is clipped.

    The rule: corners are rounded to fifths of a pixel and joined by digital lines (one point for each
    step of the longer axis). Where such an outline crosses the middle of a pixel column, the pixels
    of that column change between outside and inside, from the first one whose middle is not above
    the crossing. So a polygon is filled by the even-odd rule, with its border off by a quarter of a pixel at
    most.

    Args:
      polygons: what `polygon` returns; pixel (row, column) covers [column, column + 1] x [row,
        row + 1].
      size: (height, width) of the image.
    """
    pieces = [piece for polygon in polygons if (piece := _fill_one(polygon, size))[2].size]
    if not pieces:
        return 0, 0, np.zeros((0, 0), bool)
    top, left = min(p[0] for p in pieces), min(p[1] for p in pieces)
    bottom = max(t + crop.shape[0] for t, _, crop in pieces)
    right = max(le + crop.shape[1] for _, le, crop in pieces)
    union = np.zeros((bottom - top, right - left), bool)
    for t, le, crop in pieces:
        union[t - top :, le - left :][: crop.shape[0], : crop.shape[1]] |= crop
    return top, left, union


def _fill_one(polygon: np.ndarray, size: tuple[int, int]) -> Region:
    height, width = size
    column, line_row = _crossings((_FINE * polygon + 0.5).astype(np.int64), width)
    if not len(column):
        return 0, 0, np.zeros((0, 0), bool)
    row = np.clip(-((_FINE // 2 - line_row) // _FINE), 0, height)
    left, top = column.min(), row.min()
    shape = column.max() - left + 1, row.max() - top + 1
    place = (column - left) * shape[1] + row - top
    changes = np.bincount(place, minlength=shape[0] * shape[1]).reshape(shape) % 2 == 1
    inside = np.logical_xor.accumulate(changes, axis=1)[:, :-1]
    return int(top), int(left), inside.T


def _crossings(corners: np.ndarray, width: int) -> tuple[np.ndarray, np.ndarray]:
    """Where the outline through fine `corners` crosses the middles of columns 0 .. width - 1.

    The middle of column c is between fine columns 5c + 2 and 5c + 3. Its crossing has the smaller of
    the outline's fine rows in these two.

    Returns:
      (pixel column, fine row) of all crossings.
    """
    ends = np.stack([corners, np.roll(corners, -1, axis=0)])
    long_x, long_y = np.abs(ends[0] - ends[1]).T
    steep = long_y > long_x
    # Both directions of an edge give the same points: it is drawn upwards along its longer axis.
    backwards = np.where(steep, ends[0, :, 1] > ends[1, :, 1], ends[0, :, 0] > ends[1, :, 0])
    (x, y), (end_x, end_y) = np.where(backwards[:, None], ends[::-1], ends).transpose(0, 2, 1)
    middle = _FINE // 2
    first = np.maximum(-((middle - np.minimum(x, end_x)) // _FINE), 0)
    last = np.minimum((np.maximum(x, end_x) - middle - 1) // _FINE, width - 1)
    count = np.maximum(last - first + 1, 0)
    edge = np.repeat(np.arange(len(x)), count)
    column = first[edge] + np.arange(len(edge)) - np.repeat(np.cumsum(count) - count, count)
    slope = np.where(steep, end_x - x, end_y - y) / np.maximum(np.maximum(long_x, long_y), 1)
    x, y, slope, steep = x[edge], y[edge], slope[edge], steep[edge]
    line = _FINE * column + middle
    return column, np.where(steep, _steep(x, y, slope, line), _flat(x, y, slope, line))


def _flat(x: np.ndarray, y: np.ndarray, slope: np.ndarray, line: np.ndarray) -> np.ndarray:
    """The smaller of the fine rows of an edge of one point per column, in columns line, line + 1."""
    before, after = ((y + slope * (at - x) + 0.5).astype(np.int64) for at in (line, line + 1))
    return np.minimum(before, after)


def _steep(x: np.ndarray, y: np.ndarray, slope: np.ndarray, line: np.ndarray) -> np.ndarray:
    """The last fine row before an edge of one point per row steps between line and line + 1."""

    def past(step):
        at = (x + slope * step + 0.5).astype(np.int64)
        return np.where(slope > 0, at > line, at <= line)

    safe = np.where(slope == 0, 1, slope)
    step = np.ceil((line + 0.5 - x) / safe).astype(np.int64)  # right, but for rounding
    step -= past(step - 1)
    step += ~past(step)
    return y + step - 1


def run_lengths(counts: Sequence[int] | str) -> np.ndarray:
    """Decodes COCO's run lengths, int64: a list as it is, or a string.

    In a string each character but the last of a number holds its code - 48 in 6 bits: the sixth says
    that the number goes on, the others are five of its bits, low ones first, two's complement. From
    the fourth number on, each is the difference to the one two before.

    Raises:
      ValueError: if they are no whole numbers >= 0, or the string is damaged.
    """
    if isinstance(counts, str):
        counts = _differences_added(_numbers(counts))
    if not all(isinstance(c, int) and not isinstance(c, bool) and c >= 0 for c in counts):
        raise ValueError("run lengths must be whole numbers >= 0")
    return np.array(counts, np.int64)


def _numbers(text: str) -> list[int]:
    numbers, value, shift = [], 0, 0
    for character in text:
        code = ord(character) - 48
        if not 0 <= code < 64:
            raise ValueError(f"character {character!r} in compressed run lengths")
        value |= (code & 31) << shift
        shift += 5
        if not code & 32:
            numbers.append(value - (1 << shift) if code & 16 else value)
            value, shift = 0, 0
    if shift:
        raise ValueError("compressed run lengths end within a number")
    return numbers


def _differences_added(numbers: list[int]) -> list[int]:
    for i in range(3, len(numbers)):
        numbers[i] += numbers[i - 2]
    return numbers


def runs_region(lengths: np.ndarray, size: tuple[int, int]) -> Region:
    """The region of run lengths that add up to the image: column by column, the first run unset."""
    height, width = size
    inside = np.repeat(np.arange(len(lengths)) % 2 == 1, lengths).reshape(width, height).T
    rows, columns = inside.any(axis=1).nonzero()[0], inside.any(axis=0).nonzero()[0]
    if not len(rows):
        return 0, 0, np.zeros((0, 0), bool)
    top, left = int(rows[0]), int(columns[0])
    return top, left, inside[top : rows[-1] + 1, left : columns[-1] + 1].copy()
