"""Masks and overlays for images of any size, from a trained run."""

import contextlib
import itertools
import logging
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from PIL import Image

from jaxseg.config import ConfigError
from jaxseg.data import DataError, list_images, read_image, write_image, write_mask
from jaxseg.data.large import LargeImage, NpyWriter, Overview, PngWriter, is_large
from jaxseg.evaluate import masks as dense
from jaxseg.report.palette import overlay_classes, palette
from jaxseg.report.report import overlay
from jaxseg.evaluate.tiles import default_overlap, predict_tiles
from jaxseg.run import Run, make_inference, restore
from jaxseg.tasks.query import AttentionTask
from jaxseg.tasks.multiclass import background
from jaxseg.tasks.binary import SegmentationTask
from jaxseg.train.writers import Progress

log = logging.getLogger(__name__)

# The working image is as large as those the run was trained on, in the input's own shape, up to
# this ratio of the sides; its sides are rounded to this many strides, so that few shapes compile.
_MOST_ELONGATED = 4.0
_ROUND_STRIDES = 2
# Images with more pixels than this are predicted tile by tile.
_LARGE = 64_000_000
# Scores of a smaller image are brought to its size by bands of so many numbers.
_BAND = 32_000_000


def working_shape(
    height: int, width: int, *, trained: tuple[int, int], stride: int
) -> tuple[int, int]:
    """(height, width) at which an image is segmented.

    An image of the trained shape gets the trained size; others get about its area, in their own
    proportions, rounded to multiples of `2 * stride`.
    """
    if abs(np.log(height / width * trained[1] / trained[0])) < 0.05:
        return trained
    ratio = float(np.clip(height / width, 1 / _MOST_ELONGATED, _MOST_ELONGATED))
    area = trained[0] * trained[1]
    # Small images would be bent by more than a few percent.
    unit = stride * (_ROUND_STRIDES if min(trained) >= 16 * stride else 1)
    sides = (np.sqrt(area * ratio), np.sqrt(area / ratio))
    return tuple(max(1, round(side / unit)) * unit for side in sides)


