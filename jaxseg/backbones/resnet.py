"""Residual networks (He et al., CVPR 2016) in torchvision's form, with dilation for dense prediction."""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxseg.ops.conv import conv_general_dilated
from jaxseg.options import OptionError, option

OUTPUT_STRIDES = (8, 16, 32)
NORMS = ("batch", "group")
# torchvision: normal with the variance of the fan out.
_conv_init = nn.initializers.variance_scaling(2.0, "fan_out", "normal")


@dataclasses.dataclass(frozen=True)
class ResNetVariant:
    """The shape of a ResNet: blocks of each stage, whether they are bottlenecks, and the stem.

    `width` is the first stage's; a `small_stem` is one 3x3 convolution of `stem_stride` without
    pooling, for images of 32 x 32.
    """

    name: str
    blocks: tuple[int, int, int, int]
    bottleneck: bool
    width: int = 64
    small_stem: bool = False
    stem_stride: int = 1

    @property
    def dim(self) -> int:
        """Channels of the last stage."""
        return self.width * 8 * (4 if self.bottleneck else 1)

    @property
    def layer_names(self) -> tuple[tuple[str, ...], ...]:
        """The parameters' names by stage, from the input on."""
        blocks = (tuple(f"layer{i + 1}_{j}" for j in range(n)) for i, n in enumerate(self.blocks))
        return (("conv1", "bn1"), *blocks)


# Sizes: He et al. 2016, table 1.
RESNETS: dict[str, ResNetVariant] = {
    variant.name: variant
    for variant in [
        ResNetVariant("resnet18", (2, 2, 2, 2), bottleneck=False),
        ResNetVariant("resnet50", (3, 4, 6, 3), bottleneck=True),
        ResNetVariant("resnet101", (3, 4, 23, 3), bottleneck=True),
        # As used on CIFAR, where the usual stem would leave a single pixel.
        ResNetVariant("resnet18_small", (2, 2, 2, 2), bottleneck=False, small_stem=True),
        # Ours: small enough to pretrain on a laptop.
        ResNetVariant(
            "resnet10_mini",
            (1, 1, 1, 1),
            bottleneck=False,
            width=32,
            small_stem=True,
            stem_stride=2,
        ),
    ]
}


def _norm(kind: str, train: bool, dtype: Any) -> Callable[..., nn.Module]:
    if kind == "group":
        return partial(nn.GroupNorm, num_groups=32, epsilon=1e-5, dtype=dtype)
    # One program over a sharded batch: the statistics are those of the whole batch, on all devices.
    return partial(
        nn.BatchNorm, use_running_average=not train, momentum=0.9, epsilon=1e-5, dtype=dtype
    )


def _conv(features: int, size: int, *, stride: int = 1, dilation: int = 1, dtype: Any, name: str):
    return nn.Conv(
        features,
        (size, size),
        strides=stride,
        kernel_dilation=dilation,
        padding=dilation * (size // 2),
        use_bias=False,
        kernel_init=_conv_init,
        conv_general_dilated=conv_general_dilated,
        dtype=dtype,
        name=name,
    )


class ResidualBlock(nn.Module):
    """A basic block (two 3x3 convolutions) or a bottleneck (1x1, 3x3, 1x1 to four times as many).

    As in torchvision the stride is on the 3x3 convolution of a bottleneck.
    """

    width: int
    bottleneck: bool
    stride: int
    dilation: int
    norm: Callable[..., nn.Module]
    dtype: Any

    @nn.compact
    def __call__(self, x_BxhxwxC: jax.Array) -> jax.Array:
        conv = partial(_conv, dtype=self.dtype)
        spatial = dict(stride=self.stride, dilation=self.dilation)
        if self.bottleneck:
            plan = [(self.width, 1, {}), (self.width, 3, spatial), (4 * self.width, 1, {})]
        else:
            plan = [(self.width, 3, spatial), (self.width, 3, dict(dilation=self.dilation))]
        y = x_BxhxwxC
        for i, (features, size, options) in enumerate(plan, start=1):
            y = conv(features, size, name=f"conv{i}", **options)(y)
            y = self.norm(name=f"bn{i}")(y)
            y = y if i == len(plan) else nn.relu(y)
        shortcut = x_BxhxwxC
        if shortcut.shape != y.shape:
            shortcut = conv(y.shape[-1], 1, stride=self.stride, name="downsample_conv")(shortcut)
            shortcut = self.norm(name="downsample_bn")(shortcut)
        return nn.relu(y + shortcut)


class ResNet(nn.Module):
    """A ResNet without its classifier.

    Attributes:
      variant: its shape.
      dtype: of the convolutions; parameters, statistics and what is returned are float32.
      output_stride: pixels per cell of the last map: 32, or 16 or 8 with dilation in place of stride
        in the last one or two stages (Chen et al., DeepLab).
      norm: "batch" or "group" (32 groups).
      remat: compute a block's activations again in the backward pass instead of keeping them.
    """

    variant: ResNetVariant
    dtype: Any = jnp.float32
    output_stride: int = 32
    norm: str = option("batch", "of a ResNet; group from scratch only", choices=NORMS)
    remat: bool = option(False, "compute activations again: less memory, more time", neutral=False)

    @property
    def layer_names(self) -> tuple[tuple[str, ...], ...]:
        return self.variant.layer_names

    def with_stride(self, stride: int) -> "ResNet":
        """This network with a last map of `stride` pixels per cell; 0 for 16."""
        stride = stride or 16
        if stride not in OUTPUT_STRIDES:
            raise OptionError(f"stride is {stride}; {self.variant.name} allows {OUTPUT_STRIDES}")
        return self.clone(output_stride=stride)

    @nn.compact
    def __call__(self, image_BxHxWx3: jax.Array, *, train: bool = False) -> dict[str, Any]:
        """Computes the features of normalised images of any size.

        Args:
          image_BxHxWx3: float.
          train: whether batch norm uses (and updates) the statistics of this batch.

        Returns:
          float32 `cls` [B, D], the mean of the last map; `patches` [B, h, w, D], the last map; and
          `stages`, the four stages' maps.
        """
        v = self.variant
        norm = _norm(self.norm, train, self.dtype)
        block = nn.remat(ResidualBlock) if self.remat else ResidualBlock
        if v.small_stem:
            x = _conv(v.width, 3, stride=v.stem_stride, dtype=self.dtype, name="conv1")(
                image_BxHxWx3
            )
            x = nn.relu(norm(name="bn1")(x))
        else:
            x = _conv(v.width, 7, stride=2, dtype=self.dtype, name="conv1")(image_BxHxWx3)
            x = nn.relu(norm(name="bn1")(x))
            x = nn.max_pool(x, (3, 3), (2, 2), ((1, 1), (1, 1)))
        stages, dilation, reached = [], 1, v.stem_stride if v.small_stem else 4
        for i, blocks in enumerate(v.blocks):
            stride = 1 if i == 0 else 2
            entry = dilation
            if i and reached * stride > self.output_stride:
                # torchvision: the first block still has the rate of the stage before.
                stride, dilation = 1, dilation * 2
            reached *= stride
            for j in range(blocks):
                x = block(
                    v.width * 2**i,
                    v.bottleneck,
                    stride if j == 0 else 1,
                    entry if j == 0 else dilation,
                    norm,
                    self.dtype,
                    name=f"layer{i + 1}_{j}",
                )(x)
            stages.append(x.astype(jnp.float32))
        last = stages[-1]
        return {"cls": last.mean((1, 2)), "patches": last, "stages": tuple(stages)}
