"""What a data source is, which ones there are, and how their examples get one common size."""

import logging
from collections.abc import Sequence
from typing import Protocol

import numpy as np
from PIL import Image

from jaxseg.data.image_files import VOID, DataError

_LOG = logging.getLogger(__name__)
NAMES = ("shapes", "scenes", "kinds", "folder", "labelled", "coco", "images", "tfds")
DRAWN = ("shapes", "scenes", "kinds")
_LONG_SIDE = 480  # of the automatic size, when images differ


class Source(Protocol):
    """Examples by index. Reading the same index twice gives the same example, from any thread.

    A source whose images may differ in size also has `sizes() -> Sequence[(height, width)]` of all
    examples, found without decoding. One whose masks hold several classes has `mask_names`, the names
    of the values 0, 1, 2, ...; without it they are 0 (background) and 1.
    """

    categories: tuple[str, ...]

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> dict:
        """image uint8 HxWx3; mask uint8 HxW of class ids and 255 (void), absent if the source has none;
        category int, an index into `categories`; name str, unique within the source."""


class Some:
    """`limit` examples of a source, evenly spaced: sources are often sorted by class."""

    def __init__(self, source: Source, limit: int):
        self.categories = source.categories
        if hasattr(source, "mask_names"):
            self.mask_names = source.mask_names
        self._source = source
        self._chosen = spread(len(source), limit)

    def __len__(self) -> int:
        return len(self._chosen)

    def __getitem__(self, index: int) -> dict:
        if not 0 <= index < len(self._chosen):
            raise IndexError(index)
        return self._source[int(self._chosen[index])]

    def sizes(self) -> Sequence[tuple[int, int]]:
        sizes = _sizes(self._source)
        return [sizes[i] for i in self._chosen] if len(sizes) == len(self._source) else sizes


def spread(length: int, limit: int) -> np.ndarray:
    """At most `limit` indices below `length`, evenly spaced, the first and the last among them."""
    return np.linspace(0, length - 1, min(limit, length)).astype(int)


def create(
    name: str, split: str, *, root: str = "", categories: Sequence[str] = (), **options
) -> Source:
    """Makes the source `name`.

    Args:
      name: "shapes", "scenes" or "kinds" (drawn, need nothing); "folder" (images and masks of one
        class), "labelled" (masks of several), "coco", "images" (without masks) or "tfds".
      split: "train", "val" or "test"; for tfds any split it knows.
      root: the folder to read; for tfds its data_dir.
      categories: those to read; empty for all.
      **options: of the source's class: `Shapes`, `Folder`, `LabelledFolder`, `Coco`, `Images`,
        `Tfds`.

    Raises:
      DataError: if the name is unknown, or the source finds something wrong.
    """
    # Imported here, so that one source's dependencies are not needed to read another.
    if name == "folder":
        from jaxseg.data.formats.binary_masks import Folder

        return Folder(root, split, categories=categories, **options)
    if name == "labelled":
        from jaxseg.data.formats.class_masks import LabelledFolder

        return LabelledFolder(root, split, **options)
    if name == "coco":
        from jaxseg.data.formats.coco import Coco

        return Coco(root, split, **options)
    if name == "images":
        from jaxseg.data.formats.images import Images

        return Images(root, split, categories=categories, **options)
    if name == "tfds":
        from jaxseg.data.formats.tfds_records import Tfds

        return Tfds(split, root=root, categories=categories, **options)
    if name in DRAWN:
        from jaxseg.data.drawn import shapes

        kind = {"shapes": shapes.Shapes, "scenes": shapes.Scenes, "kinds": shapes.Kinds}[name]
        return kind(split, categories=tuple(categories), **options)
    raise DataError(f"unknown data source {name!r}: allowed are {', '.join(NAMES)}")


def _sizes(source: Source) -> Sequence[tuple[int, int]]:
    """(height, width) of all examples; of the first alone, where the source says they are alike."""
    return source.sizes() if hasattr(source, "sizes") else [source[0]["image"].shape[:2]]


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
    sizes = np.array(_sizes(source))
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


def fit(example: dict, size: tuple[int, int], *, multiple: int = 16) -> dict:
    """Brings an example to (height, width) `size`, top left, by crop or letterbox (`placement`).

    A letterboxed image is resized bilinearly with antialiasing and its mask to the nearest; the
    rest is the image's mean colour, and void (255) in the mask. `extent`, int32 (height, width), says
    which part is image.
    """
    image, mask = example["image"], example.get("mask")
    (h, w), crop = placement(image.shape[:2], size, multiple=multiple)
    if crop:
        image, mask = image[:h, :w], None if mask is None else mask[:h, :w]
    else:
        image = _resized(image, (h, w), Image.Resampling.BILINEAR)
        canvas = np.empty((*size, 3), np.uint8)
        canvas[:h, :w] = image
        # Rows first: ten times as fast as the mean over both axes, which takes channels one by one.
        colour = (image.sum(0, dtype=np.uint32).sum(0) / (h * w)).round().astype(np.uint8)
        canvas[h:] = canvas[:h, w:] = colour
        image = canvas
        if mask is not None:
            padded = np.full(size, VOID, np.uint8)
            padded[:h, :w] = _resized(mask, (h, w), Image.Resampling.NEAREST)
            mask = padded
    example = {**example, "image": image, "extent": np.array([h, w], np.int32)}
    return example if mask is None else {**example, "mask": mask}


def _resized(array: np.ndarray, size: tuple[int, int], method: Image.Resampling) -> np.ndarray:
    if array.shape[:2] == tuple(size):
        return array
    return np.asarray(Image.fromarray(array).resize((size[1], size[0]), method))
