"""Images and masks of class ids in folders, with a list of the classes."""

import dataclasses
import logging
import re
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import ClassVar

import numpy as np
from PIL import Image

from jaxseg.data.format import Format
from jaxseg.data.formats.binary_masks import SPLITS, Pair, hash_split, listed, pair_size, pair_stems
from jaxseg.data.image_files import VOID, DataError, check_sizes, decode, read_image, to_values
from jaxseg.options import option

_LOG = logging.getLogger(__name__)
_CLASSES, _PALETTE = "classes.txt", "palette.txt"
_MOST = 255  # class ids are 0 to 254
_IDS = 2**16  # that a file can hold


@dataclasses.dataclass(eq=False)
class ClassMasks(Format):
    """Images and masks whose pixels say their class, read from one of two layouts.

      1. `root/{train,val,test}/images` and `.../labels`
      2. `root/images` and `root/labels`: split by the hash of each name, as `BinaryMasks` does.

    An image and its mask have the same stem; suffixes may differ. Hidden files are ignored.

    `root/classes.txt` names the classes, one a line: the first line is id 0 of the files, the next
    id 1 and so on. Ids called "void", and those in `void`, are ignored in training and evaluation;
    they need no line if they come after the others. The classes are the remaining ids, renumbered
    without gaps (where void ids come last, nothing changes); void becomes 255, and 255 always is.

    Masks of one channel hold ids, those with a palette too (their colours do not matter). Masks in
    colours need `root/palette.txt`, a line "r g b" of each id.

    Args:
      root: the folder.
      part: "train", "val" or "test".
      classes: the names instead of those in classes.txt, also of ids 0, 1, 2, ... Afterwards, those
        that are not void, as `names`.
      void: further ids of the files (0 to 65535) to be ignored.
      images, labels: what the two folders are called, if not so.

    Raises:
      DataError: if a folder is missing or empty, a split is unknown, the list of classes or colours is
        missing or wrong, or an image has no mask. Files are opened later: `sizes` finds pairs of
        unequal size, `__getitem__` unreadable ones and ids or colours that are not declared.
    """

    classes: tuple[str, ...] = option((), "names; empty = those of the data", open=True)
    void: tuple[int, ...] = option((), "further ids that are ignored", low=0, high=65535, open=True)
    images: str = option(
        "", "the subfolder of images, or where the images are; empty = where expected", open=True
    )
    labels: str = option(
        "", "the subfolder of masks, or the annotation file; empty = where expected", open=True
    )

    categories = ("all",)
    gives: ClassVar[frozenset[str]] = frozenset({"classes"})

    def __post_init__(self):
        super().__post_init__()
        split = self.part
        if not str(self.root):
            raise DataError("data.root is empty: name the folder that holds the images and labels")
        if split not in SPLITS:
            raise DataError(f"unknown split {split!r}: allowed are {', '.join(SPLITS)}")
        root = Path(self.root).expanduser()
        folders = self.images or "images", self.labels or "labels"
        self._pairs = _split_pairs(root, split, *folders)
        names = _names(root, tuple(self.classes))
        self._void = _void_ids(names, self.void)
        kept = [i for i in range(len(names)) if i not in self._void]
        self.classes = self.names = tuple(names[i] for i in kept)
        if not 0 < len(kept) <= _MOST or len(set(self.classes)) < len(kept):
            raise DataError(
                f"{root}: {len(kept)} classes ({listed(self.classes)}); allowed are 1 to {_MOST} "
                "different names that are not void"
            )
        self._class_of = np.full(_IDS, -1, np.int16)
        self._class_of[kept] = np.arange(len(kept))
        self._class_of[sorted(self._void)] = VOID
        self._colors = _colors(root, self._class_of)
        self._sizes: list[tuple[int, int]] | None = None

    def __len__(self) -> int:
        return len(self._pairs)

    def __getitem__(self, index: int) -> dict:
        """Reads one: image uint8 HxWx3, mask uint8 HxW of class ids (255: void), category 0, name."""
        pair = self._pairs[index]
        image = read_image(pair.image)
        mask = decode(pair.mask, lambda opened: self._mask(opened, pair.mask))
        check_sizes(pair.image, image.shape[:2], pair.mask, mask.shape)
        return {"image": image, "mask": mask, "category": 0, "name": pair.name}

    def sizes(self) -> list[tuple[int, int]]:
        """Returns every (height, width), from the headers, and checks that masks have the same."""
        if self._sizes is None:
            with ThreadPoolExecutor(16) as pool:
                self._sizes = list(pool.map(pair_size, self._pairs))
        return self._sizes

    def _mask(self, image: Image.Image, path: Path) -> np.ndarray:
        if len(image.getbands()) >= 3:
            return self._from_colors(np.asarray(image.convert("RGB")), path)
        ids = to_values(image, path)
        if ids.dtype.kind not in "bu":
            raise DataError(f"{path}: pixels are {ids.dtype}; allowed are whole numbers")
        mask = self._class_of[ids.astype(np.uint16)]
        if (mask < 0).any():
            raise DataError(self._undeclared(path, np.unique(ids[mask < 0]).tolist()))
        return mask.astype(np.uint8)

    def _from_colors(self, rgb: np.ndarray, path: Path) -> np.ndarray:
        if self._colors is None:
            raise DataError(
                f"{path} is in colour and no colours are given: allowed are masks of one channel that "
                f"hold class ids, or list the colours in {_PALETTE}"
            )
        codes, values = self._colors
        found = _codes(rgb)
        place = np.searchsorted(codes, found).clip(max=len(codes) - 1)
        wrong = codes[place] != found
        if wrong.any():
            odd = [f"({c >> 16} {c >> 8 & 255} {c & 255})" for c in np.unique(found[wrong])]
            raise DataError(
                f"{path}: colours {listed(odd)} are not declared; allowed are the {len(codes)} of "
                f"{_PALETTE}{_lossy(path)}"
            )
        return values[place]

    def _undeclared(self, path: Path, ids: list[int]) -> str:
        declared = np.flatnonzero(self._class_of >= 0).tolist()
        return (
            f"{path}: ids {listed([str(i) for i in ids])} are not declared; allowed are "
            f"{_ranges([i for i in declared if i not in self._void])} ({len(self.classes)} classes) and "
            f"{_ranges(sorted(self._void))} (void). Name them in {_CLASSES} or data.classes, or add "
            f"them to data.void to ignore them{_lossy(path)}"
        )


