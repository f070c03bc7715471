"""Pixel-adaptive convolution (Su et al., CVPR 2019, arXiv:1904.05373), transposed and pooling.

`y_i = b + sum_j K(f_i, f_j) W[p_i - p_j] x_j` over a k x k window: a convolution whose weight is
scaled, pixel by pixel, by how alike the guide features f are. All arrays are NHWC, weights are
k x k x Cin x Cout and, as in `jax.lax.conv_general_dilated`, not flipped.

Every function takes `form`: "fast" (default; see `pac_fast.py`) or "patches", the definition
(see `pac_reference.py`). Matrix products follow `jax.default_matmul_precision`. The kernel is
computed in the guide's dtype, at least float32.
"""

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp

from jaxseg.ops.pac import fast as pac_fast
from jaxseg.ops.pac import reference as pac_reference
from jaxseg.ops.pac.window import GAUSSIAN, Kernel, Window

__all__ = [
    "GAUSSIAN",
    "Kernel",
    "pac_conv",
    "pac_conv_transpose",
    "pac_kernel",
    "pac_pool",
    "pac_upsample_nearest",
    "smooth_guide",
]

Form = Literal["fast", "patches"]
Pair = int | tuple[int, int]


def pac_kernel(
    guide_BxHxWxG: jax.Array,
    size: Pair,
    *,
    stride: Pair = 1,
    padding: Pair = 0,
    dilation: Pair = 1,
    kernel: Kernel = GAUSSIAN,
    centre: jax.Array | None = None,
    form: Form = "fast",
) -> jax.Array:
    """Kernel values of every window: BxHoxWoxkxk, for the convolution of the same arguments.

    Args:
      guide_BxHxWxG: features to compare; zero-padded.
      size: of the window, rows and columns.
      kernel: the formula and its parameters.
      centre: BxHxWxG features that stand for the window's centre, such as `smooth_guide(guide)`;
        the guide itself if None.

    Raises:
      ValueError: if a size, an option or the shape of an array is not allowed.
    """
    window = _window(size, stride, padding, dilation)
    guide, centre = _guides(guide_BxHxWxG, centre, kernel, guide_BxHxWxG.shape[1:3], None)
    output = _output_size(window, guide.shape[1:3])
    values_BxHxWxT = _form(form).kernel_BxHxWxT(guide, centre, kernel, window, guide.shape[1:3])
    return values_BxHxWxT.reshape(-1, *output, *window.size)


def pac_conv(
    x_BxHxWxC: jax.Array,
    guide_BxHxWxG: jax.Array,
    weight_kxkxCxO: jax.Array,
    bias_O: jax.Array | None = None,
    *,
    stride: Pair = 1,
    padding: Pair = 0,
    dilation: Pair = 1,
    kernel: Kernel = GAUSSIAN,
    centre: jax.Array | None = None,
    form: Form = "fast",
) -> jax.Array:
    """Pixel-adaptive convolution: BxHoxWoxO, `Ho = (H + 2 padding - dilation (k - 1) - 1) // stride + 1`.

    Args:
      guide_BxHxWxG: guide features at the size of x.
      centre: as in `pac_kernel`.

    Raises:
      ValueError: if a size, an option or the shape of an array is not allowed.
    """
    window = _window(weight_kxkxCxO.shape[:2], stride, padding, dilation)
    return _conv(x_BxHxWxC, guide_BxHxWxG, weight_kxkxCxO, bias_O, kernel, centre, window, form)


def pac_conv_transpose(
    x_BxHxWxC: jax.Array,
    guide_BxHoxWoxG: jax.Array,
    weight_kxkxCxO: jax.Array,
    bias_O: jax.Array | None = None,
    *,
    stride: Pair = 2,
    padding: Pair = 0,
    output_padding: Pair = 0,
    dilation: Pair = 1,
    kernel: Kernel = GAUSSIAN,
    centre: jax.Array | None = None,
    form: Form = "fast",
) -> jax.Array:
    """Transposed pixel-adaptive convolution: BxHoxWoxO.

    `stride - 1` zeros are inserted between the pixels of x, and a convolution of stride 1 runs
    over them: `Ho = (H - 1) stride - 2 padding + dilation (k - 1) + output_padding + 1`.

    Args:
      guide_BxHoxWoxG: guide features at the size of the output.
      centre: as in `pac_kernel`, at the size of the output.

    Raises:
      ValueError: if a size, an option or the shape of an array is not allowed.
    """
    size = weight_kxkxCxO.shape[:2]
    window = _transposed(size, stride, padding, output_padding, dilation)
    return _conv(x_BxHxWxC, guide_BxHoxWoxG, weight_kxkxCxO, bias_O, kernel, centre, window, form)


