"""Masks and probabilities of single images, at few compiled shapes, from a restored run."""

import math
import threading
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np
from PIL import Image

from jaxseg.evaluate.masks import Inference
from jaxseg.options import OptionError

# The working image is as large as those the run was trained on. Its sides have the ratio that comes
# nearest to the input's: of those that cameras and screens have, so that few shapes compile.
_RATIOS = (1.0, 4 / 3, 3 / 2, 16 / 9, 2.4, 4.0)
_ROUND_STRIDES = 2
# Scores of a smaller image are brought to its size by bands of so many numbers.
_BAND = 32_000_000


def working_shape(
    height: int, width: int, *, trained: tuple[int, int], stride: int
) -> tuple[int, int]:
    """(height, width) at which an image is segmented.

    An image of the trained shape gets the trained size; others get about its area, in the nearest of 11
    proportions, with sides in multiples of `2 * stride`.
    """
    own, usual = math.log(height / width), math.log(trained[0] / trained[1])
    logarithms = [sign * math.log(ratio) for ratio in _RATIOS for sign in (1, -1)]
    nearest = min([usual, *logarithms], key=lambda x: abs(x - own))
    if abs(own - usual) < 0.05 or nearest == usual:
        return tuple(trained)
    ratio, area = math.exp(nearest), trained[0] * trained[1]
    # Small images would be bent by more than a few percent.
    unit = stride * (_ROUND_STRIDES if min(trained) >= 16 * stride else 1)
    sides = (math.sqrt(area * ratio), math.sqrt(area / ratio))
    return tuple(max(1, round(side / unit)) * unit for side in sides)


class Predictor:
    """Segments images with a restored run.

    Args:
      run: a `jaxseg.run.Run`.

    Attributes:
      task: what scores mean.
      size: (H, W) of the images that the run was trained on.
      stride: of which the sides of images that the network sees are multiples.
    """

    def __init__(self, run: Any):
        self.task = run.task.masks
        self.size, self.stride = self.task.size, self.task.multiple
        # Images come one by one and in any shape, so one device does the work.
        self._device = jax.local_devices()[0]
        self._params = jax.device_put(run.host(run.variables), self._device)
        self._apply = jax.jit(run.scores)
        self._inference = run.scoring.inference(self.stride) or Inference()
        # Programs compile once, whichever thread comes first.
        self._lock = threading.Lock()
        self._compiled: set[tuple[int, ...]] = set()

    def windows(self, image_BxHxWx3: np.ndarray) -> np.ndarray:
        """Scores `B x H x W x K` in [0, 1] of uint8 images as they are; see `MaskTask.scores`."""
        shape = (*image_BxHxWx3.shape, image_BxHxWx3.dtype.name)
        image = jax.device_put(image_BxHxWx3, self._device)
        if shape not in self._compiled:
            with self._lock:
                self._apply(self._params, image)
                self._compiled.add(shape)
        return np.asarray(self._apply(self._params, image))

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
        _check_image(image)
        return np.concatenate([self.task.mask_of(scores) for scores in self.bands(image)])

    def probabilities(self, image: np.ndarray) -> np.ndarray:
        """Probabilities float32 `H x W x classes` of one uint8 image of any size."""
        _check_image(image)
        return np.concatenate([self.task.probabilities_of(scores) for scores in self.bands(image)])

    def masks(self, scores: np.ndarray, values: Sequence[int | None]) -> np.ndarray:
        """uint8 `H x W x len(values)`: where the mask has a value, or for None the mask itself."""
        mask = self.task.mask_of(scores)
        one = self.task.mask_of_value
        return np.stack([mask if v is None else one(scores, v) for v in values], -1)


def _check_image(image: Any) -> None:
    if getattr(image, "dtype", None) != np.uint8 or image.ndim != 3 or image.shape[-1] != 3:
        found = f"{getattr(image, 'dtype', type(image).__name__)} {getattr(image, 'shape', '')}"
        raise OptionError(f"image is {found}; allowed: uint8 H x W x 3")
