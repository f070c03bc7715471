"""Images with masks or labels of a prepared TensorFlow Datasets data set, read without TensorFlow."""

import dataclasses
import io
import re
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, ClassVar

import numpy as np

from jaxseg.data.format import Format
from jaxseg.data.image_files import VOID, DataError, binary_mask, opened, to_rgb, to_values
from jaxseg.options import option

_PREPARE = (
    "prepare it once with tfds.builder({name!r}, data_dir={root!r}, "
    "file_format='array_record').download_and_prepare() (many builders need TensorFlow for that)"
)


@dataclasses.dataclass(eq=False)
class Tfds(Format):
    """Images of any TFDS data set, with a binary mask, a mask of several classes, or a class label.

    With masks there is one category, "object"; with labels the categories are the label's names. As
    in TFDS itself, images are not turned by their EXIF orientation.

    Args:
      root: TFDS's data_dir; empty for its default.
      part: a split of the data set, or a slice as "train[:80%]". "val" also finds "validation".
      name: of the data set, with config and version if need be, e.g. "oxford_iiit_pet".
      image_key, mask_key: the features to read: uint8 HxWx3 or HxWx1, and integer HxW or HxWx1; an
        empty mask_key for no masks.
      label_key: the class of an image, read where there are no masks; empty for none.
      foreground: the mask values that are foreground; all others are background. Empty: the
        values are 0/255, or ids 0 and 1 with 255 as void (see `image_files.read_mask`).
      void: the mask values to be ignored, if `foreground` is given. For the trimaps of
        oxford_iiit_pet: foreground=(1,), void=(3,).
      classes: names of several classes, which then replaces `foreground`. Masks hold the place of a
        value in `ids` (empty: 0, 1, 2, ...), and 255 where the value is in `void`, or is 255.
      categories: empty, or all. Afterwards, those that there are.

    Raises:
      DataError: if the data set is not prepared as array_record, or lacks the split or a feature.
    """

    name: str = option("", "the data set", open=True)
    image_key: str = option("image", "the feature that holds the images", open=True)
    mask_key: str = option(
        "segmentation_mask", "the feature that holds the masks; empty = no masks", open=True
    )
    label_key: str = option("", "read for pretraining, where mask_key is empty", open=True)
    foreground: tuple[int, ...] = option(
        (1,), "values that are foreground; empty = 0/255, or 0 and 1 with 255 as void", open=True
    )
    void: tuple[int, ...] = option((), "values that are ignored", open=True)
    ids: tuple[int, ...] = option(
        (), "values of the classes in the masks; empty = 0, 1, 2, ...", open=True
    )
    categories: tuple[str, ...] = option((), "names; empty = all", open=True)
    classes: tuple[str, ...] = option((), "names; empty = those of the data", open=True)

    gives: ClassVar[frozenset[str]] = frozenset({"binary", "classes", "images"})
    section: ClassVar[str] = "tfds"
    shared: ClassVar[tuple[str, ...]] = ("categories", "classes")

    def __post_init__(self):
        super().__post_init__()
        dataset, split, categories = self.name, self.part, self.categories
        image_key, mask_key, label_key = self.image_key, self.mask_key, self.label_key
        if not dataset:
            raise DataError("data.tfds.name is empty: name the data set")
        builder = _prepared(dataset, str(self.root))
        features = dict(builder.info.features)
        for key in filter(None, (image_key, mask_key, label_key)):
            if key not in features:
                raise DataError(f"{dataset} has no feature {key!r}; it has {', '.join(features)}")
        if mask_key and len(features[mask_key].shape) < 2:
            raise DataError(
                f"data.tfds.mask_key={mask_key!r} of {dataset} holds no masks but {features[mask_key]}"
            )
        self.categories = ("object",)
        if label_key and not mask_key:
            self.categories = tuple(features[label_key].names)
        if categories and set(categories) != set(self.categories):
            raise DataError(
                f"data.categories is {', '.join(categories)}; of {dataset} it can be empty, or all of "
                f"{', '.join(self.categories)}"
            )
        splits = builder.info.splits
        if split == "val" and "val" not in splits and "validation" in splits:
            split = "validation"
        self._examples = _open(builder, dataset, split)
        self._where = f"{dataset}/{split}"
        self._label_key = "" if mask_key else label_key
        self._foreground, self._void = tuple(self.foreground), tuple(self.void)
        classes = tuple(self.classes)
        self._ids = tuple(self.ids) or tuple(range(len(classes)))
        # Masks of one class have no names of values.
        self.names = classes or None
        if classes:
            if not mask_key or len(self._ids) != len(classes):
                raise DataError(
                    f"{dataset}: {len(classes)} classes in data.classes, {len(self._ids)} values in "
                    f"data.tfds.ids, masks in {mask_key!r}; each class needs one value in the masks"
                )
            if len(classes) > VOID or len(set(classes)) < len(classes):
                raise DataError(
                    f"data.classes has {len(classes)} names, {len(set(classes))} of them different; allowed "
                    f"are at most {VOID}, each once"
                )
            twice = {i for i in self._ids if self._ids.count(i) > 1 or i in (VOID, *self._void)}
            if twice:
                raise DataError(
                    f"data.tfds.ids={self._ids} has {sorted(twice)}; allowed is each value once, and none "
                    f"that is void ({VOID}, and data.tfds.void={self._void})"
                )

    def __len__(self) -> int:
        return len(self._examples)

    def __getitem__(self, index: int) -> dict:
        """Reads an example: image uint8 HxWx3, mask uint8 HxW (255: void), category, name."""
        where = f"{self._where} example {index}"
        if not 0 <= index < len(self):
            raise IndexError(f"{where}: there are {len(self)}")
        example = self._examples[int(index)]
        image = _rgb(example[self.image_key], f"{where} {self.image_key}")
        name = re.sub(r"\W+", "-", f"{self._where}-{index:06d}")
        if not self.mask_key:
            label = int(example[self._label_key]) if self._label_key else 0
            return {"image": image, "category": label, "name": name}
        mask = self._mask(example[self.mask_key], f"{where} {self.mask_key}")
        if image.shape[:2] != mask.shape:
            raise DataError(
                f"{where}: image {image.shape[:2]} and mask {mask.shape} must have the same size"
            )
        return {"image": image, "mask": mask, "category": 0, "name": name}

    def sizes(self) -> list[tuple[int, int]]:
        """Returns every (height, width), from the image headers."""
        with ThreadPoolExecutor(16) as pool:
            return list(pool.map(self._size, range(len(self))))

    def _size(self, index: int) -> tuple[int, int]:
        stored = self._examples[index][self.image_key]
        if not isinstance(stored, bytes):  # a tensor feature, which has no header
            return tuple(np.shape(stored)[:2])
        with opened(f"{self._where} example {index}", io.BytesIO(stored)) as image:
            return image.height, image.width

    def _mask(self, stored: bytes | np.ndarray, where: str) -> np.ndarray:
        raw = _decoded(stored, lambda image: to_values(image, where), where)
        raw = raw[..., 0] if raw.ndim == 3 else raw
        if self.names:
            return self._class_mask(raw, where)
        if not self._foreground:
            try:
                return binary_mask(raw, where)
            except DataError as error:
                raise DataError(f"{error}; or name the foreground values") from error
        mask = np.isin(raw, self._foreground).astype(np.uint8)
        mask[np.isin(raw, self._void)] = VOID
        return mask

    def _class_mask(self, raw: np.ndarray, where: str) -> np.ndarray:
        mask = np.full(raw.shape, VOID, np.uint8)
        known = np.isin(raw, (VOID, *self._void))
        for number, value in enumerate(self._ids):
            here = raw == value
            mask[here] = number
            known |= here
        if not known.all():
            found = ", ".join(str(v) for v in np.unique(raw[~known])[:8])
            raise DataError(
                f"{where}: values {found} are neither classes (data.tfds.ids={self._ids}) nor void "
                f"(data.tfds.void={self._void}, and 255)"
            )
        return mask


