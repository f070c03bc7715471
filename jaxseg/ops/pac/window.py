"""What both forms of pixel-adaptive convolution share: the kernel's formula and the geometry."""

import dataclasses
from typing import Any, Literal

import jax
import jax.numpy as jnp

EPSILON = 1e-4  # under the root of the inverse kernel


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Kernel:
    """How alike two guide features are; `d2` is their squared distance, summed over channels.

    kind: "gaussian", `exp(-d2 / 2)`; or "inverse", `alpha + (d2 + 1e-4) ** (lam / 2)`.
    normalized: divide by the sum over the valid taps of the window (a masked softmax when
      Gaussian, so that it cannot underflow); 0 where a window has no valid tap.
    asymmetric: only what the neighbour has more than the centre counts, `relu(f_j - f_i)`.
    alpha, lam: of the inverse kernel; scalars or 0-d arrays, so that they can be learned.
    temperature: None, a scalar or one value per guide channel that multiplies the guide.
    """

    kind: Literal["gaussian", "inverse"] = dataclasses.field(
        default="gaussian", metadata={"static": True}
    )
    normalized: bool = dataclasses.field(default=False, metadata={"static": True})
    asymmetric: bool = dataclasses.field(default=False, metadata={"static": True})
    alpha: Any = 0.0
    lam: Any = -1.0
    temperature: Any = None


GAUSSIAN = Kernel()


def difference(neighbour: jax.Array, centre: jax.Array, kernel: Kernel) -> jax.Array:
    """What is squared and summed over channels."""
    d = neighbour - centre
    return jax.nn.relu(d) if kernel.asymmetric else d


def similarity(d2: jax.Array, kernel: Kernel) -> jax.Array:
    """The kernel value, before any normalisation, of a squared distance."""
    if kernel.kind == "gaussian":
        return jnp.exp(-0.5 * d2)
    return kernel.alpha + (d2 + EPSILON) ** (0.5 * kernel.lam)


@dataclasses.dataclass(frozen=True)
class Window:
    """Geometry of a window sliding over an image, per dimension (rows, columns).

    The input is first enlarged by `zoom`: with zeros in between if `transposed`, else by repeating
    pixels. Output i then sees, for tap t, position `i * stride + t * dilation - low`.
    The guide is as large as the output if `transposed`, else as the enlarged input.
    """

    size: tuple[int, int]
    dilation: tuple[int, int]
    low: tuple[int, int]
    high: tuple[int, int]
    stride: tuple[int, int] = (1, 1)
    zoom: tuple[int, int] = (1, 1)
    transposed: bool = False

    @property
    def guide_low(self) -> tuple[int, int]:
        """Zeros before the guide's first pixel: they centre it where it is as large as the output."""
        if not self.transposed:
            return self.low
        return tuple(k // 2 * d for k, d in zip(self.size, self.dilation, strict=True))

    @property
    def guide_high(self) -> tuple[int, int]:
        if not self.transposed:
            return self.high
        return tuple((k - 1) // 2 * d for k, d in zip(self.size, self.dilation, strict=True))

    def enlarged_size(self, input_size: tuple[int, int]) -> tuple[int, int]:
        gap = 1 if self.transposed else 0
        return tuple((n - gap) * z + gap for n, z in zip(input_size, self.zoom, strict=True))

    def output_size(self, input_size: tuple[int, int]) -> tuple[int, int]:
        """Rows and columns of the output; may be less than 1, which the caller must refuse."""
        sizes = zip(self.enlarged_size(input_size), self.low, self.high, strict=True)
        padded = [n + low + high for n, low, high in sizes]
        windows = zip(padded, self.size, self.dilation, self.stride, strict=True)
        return tuple((n - (k - 1) * d - 1) // s + 1 for n, k, d, s in windows)
