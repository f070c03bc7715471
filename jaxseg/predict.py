"""Masks and overlays for images of any size, from a trained run."""

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from PIL import Image

from jaxseg.data import DataError, list_images, read_image, write_image, write_mask
from jaxseg.evaluate.report import overlay
from jaxseg.run import Run, restore
from jaxseg.train.writers import Progress

log = logging.getLogger(__name__)

# The working image is as large as those the run was trained on, in the input's own shape, up to
# this ratio of the sides; its sides are rounded to this many strides, so that few shapes compile.
_MOST_ELONGATED = 4.0
_ROUND_STRIDES = 4


def working_shape(
    height: int, width: int, *, trained: tuple[int, int], stride: int
) -> tuple[int, int]:
    """(height, width) at which an image is segmented.

    An image of the trained shape gets the trained size; others get about its area, in their own
    proportions, rounded to multiples of `4 * stride`.
    """
    if abs(np.log(height / width * trained[1] / trained[0])) < 0.05:
        return trained
    ratio = float(np.clip(height / width, 1 / _MOST_ELONGATED, _MOST_ELONGATED))
    area = trained[0] * trained[1]
    unit = _ROUND_STRIDES * stride
    sides = (np.sqrt(area * ratio), np.sqrt(area / ratio))
    return tuple(max(1, round(side / unit)) * unit for side in sides)


class Predictor:
    """Segments images with a restored run.

    Args:
      run: from `jaxseg.run.restore`.
    """

    def __init__(self, run: Run):
        self._task, self._stride = run.task, run.task.model.stride
        # Images come one by one and in any shape, so one device does the work.
        self._device = jax.local_devices()[0]
        self._params = jax.device_put(run.host(run.params), self._device)
        self._apply = jax.jit(self._probability)

    def _probability(self, params, image_HxWx3):
        logits, _ = self._task.logits(params, {"image": image_HxWx3[None]})
        return jax.nn.sigmoid(logits[0, ..., 0])

    def __call__(self, image: np.ndarray) -> np.ndarray:
        """Foreground probability, float32 `H x W` in [0, 1], of a uint8 image `H x W x 3`."""
        height, width = image.shape[:2]
        shape = working_shape(height, width, trained=self._task.size, stride=self._stride)
        small = Image.fromarray(image).resize(shape[::-1], Image.Resampling.BILINEAR)
        chance = self._apply(self._params, jax.device_put(np.asarray(small), self._device))
        chance = Image.fromarray(np.asarray(chance, np.float32))
        return np.asarray(chance.resize((width, height), Image.Resampling.BILINEAR))


def output_names(paths: list[Path]) -> list[str]:
    """A name for each input, its stem; inputs of one stem are told apart by folder and ending.

    `a/x.jpg` and `b/x.jpg` become `a_x` and `b_x`; `x.jpg` and `x.png` become `x_jpg` and `x_png`.
    """

    def clashes(names: list[str]) -> set[str]:
        return {name for name in names if names.count(name) > 1}

    names = [path.stem for path in paths]
    for rename in (
        lambda name, path: f"{path.parent.name}_{name}",
        lambda name, path: f"{name}_{path.suffix[1:]}",
    ):
        taken = clashes(names)
        names = [rename(n, p) if n in taken else n for n, p in zip(names, paths, strict=True)]
    for number, name in enumerate(names):
        if name in clashes(names):
            names[number] = f"{name}_{number}"
    return names


def predict(workdir: Path, inputs: str, outputs: Path, overrides: Mapping[str, Any]) -> list[Path]:
    """Writes `<name>_mask.png` (0/255) and `<name>_overlay.jpg` for every image of `inputs`.

    Masks have the size and orientation in which the image is seen (EXIF rotation applied). An image
    that cannot be read is reported and the others go on.

    Args:
      workdir: of a trained run.
      inputs: an image, a folder (read recursively) or a glob.
      outputs: a folder; it is created.
      overrides: of config values, see `jaxseg.run.restore`.

    Returns:
      The masks written.

    Raises:
      DataError: there are no images, or at the end if some could not be read.
    """
    # What an earlier call wrote is no input, should the outputs lie below the inputs.
    paths = [p for p in list_images(inputs) if outputs.resolve() not in p.resolve().parents]
    if not paths:
        raise DataError(f"--inputs={inputs} holds no images besides those in --outputs={outputs}")
    run = restore(workdir, overrides)
    predictor = Predictor(run)
    try:
        outputs.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DataError(f"cannot write to --outputs={outputs}: {error}") from error
    written, failed = [], []
    progress = Progress("predict", len(paths))
    for number, (path, name) in enumerate(zip(paths, output_names(paths), strict=True), 1):
        try:
            image = read_image(path)
        except DataError as error:
            log.warning("%s", error)
            failed.append(path)
            continue
        mask = predictor(image) >= run.task.threshold
        written.append(outputs / f"{name}_mask.png")
        write_mask(written[-1], mask)
        write_image(outputs / f"{name}_overlay.jpg", overlay(image, mask))
        progress.update(number)
    progress.close()
    if failed:
        names = ", ".join(str(p) for p in failed[:5])
        raise DataError(f"{len(failed)} of {len(paths)} images could not be read: {names}")
    return written
