"""Resizing exactly as PyTorch does it: separable, as one small matrix product per axis.

`jax.image.resize` cannot stand in: its bicubic kernel has A = -0.5 instead of -0.75 and its filters
widen when shrinking. The matrices depend on shapes only and are built in NumPy at trace time.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


def _cubic(x: np.ndarray, a: float) -> np.ndarray:
    """Keys' cubic convolution kernel with free parameter `a`."""
    x = np.abs(x)
    near = ((a + 2) * x - (a + 3)) * x * x + 1
    far = ((x - 5) * x + 8) * x * a - 4 * a
    return np.where(x < 1, near, np.where(x < 2, far, 0.0))


def _triangle(x: np.ndarray) -> np.ndarray:
    return np.maximum(0.0, 1.0 - np.abs(x))


@functools.lru_cache(maxsize=256)
def resize_matrix(
    n_in: int, n_out: int, *, kind: str, scale: float | None = None, antialias: bool = False
) -> np.ndarray:
    """Returns the float32 [n_out, n_in] matrix that resizes one axis with half-pixel centres.

    `kind` is "bicubic" or "bilinear". `scale` is input pixels per output pixel, n_in / n_out if
    None. Without `antialias` samples beyond the border repeat the border pixel (bicubic A = -0.75);
    with it the kernel widens when shrinking, is cut at the border and renormalised (A = -0.5).
    """
    if kind not in ("bicubic", "bilinear"):
        raise ValueError(f"kind is {kind!r}: allowed are 'bicubic' and 'bilinear'")
    if n_in < 1 or n_out < 1:
        raise ValueError(f"cannot resize an axis of {n_in} to {n_out}: both must be at least 1")
    scale = n_in / n_out if scale is None else scale
    radius = 2 if kind == "bicubic" else 1
    centre = (np.arange(n_out) + 0.5) * scale - 0.5
    stretch = max(scale, 1.0) if antialias else 1.0
    reach = math.ceil(radius * stretch)
    tap = np.floor(centre).astype(int)[:, None] + np.arange(-reach, reach + 1)
    offset = (tap - centre[:, None]) / stretch
    if kind == "bicubic":
        weight = _cubic(offset, -0.5 if antialias else -0.75)
    else:
        weight = _triangle(offset)
    if antialias:
        weight = np.where((tap >= 0) & (tap < n_in), weight, 0.0)
        weight /= weight.sum(axis=1, keepdims=True)
    matrix = np.zeros((n_out, n_in))
    np.add.at(matrix, (np.arange(n_out)[:, None], np.clip(tap, 0, n_in - 1)), weight)
    matrix = matrix.astype(np.float32)
    matrix.flags.writeable = False  # The cache hands the same array to every caller.
    return matrix


def _apply(x_BxHxWxC: jax.Array, rows: np.ndarray, columns: np.ndarray) -> jax.Array:
    """Multiplies H by `rows` and W by `columns`, the cheaper order first, in float32."""
    (h_out, h_in), (w_out, w_in) = rows.shape, columns.shape
    x = x_BxHxWxC.astype(jnp.float32)
    along_h = functools.partial(
        jnp.einsum, "oh,bhwc->bowc", rows, precision=jax.lax.Precision.HIGHEST
    )
    along_w = functools.partial(
        jnp.einsum, "ow,bhwc->bhoc", columns, precision=jax.lax.Precision.HIGHEST
    )
    h_first = h_out * w_in * (h_in + w_out) <= h_in * w_out * (w_in + h_out)
    x = along_w(along_h(x)) if h_first else along_h(along_w(x))
    return x.astype(x_BxHxWxC.dtype)


def _check_image(x: jax.Array) -> None:
    if x.ndim != 4:
        raise ValueError(f"expected an array of shape [B, H, W, C], got shape {tuple(x.shape)}")
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise ValueError(f"expected a floating-point array, got {x.dtype}")


def resize_bicubic(
    x_BxHxWxC: jax.Array,
    shape: tuple[int, int],
    *,
    scale: tuple[float, float] | None = None,
    antialias: bool = False,
) -> jax.Array:
    """Resizes to `shape` = (h, w) as torch's bicubic `F.interpolate(align_corners=False)` does.

    Floating-point [B, H, W, C] of any range to [B, h, w, C] of the same dtype, computed in float32.
    `scale` overrides the input pixels per output pixel (rows, columns); it is what torch uses when
    it is given a `scale_factor`. Raises ValueError for other ranks and dtypes.
    """
    _check_image(x_BxHxWxC)
    scale_h, scale_w = scale or (None, None)
    matrix = functools.partial(resize_matrix, kind="bicubic", antialias=antialias)
    _, h, w, _ = x_BxHxWxC.shape
    return _apply(x_BxHxWxC, matrix(h, shape[0], scale=scale_h), matrix(w, shape[1], scale=scale_w))


