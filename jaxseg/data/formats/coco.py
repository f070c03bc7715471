"""COCO annotations, in its own instances JSON or the Freiburg lab's aggregated one, as class masks."""

import contextlib
import dataclasses
import glob
import json
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePosixPath
from typing import Any, ClassVar, NamedTuple

import numpy as np

from jaxseg.data.format import Format
from jaxseg.data.formats.binary_masks import listed
from jaxseg.data.formats.polygons import Region, fill, polygon, run_lengths, runs_region
from jaxseg.data.image_files import VOID, DataError, image_size, read_image
from jaxseg.options import option

BACKGROUND = "background"
OVERLAPS = ("smaller-on-top", "last-on-top", "void")
CROWDS = ("void", "paint")
# What the ids in the lab's aggregated files mean: they are COCO's, and the files do not say it.
AGGREGATED = {1: "person", 2: "bicycle", 3: "car", 17: "cat", 18: "dog"}
_FILES = ("instances_{}*.json", "aggregated_annotations_{}_*classes.json")
_IMAGE_FOLDERS = ("", "images", "imgs")
_MOST = 254  # class ids are 1 to 254; 255 is void


class _Annotation(NamedTuple):
    label: int
    crowd: bool
    shape: tuple[np.ndarray, ...] | np.ndarray  # polygons of Nx2, or run lengths


class _Image(NamedTuple):
    path: Path
    name: str
    size: tuple[int, int] | None  # (height, width) as the JSON says
    annotations: list[_Annotation]


