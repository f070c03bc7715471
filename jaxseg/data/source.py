"""What a data source is, and how its examples get one common size.

The functions `names_of`, `categories_of`, `sizes_of` and `example_of` are the only ones that ask
what a source has beyond its length and its examples.
"""

import logging
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Protocol

import numpy as np
from PIL import Image

from jaxseg.data.image_files import DataError
from jaxseg.ops import geometry

_LOG = logging.getLogger(__name__)
_LONG_SIDE = 480  # of the automatic size, when images differ
_THREADS = 16  # that find sizes


class Source(Protocol):
    """Examples by index. Reading the same index twice gives the same example, from any thread.

    A source may have more, which is looked up by the functions below:
      `names`: of the values 0, 1, 2, ... in its masks. Without, they are 0 (background) and 1.
      `categories`: the names of its examples' categories. Without, all are "object".
      `sizes() -> Sequence[(height, width)]` of all examples. Without, every image is read for them.
    """

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Mapping[str, Any]:
        """image uint8 HxWx3; mask uint8 HxW of class ids and 255 (void), absent if the source has none;
        category int, an index into `categories` (-1 for none), 0 if absent; name str, unique within
        the source, the index if absent. Detectors also take instances, int32 HxW of numbers from 1 and
        0 where there is none, and boxes, float32 Nx4 (x0, y0, x1, y1 in pixels; rows of 0 are none)."""


class Splits(Protocol):
    """A data set: its sources by the names of the splits."""

    def split(self, name: str) -> Source:
        """Raises DataError if there is no such split."""


def names_of(source: Source) -> tuple[str, ...] | None:
    """The names of the values in a source's masks, None where it does not say."""
    names = getattr(source, "names", None)
    return None if names is None else tuple(names)


def categories_of(source: Source) -> tuple[str, ...]:
    """The names of the examples' categories."""
    categories = getattr(source, "categories", None)
    return ("object",) if categories is None else tuple(categories)


def sizes_of(source: Source) -> list[tuple[int, int]]:
    """(height, width) of all examples, by the source's `sizes`, or else from every image."""
    if not hasattr(source, "sizes"):
        return _read_sizes(source, range(len(source)))
    sizes = [(int(height), int(width)) for height, width in source.sizes()]
    if len(sizes) != len(source):
        raise DataError(f"the source's sizes() gives {len(sizes)} sizes of {len(source)} examples")
    return sizes


def _read_sizes(source: Source, indices: Iterable[int]) -> list[tuple[int, int]]:
    with ThreadPoolExecutor(_THREADS) as pool:
        return list(pool.map(lambda i: example_of(source, i)["image"].shape[:2], indices))


def example_of(source: Source, index: int) -> dict[str, Any]:
    """The example `index` of a source, with what a source may leave out, and checked.

    Returns:
      image uint8 HxWx3; mask uint8 HxW, absent if the source has none; category int; name str; and
      whatever else the example has, instances and boxes in the dtypes of `geometry.FIELDS`.

    Raises:
      DataError: the image, mask, instances or boxes are of another kind or shape, or a value is out of
        range.
    """
    index = int(index)
    example = source[index]
    if not isinstance(example, Mapping) or "image" not in example:
        found = sorted(example) if isinstance(example, Mapping) else type(example).__name__
        raise DataError(
            f"example {index} is {found}: allowed is a dict with image and, if there are any, mask, "
            "category and name"
        )
    example = {"category": 0, "name": str(index), **example}
    where = f"example {index}"
    if example["name"] != str(index):
        where += f" ({example['name']})"
    image = example["image"] = np.asarray(example["image"])
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or not image.size:
        raise DataError(
            f"{where}: its image is {image.dtype} of shape {image.shape}; allowed is uint8 [H, W, 3]"
        )
    for name in [name for name in example if name != "image"]:
        value, kind = example[name], geometry.field(name)
        if kind.geometry == "nearest":
            example[name] = _checked_map(np.asarray(value), name, image.shape[:2], where)
        elif kind.geometry == "boxes":
            example[name] = _checked_boxes(np.asarray(value), name, where)
    return example


