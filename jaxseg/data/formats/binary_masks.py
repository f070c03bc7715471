"""Images and masks in folders."""

import dataclasses
import functools
import glob
import hashlib
import logging
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import ClassVar, NamedTuple

from jaxseg.data.format import Format
from jaxseg.data.image_files import (
    SUFFIXES,
    DataError,
    check_sizes,
    image_size,
    is_image,
    opened,
    read_pair,
    to_values,
)
from jaxseg.options import option

_LOG = logging.getLogger(__name__)
SPLITS = ("train", "val", "test")
_SAMPLE = 96  # masks looked at to tell what 255 means
_MASK_FOLDERS = ("annotations", "masks")
_LAYOUTS = (
    "<split>/<category>/images + annotations, <split>/images + masks, or images + masks "
    "(<split> is train, val or test)"
)


class Pair(NamedTuple):
    name: str
    image: Path
    mask: Path
    category: int


@dataclasses.dataclass(eq=False)
class BinaryMasks(Format):
    """Pairs of image and binary mask, read from one of three layouts.

      1. `root/{train,val,test}/<category>/images` and `.../annotations` (or `masks`)
      2. `root/{train,val,test}/images` and `.../masks` (or `annotations`)
      3. `root/images` and `root/masks` (or `annotations`): split here, by the hash of each name,
         into 80 % train, 10 % val and 10 % test, each at least one; the same on every machine.

    An image and its mask have the same stem; suffixes may differ. In 2 and 3 there is one category,
    "object". Hidden files are ignored.

    Args:
      root: the folder.
      part: "train", "val" or "test".
      categories: those to read in layout 1; empty for all. Afterwards, those that are read.
      mask_values, mask_threshold: how masks are read, see `image_files.read_mask`.

    Raises:
      DataError: if a folder is missing or empty, a split or category is unknown, or an image has no
        mask. Masks without image are logged. Files are opened later: `sizes` finds pairs of unequal
        size, `__getitem__` unreadable ones.
    """

    categories: tuple[str, ...] = option((), "names; empty = all", open=True)
    mask_values: str = option(
        "auto",
        "what masks hold: 0/255, 0/1 (255 = void), or auto: 0/1 if a mask has a 1",
        choices=("auto", "0/255", "0/1"),
        open=True,
    )
    mask_threshold: int = option(
        0,
        "foreground is every value from here, for soft masks; 0 = off",
        low=0,
        high=65535,
        open=True,
    )

    gives: ClassVar[frozenset[str]] = frozenset({"binary", "images"})

    def __post_init__(self):
        super().__post_init__()
        split, categories = self.part, self.categories
        if not str(self.root):
            raise DataError("data.root is empty: name the folder that holds the images and masks")
        if split not in SPLITS:
            raise DataError(f"unknown split {split!r}: allowed are {', '.join(SPLITS)}")
        self._root = root = Path(self.root).expanduser()
        found = _subfolders(root)
        self._threshold = self.mask_threshold or None
        self._sizes: list[tuple[int, int]] | None = None
        if "images" in found and not set(SPLITS) & set(found):
            self.categories = _chosen(["object"], categories, root)
            self._pairs = hash_split(_pairs(root, "", 0), split, root)
            return
        if split not in found:
            splits = [name for name in found if name in SPLITS]
            if not splits:
                raise DataError(f"{root} holds {listed(found)}; allowed layouts: {_LAYOUTS}")
            raise DataError(f"{root} has no split {split!r}: it has {listed(splits)}")
        inside = _subfolders(root / split)
        if "images" in inside:
            self.categories = _chosen(["object"], categories, root / split)
            self._pairs = _pairs(root / split, "", 0)
            return
        self.categories = _chosen(inside, categories, root / split)
        self._pairs = [
            pair
            for index, name in enumerate(self.categories)
            for pair in _pairs(root / split / name, f"{name}/", index)
        ]

    def __len__(self) -> int:
        return len(self._pairs)

    def __getitem__(self, index: int) -> dict:
        """Reads one pair: image uint8 HxWx3, mask uint8 HxW in {0, 1, 255}, category, name."""
        pair = self._pairs[index]
        options = {"values": self._mask_values, "threshold": self._threshold}
        image, mask = read_pair(pair.image, pair.mask, **options)
        return {"image": image, "mask": mask, "category": pair.category, "name": pair.name}

    @functools.cached_property
    def _mask_values(self) -> str:
        """What 255 means is one decision for all splits: void if any of a sample of masks has a 1."""
        if self.mask_values != "auto" or self._threshold is not None:
            return self.mask_values
        depths = [f"{below}{name}" for below in ("", "*/", "*/*/") for name in _MASK_FOLDERS]
        folders = (folder for depth in depths for folder in self._root.glob(depth))
        masks = sorted(file for folder in folders for file in folder.iterdir() if is_image(file))
        for mask in masks[:: max(1, len(masks) // _SAMPLE)]:
            try:
                with opened(mask) as image:
                    if (to_values(image, mask) == 1).any():
                        return "0/1"
            except DataError:
                continue  # It is reported when the pair itself is read.
        return "auto"

    def sizes(self) -> list[tuple[int, int]]:
        """Returns every (height, width), from the headers, and checks that masks have the same."""
        if self._sizes is None:
            with ThreadPoolExecutor(16) as pool:
                self._sizes = list(pool.map(pair_size, self._pairs))
        return self._sizes


def list_images(inputs: str | Path) -> list[Path]:
    """Lists the images of a file, a folder (with its subfolders) or a glob pattern, sorted.

    Raises:
      DataError: if there are none.
    """
    path = Path(inputs).expanduser()
    if path.is_file():
        return [path]
    if path.is_dir():
        visible = (p for p in path.rglob("*") if not _hidden(p.relative_to(path)))
        found = [p for p in visible if is_image(p)]
        what = "no images in folder"
    else:
        found = [p for p in map(Path, glob.glob(str(path), recursive=True)) if is_image(p)]
        what = "no such file or folder, and no image matches the pattern"
    if not found:
        raise DataError(f"{inputs}: {what}; image suffixes are {' '.join(SUFFIXES)}")
    return sorted(found)


def _hidden(relative: Path) -> bool:
    return any(part.startswith(".") for part in relative.parts)


def _subfolders(path: Path) -> list[str]:
    """Names of the visible folders in `path`, sorted; complains if it is missing or has none."""
    if not path.is_dir():
        what = "not a folder" if path.exists() else "no such data folder"
        raise DataError(f"{path}: {what}; expected {_LAYOUTS} below the data root")
    names = sorted(p.name for p in path.iterdir() if p.is_dir() and not p.name.startswith("."))
    if not names:
        raise DataError(f"{path} has no folders in it; expected {_LAYOUTS} below the data root")
    return names


def _chosen(available: Sequence[str], wanted: Sequence[str], path: Path) -> tuple[str, ...]:
    unknown = sorted(set(wanted) - set(available))
    if unknown:
        raise DataError(f"{path} has no category {listed(unknown)}; available: {listed(available)}")
    return tuple(sorted(set(wanted)) if wanted else available)


def _pairs(folder: Path, prefix: str, category: int) -> list[Pair]:
    """Matches `folder/images` with its masks by stem, sorted by name."""
    masks_folder = next((folder / m for m in _MASK_FOLDERS if (folder / m).is_dir()), None)
    if masks_folder is None:
        raise DataError(f"{folder} has no folder of masks; allowed names: {listed(_MASK_FOLDERS)}")
    pairs = pair_stems(folder / "images", masks_folder)
    return [Pair(prefix + stem, image, mask, category) for stem, image, mask in pairs]


def pair_stems(images_folder: Path, masks_folder: Path) -> list[tuple[str, Path, Path]]:
    """(stem, image, mask) for every image, by stem; masks without an image are ignored with a warning.

    Raises:
      DataError: a folder holds no images, a stem occurs twice, or an image has no mask.
    """
    images, masks = _by_stem(images_folder), _by_stem(masks_folder)
    alone = [images[stem].name for stem in images if stem not in masks]
    if alone:
        raise DataError(
            f"{images_folder}: {len(alone)} of {len(images)} images have no mask of the same stem in "
            f"{masks_folder}: {listed(alone)}"
        )
    extra = [masks[stem].name for stem in masks if stem not in images]
    if extra:
        _LOG.warning("%s: masks without image, ignored: %s", masks_folder, listed(extra))
    return [(stem, images[stem], masks[stem]) for stem in sorted(images)]


def _by_stem(folder: Path) -> dict[str, Path]:
    files = sorted(filter(is_image, folder.iterdir())) if folder.is_dir() else []
    if not files:
        state = "holds no images" if folder.is_dir() else "no such folder"
        raise DataError(f"{folder}: {state}; image suffixes are {' '.join(SUFFIXES)}")
    stems: dict[str, Path] = {}
    for file in files:
        if file.stem in stems:
            raise DataError(
                f"{folder}: {stems[file.stem].name} and {file.name} have the same stem, so it is "
                "unclear which belongs to the mask; keep one"
            )
        stems[file.stem] = file
    return stems


def hash_split(pairs: list[Pair], split: str, root: Path) -> list[Pair]:
    """Keeps one split. By rank of the hash, so that each split has its share even of ten images."""
    if len(pairs) < len(SPLITS):
        raise DataError(
            f"{root}: {len(pairs)} images cannot be split into {listed(SPLITS)}: "
            f"give three or more, or make the folders {root}/train and {root}/test"
        )
    ranked = sorted(pairs, key=lambda pair: hashlib.sha256(pair.name.encode()).digest())
    tenth = max(1, round(len(pairs) / 10))
    parts = {"test": ranked[:tenth], "val": ranked[tenth : 2 * tenth], "train": ranked[2 * tenth :]}
    return sorted(parts[split])


def pair_size(pair: Pair) -> tuple[int, int]:
    size = image_size(pair.image)
    check_sizes(pair.image, size, pair.mask, image_size(pair.mask))
    return size


def listed(names: Sequence[str], most: int = 8) -> str:
    return ", ".join(names[:most]) + (f", ... ({len(names)} in all)" if len(names) > most else "")