def _prepared(dataset: str, root: str) -> Any:
    """The `tfds.core.DatasetBuilder`."""
    import tensorflow_datasets as tfds  # here, since it takes a second, and others do not need it

    advice = _PREPARE.format(name=dataset, root=root or None)
    try:
        builder = tfds.builder(dataset, data_dir=root or None)
    except tfds.core.DatasetNotFoundError as error:
        raise DataError(
            f"TFDS knows no data set {dataset!r}, and none is prepared in {root!r}: check both, or "
            f"import the module that defines it and {advice}"
        ) from error
    if not builder.info.splits:
        raise DataError(f"{dataset} is not prepared in {builder.data_dir}: {advice}")
    return builder


def _open(builder: Any, dataset: str, split: str):
    """A random-access view of a split, with images as they are stored.

    TFDS's own decoder uses OpenCV or Pillow, whichever there is, and has Pillow accept truncated
    images from then on.
    """
    import tensorflow_datasets as tfds

    features = builder.info.features
    skip = [key for key in features if isinstance(features[key], tfds.features.Image)]
    decoders = {key: tfds.decode.SkipDecoding() for key in skip}
    try:
        return builder.as_data_source(split=split, decoders=decoders or None)
    except NotImplementedError as error:
        raise DataError(
            f"{dataset} in {builder.data_dir} is not stored as array_record, which reading without "
            f"TensorFlow needs: {_PREPARE.format(name=dataset, root='another folder')}"
        ) from error
    except ValueError as error:
        raise DataError(
            f"{dataset} has no split {split!r}; it has {', '.join(builder.info.splits)}"
        ) from error


def _decoded(stored: bytes | np.ndarray, convert: Callable, where: str) -> np.ndarray:
    if not isinstance(stored, bytes):
        return np.asarray(stored)
    with opened(where, io.BytesIO(stored)) as image:
        return convert(image)


def _rgb(stored: bytes | np.ndarray, where: str) -> np.ndarray:
    image = _decoded(stored, to_rgb, where)
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[-1] not in (1, 3):
        raise DataError(
            f"{where}: is {image.dtype} {image.shape}; allowed is uint8 HxWxC with 1 or 3 channels"
        )
    return np.repeat(image, 3, axis=-1) if image.shape[-1] == 1 else image