def _checked_map(found: np.ndarray, name: str, size: tuple[int, int], where: str) -> np.ndarray:
    """A mask, or instances: whole numbers of an image's pixels."""
    dtype = geometry.field(name).dtype
    most, good = geometry.MOST[dtype], found.dtype.kind in "bui" and found.shape == size
    text = f"is {found.dtype} of shape {found.shape}"
    if good and found.dtype not in (np.bool_, np.uint8):
        low, high = found.min(), found.max()
        good, text = 0 <= low and high <= most, f"{text} with values {low} to {high}"
    if not good:
        raise DataError(
            f"{where}: its {name} {text}; allowed are whole numbers from 0 to {most}, or bool, of shape "
            f"{size}, that of its image"
        )
    return found.astype(dtype, copy=False)


def _checked_boxes(found: np.ndarray, name: str, where: str) -> np.ndarray:
    number = found.dtype.kind in "uif"
    if not number or found.ndim != 2 or found.shape[1] != 4 or not np.isfinite(found).all():
        raise DataError(
            f"{where}: its {name} is {found.dtype} of shape {found.shape}; allowed are finite numbers "
            "[N, 4], rows x0, y0, x1, y1 in pixels"
        )
    return found.astype(geometry.field(name).dtype, copy=False)


def check_function(source: Source) -> None:
    """Reads one example twice: training goes on, and is repeated, with what an index gives.

    Raises:
      DataError: the two differ.
    """
    if not len(source):
        return
    # Copied: a source may fill the same array again.
    first = {key: np.array(value) for key, value in example_of(source, 0).items()}
    again = example_of(source, 0)
    differ = sorted(first.keys() ^ again.keys())
    differ += [key for key in first if key in again and not _same(first[key], again[key])]
    if differ:
        raise DataError(
            f"example 0 was read twice and differs in {', '.join(differ)}: a source must be a function of "
            "its index (random changes are made later, by the augmentation)"
        )


def _same(first: np.ndarray, again: Any) -> bool:
    again = np.asarray(again)
    numbers = first.dtype.kind in "fc" and again.dtype.kind in "fc"
    return first.dtype == again.dtype and np.array_equal(first, again, equal_nan=numbers)


def as_splits(data: Any, validation: Source | None = None) -> Splits:
    """The splits of what a user has.

    Args:
      data: a data set with `split(name)`, a mapping of names to sources, or one source, which is then
        the split "train".
      validation: the split "val", whatever `data` has.

    Raises:
      DataError: `data` is something else.
    """
    given: dict[str, Source] = {} if validation is None else {"val": validation}
    if isinstance(data, Mapping):
        return _Splits({**data, **given})
    # Texts have a method of that name too.
    if callable(getattr(data, "split", None)) and not isinstance(data, str | bytes):
        return _Splits(given, data) if given else data
    if isinstance(data, str | bytes) or not all(
        hasattr(data, name) for name in ("__len__", "__getitem__")
    ):
        raise DataError(
            f"the data are {type(data).__name__} {str(data)[:80]!r}: allowed are a source (with __len__ "
            "and __getitem__), a dict of them by split, and a data set with split(name)"
        )
    return _Splits({"train": data, **given})


class _Splits:
    """Sources by split; any other split is one of `rest`."""

    def __init__(self, given: Mapping[str, Source], rest: Splits | None = None):
        self._given, self._rest = given, rest

    def split(self, name: str) -> Source:
        if name in self._given:
            return self._given[name]
        if self._rest is None:
            known = ", ".join(map(str, self._given)) or "none"
            raise DataError(f"the data have no split {name!r}; those there are: {known}")
        return self._rest.split(name)


class Some:
    """`limit` examples of a source, evenly spaced: sources are often sorted by class."""

    def __init__(self, source: Source, limit: int):
        self.categories, self.names = categories_of(source), names_of(source)
        self._source = source
        self._chosen = spread(len(source), limit)

    def __len__(self) -> int:
        return len(self._chosen)

    def __getitem__(self, index: int) -> dict[str, Any]:
        if not 0 <= index < len(self._chosen):
            raise IndexError(index)
        return example_of(self._source, self._chosen[index])

    def sizes(self) -> list[tuple[int, int]]:
        if not hasattr(self._source, "sizes"):
            return _read_sizes(self._source, self._chosen)
        sizes = sizes_of(self._source)
        return [sizes[i] for i in self._chosen]


def spread(length: int, limit: int) -> np.ndarray:
    """At most `limit` indices below `length`, evenly spaced, the first and the last among them."""
    return np.linspace(0, length - 1, min(limit, length)).astype(int)