def _lossy(path: Path) -> str:
    if path.suffix.lower() not in (".jpg", ".jpeg", ".jfif"):
        return ""
    return "; JPEG does not keep a mask's values: save it as PNG"


def _split_pairs(root: Path, split: str, images: str, labels: str) -> list[Pair]:
    layouts = f"<split>/{images} + {labels}, or {images} + {labels} (<split> is train, val or test)"
    if not root.is_dir():
        raise DataError(f"{root}: no such data folder; expected in it is {layouts}")
    found = [name for name in SPLITS if (root / name).is_dir()]
    if found and split not in found:
        raise DataError(f"{root} has no split {split!r}: it has {listed(found)}")
    if not found and not (root / images).is_dir():
        inside = sorted(p.name for p in root.iterdir() if p.is_dir()) or ["no folders"]
        raise DataError(f"{root} holds {listed(inside)}; allowed layouts: {layouts}")
    inside = root / split if found else root
    pairs = [Pair(*pair, 0) for pair in pair_stems(inside / images, inside / labels)]
    return pairs if found else hash_split(pairs, split, root)


def _names(root: Path, given: tuple[str, ...]) -> tuple[str, ...]:
    """The names of ids 0, 1, 2, ..., void ones among them."""
    lines = tuple(_lines(root / _CLASSES))
    if not lines and not given:
        state = "is empty" if (root / _CLASSES).exists() else "is missing"
        raise DataError(
            f"{root / _CLASSES} {state}: name the classes in it, one a line, or in data.classes"
        )
    moved = [name for i, name in enumerate(given) if name in lines and lines[i : i + 1] != (name,)]
    if moved:
        raise DataError(
            f"data.classes names ids 0, 1, 2, ... and has {listed(moved)} in other places than "
            f"{root / _CLASSES}, where they are ids {', '.join(str(lines.index(n)) for n in moved)}"
        )
    return given or lines


def _lines(file: Path) -> list[str]:
    """The lines of a file, none if there is no file. The number of a line counts: none may be empty."""
    if not file.exists():
        return []
    try:
        lines = [line.strip() for line in file.read_text("utf-8-sig").rstrip().splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{file}: cannot be read as text ({error})") from error
    if "" in lines:
        raise DataError(f"{file}: line {lines.index('') + 1} is empty; each line stands for an id")
    return lines


def _void_ids(names: Sequence[str], void: Sequence[int]) -> set[int]:
    wrong = [str(i) for i in void if not isinstance(i, int) or not 0 <= i < _IDS]
    if wrong:
        raise DataError(f"data.void has {listed(wrong)}; allowed are ids from 0 to {_IDS - 1}")
    return {VOID, *void, *(i for i, name in enumerate(names) if name.lower() == "void")}


def _colors(root: Path, class_of: np.ndarray) -> tuple[np.ndarray, np.ndarray] | None:
    """Colours as ascending 24-bit codes, and the mask value of each; None if there are none."""
    where = root / _PALETTE
    rows = [re.split(r"[\s,]+", line) for line in _lines(where)]
    if not rows:
        return None
    try:
        colors = np.array([[int(value) for value in row] for row in rows])
    except (ValueError, TypeError) as error:
        raise DataError(f"{where}: colours must be three whole numbers each ({error})") from error
    if colors.ndim != 2 or colors.shape[1] != 3 or colors.min() < 0 or colors.max() > 255:
        raise DataError(f"{where}: colours must be three numbers from 0 to 255 each")
    values = class_of[: len(colors)]
    if (values < 0).any() or len({VOID, *values.tolist()}) <= class_of[class_of != VOID].max() + 1:
        raise DataError(
            f"{where}: {len(colors)} colours are for ids 0 to {len(colors) - 1}; each class needs one, "
            "and each id with a colour a class, or to be in data.void"
        )
    codes, first = np.unique(_codes(colors), return_index=True)
    if len(codes) < len(set(zip(_codes(colors).tolist(), values.tolist(), strict=True))):
        raise DataError(f"{where}: two classes have the same colour")
    return codes, values[first].astype(np.uint8)


def _codes(rgb: np.ndarray) -> np.ndarray:
    red, green, blue = np.moveaxis(rgb.astype(np.int32), -1, 0)
    return red << 16 | green << 8 | blue


def _ranges(ids: Sequence[int]) -> str:
    """[0, 1, 2, 5] as "0-2, 5"."""
    starts = [i for i in ids if i - 1 not in ids]
    ends = [i for i in ids if i + 1 not in ids]
    return ", ".join(f"{a}" if a == b else f"{a}-{b}" for a, b in zip(starts, ends, strict=True))
