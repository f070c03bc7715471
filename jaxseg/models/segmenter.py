"""A backbone and a head as one model, from images in [0, 1] to logits."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxseg.models.vit import ViT
from jaxseg.ops.resize import resize_bilinear

# The statistics that DINO's and DINOv2's released weights were trained with.
NORMALIZATIONS = {
    "imagenet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    "none": ((0.0, 0.0, 0.0), (1.0, 1.0, 1.0)),
}


def normalize(image: jax.Array, name: str) -> jax.Array:
    """Images in [0, 1], [..., 3], less the mean and over the deviation of `NORMALIZATIONS[name]`."""
    mean, std = NORMALIZATIONS[name]
    return (image - jnp.asarray(mean)) / jnp.asarray(std)


def default_stride(patch: int) -> int:
    """Image pixels per token: the patch size where that is a power of two, else 16.

    A patch-14 backbone sees the image resized by 14/16, so that the heads' factors of two end at
    full resolution.
    """
    return patch if patch & (patch - 1) == 0 else 16


class Segmenter(nn.Module):
    """Backbone features, then a head.

    Attributes:
      backbone: gives the features.
      head: `head(features_BxhxwxC, image_BxHxWx3, train=...) -> (logits_BxHxWxK, aux)`.
      stride: image pixels per token; a power of two. H and W must be multiples of it.
      layers: blocks whose patch tokens are concatenated, each after the final norm; -1 is the last.
      normalization: a key of `NORMALIZATIONS`, applied to what the backbone sees, not to the guide.
    """

    backbone: ViT
    head: nn.Module
    stride: int
    layers: tuple[int, ...] = (-1,)
    normalization: str = "imagenet"

    def features(self, image_BxHxWx3: jax.Array) -> jax.Array:
        """Features of images in [0, 1]: float32 `B x H/stride x W/stride x C`, C = dim * layers."""
        height, width = image_BxHxWx3.shape[1:3]
        if height % self.stride or width % self.stride:
            raise ValueError(
                f"images of {height}x{width} are no multiple of the stride {self.stride}"
            )
        patch = self.backbone.variant.patch
        size = (height // self.stride * patch, width // self.stride * patch)
        x = resize_bilinear(image_BxHxWx3, size)
        x = normalize(x, self.normalization)
        if self.layers == (-1,):
            return self.backbone(x)["patches"]
        out = self.backbone(x, layers=self.layers)["layers"]
        return jnp.concatenate([out[i] for i in self.layers], axis=-1)

    def __call__(
        self,
        image_BxHxWx3: jax.Array,
        *,
        features_BxhxwxC: jax.Array | None = None,
        train: bool = False,
    ) -> tuple[jax.Array, dict[str, Any]]:
        """Logits of images.

        Args:
          image_BxHxWx3: float in [0, 1].
          features_BxhxwxC: what `features` gives for them, if that is at hand; any float dtype.
          train: whether dropout and the like are on (needs the rng `dropout`).

        Returns:
          (logits float32 `B x H x W x K`, named extras of the head).
        """
        if features_BxhxwxC is None:
            features_BxhxwxC = self.features(image_BxHxWx3)
        return self.head(features_BxhxwxC.astype(jnp.float32), image_BxHxWx3, train=train)