@dataclasses.dataclass(eq=False)
class Coco(Format):
    """Images with class masks drawn from COCO annotations: polygons and run lengths.

    Of `root` are read, unless `labels` and `images` say otherwise:
      1. COCO: `annotations/instances_<split>*.json`, images in `<split>*`, `images/<split>*` or
         `imgs/<split>*`.
      2. The Freiburg lab's: `aggregated_annotations_<split>_5classes.json`, a list of {file_name,
         annotations: {category id: [{segmentation, ...}]}}, images in the same places. Its categories
         are always the five of `AGGREGATED`.

    A mask is 0 (background), 1 .. C (`classes`) and 255 (void), and is drawn on the upright image:
      - each annotation has the pixels that COCO's own tools give it (`polygons.fill`, which also
        clips what lies outside the image; several polygons of an annotation are united);
      - crowds (`iscrowd`) come first, so that void or their class shows only where no object is;
      - objects follow in the order that `overlap` says;
      - annotations of classes that were not asked for are not drawn.

    Args:
      root: the folder.
      part: "train", "val", or as the files are called, e.g. "val2017".
      classes: names of those to read, in the order of their ids 1 .. C; empty for all, in the order
        of their category ids. "background" may come first; a category of that name is background.
        Afterwards, background and those that are read, as `names`.
      labels: the JSON file, relative to the root; `{split}` in it stands for the split.
      images: the folder of the images, likewise.
      overlap: "smaller-on-top" draws objects with more pixels first; equal ones in the order of their
        annotation ids (of the file, where it has none). "last-on-top" draws all in that order.
        "void" makes pixels void that objects of different classes share.
      crowd: "void", or "paint" for the class.

    Raises:
      DataError: if a file or folder is missing, ambiguous or damaged, a listed image is not there, a
        class is unknown, or an annotation that would be drawn is malformed. Images are opened later.
    """

    classes: tuple[str, ...] = option((), "names; empty = those of the data", open=True)
    labels: str = option(
        "", "the subfolder of masks, or the annotation file; empty = where expected", open=True
    )
    images: str = option(
        "", "the subfolder of images, or where the images are; empty = where expected", open=True
    )
    overlap: str = option(
        "smaller-on-top", "which of overlapping objects is seen", choices=OVERLAPS, open=True
    )
    crowd: str = option("void", "what crowds are", choices=CROWDS, open=True)

    categories = ("all",)
    gives: ClassVar[frozenset[str]] = frozenset({"classes"})

    def __post_init__(self):
        super().__post_init__()
        split = self.part
        if not str(self.root):
            raise DataError("data.root is empty: name the folder that holds the COCO data")
        _check_option("data.overlap", self.overlap, OVERLAPS)
        _check_option("data.crowd", self.crowd, CROWDS)
        root = Path(self.root).expanduser()
        if not root.is_dir():
            raise DataError(f"{root}: no such data folder")
        file = _annotation_file(root, split, self.labels)
        folder = _image_folder(root, split, self.images, file)
        content = _parsed(file)
        with _reading(f"{file}: neither COCO's instances nor aggregated annotations"):
            names = _names(content, file)
            self.classes = self.names = _chosen(names, self.classes, file)
            annotated = _images(content, folder, file)
        labels = {i: self.classes.index(n) if n in self.classes else 0 for i, n in names.items()}
        _annotate(annotated, labels, content, file)
        self._images = list(annotated.values())
        self._sizes: list[tuple[int, int]] | None = None

    def __len__(self) -> int:
        return len(self._images)

    def __getitem__(self, index: int) -> dict:
        """Reads one: image uint8 HxWx3, mask uint8 HxW of class ids (255: void), category 0, name."""
        image = self._images[index]
        pixels = read_image(image.path)
        mask = self._mask(image.annotations, _agreed(image, pixels.shape[:2]))
        return {"image": pixels, "mask": mask, "category": 0, "name": image.name}

    def sizes(self) -> list[tuple[int, int]]:
        """Returns every (height, width), from the headers, and checks that the JSON says the same."""
        if self._sizes is None:
            with ThreadPoolExecutor(16) as pool:
                found = pool.map(lambda image: _agreed(image, image_size(image.path)), self._images)
                self._sizes = list(found)
        return self._sizes

    def _mask(self, annotations: Sequence[_Annotation], size: tuple[int, int]) -> np.ndarray:
        drawn = [(a, _region(a.shape, size)) for a in annotations]
        if self.overlap == "smaller-on-top":
            drawn.sort(key=lambda item: -np.count_nonzero(item[1][2]))
        crowds, objects = np.zeros(size, np.uint8), np.zeros(size, np.uint8)
        for annotation, (top, left, inside) in drawn:
            canvas, value = objects, annotation.label
            if annotation.crowd:
                canvas, value = crowds, VOID if self.crowd == "void" else value
            window = canvas[top:, left:][: inside.shape[0], : inside.shape[1]]
            if self.overlap == "void":
                value = np.where((window == 0) | (window == value), value, VOID)
            np.copyto(window, value, where=inside, casting="unsafe")
        return np.where(objects, objects, crowds)


def _agreed(image: _Image, size: tuple[int, int]) -> tuple[int, int]:
    """The (height, width) of an image, which its annotations may give as well."""
    if image.size and image.size != size:
        raise DataError(
            f"{image.path} is {size[1]}x{size[0]} but its annotations say {image.size[1]}x"
            f"{image.size[0]} (width x height): they must agree"
        )
    return size


def _region(shape: tuple[np.ndarray, ...] | np.ndarray, size: tuple[int, int]) -> Region:
    return fill(shape, size) if isinstance(shape, tuple) else runs_region(shape, size)


@contextlib.contextmanager
def _reading(where: str) -> Iterator[None]:
    """Makes one `DataError` that starts with `where` of what is wrong with the content of a file."""
    try:
        yield
    except DataError:
        raise
    except KeyError as error:
        raise DataError(f"{where}: key {error} is missing") from error
    except (ValueError, TypeError, AttributeError) as error:
        raise DataError(f"{where}: {error}") from error


def _check_option(name: str, value: str, allowed: Sequence[str]) -> None:
    if value not in allowed:
        raise DataError(f"{name} is {value!r}: allowed are {', '.join(allowed)}")


