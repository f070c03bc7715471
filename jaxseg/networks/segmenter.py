"""A backbone and a head as one model, from images in [0, 1] to logits.

What passes between them is one map `B x h x w x C` (ViT), or the maps of several strides as a mapping
{stride: map} (ResNet), whose `"auxiliary"` is the last map but one, for auxiliary losses.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxseg.backbones.resnet import ResNet
from jaxseg.backbones.vit import ViT
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
      head: `head(features, image_BxHxWx3, train=...) -> (logits_BxHxWxK, aux)`. One whose class has
        `several_maps` gets all maps of a ResNet, others the deepest.
      stride: image pixels per cell of the last map; a power of two. H and W must be multiples of it.
      layers: blocks of a ViT whose patch tokens are concatenated, each after the final norm; -1 is the
        last.
      normalization: a key of `NORMALIZATIONS`, applied to what the backbone sees, not to the guide.
      trains_backbone: whether the backbone's batch norm takes part in training; else it keeps the
        statistics that it has.
    """

    backbone: ViT | ResNet
    head: nn.Module
    stride: int
    layers: tuple[int, ...] = (-1,)
    normalization: str = "imagenet"
    trains_backbone: bool = False

    def features(
        self, image_BxHxWx3: jax.Array, *, train: bool = False
    ) -> jax.Array | dict[Any, jax.Array]:
        """Features of images in [0, 1], float32.

        Returns:
          Of a ViT one map `B x H/stride x W/stride x C`, C = dim * layers; of a ResNet its maps by
          their stride, and "auxiliary".
        """
        height, width = image_BxHxWx3.shape[1:3]
        if height % self.stride or width % self.stride:
            raise ValueError(
                f"images of {height}x{width} are no multiple of the stride {self.stride}"
            )
        if isinstance(self.backbone, ResNet):
            x = normalize(image_BxHxWx3, self.normalization)
            stages = self.backbone(x, train=train and self.trains_backbone)["stages"]
            # Where stages share a stride, the later one replaces the earlier.
            maps = {height // x.shape[1]: x for x in stages}
            return {**maps, "auxiliary": stages[-2]}
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
        features: Any = None,
        train: bool = False,
        **inputs: jax.Array,
    ) -> tuple[jax.Array, dict[str, Any]]:
        """Logits of images.

        Args:
          image_BxHxWx3: float in [0, 1].
          features: what `features` gives for them, if that is at hand; any float dtype.
          train: whether dropout, batch norm and the like are on (needs the rng `dropout`).
          **inputs: what else the head takes.

        Returns:
          (logits float32 `B x H x W x K`, named extras of the head).
        """
        if features is None:
            features = self.features(image_BxHxWx3, train=train)
        if not isinstance(features, dict):
            features = features.astype(jnp.float32)  # they may come from the cache
        elif not getattr(self.head, "several_maps", False):
            features = features[max(key for key in features if isinstance(key, int))]
        return self.head(features, image_BxHxWx3, train=train, **inputs)
