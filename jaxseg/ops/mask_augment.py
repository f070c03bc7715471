"""Augmentation on the device: one random transform for an image and its mask.

All geometry is one affine map per example, so flip, scale and crop cost one resampling together.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jax.scipy.ndimage import map_coordinates

VOID = 255


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

    flip: float = 0.0
    scale: tuple[float, float] = (1.0, 1.0)
    brightness: float = 0.0
    contrast: float = 0.0
    saturation: float = 0.0

    def __call__(
        self, rng: jax.Array, image_BxHxWx3: jax.Array, mask_BxHxW: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        """Transforms float images in [0, 1] and uint8 masks; shapes and dtypes stay.

        The masks are resampled to the nearest pixel, the images bilinearly.
        """
        keys = jax.random.split(rng, image_BxHxWx3.shape[0])
        return jax.vmap(self._one)(keys, image_BxHxWx3, mask_BxHxW)

    def _one(self, key, image, mask):
        key_flip, key_scale, key_y, key_x, key_colour = jax.random.split(key, 5)
        if tuple(self.scale) != (1.0, 1.0):
            low, high = jnp.log(jnp.asarray(self.scale, jnp.float32))
            zoom = jnp.exp(jax.random.uniform(key_scale, minval=low, maxval=high))
            image, mask = _zoom(image, mask, zoom, key_y, key_x)
        if self.flip:
            mirrored = jax.random.bernoulli(key_flip, self.flip)
            image = jnp.where(mirrored, image[:, ::-1], image)
            mask = jnp.where(mirrored, mask[:, ::-1], mask)
        return self._colour(key_colour, image), mask

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


def _zoom(image_HxWx3, mask_HxW, zoom, key_y, key_x):
    """Enlarges by `zoom` and moves at random, such that as much of the image as fits is seen."""

    def source(size: int, key) -> jax.Array:
        # Output pixel i shows source coordinate (i + 0.5) / zoom + offset - 0.5.
        offset = jax.random.uniform(key) * (size - size / zoom)
        return (jnp.arange(size) + 0.5) / zoom + offset - 0.5

    height, width = mask_HxW.shape
    grid = jnp.meshgrid(source(height, key_y), source(width, key_x), indexing="ij")
    inside = (
        (grid[0] > -0.5) & (grid[0] < height - 0.5) & (grid[1] > -0.5) & (grid[1] < width - 0.5)
    )

    def sample(channel, order):
        return map_coordinates(channel, grid, order=order, mode="nearest")

    image = jnp.stack([sample(image_HxWx3[..., c], 1) for c in range(3)], -1)
    mask = sample(mask_HxW.astype(jnp.float32), 0).astype(mask_HxW.dtype)
    return jnp.where(inside[..., None], image, 0.0), jnp.where(inside, mask, VOID)
