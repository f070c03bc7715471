"""Heads that upsample features with pixel-adaptive convolution, guided by the image.

The number of stages follows from the shapes: one per factor of two between features and image.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxseg.nn.initializers import uniform_fan_in
from jaxseg.ops.pac import Kernel, pac_conv_transpose, pac_upsample_nearest
from jaxseg.ops.resize import resize_bilinear
from jaxseg.options import option


def stages(features_BxhxwxC: jax.Array, image_BxHxWx3: jax.Array) -> int:
    """How many times the features must be doubled to reach the image's size.

    Raises:
      ValueError: if the sizes do not differ by the same power of two, at least 2, in both axes.
    """
    (h, w), (height, width) = features_BxhxwxC.shape[1:3], image_BxHxWx3.shape[1:3]
    factor = height // h
    if (height, width) != (h * factor, w * factor) or factor < 2 or factor & (factor - 1):
        raise ValueError(
            f"an image of {height}x{width} on features of {h}x{w}: the ratio must be the same "
            "power of two, 2 or more, in both axes"
        )
    return factor.bit_length() - 1


def shrink_bilinear(image_BxHxWxC: jax.Array, factor: int) -> jax.Array:
    """Bilinear resize (half-pixel centres) by 1 / factor, a power of two that divides H and W.

    Each result is the mean of the two middle pixels of a block, per axis, so nothing else is read.
    """
    if factor == 1:
        return image_BxHxWxC
    b, h, w, c = image_BxHxWxC.shape
    blocks = image_BxHxWxC.reshape(b, h // factor, factor, w // factor, factor, c)
    middle = slice(factor // 2 - 1, factor // 2 + 1)
    return blocks[:, :, middle, :, middle].mean(axis=(2, 4))


class _Weights(nn.Module):
    """Parameters of a k x k convolution, initialised as in torch."""

    inputs: int
    outputs: int
    size: int

    @nn.compact
    def __call__(self) -> tuple[jax.Array, jax.Array]:
        init = uniform_fan_in(self.inputs * self.size**2)
        shape = (self.size, self.size, self.inputs, self.outputs)
        return self.param("kernel", init, shape), self.param("bias", init, (self.outputs,))


def _conv(inputs: int, outputs: int, size: int, name: str) -> nn.Conv:
    init = uniform_fan_in(inputs * size**2)
    return nn.Conv(outputs, (size, size), kernel_init=init, bias_init=init, name=name)


class PacCourse(nn.Module):
    """The PAC network of exercise 4 of the TUM course (cv3dst), exactly.

    A 1x1 convolution to 16 channels, leaky ReLU, then stages of nearest x2 and PAC 3x3 with
    leaky ReLU in between, channels 16 -> 4 -> ... -> 4 -> outputs, guided by the RGB image.
    On 384 channels and one output: 7,073 parameters at patch 16 (four stages), 6,925 at patch 8.

    Attributes:
      outputs: number of logits per pixel.
    """

    outputs: int = 1

    @nn.compact
    def __call__(
        self, features_BxhxwxC: jax.Array, image_BxHxWx3: jax.Array, *, train: bool = False
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """Logits BxHxWxK float32 of an image in [0, 1] whose sizes are h and w times 2^n."""
        n = stages(features_BxhxwxC, image_BxHxWx3)
        x = features_BxhxwxC.astype(jnp.float32)
        x = nn.leaky_relu(_conv(x.shape[-1], 16, 1, "reduce")(x))
        for i in range(n):
            last = i == n - 1
            weights = _Weights(x.shape[-1], self.outputs if last else 4, 3, name=f"stage{i}")
            guide = shrink_bilinear(image_BxHxWx3, 2 ** (n - 1 - i))
            x = pac_upsample_nearest(x, guide, *weights(), factor=2, padding=1)
            x = x if last else nn.leaky_relu(x)
        return x, {}


class PacJointUpsample(nn.Module):
    """Joint upsampling with transposed PAC 5x5, stride 2, in the spirit of Su et al., section 5.

    Three convolutions on the features; per level a transposed PAC and ReLU, whose guide is made by
    three convolutions from the image at that level's size and scaled by a learned temperature;
    two convolutions at full resolution.

    Attributes:
      outputs: number of logits per pixel.
      channels: width of the features while they are upsampled.
      guide_channels: compared by the kernel, 16 at most: with more it degenerates to its centre.
      guide_width: channels within the guide network.
      normalized: divide the kernel by its sum.
    """

    outputs: int = 1
    channels: int = option(32, "width of the features while they are upsampled", low=1, high=2**16)
    guide_channels: int = option(16, "channels that the kernel compares", low=1, high=16)
    guide_width: int = 16
    normalized: bool = False

    @nn.compact
    def __call__(
        self, features_BxhxwxC: jax.Array, image_BxHxWx3: jax.Array, *, train: bool = False
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """Logits BxHxWxK float32 of an image in [0, 1] whose sizes are h and w times 2^n."""
        if not 1 <= self.guide_channels <= 16:
            raise ValueError(f"guide_channels is {self.guide_channels}: allowed are 1 to 16")
        n = stages(features_BxhxwxC, image_BxHxWx3)
        x = features_BxhxwxC.astype(jnp.float32)
        for i, size in enumerate((1, 3, 3)):
            x = nn.relu(_conv(x.shape[-1], self.channels, size, f"target{i}")(x))
        for i in range(n):
            size = (2 * x.shape[1], 2 * x.shape[2])
            guide = self._guide(resize_bilinear(image_BxHxWx3, size, antialias=True), i)
            # Unit-variance guides then differ by 2 on average: a kernel value near exp(-1).
            start = nn.initializers.constant(self.guide_channels**-0.5)
            temperature = self.param(f"temperature{i}", start, ())
            kernel = Kernel(normalized=self.normalized, temperature=temperature)
            weights = _Weights(self.channels, self.channels, 5, name=f"upsample{i}")
            x = nn.relu(
                pac_conv_transpose(
                    x, guide, *weights(), stride=2, padding=2, output_padding=1, kernel=kernel
                )
            )
        x = nn.relu(_conv(self.channels, self.channels, 3, "final")(x))
        return _conv(self.channels, self.outputs, 1, "classify")(x), {}

    def _guide(self, image_BxHxWx3: jax.Array, level: int) -> jax.Array:
        x = image_BxHxWx3 - 0.5
        widths = (self.guide_width, self.guide_width, self.guide_channels)
        for i, width in enumerate(widths):
            x = _conv(x.shape[-1], width, 3, f"guide{level}_{i}")(x if i == 0 else nn.relu(x))
        return x
