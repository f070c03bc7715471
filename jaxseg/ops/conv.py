"""Convolutions of maps of a few pixels, which XLA's CPU backend computes very slowly."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

# Up to here the patches as a matrix are at least as fast on a CPU, forward and backward: 1.4 times at
# 4 x 4 cells of 512 channels, 31 times at 2 x 2 of 256 (`python benchmarks/conv.py`).
_FEW = 16


def conv_general_dilated(
    lhs: jax.Array,
    rhs: jax.Array,
    window_strides: Sequence[int],
    padding: Sequence[tuple[int, int]],
    *,
    rhs_dilation: Sequence[int] | None = None,
    lhs_dilation: Sequence[int] | None = None,
    feature_group_count: int = 1,
    **options: Any,
) -> jax.Array:
    """`jax.lax.conv_general_dilated` for `flax.linen.Conv(conv_general_dilated=...)`, fast on small maps.

    Where the result has at most 16 pixels, or the kernel is one pixel, it is one product of the
    patches [B, h, w, kh kw C] with the kernel, [kh kw C, O]; else XLA's convolution. Same values, same
    arguments as flax passes: [B, H, W, C], a kernel [kh, kw, C, O], explicit padding.

    Raises:
      ValueError: for groups of channels or a dilated input.
    """
    if feature_group_count != 1 or any(rate != 1 for rate in lhs_dilation or ()):
        raise ValueError(
            f"feature_group_count is {feature_group_count}, lhs_dilation {lhs_dilation}: allowed is 1"
        )
    batch, height, width, _ = lhs.shape
    kh, kw, _, features = rhs.shape
    dilation = tuple(rhs_dilation or (1, 1))

    def cells(n: int, kernel: int, rate: int, stride: int, pad: tuple[int, int]) -> int:
        return (n + sum(pad) - rate * (kernel - 1) - 1) // stride + 1

    h = cells(height, kh, dilation[0], window_strides[0], padding[0])
    w = cells(width, kw, dilation[1], window_strides[1], padding[1])
    if h * w > _FEW and (kh, kw) != (1, 1):
        return jax.lax.conv_general_dilated(
            lhs, rhs, window_strides, padding, rhs_dilation=rhs_dilation, **options
        )
    padded = jnp.pad(lhs, ((0, 0), *padding, (0, 0)))

    def along(at: int, rate: int, stride: int, count: int) -> slice:
        return slice(at * rate, at * rate + (count - 1) * stride + 1, stride)

    patches = [
        padded[
            :,
            along(i, dilation[0], window_strides[0], h),
            along(j, dilation[1], window_strides[1], w),
        ]
        for i in range(kh)
        for j in range(kw)
    ]
    matrix = jnp.concatenate(patches, -1).reshape(batch * h * w, -1)
    product = jnp.matmul(matrix, rhs.reshape(-1, features), precision=options.get("precision"))
    return product.reshape(batch, h, w, features)
