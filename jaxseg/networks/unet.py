"""U-Net (Ronneberger, Fischer and Brox, MICCAI 2015, arXiv:1505.04597), as published and as used today."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from jaxseg.heads.guided import depth_to_space
from jaxseg.nn.dense import Dense
from jaxseg.nn.normalize import normalize
from jaxseg.ops.conv import conv_general_dilated
from jaxseg.ops.pool import max_pool
from jaxseg.options import OptionError, option

PADDINGS = ("same", "valid")
NORMS = ("batch", "group", "none")
ENCODERS = ("", "vgg16")
# The paper's: a standard deviation of sqrt(2 / inputs).
_init = nn.initializers.variance_scaling(2.0, "fan_in", "normal")
# Of the up-convolutions, which no ReLU follows: sqrt(1 / inputs). Each result sees one of the four taps,
# but Flax counts all.
_up_init = nn.initializers.variance_scaling(4.0, "fan_in", "normal")
# (channels over those of the first level, convolutions) of each level.
_VGG16 = ((1, 2), (2, 2), (4, 3), (8, 3), (8, 3))


def _conv_norm(x, features: int, level: str, padding: str, norm: str, train: bool) -> jax.Array:
    x = nn.Conv(
        features,
        (3, 3),
        padding=1 if padding == "same" else 0,
        use_bias=norm == "none",
        kernel_init=_init,
        conv_general_dilated=conv_general_dilated,
        name=f"conv{level}",
    )(x)
    if norm == "batch":
        # One value a channel is its own mean: training on it would give zeros (as in the heads).
        alone = x.size == features
        x = nn.BatchNorm(not train or alone, momentum=0.9, epsilon=1e-5, name=f"norm{level}")(x)
    elif norm == "group":
        groups = (g for g in (32, 16, 8, 4, 2) if features % g == 0 and features // g >= 8)
        x = nn.GroupNorm(next(groups, 1), epsilon=1e-5, name=f"norm{level}")(x)
    return nn.relu(x)


class UpConvolution(nn.Module):
    """A transposed convolution of 2x2 with stride 2 and a bias: `B x 2h x 2w x features`.

    Windows do not meet, so it is one product of matrices; the gradient of `nn.ConvTranspose` takes 40
    times as long on a CPU. Pixel (i, j) of each window is made by `kernel[i, j]`.
    """

    features: int

    @nn.compact
    def __call__(self, x_BxhxwxC: jax.Array) -> jax.Array:
        b, h, w, c = x_BxhxwxC.shape
        kernel = self.param("kernel", _up_init, (2, 2, c, self.features))
        bias = self.param("bias", nn.initializers.zeros, (self.features,))
        x = x_BxhxwxC.reshape(-1, c) @ kernel.transpose(2, 0, 1, 3).reshape(c, -1)
        return depth_to_space(x.reshape(b, h, w, -1)) + bias


class ContractingPath(nn.Module):
    """Levels of 3x3 convolutions, norm and ReLU, with 2x2 max pooling (rounded down) in between.

    Attributes:
      levels: (channels, number of convolutions) of each.
      padding, norm, dropout: those of `UNet`.
    """

    levels: tuple[tuple[int, int], ...]
    padding: str
    norm: str
    dropout: float

    @nn.compact
    def __call__(self, x_BxHxWxC: jax.Array, *, train: bool = False) -> list[jax.Array]:
        """The last map of each level, from shallow to deep."""
        x, maps = x_BxHxWxC, []
        for i, (features, convolutions) in enumerate(self.levels, 1):
            if i > 1:
                x = max_pool(x)
            for j in range(1, convolutions + 1):
                x = _conv_norm(x, features, f"{i}_{j}", self.padding, self.norm, train)
            # As in the released network: the skip of the last level but one is dropped too.
            if i >= len(self.levels) - 1:
                x = nn.Dropout(self.dropout, deterministic=not train)(x)
            maps.append(x)
        return maps


class ExpandingPath(nn.Module):
    """Per level an up-convolution (2x2, stride 2), the skip before it, and two 3x3 convolutions.

    Attributes:
      padding, norm: those of `UNet`.
    """

    padding: str
    norm: str

    @nn.compact
    def __call__(self, maps: list[jax.Array], *, train: bool = False) -> jax.Array:
        """A map of the first level, of maps from shallow to deep, each with its skip's channels."""
        x = maps[-1]
        for i in range(len(maps) - 1, 0, -1):
            skip = maps[i - 1]
            x = UpConvolution(skip.shape[-1], name=f"up{i}")(x)
            (height, width), (h, w) = skip.shape[1:3], x.shape[1:3]
            if self.padding == "same":
                x = jnp.pad(x, ((0, 0), (0, height - h), (0, width - w), (0, 0)))
            else:
                top, left = (height - h) // 2, (width - w) // 2
                skip = skip[:, top : top + h, left : left + w]
            x = jnp.concatenate([skip, x], -1)
            for j in (1, 2):
                x = _conv_norm(x, skip.shape[-1], f"{i}_{j}", self.padding, self.norm, train)
        return x


