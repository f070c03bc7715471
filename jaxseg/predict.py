"""Masks and overlays for images of any size, or what else a task predicts, from a trained run."""

import contextlib
import itertools
import logging
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from PIL import Image

from jaxseg import workdir as folder
from jaxseg.data.image_files import DataError, read_image, write_image, write_mask
from jaxseg.evaluate.tiles import default_overlap, predict_tiles
from jaxseg.predictor import Predictor, working_shape
from jaxseg.report.palette import overlay, overlay_classes, palette
from jaxseg.run import Run, restore
from jaxseg.schema import ConfigError
from jaxseg.tasks import TASKS
from jaxseg.train.writers import Progress

log = logging.getLogger(__name__)

# Images with more pixels than this are predicted tile by tile.
_LARGE = 64_000_000


def check_masks(workdir: Path, overrides: Mapping[str, Any]) -> None:
    """Refuses a run whose task predicts no masks, before it is restored.

    Raises:
      ConfigError: it names the task.
    """
    config, _ = folder.load(workdir, overrides)
    if not TASKS[config.task].heads:
        raise ConfigError(
            f"--workdir={workdir} holds a run of {config.task}, which predicts no masks: train "
            f"configs/pac_objseg.py with --config.backbone.weights={workdir} first"
        )


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
    """Writes a mask and an overlay, or the pictures that the task draws, for every image of `inputs`.

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
      The masks, or pictures, written.

    Raises:
      ConfigError: the run has no such class, or predicts nothing.
      DataError: there are no images, or at the end if some could not be read.
    """
    # What an earlier call wrote is no input, should the outputs lie below the inputs.
    from jaxseg.data.formats.binary_masks import list_images

    paths = [p for p in list_images(inputs) if outputs.resolve() not in p.resolve().parents]
    if not paths:
        raise DataError(
            f"--inputs={inputs} holds no images besides those in --outputs={outputs}: "
            "the two must be different folders"
        )
    draws = _draws(workdir, overrides, masked=bool(classes or probabilities))
    run = restore(workdir, overrides)
    write = _picture_writer(run) if draws else _mask_writer(run, classes, probabilities)
    try:
        outputs.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DataError(f"cannot write to --outputs={outputs}: {error}") from error
    written, failed = [], []
    progress = Progress("predict", len(paths))
    for number, (path, name) in enumerate(zip(paths, output_names(paths), strict=True), 1):
        try:
            written += write(path, outputs / name)
        except DataError as error:
            log.warning("%s", error)
            failed.append(path)
        progress.update(number)
    progress.close()
    if failed:
        names = ", ".join(str(p) for p in failed[:5])
        raise DataError(f"{len(failed)} of {len(paths)} images could not be read: {names}")
    return written


def _draws(workdir: Path, overrides: Mapping[str, Any], *, masked: bool) -> bool:
    """Whether the run's task draws pictures; `masked` if what was asked for is of masks alone."""
    kind = TASKS[folder.load(workdir, overrides)[0].task]
    if not kind.draws or masked:
        check_masks(workdir, overrides)
    return kind.draws


Write = Callable[[Path, Path], list[Path]]


def _picture_writer(run: Run) -> Write:
    """What reads an image and writes `<stem>_<ending>` for each of its pictures, in the image's size."""
    device = jax.local_devices()[0]
    params = jax.device_put(run.host(run.variables), device)
    draw = jax.jit(run.task.pictures)

    def write(path: Path, stem: Path) -> list[Path]:
        image = read_image(path)
        size, trained = image.shape[:2], run.task.facts.size
        shape = working_shape(*size, trained=trained, stride=run.task.multiple)
        small = np.asarray(Image.fromarray(image).resize(shape[::-1], Image.Resampling.BILINEAR))
        found = jax.device_get(draw(params, jax.device_put(small[None], device)))
        for ending, picture in found.items():
            shown = Image.fromarray((picture[0].clip(0, 1) * 255).round().astype(np.uint8))
            whole = shown.resize(size[::-1], Image.Resampling.BILINEAR)
            write_image(_beside(stem, ending), np.asarray(whole))
        return [_beside(stem, ending) for ending in found]

    return write


def _mask_writer(run: Run, classes: Sequence[str], probabilities: bool) -> Write:
    """What reads an image and writes its masks, and overlays."""
    masks = _masks(run.task.masks, classes)
    predictor = Predictor(run)
    return lambda path, stem: _predict_one(predictor, path, stem, masks, probabilities)


def _masks(task: Any, classes: Sequence[str]) -> dict[str, int | None]:
    """Endings of the masks to write: each with the value that is foreground, or None for all ids."""
    values = task.values_of(classes)
    if not values:
        ending, value = task.mask_file
        return {ending: value}
    stems = {name: re.sub(r"[^\w-]+", "_", name) for name in values}
    counts = Counter(stems.values())
    if alike := [name for name, stem in stems.items() if counts[stem] > 1]:
        raise ConfigError(
            f"--classes has {' and '.join(map(repr, alike))}, whose files would have one name; ask for "
            "them one at a time, with another --outputs"
        )
    return {f"{stems[name]}_mask.png": value for name, value in values.items()}


def _predict_one(
    predictor: Predictor,
    path: Path,
    stem: Path,
    masks: Mapping[str, int | None],
    probabilities: bool,
) -> list[Path]:
    """Reads one image and writes `<stem>_<ending>` for each of the masks, and overlays."""
    from jaxseg.data.large import NpyWriter, is_large

    if is_large(path, _LARGE):
        return _predict_large(predictor, path, stem, masks, probabilities)
    image = read_image(path)
    found = []
    with contextlib.ExitStack() as files:
        if probabilities:
            shape = (*image.shape[:2], predictor.task.outputs)
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
    return _write_overlays(stem, image, found, masks, predictor.task.background)


def _predict_large(predictor, path, stem, masks, probabilities) -> list[Path]:
    """The same for an image that may not fit in memory, by windows of the trained size.

    Windows show the image's own pixels, at one scale and not mirrored, whatever `config.eval` says; the
    overlay is at most 2048 pixels long.
    """
    from jaxseg.data.large import LargeImage, NpyWriter, Overview, PngWriter

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
            shape = (*image.size, predictor.task.outputs)
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
    return _write_overlays(stem, picture.image(), found, masks, predictor.task.background)


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
