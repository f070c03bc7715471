"""DeepLab's heads: V3 (Chen et al. 2017, arXiv:1706.05587) and V3+ (Chen et al. 2018, 1802.02611).

`features` of both heads is one map `B x h x w x C` whose stride is H/h, or a mapping from strides to
maps, of which the deepest goes through the atrous pyramid. The keys of a mapping may be written as
strings ("16"): the arguments of a jitted function must not mix them with the key `AUXILIARY`.
"""

from collections.abc import Mapping
from functools import partial
from typing import ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxseg.backbones.resnet import NORMS
from jaxseg.heads.guided import depth_to_space
from jaxseg.nn.dense import Dense
from jaxseg.ops.resize import resize_bilinear
from jaxseg.options import option

AUXILIARY = "auxiliary"
LOW_LEVELS = ("stem", "pyramid")
LOW_STRIDE = 4
Features = jax.Array | Mapping[int | str, jax.Array]


def atrous_rates(stride: int) -> tuple[int, int, int]:
    """The rates that reach as far as 6, 12, 18 do at stride 16 (12, 24, 36 at 8); at least 1."""
    return tuple(max(1, int(rate * 16 / stride + 0.5)) for rate in (6, 12, 18))


def split_features(
    features: Features, image_BxHxWx3: jax.Array
) -> tuple[dict[int, jax.Array], jax.Array | None]:
    """(float32 maps by stride, the map under `AUXILIARY` or None).

    Raises:
      ValueError: the image is no whole multiple of a single map, or a mapping is without strides.
    """
    if not isinstance(features, Mapping):
        (h, w), (height, width) = features.shape[1:3], image_BxHxWx3.shape[1:3]
        stride = height // h
        if (height, width) != (h * stride, w * stride) or not stride:
            raise ValueError(
                f"an image of {height}x{width} on features of {h}x{w}: the ratio must be the same "
                "whole number in both axes"
            )
        features = {stride: features}
    features = {k: v.astype(jnp.float32) for k, v in features.items()}
    auxiliary = features.pop(AUXILIARY, None)
    try:
        maps = {int(stride): x for stride, x in features.items()}
    except ValueError:
        maps = {}
    if not maps:
        raise ValueError(
            f"features are called {list(features)}: allowed are strides and {AUXILIARY!r}"
        )
    return maps, auxiliary