def pac_pool(
    x_BxHxWxC: jax.Array,
    guide_BxHxWxG: jax.Array,
    size: Pair,
    *,
    stride: Pair = 1,
    padding: Pair = 0,
    dilation: Pair = 1,
    kernel: Kernel = GAUSSIAN,
    centre: jax.Array | None = None,
    form: Form = "fast",
) -> jax.Array:
    """Pixel-adaptive pooling, `y_i = sum_j K(f_i, f_j) x_j`: BxHoxWoxC, sizes as in `pac_conv`.

    A weighted sum; a weighted mean with `Kernel(normalized=True)`.

    Raises:
      ValueError: if a size, an option or the shape of an array is not allowed.
    """
    window = _window(size, stride, padding, dilation)
    guide, centre = _guides(guide_BxHxWxG, centre, kernel, x_BxHxWxC.shape[1:3], x_BxHxWxC)
    _output_size(window, x_BxHxWxC.shape[1:3])
    return _form(form).pool(x_BxHxWxC, guide, centre, kernel, window)


def pac_upsample_nearest(
    x_BxHxWxC: jax.Array,
    guide_BxHoxWoxG: jax.Array,
    weight_kxkxCxO: jax.Array,
    bias_O: jax.Array | None = None,
    *,
    factor: Pair = 2,
    padding: Pair = 1,
    dilation: Pair = 1,
    kernel: Kernel = GAUSSIAN,
    centre: jax.Array | None = None,
    form: Form = "fast",
) -> jax.Array:
    """Nearest-neighbour upsampling, then a pixel-adaptive convolution of stride 1: BxHoxWoxO.

    The enlarged input is never made: taps that read the same source pixel share it, and the
    matrix products run at the size of x.

    Args:
      guide_BxHoxWoxG: guide features at the enlarged size, `factor` times that of x.
      centre: as in `pac_kernel`, at the enlarged size.

    Raises:
      ValueError: if a size, an option or the shape of an array is not allowed.
    """
    window = _window(weight_kxkxCxO.shape[:2], 1, padding, dilation)
    window = dataclasses.replace(window, zoom=_pair("factor", factor, 1))
    return _conv(x_BxHxWxC, guide_BxHoxWoxG, weight_kxkxCxO, bias_O, kernel, centre, window, form)


def smooth_guide(guide_BxHxWxG: jax.Array, weight_kxk: jax.Array | None = None) -> jax.Array:
    """Smooths every channel, zero-padded, for use as `centre`.

    Args:
      weight_kxk: the filter, odd sizes; None is the outer product of [1/4, 1/2, 1/4] with itself.
        For an average pass `jnp.full((k, k), 1 / k**2)`; it may be learned.
    """
    if weight_kxk is None:
        line = jnp.array([0.25, 0.5, 0.25], guide_BxHxWxG.dtype)
        weight_kxk = jnp.outer(line, line)
    if weight_kxk.ndim != 2 or weight_kxk.shape[0] % 2 == 0 or weight_kxk.shape[1] % 2 == 0:
        raise ValueError(f"the smoothing filter has shape {weight_kxk.shape}: two odd sizes needed")
    channels = guide_BxHxWxG.shape[-1]
    return jax.lax.conv_general_dilated(
        guide_BxHxWxG,
        jnp.tile(weight_kxk[:, :, None, None], (1, 1, 1, channels)).astype(guide_BxHxWxG.dtype),
        (1, 1),
        "SAME",
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=channels,
        precision=jax.lax.Precision.HIGHEST,
    )