def resize_bilinear(
    x_BxHxWxC: jax.Array, shape: tuple[int, int], *, antialias: bool = False
) -> jax.Array:
    """Resizes to `shape` = (h, w) as torch's bilinear `F.interpolate(align_corners=False)` does.

    Floating-point [B, H, W, C] of any range to [B, h, w, C] of the same dtype, computed in float32.
    Has a reverse-mode gradient only. Raises ValueError for other ranks and dtypes.
    """
    _check_image(x_BxHxWxC)
    if tuple(shape) == x_BxHxWxC.shape[1:3]:
        return x_BxHxWxC
    if not antialias:
        x = _bilinear(x_BxHxWxC.astype(jnp.float32), tuple(shape))
        return x.astype(x_BxHxWxC.dtype)
    return _apply(x_BxHxWxC, *_bilinear_matrices(x_BxHxWxC.shape[1:3], shape, antialias=True))


def _bilinear_matrices(
    before: tuple[int, int], after: tuple[int, int], *, antialias: bool = False
) -> list[np.ndarray]:
    return [
        resize_matrix(n, m, kind="bilinear", antialias=antialias)
        for n, m in zip(before, after, strict=True)
    ]


# Forward the two taps are gathered, which is several times faster on CPUs than the matrix product.
# Backward that would be a scatter, which is slower than the product by as much.
@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def _bilinear(x_BxHxWxC: jax.Array, shape: tuple[int, int]) -> jax.Array:
    x = x_BxHxWxC
    for axis, n_out in zip((2, 1), shape[::-1], strict=True):
        n = x.shape[axis]
        source = np.clip((np.arange(n_out) + 0.5) * (n / n_out) - 0.5, 0, n - 1)
        low = np.floor(source).astype(np.int32)
        high = np.minimum(low + 1, n - 1)
        weight = (source - low).astype(np.float32).reshape(-1, *[1] * (3 - axis))
        x = jnp.take(x, low, axis=axis) * (1 - weight) + jnp.take(x, high, axis=axis) * weight
    return x


def _bilinear_forward(x_BxHxWxC: jax.Array, shape: tuple[int, int]) -> tuple[jax.Array, Any]:
    return _bilinear(x_BxHxWxC, shape), x_BxHxWxC.shape[1:3]


def _bilinear_backward(
    shape: tuple[int, int], before: tuple[int, int], g_BxHxWxC: jax.Array
) -> tuple[jax.Array]:
    rows, columns = _bilinear_matrices(before, shape)
    return (_apply(g_BxHxWxC, rows.T, columns.T),)


_bilinear.defvjp(_bilinear_forward, _bilinear_backward)


def resize_nearest(x_BxHxWxC: jax.Array, factor: int) -> jax.Array:
    """Repeats every pixel `factor` times along H and W: [B, H, W, C] to [B, fH, fW, C], any dtype."""
    if factor < 1:
        raise ValueError(f"factor is {factor}: it must be a positive integer")
    b, h, w, c = x_BxHxWxC.shape
    x = jnp.broadcast_to(x_BxHxWxC[:, :, None, :, None], (b, h, factor, w, factor, c))
    return x.reshape(b, h * factor, w * factor, c)


def interpolate_position_embedding(
    pos_1xNxD: jax.Array,
    grid_hw: tuple[int, int],
    *,
    prefix: int = 1,
    offset: float = 0.1,
    antialias: bool = False,
) -> jax.Array:
    """Resizes the square grid of position embeddings in [1, prefix + n*n, D] to `grid_hw`.

    The first `prefix` embeddings (CLS) are kept. DINO v1 and DINOv2 use `offset` 0.1: torch is given
    the scale factor (h + 0.1) / n, so the source coordinate of row i is (i + 0.5) n / (h + 0.1) - 0.5.
    DINOv2 with registers uses `offset` 0 and `antialias`. The native grid is returned unchanged.
    Returns [1, prefix + h*w, D]. Raises ValueError if the embedding's grid is not square.
    """
    _, count, dim = pos_1xNxD.shape
    side = math.isqrt(count - prefix)
    if side * side != count - prefix:
        raise ValueError(f"{count - prefix} position embeddings do not form a square grid")
    h, w = grid_hw
    if (h, w) == (side, side):
        return pos_1xNxD
    grid = pos_1xNxD[:, prefix:].reshape(1, side, side, dim)
    scale = (side / (h + offset), side / (w + offset))
    grid = resize_bicubic(grid, (h, w), scale=scale, antialias=antialias)
    return jnp.concatenate([pos_1xNxD[:, :prefix], grid.reshape(1, h * w, dim)], axis=1)
