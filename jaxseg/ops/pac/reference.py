"""Pixel-adaptive convolution by its definition: gather every window, then one einsum.

Readable and slow: k * k copies of the input, and a ruinous gradient on CPU. The fast form in
`pac_fast.py` is tested against this one.
"""

import jax
import jax.numpy as jnp

from jaxseg.ops.pac.window import Kernel, Window, difference, similarity


def conv(
    x_BxHxWxC: jax.Array,
    guide_BxHxWxG: jax.Array,
    centre_BxHxWxG: jax.Array | None,
    weight_kxkxCxO: jax.Array,
    kernel: Kernel,
    window: Window,
) -> jax.Array:
    """Convolution, transposed convolution, or convolution of the repeated input: BxHoxWoxO."""
    size = x_BxHxWxC.shape[1:3]
    k_BxHxWxT = kernel_BxHxWxT(guide_BxHxWxG, centre_BxHxWxG, kernel, window, size)
    columns_BxHxWxCxT = _windows(x_BxHxWxC, window)
    weight_TxCxO = weight_kxkxCxO.reshape(-1, *weight_kxkxCxO.shape[2:])
    adapted = columns_BxHxWxCxT * k_BxHxWxT[:, :, :, None].astype(x_BxHxWxC.dtype)
    return jnp.einsum("bhwct,tco->bhwo", adapted, weight_TxCxO)


def pool(x_BxHxWxC, guide_BxHxWxG, centre_BxHxWxG, kernel: Kernel, window: Window) -> jax.Array:
    """Sum of every window times its kernel: BxHoxWoxC."""
    size = x_BxHxWxC.shape[1:3]
    k_BxHxWxT = kernel_BxHxWxT(guide_BxHxWxG, centre_BxHxWxG, kernel, window, size)
    columns_BxHxWxCxT = _windows(x_BxHxWxC, window)
    return jnp.sum(columns_BxHxWxCxT * k_BxHxWxT[:, :, :, None].astype(x_BxHxWxC.dtype), axis=-1)


def kernel_BxHxWxT(
    guide_BxHxWxG: jax.Array,
    centre_BxHxWxG: jax.Array | None,
    kernel: Kernel,
    window: Window,
    input_size: tuple[int, int],
) -> jax.Array:
    """Kernel values of the T = k * k taps of every output pixel."""
    over_guide = Window(
        window.size, window.dilation, window.guide_low, window.guide_high, window.stride
    )
    neighbour_BxHxWxGxT = _windows(guide_BxHxWxG, over_guide)
    middle = window.size[0] // 2 * window.size[1] + window.size[1] // 2
    if centre_BxHxWxG is None:
        centre_BxHxWxG = guide_BxHxWxG
    centre_BxHxWxGx1 = _windows(centre_BxHxWxG, over_guide)[..., middle, None]
    d_BxHxWxGxT = difference(neighbour_BxHxWxGxT, centre_BxHxWxGx1, kernel)
    d2_BxHxWxT = jnp.sum(d_BxHxWxGxT**2, axis=-2)
    if not kernel.normalized:
        return similarity(d2_BxHxWxT, kernel)
    inside_1xHxWx1 = jnp.ones((1, *input_size, 1), d2_BxHxWxT.dtype)
    valid_1xHxWxT = _windows(inside_1xHxWx1, window)[..., 0, :] > 0
    if kernel.kind == "gaussian":
        value = jax.nn.softmax(-0.5 * d2_BxHxWxT, axis=-1, where=valid_1xHxWxT)
        return jnp.where(valid_1xHxWxT, value, 0.0)
    value = jnp.where(valid_1xHxWxT, similarity(d2_BxHxWxT, kernel), 0.0)
    total = jnp.sum(value, axis=-1, keepdims=True)
    return value / jnp.where(total == 0.0, 1.0, total)


def _windows(x_BxHxWxC: jax.Array, window: Window) -> jax.Array:
    """Every window of x with zeros outside: BxHxWxCxT."""
    zoom = window.zoom
    if not window.transposed:
        x_BxHxWxC = jnp.repeat(jnp.repeat(x_BxHxWxC, zoom[0], axis=1), zoom[1], axis=2)
        zoom = (1, 1)
    patches = jax.lax.conv_general_dilated_patches(
        x_BxHxWxC,
        window.size,
        window.stride,
        tuple(zip(window.low, window.high, strict=True)),
        lhs_dilation=zoom,
        rhs_dilation=window.dilation,
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        precision=jax.lax.Precision.HIGHEST,  # else TF32 or bf16 rounds the copied pixels
    )
    # The patches come channel-major: (c, row, column).
    return patches.reshape(*patches.shape[:3], x_BxHxWxC.shape[-1], -1)