def _conv(x, guide, weight, bias, kernel, centre, window, form):
    """Checks the arguments, then runs the form asked for."""
    if x.ndim != 4 or weight.ndim != 4 or x.shape[-1] != weight.shape[2]:
        raise ValueError(
            f"x must be BxHxWxC and weight kxkxCxO with the same C, got {x.shape} and {weight.shape}"
        )
    if bias is not None and bias.shape != weight.shape[3:]:
        raise ValueError(f"bias must have shape {weight.shape[3:]}, got {bias.shape}")
    output = _output_size(window, x.shape[1:3])
    guide_size = output if window.transposed else window.enlarged_size(x.shape[1:3])
    guide, centre = _guides(guide, centre, kernel, guide_size, x)
    y = _form(form).conv(x, guide, centre, weight.astype(x.dtype), kernel, window)
    return y if bias is None else y + bias.astype(y.dtype)


def _form(form: str):
    forms = {"fast": pac_fast, "patches": pac_reference}
    if form not in forms:
        raise ValueError(f"form is {form!r}: allowed are {', '.join(map(repr, forms))}")
    return forms[form]


def _guides(guide, centre, kernel, size, x):
    """Checks guide and kernel, applies the temperature: the guide and its centre, as float32."""
    if kernel.kind not in ("gaussian", "inverse"):
        raise ValueError(f"kernel kind is {kernel.kind!r}: allowed are 'gaussian' and 'inverse'")
    batch = guide.shape[:1] if x is None else x.shape[:1]
    if guide.ndim != 4 or guide.shape[:3] != (*batch, *size):
        raise ValueError(f"guide must have shape {(*batch, *size, 'G')}, got {guide.shape}")
    if centre is not None and centre.shape != guide.shape:
        raise ValueError(f"centre must have the guide's shape {guide.shape}, got {centre.shape}")
    temperature = kernel.temperature
    if temperature is not None and jnp.shape(temperature) not in ((), guide.shape[3:]):
        raise ValueError(
            f"temperature must be a scalar or have shape {guide.shape[3:]}, "
            f"got {jnp.shape(temperature)}"
        )

    def scale(feature):
        feature = feature.astype(jnp.promote_types(feature.dtype, jnp.float32))
        return feature if temperature is None else feature * temperature

    guide = scale(guide)
    return guide, None if centre is None else scale(centre)


def _pair(name: str, value: Pair, least: int) -> tuple[int, int]:
    pair = (value, value) if isinstance(value, int) else tuple(value)
    if len(pair) != 2 or any(not isinstance(v, int) or v < least for v in pair):
        raise ValueError(f"{name} is {value!r}: needs an int or two, each at least {least}")
    return pair


def _window(size, stride, padding, dilation) -> Window:
    size, padding = _pair("size", size, 1), _pair("padding", padding, 0)
    stride, dilation = _pair("stride", stride, 1), _pair("dilation", dilation, 1)
    return Window(size, dilation, padding, padding, stride)


def _transposed(size, stride, padding, output_padding, dilation) -> Window:
    size, padding = _pair("size", size, 1), _pair("padding", padding, 0)
    stride, dilation = _pair("stride", stride, 1), _pair("dilation", dilation, 1)
    extra = _pair("output_padding", output_padding, 0)
    if any(e >= max(s, d) for e, s, d in zip(extra, stride, dilation, strict=True)):
        raise ValueError(f"output_padding is {output_padding}: must be below stride or dilation")
    low = tuple((k - 1) * d - p for k, d, p in zip(size, dilation, padding, strict=True))
    high = tuple(lo + e for lo, e in zip(low, extra, strict=True))
    return Window(size, dilation, low, high, zoom=stride, transposed=True)


def _output_size(window: Window, size: tuple[int, int]) -> tuple[int, int]:
    output = window.output_size(size)
    if min(*output, *size) < 1:
        raise ValueError(
            f"an input of {size[0]}x{size[1]} gives an output of {output[0]}x{output[1]} with a "
            f"{window.size[0]}x{window.size[1]} window of dilation {window.dilation} and padding "
            f"{window.low}: it must be at least 1x1"
        )
    return output