class UNet(nn.Module):
    """U-Net: a contracting and an expanding path of the same depth, with skips from one to the other.

    The defaults are the form in use today, with zero padding and batch norm. The published one has
    padding "valid", norm "none" and dropout 0.5; to give logits for the whole image, the image is
    continued by mirroring it (without its border pixels twice), as in the paper's overlap-tile
    strategy. Up-convolutions have no ReLU after them (in the network that the authors released they do).

    Parameters lie under `contracting`, `expanding` and `classify`; convolution j of level i, both from
    1 and level 1 at full resolution, is `conv{i}_{j}`.

    Attributes:
      outputs: number of logits per pixel, K.
    """

    outputs: int = 1
    padding: str = option(
        "same",
        "of the 3x3 convolutions: same (zeros) or valid (the image mirrored)",
        choices=PADDINGS,
    )
    width: int = option(64, "channels of the first level, doubled at each of the next", low=1)
    depth: int = option(4, "poolings; at most 4 with an encoder", low=1, high=8)
    norm: str = option("batch", "after each 3x3 convolution; none gives it a bias", choices=NORMS)
    dropout: float = option(0.0, "at the end of the contracting path", low=0.0, high=0.99)
    encoder: str = option(
        "", "contracting path instead: vgg16 (its 13 convolutions, without norm)", choices=ENCODERS
    )

    @property
    def multiple(self) -> int:
        """Images' heights and widths must be multiples of it."""
        return 1

    @property
    def margin(self) -> int:
        """Pixels beyond each side of the image that the logits depend on and that are mirrored."""
        if self.padding == "same":
            return 0
        down = sum(n * 2**i for i, (_, n) in enumerate(self._levels()))
        return down + 2 * (2**self.depth - 1)

    def _levels(self) -> tuple[tuple[int, int], ...]:
        for name, allowed in [("padding", PADDINGS), ("norm", NORMS), ("encoder", ENCODERS)]:
            if getattr(self, name) not in allowed:
                raise OptionError(
                    f"{name} is {getattr(self, name)!r}; allowed: {', '.join(map(repr, allowed))}"
                )
        levels: Any = [(2**i, 2) for i in range(self.depth + 1)]
        if self.encoder:
            levels = _VGG16[: self.depth + 1]
            if len(levels) <= self.depth:
                raise OptionError(f"depth is {self.depth}; allowed with {self.encoder}: at most 4")
        return tuple((self.width * factor, n) for factor, n in levels)

    def __call__(
        self, image_BxHxWx3: jax.Array, *, train: bool = False
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """Logits of images.

        Args:
          image_BxHxWx3: float in [0, 1], of any size (with padding "same" 2**depth pixels or more),
            and of any number of channels without an encoder.
          train: whether batch norm uses (and updates) the statistics of this batch, and dropout is
            on (needs the rng `dropout`).

        Returns:
          (logits float32 `B x H x W x K`, {}).

        Raises:
          ValueError: an image that is too small, or an option that is not allowed.
        """
        if self.padding == "same":
            return self.tile(image_BxHxWx3, train=train), {}
        height, width = image_BxHxWx3.shape[1:3]
        margin, grid = self.margin, 2**self.depth
        rows, columns = (
            # Results come in sizes of 4 more than a multiple of the grid.
            np.pad(np.arange(n), (margin, margin + (4 - n) % grid), mode="reflect")
            for n in (height, width)
        )
        logits = self.tile(image_BxHxWx3[:, rows[:, None], columns], train=train)
        return logits[:, :height, :width], {}

    @nn.compact
    def tile(self, image_BxHxWx3: jax.Array, *, train: bool = False) -> jax.Array:
        """The network as published: logits of the pixels whose surroundings are in the image.

        With padding "same" these are all of them. With "valid" the result is `margin` smaller on each
        side (572 gives 388), and sizes must be such that each pooled map is even.

        Returns:
          Logits float32 `B x H - 2 margin x W - 2 margin x K`.

        Raises:
          ValueError: another size, or an option that is not allowed.
        """
        levels, margin, grid = self._levels(), self.margin, 2**self.depth
        for n in image_BxHxWx3.shape[1:3]:
            if margin and (n <= 2 * margin or (n - 2 * margin - 4) % grid):
                raise ValueError(
                    f"a tile of {n} pixels: allowed are multiples of {grid} plus "
                    f"{(2 * margin + 4) % grid}, above {2 * margin}"
                )
            if n < grid:
                raise ValueError(
                    f"an image of {n} pixels: with depth {self.depth} allowed are {grid} or more"
                )
        x, norm = image_BxHxWx3, self.norm
        if self.encoder:
            # As the weights that there are for it were trained.
            x, norm = normalize(x, "imagenet"), "none"
        path = ContractingPath(levels, self.padding, norm, self.dropout, name="contracting")
        maps = path(x, train=train)
        x = ExpandingPath(self.padding, self.norm, name="expanding")(maps, train=train)
        return Dense(self.outputs, kernel_init=_init, name="classify")(x).astype(jnp.float32)
