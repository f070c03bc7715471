"""Baselines without a guide: one 1x1 convolution on the features."""

from typing import ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxseg.nn.initializers import uniform_fan_in
from jaxseg.ops.resize import resize_bilinear, resize_nearest


class LinearProbe(nn.Module):
    """The linear probe: a 1x1 convolution, trained on masks max-pooled to the token grid.

    Full-resolution logits are the token's own, repeated (nearest), as the course evaluates it.

    Attributes:
      outputs: number of logits, K.
      resize: `nearest`, or `bilinear` for the smoother baseline, which is trained at full resolution.
      norm: batch norm before the convolution, as DINOv2 evaluates features (Oquab et al. 2023).
    """

    coarse: ClassVar[bool] = True

    outputs: int = 1
    resize: str = "nearest"
    norm: bool = False

    @nn.compact
    def __call__(
        self, features_BxhxwxC: jax.Array, image_BxHxWx3: jax.Array, *, train: bool = False
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """Returns (logits `B x H x W x K`, {"coarse": logits `B x h x w x K`}).

        `coarse` is given by the nearest form only: it is what that form is trained on.
        """
        init = uniform_fan_in(features_BxhxwxC.shape[-1])
        classify = nn.Dense(self.outputs, kernel_init=init, bias_init=init, name="classify")
        x = features_BxhxwxC.astype(jnp.float32)
        if self.norm:
            statistics = dict(use_running_average=not train, momentum=0.9, epsilon=1e-5)
            x = nn.BatchNorm(**statistics, name="norm")(x)
        x = classify(x)
        if self.resize == "bilinear":
            return resize_bilinear(x, image_BxHxWx3.shape[1:3]), {}
        return resize_nearest(x, image_BxHxWx3.shape[1] // x.shape[1]), {"coarse": x}


class BilinearProbe(LinearProbe):
    """The probe with logits upsampled bilinearly, trained at full resolution."""

    coarse: ClassVar[bool] = False

    resize: str = "bilinear"


class NormalizedProbe(BilinearProbe):
    """The bilinear probe after batch norm."""

    norm: bool = True
