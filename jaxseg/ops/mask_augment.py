"""Augmentation on the device: one random transform for an image and what belongs to it.

All geometry is one affine map per example, so flip, scale and crop cost one resampling together.
"""

import dataclasses
from collections.abc import Mapping

import jax
import jax.numpy as jnp
from jax.scipy.ndimage import map_coordinates

from jaxseg.ops import geometry
from jaxseg.options import OptionError, option


@dataclasses.dataclass(frozen=True)
class Augmentation:
    """A random flip, scale, crop and colour change; the default does nothing.

    Attributes:
      flip: probability of a left-right flip, 0 to 1.
      scale: (low, high) of the zoom, drawn log-uniformly; above 1 the image is enlarged and a
        window of the original size is cropped at random, below 1 it is shrunk into a random place
        and what is beyond it is black in the image and void in the mask.
      brightness, contrast, saturation: largest relative change, each drawn from U(1 - x, 1 + x).
    """

    flip: float = option(0.0, "probability", low=0, high=1)
    scale: tuple[float, float] = option((1.0, 1.0), "(low, high) of the zoom", length=2, low=0)
    brightness: float = option(0.0, "largest relative change", low=0, high=1)
    contrast: float = option(0.0, low=0, high=1)
    saturation: float = option(0.0, low=0, high=1)

    def __post_init__(self):
        low, high = self.scale
        if not 0 < low <= high:
            raise OptionError(f"scale is ({low}, {high}); allowed: 0 < low <= high")

    def __call__(
        self, rng: jax.Array, image_BxHxWx3: jax.Array, mask_BxHxW: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        """Transforms float images in [0, 1] and uint8 masks; shapes and dtypes stay.

        The masks are resampled to the nearest pixel, the images bilinearly.
        """
        changed = self.examples(rng, {"image": image_BxHxWx3, "mask": mask_BxHxW})
        return changed["image"], changed["mask"]

    def examples(self, rng: jax.Array, fields: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
        """Transforms the fields of B examples, each by its geometry (`geometry.FIELDS`).

        The image is float [B, H, W, 3] in [0, 1]. Shapes and dtypes stay.
        """
        keys = jax.random.split(rng, fields["image"].shape[0])
        return jax.vmap(self._one)(keys, dict(fields))

    def _one(self, key, fields):
        key_flip, key_scale, key_y, key_x, key_colour = jax.random.split(key, 5)
        if tuple(self.scale) != (1.0, 1.0):
            low, high = jnp.log(jnp.asarray(self.scale, jnp.float32))
            zoom = jnp.exp(jax.random.uniform(key_scale, minval=low, maxval=high))
            fields = _zoom(fields, zoom, key_y, key_x)
        if self.flip:
            mirrored = jax.random.bernoulli(key_flip, self.flip)
            size = fields["image"].shape[:2]
            for name, value in fields.items():
                if geometry.field(name).geometry:
                    flipped = geometry.flip(name, value, size, jnp)
                    fields = {**fields, name: jnp.where(mirrored, flipped, value)}
        return {**fields, "image": self._colour(key_colour, fields["image"])}

    def _colour(self, key, image):
        factors = jax.random.uniform(key, (3,), minval=-1.0, maxval=1.0)
        grey = jnp.asarray([0.299, 0.587, 0.114])
        if self.brightness:
            image = image * (1.0 + self.brightness * factors[0])
        if self.contrast:
            mean = (image @ grey).mean()
            image = mean + (image - mean) * (1.0 + self.contrast * factors[1])
        if self.saturation:
            luma = (image @ grey)[..., None]
            image = luma + (image - luma) * (1.0 + self.saturation * factors[2])
        return jnp.clip(image, 0.0, 1.0)


def _zoom(fields, zoom, key_y, key_x):
    """Enlarges by `zoom` and moves at random, such that as much of the image as fits is seen."""

    def source(size: int, key) -> tuple[jax.Array, jax.Array]:
        # Output pixel i shows source coordinate (i + 0.5) / zoom + offset - 0.5.
        offset = jax.random.uniform(key) * (size - size / zoom)
        return (jnp.arange(size) + 0.5) / zoom + offset - 0.5, offset

    height, width = fields["image"].shape[:2]
    (rows, top), (columns, left) = source(height, key_y), source(width, key_x)
    grid = jnp.meshgrid(rows, columns, indexing="ij")
    inside = (
        (grid[0] > -0.5) & (grid[0] < height - 0.5) & (grid[1] > -0.5) & (grid[1] < width - 0.5)
    )

    def sample(channel, order):
        return map_coordinates(channel, grid, order=order, mode="nearest")

    def moved(field, value):
        if field.geometry == "bilinear":
            return jnp.stack([sample(value[..., c], 1) for c in range(value.shape[-1])], -1)
        if field.geometry == "nearest":
            return sample(value.astype(jnp.float32), 0).astype(value.dtype)
        if field.geometry == "boxes":
            shift = (-top * zoom, -left * zoom)
            return geometry.move_boxes(value, (zoom, zoom), shift, (height, width), jnp)
        return value

    def padded(field, value):
        if field.geometry == "bilinear":
            return jnp.where(inside[..., None], value, float(field.padding))
        return jnp.where(inside, value, field.padding) if field.geometry == "nearest" else value

    found = {name: moved(geometry.field(name), value) for name, value in fields.items()}
    return {name: padded(geometry.field(name), value) for name, value in found.items()}