def working_size(source: Source, size: tuple[int, int], multiple: int = 16) -> tuple[int, int]:
    """The (height, width) to which `fit` brings every example of a source.

    `size` (0, 0) means native: where all images have one size, that size cut down to multiples of
    `multiple`; where they differ, the smallest size that holds them all once long sides above 480
    are shrunk to 480, which is logged.

    Raises:
      DataError: if an explicit size is not a positive multiple of `multiple`.
    """
    if tuple(size) != (0, 0):
        if len(size) != 2 or any(side <= 0 or side % multiple for side in size):
            raise DataError(
                f"size {tuple(size)}: allowed are (0, 0) and (height, width) in positive multiples "
                f"of {multiple}"
            )
        return int(size[0]), int(size[1])
    if not len(source):
        raise DataError("the data source is empty")
    sizes = np.array(sizes_of(source))
    if (sizes == sizes[0]).all():
        height, width = sizes[0]
        return tuple(max(int(side) // multiple, 1) * multiple for side in (height, width))
    long_sides = sizes.max(axis=1, keepdims=True)
    needed = (-(-sizes * np.minimum(long_sides, _LONG_SIDE) // long_sides)).max(axis=0)
    height, width = (int(-(-side // multiple) * multiple) for side in needed)
    _LOG.info(
        "%d images differ in size (%s to %s, height x width): all are fitted into %dx%d",
        *(len(sizes), sizes.min(axis=0), sizes.max(axis=0), height, width),
    )
    return height, width


def placement(
    image_size: tuple[int, int], size: tuple[int, int], *, multiple: int = 16
) -> tuple[tuple[int, int], bool]:
    """How `fit` puts an image of (height, width) `image_size` into `size`, always at the top left.

    Returns:
      ((height, width) that it takes up, whether it is cropped to that rather than resized).
      An image that exceeds `size` by less than `multiple` on both axes is cropped.
    """
    (h, w), (height, width) = image_size, size
    if 0 <= h - height < multiple and 0 <= w - width < multiple:
        return (height, width), True
    scale = min(height / h, width / w)
    return (max(1, min(height, round(h * scale))), max(1, min(width, round(w * scale)))), False


def fit(example: Mapping[str, Any], size: tuple[int, int], *, multiple: int = 16) -> dict[str, Any]:
    """Brings an example to (height, width) `size`, top left, by crop or letterbox (`placement`).

    Fields follow their geometry (`geometry.FIELDS`): a letterboxed image is resized bilinearly with
    antialiasing and its mask to the nearest; the rest is the image's mean colour, and void (255) in
    the mask. `extent`, int32 (height, width), says which part is image.
    """
    whole = example["image"].shape[:2]
    part, crop = placement(whole, size, multiple=multiple)
    fitted = {
        name: _fitted(value, geometry.field(name), whole, part, None if crop else size)
        for name, value in example.items()
    }
    return {**fitted, "extent": np.array(part, np.int32)}


def _fitted(
    value: Any,
    field: geometry.Field,
    whole: tuple[int, int],
    part: tuple[int, int],
    canvas: tuple[int, int] | None,
) -> Any:
    """A field of an image of size `whole`: cropped to `part`, or resized to it and put on a canvas."""
    h, w = part
    if field.geometry == "boxes":
        scale = (1.0, 1.0) if canvas is None else (h / whole[0], w / whole[1])
        return geometry.move_boxes(value, scale, (0.0, 0.0), part)
    if not field.geometry:
        return value
    if canvas is None:
        return value[:h, :w]
    if field.geometry == "nearest":
        padded = np.full(canvas, field.padding, field.dtype)
        padded[:h, :w] = _resized(value, part, Image.Resampling.NEAREST)
        return padded
    image = _resized(value, part, Image.Resampling.BILINEAR)
    padded = np.empty((*canvas, 3), np.uint8)
    padded[:h, :w] = image
    # Rows first: ten times as fast as the mean over both axes, which takes channels one by one.
    colour = (image.sum(0, dtype=np.uint32).sum(0) / (h * w)).round().astype(np.uint8)
    padded[h:] = padded[:h, w:] = colour
    return padded


def _resized(array: np.ndarray, size: tuple[int, int], method: Image.Resampling) -> np.ndarray:
    if array.shape[:2] == tuple(size):
        return array
    return np.asarray(Image.fromarray(array).resize((size[1], size[0]), method))
