"""Pixel-adaptive convolution by its definition: gather every window, then one einsum.

Readable and slow: k * k copies of the input, and a ruinous gradient on CPU. The fast form in
`pac_fast.py` is tested against this one.
"""

import jax
import jax.numpy as jnp

from jaxseg.ops.pac_window import Kernel, Window, distance, weigh


def kernel_BxHxWxT(
    guide_BxHxWxG: jax.Array,
    centre_BxHxWxG: jax.Array,
    kernel: Kernel,
    window: Window,
    input_size: tuple[int, int],
) -> jax.Array:
    """Kernel values of the T = k * k taps of every output pixel."""
    guide_window = Window(
        window.size, window.stride, None, window.dilation, window.guide_low, window.guide_high
    )
    neighbour_BxHxWxGxT = windows(guide_BxHxWxG, guide_window)
    middle = window.size[0] // 2 * window.size[1] + window.size[1] // 2
    centre_BxHxWxGx1 = windows(centre_BxHxWxG, guide_window)[..., middle, None]
    d2_BxHxWxT = distance(neighbour_BxHxWxGxT, centre_BxHxWxGx1, kernel, axis=-2)
    inside_1xHxWx1 = jnp.ones((1, *input_size, 1), d2_BxHxWxT.dtype)
    valid_1xHxWxT = windows(inside_1xHxWx1, window)[..., 0, :] > 0
    return weigh(d2_BxHxWxT, kernel, valid_1xHxWxT, axis=-1)


def windows(x_BxHxWxC: jax.Array, window: Window) -> jax.Array:
    """Every window of x with zeros outside: BxHxWxCxT."""
    patches = jax.lax.conv_general_dilated_patches(
        x_BxHxWxC,
        window.size,
        window.stride,
        window.padding,
        lhs_dilation=window.zoom,
        rhs_dilation=window.dilation,
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        precision=jax.lax.Precision.HIGHEST,  # else TF32 or bf16 rounds the copied pixels
    )
    # The patches come channel-major: (c, row, column).
    return patches.reshape(*patches.shape[:3], x_BxHxWxC.shape[-1], -1)


def conv(
    x_BxHxWxC: jax.Array,
    guide_BxHxWxG: jax.Array,
    centre_BxHxWxG: jax.Array,
    weight_kxkxCxO: jax.Array,
    kernel: Kernel,
    window: Window,
) -> jax.Array:
    k_BxHxWxT = kernel_BxHxWxT(
        guide_BxHxWxG, centre_BxHxWxG, kernel, window, x_BxHxWxC.shape[1:3]
    ).astype(x_BxHxWxC.dtype)
    columns_BxHxWxCxT = windows(x_BxHxWxC, window)
    weight_TxCxO = weight_kxkxCxO.reshape(-1, *weight_kxkxCxO.shape[2:])
    return jnp.einsum("bhwt,bhwct,tco->bhwo", k_BxHxWxT, columns_BxHxWxCxT, weight_TxCxO)


def pool(x_BxHxWxC, guide_BxHxWxG, centre_BxHxWxG, kernel: Kernel, window: Window) -> jax.Array:
    k_BxHxWxT = kernel_BxHxWxT(
        guide_BxHxWxG, centre_BxHxWxG, kernel, window, x_BxHxWxC.shape[1:3]
    ).astype(x_BxHxWxC.dtype)
    return jnp.einsum("bhwt,bhwct->bhwc", k_BxHxWxT, windows(x_BxHxWxC, window))