def _norm(x_BxhxwxC: jax.Array, kind: str, *, train: bool, name: str = "norm") -> jax.Array:
    channels = x_BxhxwxC.shape[-1]
    if kind == "group":
        # The pooled map is 1x1: a group of one or two channels would have nothing left to tell.
        groups = (g for g in (32, 16, 8, 4, 2) if channels % g == 0 and channels // g >= 8)
        return nn.GroupNorm(next(groups, 1), epsilon=1e-5, name=name)(x_BxhxwxC)
    if kind != "batch":
        raise ValueError(f"norm is {kind!r}: allowed are {', '.join(NORMS)}")
    # The pooled map of a single image is one value a channel, its own mean with variance 0: training
    # on it would give zeros and drive the running variance to 0. The running statistics stand in
    # and stay as they are, where torch raises an error.
    alone = x_BxhxwxC.size == channels
    norm = nn.BatchNorm(not train or alone, momentum=0.9, epsilon=1e-5, name=name)
    return norm(x_BxhxwxC)


class ConvNorm(nn.Module):
    """A convolution without bias, a norm and ReLU.

    Attributes:
      features: channels of the result.
      size: of the kernel, odd; padded so that stride 1 keeps the size of the map.
      stride: of the convolution.
      rate: cells from one tap of the kernel to the next (atrous convolution).
      norm: "batch" or "group".
    """

    features: int
    size: int = 1
    stride: int = 1
    rate: int = 1
    norm: str = "batch"

    @nn.compact
    def __call__(self, x_BxhxwxC: jax.Array, *, train: bool = False) -> jax.Array:
        if self.size == self.stride == 1:
            # One matrix product: on CPUs its gradients take half the time of the convolution's.
            x = Dense(self.features, use_bias=False, name="conv")(x_BxhxwxC)
        else:
            x = nn.Conv(
                self.features,
                (self.size, self.size),
                strides=self.stride,
                kernel_dilation=self.rate,
                padding=self.rate * (self.size // 2),
                use_bias=False,
                name="conv",
            )(x_BxhxwxC)
        return nn.relu(_norm(x, self.norm, train=train))


def _taps(x_BxhxwxC: jax.Array, size: int, rate: int, padding: int) -> tuple[jax.Array, list]:
    """The padded map, and where the window of each tap of a kernel starts in it."""
    widths = ((0, 0), (padding, padding), (padding, padding), (0, 0))
    return jnp.pad(x_BxhxwxC, widths), [rate * i for i in range(size)]


@partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def depthwise_conv(
    x_BxhxwxC: jax.Array, kernel_kxkxC: jax.Array, rate: int, padding: int
) -> jax.Array:
    """Convolves every channel with its own kernel (not flipped), stride 1, zeros at the border.

    A sum of shifted products: on CPUs XLA's grouped convolution takes 20 times as long, and its
    gradients 40 times.

    Args:
      x_BxhxwxC: floating point.
      kernel_kxkxC: of the same dtype.
      rate: cells from one tap to the next.
      padding: cells of zeros on every side.

    Returns:
      `B x h' x w' x C` with h' = h + 2 padding - rate (k - 1).
    """
    size = kernel_kxkxC.shape[0]
    x, starts = _taps(x_BxhxwxC, size, rate, padding)
    h, w = (n - starts[-1] for n in x.shape[1:3])
    return sum(
        x[:, top : top + h, left : left + w] * kernel_kxkxC[i, j]
        for i, top in enumerate(starts)
        for j, left in enumerate(starts)
    )


def _depthwise_forward(x, kernel, rate, padding):
    return depthwise_conv(x, kernel, rate, padding), (x, kernel)


def _depthwise_backward(rate, padding, saved, gradient):
    x, kernel = saved
    size = kernel.shape[0]
    reach = rate * (size - 1)
    to_x = depthwise_conv(gradient, kernel[::-1, ::-1], rate, reach - padding)
    padded, starts = _taps(x, size, rate, padding)

    def tap(corner):
        # One tap at a time: CPUs sum the unrolled form four times slower. The sum over the images is
        # left to the end, to be one exchange between devices.
        window = jax.lax.dynamic_slice(padded, (0, *corner, 0), gradient.shape)
        return (window * gradient).sum((1, 2))

    corners = jnp.array([(top, left) for top in starts for left in starts])
    return to_x, jax.lax.map(tap, corners).sum(1).reshape(kernel.shape)


depthwise_conv.defvjp(_depthwise_forward, _depthwise_backward)


class SeparableConv(nn.Module):
    """Depthwise-separable convolution: kxk on every channel, then 1x1; norm and ReLU after both.

    Attributes:
      features: channels of the result.
      size: of the depthwise kernel, odd.
      rate: its atrous rate.
      norm: "batch" or "group".
      padding: "SAME", or "VALID" for results of whole windows only.
    """

    features: int
    size: int = 3
    rate: int = 1
    norm: str = "batch"
    padding: str = "SAME"

    @nn.compact
    def __call__(self, x_BxhxwxC: jax.Array, *, train: bool = False) -> jax.Array:
        init = nn.initializers.variance_scaling(1.0, "fan_in", "truncated_normal", in_axis=(0, 1))
        shape = (self.size, self.size, x_BxhxwxC.shape[-1])
        kernel = self.param("depthwise", init, shape)
        padding = self.rate * (self.size // 2) if self.padding == "SAME" else 0
        x = depthwise_conv(x_BxhxwxC, kernel, self.rate, padding)
        x = nn.relu(_norm(x, self.norm, train=train, name="depthwise_norm"))
        return ConvNorm(self.features, norm=self.norm, name="pointwise")(x, train=train)


class AtrousSpatialPyramid(nn.Module):
    """ASPP: 1x1, atrous 3x3 at several rates, and the image's mean, joined by 1x1 and dropout.

    In training with batch norm the mean of a single image is normalised by the running statistics,
    which it leaves alone.

    Attributes:
      rates: of the 3x3 convolutions, in cells.
      channels: of each branch and of the result.
      norm: "batch" or "group".
      dropout: of the result, in training.
      separable: whether the 3x3 convolutions are depthwise-separable (as V3+ has them).
    """

    rates: tuple[int, ...]
    channels: int = 256
    norm: str = "batch"
    dropout: float = 0.1
    separable: bool = False

    @nn.compact
    def __call__(self, x_BxhxwxC: jax.Array, *, train: bool = False) -> jax.Array:
        """`B x h x w x channels` of a map of any size."""
        point = partial(ConvNorm, self.channels, norm=self.norm)
        atrous = partial(SeparableConv if self.separable else ConvNorm, self.channels, size=3)
        branches = [point(name="point")(x_BxhxwxC, train=train)]
        for i, rate in enumerate(self.rates):
            branch = atrous(rate=rate, norm=self.norm, name=f"atrous{i}")
            branches.append(branch(x_BxhxwxC, train=train))
        pooled = point(name="pool")(x_BxhxwxC.mean((1, 2), keepdims=True), train=train)
        branches.append(jnp.broadcast_to(pooled, branches[0].shape))
        x = point(name="project")(jnp.concatenate(branches, -1), train=train)
        return nn.Dropout(self.dropout, deterministic=not train)(x)


def _classify(x_BxhxwxC: jax.Array, outputs: int, size: tuple[int, int]) -> jax.Array:
    init = nn.initializers.normal(0.01)
    return resize_bilinear(Dense(outputs, kernel_init=init, name="classify")(x_BxhxwxC), size)


class AuxiliaryHead(nn.Module):
    """Logits of an earlier map, for a second loss: 3x3 to a quarter, norm, ReLU, dropout, 1x1."""

    outputs: int
    norm: str = "batch"
    dropout: float = 0.1

    @nn.compact
    def __call__(
        self, x_BxhxwxC: jax.Array, size: tuple[int, int], *, train: bool = False
    ) -> jax.Array:
        """Logits `B x H x W x K` at `size` = (H, W)."""
        channels = max(1, x_BxhxwxC.shape[-1] // 4)
        x = ConvNorm(channels, size=3, norm=self.norm, name="conv")(x_BxhxwxC, train=train)
        x = nn.Dropout(self.dropout, deterministic=not train)(x)
        return _classify(x, self.outputs, size)


class DeepLabV3(nn.Module):
    """DeepLabV3: the atrous pyramid, 3x3, 1x1, bilinear to the image's size.

    Attributes:
      outputs: number of logits per pixel, K.
      channels: of the pyramid and what follows; 256 in the papers.
      rates: of the pyramid, in cells of the deepest map; () for `atrous_rates` of its stride.
      norm: "batch" (running statistics in `batch_stats`) or "group".
      dropout: after the pyramid (and in the auxiliary head), in training.
      separable: whether the pyramid's 3x3 convolutions are depthwise-separable.
      reduce: channels to which 1x1, norm and ReLU bring the deepest map first; 0 leaves it as it is.
      auxiliary: whether `AuxiliaryHead` adds logits.
    """

    several_maps: ClassVar[bool] = True

    outputs: int = 1
    channels: int = option(256, "of the pyramid and what follows", low=1, high=2**16)
    rates: tuple[int, ...] = option((), "of the pyramid; () for the stride's", low=1, whole=True)
    norm: str = option("batch", "batch or group", choices=NORMS)
    dropout: float = option(0.1, "after the pyramid", low=0, high=0.99)
    separable: bool = option(False, "depthwise-separable pyramid")
    reduce: int = option(
        0, "channels that the deepest map is brought to first; 0 = as it is", low=0
    )
    auxiliary: bool = option(False, "an auxiliary head on an earlier map")

    @nn.compact
    def __call__(
        self, features: Features, image_BxHxWx3: jax.Array, *, train: bool = False
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """Logits of an image in [0, 1].

        Args:
          features: `B x h x w x C`, or {stride: map}. The auxiliary head takes the map under
            `AUXILIARY`, or the only one there is.
          image_BxHxWx3: float, of any size; a whole multiple of a single map's.
          train: whether batch norm uses (and updates) the statistics of this batch, and dropout is
            on (needs the rng `dropout`).

        Returns:
          (logits float32 `B x H x W x K`, {"auxiliary": logits of the same shape} or {}).

        Raises:
          ValueError: features of other sizes or names, or an unknown option.
        """
        maps, auxiliary = split_features(features, image_BxHxWx3)
        size, stride = image_BxHxWx3.shape[1:3], max(maps)
        x = maps[stride]
        if self.reduce:
            x = ConvNorm(self.reduce, norm=self.norm, name="reduce")(x, train=train)
        pyramid = AtrousSpatialPyramid(
            tuple(self.rates) or atrous_rates(stride),
            self.channels,
            self.norm,
            self.dropout,
            self.separable,
            name="aspp",
        )
        x = self._decode(pyramid(x, train=train), maps, image_BxHxWx3, train)
        logits = _classify(x, self.outputs, size)
        if not self.auxiliary:
            return logits, {}
        if auxiliary is None and len(maps) > 1:
            raise ValueError(
                f"the auxiliary head takes the map called {AUXILIARY!r}; there are {list(maps)}"
            )
        head = AuxiliaryHead(self.outputs, self.norm, self.dropout, name="auxiliary")
        x = maps[stride] if auxiliary is None else auxiliary
        return logits, {AUXILIARY: head(x, size, train=train)}

    def _decode(self, x_BxhxwxC, maps, image_BxHxWx3, train: bool) -> jax.Array:
        return ConvNorm(self.channels, size=3, norm=self.norm, name="conv")(x_BxhxwxC, train=train)


class DeepLabV3Plus(DeepLabV3):
    """DeepLabV3+: the pyramid's result meets a map of stride 4, and two separable 3x3 sharpen it.

    Attributes:
      low_level: what stands in for the map of stride 4 where the features have none: "stem", two
        strided 3x3 convolutions on the image (the spatial prior of ViT-Adapter, Chen et al. 2023,
        in small), or "pyramid", transposed convolutions on the deepest map (the simple feature
        pyramid of ViTDet, Li et al. 2022), whose stride must be a multiple of 4.
      low_width: channels of that map.

    The others are those of `DeepLabV3`.
    """

    low_level: str = option("stem", "what stands in for the map of stride 4", choices=LOW_LEVELS)
    low_width: int = option(64, "channels of that map", low=4, high=2**16)

    def _decode(self, x_BxhxwxC, maps, image_BxHxWx3, train: bool) -> jax.Array:
        if LOW_STRIDE in maps:
            low = maps[LOW_STRIDE]
        elif self.low_level == "stem":
            low = self._stem(image_BxHxWx3, train)
        elif self.low_level == "pyramid":
            low = self._expand(maps[max(maps)], max(maps))
        else:
            raise ValueError(
                f"low_level is {self.low_level!r}: allowed are {', '.join(LOW_LEVELS)}"
            )
        low = ConvNorm(48, norm=self.norm, name="low")(low, train=train)
        x = jnp.concatenate([resize_bilinear(x_BxhxwxC, low.shape[1:3]), low], -1)
        for i in range(2):
            x = SeparableConv(self.channels, norm=self.norm, name=f"decode{i}")(x, train=train)
        return x

    def _stem(self, image_BxHxWx3: jax.Array, train: bool) -> jax.Array:
        x = 4.0 * (image_BxHxWx3 - 0.5)
        for i, width in enumerate((self.low_width // 4, self.low_width)):
            x = ConvNorm(width, size=3, stride=2, norm=self.norm, name=f"stem{i}")(x, train=train)
        return x

    def _expand(self, x_BxhxwxC: jax.Array, stride: int) -> jax.Array:
        """The deepest map at stride 4: doubled while that is even, then the odd rest at once."""
        if stride % LOW_STRIDE:
            raise ValueError(
                f"low_level='pyramid' on a map of stride {stride}: allowed are multiples of 4"
            )
        factors, rest = [], stride // LOW_STRIDE
        while rest > 1:
            factors.append(2 if rest % 2 == 0 else rest)
            rest //= factors[-1]
        x = x_BxhxwxC
        for i, factor in enumerate(factors):
            width = self.low_width * 2 ** (len(factors) - 1 - i)
            if i:
                x = nn.gelu(nn.LayerNorm(epsilon=1e-6, name=f"expand_norm{i}")(x))
            # Kernel and stride are the same, so the windows of a transposed convolution never meet.
            x = Dense(factor * factor * width, name=f"expand{i}")(x)
            x = depth_to_space(x, factor)
        return x
