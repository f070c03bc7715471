"""How a backbone sees whole images when it is judged: at which size, and what of them."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxseg.backbones.contract import apply, contract
from jaxseg.nn.normalize import normalize
from jaxseg.ops.crops import center_crops
from jaxseg.ops.resize import resize_bilinear


@dataclasses.dataclass(frozen=True)
class WholeImages:
    """Prepares images for a backbone in evaluation.

    Attributes:
      module: the backbone's.
      normalization: of the images that it sees.
      resolution: their shorter side; 0 for as it is.
      crop: share of the sides that k-NN and the probe see.
    """

    module: nn.Module
    normalization: str
    resolution: int = 0
    crop: float = 1.0

    def size(self, canvas: tuple[int, int]) -> tuple[int, int]:
        """(height, width) at which the backbone sees images of `canvas`.

        Their shorter side is `resolution`, or less where the longer one would be more than four times
        as much; both are multiples of the patch.
        """
        patch, shorter = contract(self.module).patch, self.resolution or min(canvas)
        scale = min(shorter / min(canvas), max(1.0, 4 * shorter / max(canvas)))
        return tuple(max(round(side * scale / patch), 1) * patch for side in canvas)

    def prepare(self, image_BxHxWx3: jax.Array) -> jax.Array:
        """uint8 images, resized and normalised, as the backbone sees whole images."""
        size = self.size(image_BxHxWx3.shape[1:3])
        image = resize_bilinear(image_BxHxWx3.astype(jnp.float32) / 255.0, size, antialias=True)
        return normalize(image, self.normalization)

    def crops(self, batch: Mapping[str, jax.Array]) -> jax.Array:
        """`B x h x w x 3`, normalised: the images' centres, as k-NN and the probe see them.

        The cut has the shape of the canvas and the share `crop` of the sides that fit into the image;
        so the network never sees what is around the image in the canvas.
        """
        size = self.size(batch["image"].shape[1:3])
        images = center_crops(batch["image"], batch["extent"], size, share=self.crop)
        return normalize(images, self.normalization)

    def embed(
        self, variables: Mapping[str, Any], batch: Mapping[str, jax.Array]
    ) -> dict[str, jax.Array]:
        """`cls` [B, D] of the images' centres, and their `mean`.

        The mean [B, 3] of what the network saw tells later whether two features are of the same image.
        """
        seen = self.crops(batch)
        cls = apply(self.module, variables, seen, train=False)["cls"]
        return {"cls": cls, "mean": seen.mean((1, 2))}