def _annotation_file(root: Path, split: str, annotations: str) -> Path:
    if annotations:
        file = root / annotations.replace("{split}", split)
        if not file.is_file():
            raise DataError(f"{file}: no such annotation file; it holds {listed(_jsons(root))}")
        return file
    names = [f + p.format(glob.escape(split)) for f in ("", "annotations/") for p in _FILES]
    found = [path for name in names for path in sorted(root.glob(name))]
    if len(found) != 1:
        raise DataError(
            f"{root}: {len(found) or 'no'} annotation files of split {split!r}"
            f"{': ' if found else ''}{listed([p.name for p in found])}. Expected is one "
            f"{' or '.join(pattern.format(split) for pattern in _FILES)} in it or in its folder "
            f"annotations, or data.labels; there are {listed(_jsons(root)) or 'no JSON files'}"
        )
    return found[0]


def _jsons(root: Path) -> list[str]:
    return sorted(str(p.relative_to(root)) for g in ("*.json", "*/*.json") for p in root.glob(g))


def _image_folder(root: Path, split: str, images: str, file: Path) -> Path:
    if images:
        folder = root / images.replace("{split}", split)
        if not folder.is_dir():
            raise DataError(f"{folder}: no such folder of images")
        return folder
    pattern = f"{glob.escape(split)}*"
    found = [p for f in _IMAGE_FOLDERS for p in sorted((root / f).glob(pattern)) if p.is_dir()]
    exact = [p for p in found if p.name in (split, file.stem.removeprefix("instances_"))]
    if len(exact or found) != 1:
        raise DataError(
            f"{root}: {len(found) or 'no'} folders of images of split {split!r}"
            f"{': ' if found else ''}{listed([str(p.relative_to(root)) for p in found])}. Expected "
            f"is one {split}*, images/{split}* or imgs/{split}*, or data.images"
        )
    return (exact or found)[0]


def _parsed(file: Path) -> Any:
    try:
        content = json.loads(file.read_bytes() or "null")
    except (ValueError, RecursionError, OSError) as error:
        raise DataError(f"{file}: unreadable or damaged JSON ({error})") from error
    if not content or (isinstance(content, dict) and not content.get("images", [None])):
        raise DataError(f"{file} is empty: it lists no images")
    return content


def _names(content: Any, file: Path) -> dict[int, str]:
    """Category id -> name, in the order of the ids."""
    if isinstance(content, list):
        return AGGREGATED
    names = dict(sorted((int(c["id"]), str(c["name"])) for c in content["categories"]))
    double = sorted({name for name in names.values() if list(names.values()).count(name) > 1})
    if double or len(names) < len(content["categories"]):
        raise DataError(f"{file}: categories share an id or a name ({listed(double)})")
    return names


def _chosen(names: dict[int, str], wanted: Sequence[str], file: Path) -> tuple[str, ...]:
    known = [name for name in names.values() if name != BACKGROUND]
    chosen = tuple(wanted) or tuple(known)
    chosen = chosen[1:] if chosen[:1] == (BACKGROUND,) else chosen
    unknown = [name for name in chosen if name not in known]
    if unknown or not chosen or len(set(chosen)) < len(chosen):
        what = f"has no class {listed(unknown)}" if unknown else "needs each class once"
        raise DataError(f"{file} {what}; available: {listed(known, 100)}")
    if len(chosen) > _MOST:
        raise DataError(
            f"{file}: {len(chosen)} classes; allowed are {_MOST} beside background and void: name "
            "those to read in data.classes"
        )
    return BACKGROUND, *chosen


