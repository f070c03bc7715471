"""Images without masks, in folders or zip files, with the class that their folder names."""

import dataclasses
import hashlib
import io
import os
import threading
import zipfile
import zlib
from pathlib import Path, PurePosixPath
from typing import ClassVar

from jaxseg.data.format import Format
from jaxseg.data.image_files import SUFFIXES, DataError, image_size, read_image
from jaxseg.options import option

SPLITS = ("train", "val", "test")
_OTHER_NAMES = {"training": "train", "valid": "val", "validation": "val", "testing": "test"}


@dataclasses.dataclass(eq=False)
class Images(Format):
    """All images below a folder, or in a zip file, for pretraining and for k-NN.

      1. `root/{train,val,test}/...`: the images of a split are those below its folder. Of a folder
         without such names a tenth is `val`, chosen by a hash of the names, and the rest is `train`.
         A single folder around those of the splits is passed over.
      2. Below that, the first folder of an image's path is its class; images without one have none
         (`category` -1). The classes are those of all splits.

    Args:
      root: folder or zip file. `{split}` in it stands for the name of the split.
      part: "train", "val" or "test".
      size: (height, width) that large JPEGs may be shrunk to in decoding (`read_image`'s `at_least`);
        (0, 0) for none.
      categories: classes to read; empty for all. Afterwards, those that are read.

    Raises:
      DataError: no such file or folder, no images, an unknown split or class.
    """

    categories: tuple[str, ...] = option((), "names; empty = all", open=True)

    gives: ClassVar[frozenset[str]] = frozenset({"images"})

    def __post_init__(self):
        super().__post_init__()
        split, categories = self.part, self.categories
        if not str(self.root):
            raise DataError("data.root is empty: name the folder or zip file that holds the images")
        if split not in SPLITS:
            raise DataError(f"unknown split {split!r}: allowed are {', '.join(SPLITS)}")
        self._root = Path(str(self.root).replace("{split}", split)).expanduser()
        self._lock, self._zip = threading.Lock(), None
        self._at_least = None if tuple(self.size) == (0, 0) else tuple(self.size)
        names = sorted(self._list())
        if not names:
            raise DataError(f"{self._root} holds no images; suffixes are {' '.join(SUFFIXES)}")
        top = _around_splits(names)
        folders = _first_folders(names, top)
        present, other = folders & set(SPLITS), folders & set(_OTHER_NAMES)
        if other and folders == present | other:
            renamed = ", ".join(f"{name} to {_OTHER_NAMES[name]}" for name in sorted(other))
            raise DataError(
                f"{self._root} has the folders {', '.join(sorted(folders))}: rename {renamed}, or they "
                "would be taken for classes"
            )
        prefix = f"{top}{split}/" if present else ""
        if present or "{split}" in str(self.root):
            inside = [name for name in names if name.startswith(prefix)]
        else:
            inside = _part(names, split)
        if not inside:
            known = ", ".join(sorted(present)) or (
                "train, and val of ten images or more, as it has no folders train, val or test"
            )
            raise DataError(f"{self._root} has no split {split!r}: it has {known}")
        labels = [_label(name.removeprefix(prefix)) for name in inside]
        # Of all splits: a class may be missing in a small one, and numbers must mean the same in each.
        places = [f"{top}{name}/" for name in sorted(present)] or [""]
        found = tuple(sorted(set().union(*(_first_folders(names, place) for place in places))))
        unknown = sorted(set(categories) - set(found))
        if unknown:
            raise DataError(
                f"{self._root} has no class {', '.join(unknown)}; available: {', '.join(found)}"
            )
        self.categories = tuple(sorted(set(categories))) if categories else found
        self._items = [
            (name, self.categories.index(label) if label else -1)
            for name, label in zip(inside, labels, strict=True)
            if label in self.categories or not categories
        ]

    def _list(self) -> list[str]:
        if self._root.suffix.lower() == ".zip" and self._root.is_file():
            names = self._archive().namelist()
        elif self._root.is_dir():
            # os.walk, for it is much faster than Path.rglob on a million files.
            names = [
                os.path.relpath(os.path.join(folder, file), self._root).replace(os.sep, "/")
                for folder, _, files in os.walk(self._root, followlinks=True)
                for file in files
            ]
        else:
            raise DataError(f"data.root={self._root}: no such folder or zip file")
        hidden = (n for n in names if not any(p.startswith(".") for p in n.split("/")))
        return [n for n in hidden if PurePosixPath(n).suffix.lower() in SUFFIXES]

    def _archive(self) -> zipfile.ZipFile:
        if self._zip is None:
            try:
                self._zip = zipfile.ZipFile(self._root)
            except (zipfile.BadZipFile, OSError) as error:
                raise DataError(f"{self._root} is no readable zip file: {error}") from error
        return self._zip

    def __len__(self) -> int:
        return len(self._items)

    def __getitem__(self, index: int) -> dict:
        """Reads one image: image uint8 HxWx3, category (-1 for none), name."""
        name, category = self._items[index]
        if self._root.is_dir():
            image = read_image(self._root / name, at_least=self._at_least)
        else:
            stream = io.BytesIO(self._bytes(name))
            image = read_image(f"{self._root}/{name}", stream, at_least=self._at_least)
        return {"image": image, "category": category, "name": name}

    def _bytes(self, name: str) -> bytes:
        try:
            with self._lock:
                return self._archive().read(name)
        # RuntimeError: encrypted, or packed in a way that the standard library cannot read.
        except (zipfile.BadZipFile, zlib.error, OSError, RuntimeError) as error:
            raise DataError(f"{self._root}: {name} cannot be read: {error}") from error

    def sizes(self) -> list[tuple[int, int]]:
        """Every (height, width), from the headers."""
        if self._root.is_dir():
            return [image_size(self._root / name) for name, _ in self._items]
        return [self[i]["image"].shape[:2] for i in range(len(self))]

    def __getstate__(self):
        return {**self.__dict__, "_lock": None, "_zip": None}

    def __setstate__(self, state):
        self.__dict__.update(state, _lock=threading.Lock())


def _part(names: list[str], split: str) -> list[str]:
    """The names of a split of a folder without splits; adding images moves few between them."""
    ranked = sorted(names, key=lambda name: hashlib.sha256(name.encode()).digest())
    tenth = len(names) // 10
    parts = {"val": ranked[:tenth], "train": ranked[tenth:], "test": []}
    return sorted(parts[split])


def _first_folders(names: list[str], prefix: str) -> set[str]:
    """The folders directly below `prefix` that hold names, at any depth."""
    below = (name.removeprefix(prefix) for name in names if name.startswith(prefix))
    return {_label(name) for name in below} - {""}


def _around_splits(names: list[str]) -> str:
    """`folder/` if all names are in one folder that holds those of the splits, else empty."""
    folders = {_label(name) for name in names}
    top = f"{folders.pop()}/" if len(folders) == 1 else ""
    return top if _first_folders(names, top) & set(SPLITS) and top[:-1] not in SPLITS else ""


def _label(name: str) -> str:
    """The first folder of a path, empty where there is none."""
    return name.split("/")[0] if "/" in name else ""