class Predictor:
    """Segments images with a restored run.

    Args:
      run: from `jaxseg.run.restore`.

    Attributes:
      size: (H, W) of the images that the run was trained on.
      stride: of which the sides of images that the network sees are multiples.
      outputs: scores of a pixel, K.
      empty: the mask value of the background, or None.
    """

    def __init__(self, run: Run):
        self._task, self.size, self.stride = run.task, run.task.size, run.task.model.stride
        # Images come one by one and in any shape, so one device does the work.
        self._device = jax.local_devices()[0]
        self.outputs = 1 if run.config.task == "segmentation" else len(run.task.names)
        self.empty = background(tuple(run.task.names))
        self._params = jax.device_put(run.host(run.params), self._device)
        self._apply = jax.jit(self._scores)
        self._inference = make_inference(run.config, self.stride) or dense.Inference()

    def _scores(self, params, image_BxHxWx3):
        return self._task.scores(self._task.logits(params, {"image": image_BxHxWx3})[0])

    def windows(self, image_BxHxWx3: np.ndarray) -> np.ndarray:
        """Scores `B x H x W x K` in [0, 1] of uint8 images as they are; see `DenseTask.scores`."""
        return np.asarray(self._apply(self._params, jax.device_put(image_BxHxWx3, self._device)))

    def bands(self, image: np.ndarray) -> Iterator[np.ndarray]:
        """Scores of one uint8 image `H x W x 3` of any size, seen at about the trained size.

        In bands `rows x W x K` from the top, since all scores may take more memory than the image. They
        are predicted as `config.eval` says: at several scales, mirrored, by windows.
        """
        height, width = image.shape[:2]
        shape = working_shape(height, width, trained=self.size, stride=self.stride)
        small = np.asarray(Image.fromarray(image).resize(shape[::-1], Image.Resampling.BILINEAR))
        scores = self._inference(self._unit_windows, small[None], stride=self.stride)[0]
        planes = [Image.fromarray(plane) for plane in np.moveaxis(scores.astype(np.float32), -1, 0)]
        rows = max(1, _BAND // (width * len(planes)))
        for top in range(0, height, rows):
            size = (width, min(rows, height - top))
            # What is around the box is seen too: bands are those of the whole.
            box = (0, top * shape[0] / height, shape[1], (top + size[1]) * shape[0] / height)
            yield np.stack([p.resize(size, Image.Resampling.BILINEAR, box) for p in planes], -1)

    def _unit_windows(self, image_BxHxWx3: np.ndarray) -> np.ndarray:
        return self.windows(image_BxHxWx3 * np.float32(255.0))

    def predict(self, image: np.ndarray) -> np.ndarray:
        """The mask uint8 `H x W` of one uint8 image of any size."""
        return np.concatenate([self.mask(scores) for scores in self.bands(image)])

    def mask(self, scores: np.ndarray) -> np.ndarray:
        """The mask uint8 `H x W` that scores stand for."""
        if isinstance(self._task, SegmentationTask):
            return (scores[..., 0] >= self._task.threshold).astype(np.uint8)
        return scores.argmax(-1).astype(np.uint8)

    def masks(self, scores: np.ndarray, values: Sequence[int | None]) -> np.ndarray:
        """uint8 `H x W x len(values)`: where the mask has a value, or for None the mask itself.

        A run that was asked for classes answers for each by itself: where its score reaches 1/2.
        """
        mask = self.mask(scores)

        def one(value):
            if value is None:
                return mask
            if isinstance(self._task, AttentionTask) and value != background(self._task.names):
                return (scores[..., value] >= 0.5).astype(np.uint8)
            return (mask == value).astype(np.uint8)

        return np.stack([one(value) for value in values], -1)


def output_names(paths: list[Path]) -> list[str]:
    """A name for each input, its stem; inputs of one stem are told apart by folder and ending.

    `a/x.jpg` and `b/x.jpg` become `a_x` and `b_x`; `x.jpg` and `x.png` become `x_jpg` and `x_png`.
    """

    def clashes(names: list[str]) -> set[str]:
        return {name for name, count in Counter(names).items() if count > 1}

    names = [path.stem for path in paths]
    for rename in (
        lambda name, path: f"{path.parent.name}_{name}",
        lambda name, path: f"{name}_{path.suffix[1:]}",
    ):
        taken = clashes(names)
        names = [rename(n, p) if n in taken else n for n, p in zip(names, paths, strict=True)]
    taken, used = clashes(names), set(names)
    for place, name in enumerate(names):
        if name in taken:
            free = (f"{name}_{number}" for number in itertools.count(place))
            names[place] = next(name for name in free if name not in used)
            used.add(names[place])
    return names


def predict(
    workdir: Path,
    inputs: str,
    outputs: Path,
    overrides: Mapping[str, Any],
    *,
    classes: Sequence[str] = (),
    probabilities: bool = False,
) -> list[Path]:
    """Writes a mask and an overlay for every image of `inputs`.

    A run of one object class gives `<name>_mask.png` (0/255); one of several `<name>_classes.png`, the
    classes' numbers with a palette, or, for `classes`, `<name>_<class>_mask.png` of each. Masks have
    the size and orientation in which the image is seen (EXIF rotation applied). An image that cannot
    be read is reported and the others go on. Images of more than 64 megapixels are read and written
    strip by strip.

    Args:
      workdir: of a trained run.
      inputs: an image, a folder (read recursively) or a glob.
      outputs: a folder; it is created.
      overrides: of config values, see `jaxseg.run.restore`.
      classes: names of those to write one by one; empty for all in one mask.
      probabilities: whether to write `<name>_probabilities.npy` too, float16 `H x W x K`.

    Returns:
      The masks written.

    Raises:
      ConfigError: the run has no such class.
      DataError: there are no images, or at the end if some could not be read.
    """
    # What an earlier call wrote is no input, should the outputs lie below the inputs.
    paths = [p for p in list_images(inputs) if outputs.resolve() not in p.resolve().parents]
    if not paths:
        raise DataError(
            f"--inputs={inputs} holds no images besides those in --outputs={outputs}: "
            "the two must be different folders"
        )
    run = restore(workdir, overrides)
    masks = _masks(run, classes)
    predictor = Predictor(run)
    try:
        outputs.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DataError(f"cannot write to --outputs={outputs}: {error}") from error
    written, failed = [], []
    progress = Progress("predict", len(paths))
    for number, (path, name) in enumerate(zip(paths, output_names(paths), strict=True), 1):
        try:
            written += _predict_one(predictor, path, outputs / name, masks, probabilities)
        except DataError as error:
            log.warning("%s", error)
            failed.append(path)
        progress.update(number)
    progress.close()
    if failed:
        names = ", ".join(str(p) for p in failed[:5])
        raise DataError(f"{len(failed)} of {len(paths)} images could not be read: {names}")
    return written


def _masks(run: Run, classes: Sequence[str]) -> dict[str, int | None]:
    """Endings of the masks to write: each with the value that is foreground, or None for all ids."""
    names = run.task.names
    several = run.config.task != "segmentation"
    for name in classes:
        if not several or name not in names:
            known = f"the classes {', '.join(names)}" if several else "one class without a name"
            raise ConfigError(f"--classes has {name!r}; the run in --workdir knows {known}")
    if classes:
        stems = {name: re.sub(r"[^\w-]+", "_", name) for name in classes}
        counts = Counter(stems.values())
        if alike := [name for name, stem in stems.items() if counts[stem] > 1]:
            raise ConfigError(
                f"--classes has {' and '.join(map(repr, alike))}, whose files would have one name; ask for "
                "them one at a time, with another --outputs"
            )
        return {f"{stem}_mask.png": names.index(name) for name, stem in stems.items()}
    return {"classes.png": None} if several else {"mask.png": 1}


def _predict_one(
    predictor: Predictor,
    path: Path,
    stem: Path,
    masks: Mapping[str, int | None],
    probabilities: bool,
) -> list[Path]:
    """Reads one image and writes `<stem>_<ending>` for each of the masks, and overlays."""
    if is_large(path, _LARGE):
        return _predict_large(predictor, path, stem, masks, probabilities)
    image = read_image(path)
    found = []
    with contextlib.ExitStack() as files:
        if probabilities:
            shape = (*image.shape[:2], predictor.outputs)
            target = _beside(stem, "probabilities.npy")
            file = files.enter_context(NpyWriter(target, shape, np.float16))
        for scores in predictor.bands(image):
            found.append(predictor.masks(scores, list(masks.values())))
            if probabilities:
                file.write(scores.astype(np.float16))
    found = np.concatenate(found)
    for number, (ending, value) in enumerate(masks.items()):
        if value is None:
            write_image(_beside(stem, ending), found[..., number], palette=palette())
        else:
            write_mask(_beside(stem, ending), found[..., number])
    return _write_overlays(stem, image, found, masks, predictor.empty)


def _predict_large(predictor, path, stem, masks, probabilities) -> list[Path]:
    """The same for an image that may not fit in memory, by windows of the trained size.

    Windows show the image's own pixels, at one scale and not mirrored, whatever `config.eval` says; the
    overlay is at most 2048 pixels long.
    """
    image = LargeImage(path)
    picture, small = Overview(image.size), [Overview(image.size) for _ in masks]
    overlap, margin = default_overlap(predictor.size, predictor.stride)

    def keep(scores):
        found = predictor.masks(scores, list(masks.values()))
        return np.concatenate([found, scores], -1).astype(np.float16) if probabilities else found

    strips = predict_tiles(
        lambda start, stop: picture.add(image.rows(start, stop)),
        *(image.size, predictor.windows),
        window=predictor.size,
        overlap=overlap,
        margin=margin,
        multiple=predictor.stride,
        finish=keep,
    )
    with contextlib.ExitStack() as files:

        def png(ending, value):
            colors = palette() if value is None else None
            target = _beside(stem, ending)
            return files.enter_context(PngWriter(target, image.size, palette=colors))

        pngs = [(png(ending, value), value) for ending, value in masks.items()]
        if probabilities:
            shape = (*image.size, predictor.outputs)
            target = _beside(stem, "probabilities.npy")
            scores = files.enter_context(NpyWriter(target, shape, np.float16))
        for strip in strips:
            found = strip[..., : len(masks)].astype(np.uint8)
            for number, (file, value) in enumerate(pngs):
                file.write(found[..., number] * (1 if value is None else 255))
                small[number].add(found[..., number])
            if probabilities:
                scores.write(strip[..., len(masks) :])
    found = np.stack([overview.image() for overview in small], -1)
    return _write_overlays(stem, picture.image(), found, masks, predictor.empty)


def _write_overlays(
    stem: Path, image: np.ndarray, found: np.ndarray, masks, clear: int | None
) -> list[Path]:
    """Writes the overlay beside each mask (of `found` `H x W x masks`), and returns their paths."""
    for number, (ending, value) in enumerate(masks.items()):
        mask = found[..., number]
        shown = overlay(image, mask == 1)
        if value is None:
            shown = overlay_classes(image, mask, clear=clear)
        name = ending.replace("classes.png", "overlay.jpg").replace("mask.png", "overlay.jpg")
        write_image(_beside(stem, name), shown)
    return [_beside(stem, ending) for ending in masks]


def _beside(stem: Path, ending: str) -> Path:
    return stem.with_name(f"{stem.name}_{ending}")