def _images(content: Any, folder: Path, file: Path) -> dict[Any, _Image]:
    """Image id (in aggregated annotations the file name) -> image, without its annotations yet."""
    aggregated = isinstance(content, list)
    records = content if aggregated else content["images"]
    _check_files(folder, [record["file_name"] for record in records], file)
    images = {}
    for record in records:
        path = PurePosixPath(record["file_name"])
        size = (record["height"], record["width"]) if record.get("height") else None
        image = _Image(folder / path, str(path.with_suffix("")), size, [])
        images[record["file_name" if aggregated else "id"]] = image
    if len({image.name for image in images.values()}) < len(records):
        raise DataError(f"{file}: images share an id, or a name but for the suffix")
    return images


def _annotate(images: dict[Any, _Image], labels: dict[int, int], content: Any, file: Path) -> None:
    """Gives the images their annotations, of those categories whose label is not 0."""
    empty = True
    for image_id, category, where, record in _annotations(content, file):
        empty = False
        with _reading(where):
            if image_id not in images:
                raise ValueError(f"unknown image id {image_id!r}: the file lists no such image")
            if category not in labels:
                known = listed([str(i) for i in labels], 100)
                raise ValueError(f"unknown category id {category!r}: the file's are {known}")
            if labels[category]:
                image = images[image_id]
                image.annotations.append(_annotation(record, labels[category], image))
    if empty:
        raise DataError(f"{file} is empty: it lists no annotations")


def _annotations(content: Any, file: Path) -> Iterator[tuple[Any, int, str, dict]]:
    """(image id, category id, where it is in words, record) of all annotations, by their ids."""
    if isinstance(content, dict):
        with _reading(f"{file}: annotations"):
            records = sorted(content["annotations"], key=lambda record: record["id"])
        for record in records:
            where = f"{file}: annotation {record['id']}"
            with _reading(where):
                image_id, category = record["image_id"], record["category_id"]
            yield image_id, category, where, record
        return
    for image in content:
        where = f"{file}: annotations of {image['file_name']}"
        with _reading(where):
            groups = {int(category): list(g) for category, g in image["annotations"].items()}
        for category, group in groups.items():
            for i, record in enumerate(group):
                yield image["file_name"], category, f"{where}, category {category}, no. {i}", record


def _annotation(record: dict, label: int, image: _Image) -> _Annotation:
    stored = record["segmentation"]
    if isinstance(stored, dict):
        shape = _runs(stored["counts"], stored["size"], image.size or image_size(image.path))
    elif isinstance(stored, list) and stored:
        shape = tuple(map(polygon, stored))
    else:
        raise ValueError(
            f"segmentation is {'empty' if stored == [] else type(stored).__name__}: allowed are a "
            "list of polygons, and run lengths {counts, size}"
        )
    crowd = record.get("iscrowd", 0)
    if crowd not in (0, 1):
        raise ValueError(f"iscrowd is {crowd!r}: allowed are 0 and 1")
    return _Annotation(label, bool(crowd), shape)


def _runs(counts: Sequence[int] | str, size: Any, image: tuple[int, int]) -> np.ndarray:
    if tuple(size) != tuple(image):
        raise ValueError(
            f"run lengths are of size {list(size)} but the image is {list(image)} (height, width)"
        )
    lengths = run_lengths(counts)
    if lengths.sum() != image[0] * image[1]:
        raise ValueError(
            f"run lengths add up to {lengths.sum()}, not to the {image[0]}x{image[1]} = "
            f"{image[0] * image[1]} pixels of the image"
        )
    return lengths


def _check_files(folder: Path, names: Sequence[str], file: Path) -> None:
    """Raises a `DataError` if images are missing. Lists folders, as that is quicker than to ask."""
    paths = [os.path.split(os.path.join(folder, name)) for name in names]
    there = {
        inside: set(os.listdir(inside)) if os.path.isdir(inside) else ()
        for inside in {inside for inside, _ in paths}
    }
    missing = [inside + os.sep + last for inside, last in paths if last not in there[inside]]
    if missing:
        raise DataError(
            f"{file}: {len(missing)} of the {len(names)} images that it lists are missing: "
            f"{listed(missing)}"
        )
