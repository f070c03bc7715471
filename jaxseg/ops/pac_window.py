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


def distance(neighbour: jax.Array, centre: jax.Array, kernel: Kernel, axis: int) -> jax.Array:
    """Squared distance of features along `axis`."""
    difference = neighbour - centre
    if kernel.asymmetric:
        difference = jax.nn.relu(difference)
    return jnp.sum(difference * difference, axis=axis)


def weigh(d2: jax.Array, kernel: Kernel, valid: jax.Array | None, axis: int) -> jax.Array:
    """Turns squared distances into kernel values; `axis` runs over taps, `valid` masks them."""
    if kernel.kind == "gaussian":
        if not kernel.normalized:
            return jnp.exp(-0.5 * d2)
        score = jnp.where(valid, -0.5 * d2, -jnp.inf)
        peak = jnp.max(score, axis=axis, keepdims=True)
        value = jnp.exp(score - jax.lax.stop_gradient(jnp.where(jnp.isinf(peak), 0.0, peak)))
    else:
        value = kernel.alpha + (d2 + EPSILON) ** (0.5 * kernel.lam)
        if not kernel.normalized:
            return value
        value = jnp.where(valid, value, 0.0)
    total = jnp.sum(value, axis=axis, keepdims=True)
    return value / jnp.where(total == 0.0, 1.0, total)


@dataclasses.dataclass(frozen=True)
class Window:
    """Geometry of a k x k window over an image, per dimension (rows, columns).

    Output i sees, for tap t, position `i * stride + t * dilation - low` of the input after
    `spread - 1` zeros were inserted between its pixels.
    The guide stands on the same grid as the input if `spread` is None, else on the output's.
    """

    size: tuple[int, int]
    stride: tuple[int, int]
    spread: tuple[int, int] | None
    dilation: tuple[int, int]
    low: tuple[int, int]
    high: tuple[int, int]

    @property
    def zoom(self) -> tuple[int, int]:
        """Output pixels per input pixel when transposed, else 1."""
        return self.spread or (1, 1)

    @property
    def padding(self) -> tuple[tuple[int, int], tuple[int, int]]:
        return tuple(zip(self.low, self.high, strict=True))

    @property
    def guide_low(self) -> tuple[int, int]:
        """Padding of the guide before its first pixel: centres it when it has the output's size."""
        if self.spread is None:
            return self.low
        return tuple(k // 2 * d for k, d in zip(self.size, self.dilation, strict=True))

    @property
    def guide_high(self) -> tuple[int, int]:
        if self.spread is None:
            return self.high
        extents = zip(self.size, self.dilation, self.guide_low, strict=True)
        return tuple((k - 1) * d - low for k, d, low in extents)

    @property
    def guide_padding(self) -> tuple[tuple[int, int], tuple[int, int]]:
        return tuple(zip(self.guide_low, self.guide_high, strict=True))

    def output_size(self, input_size: tuple[int, int]) -> tuple[int, int]:
        """Rows and columns of the output; may be less than 1, which the caller must refuse."""
        return tuple(
            ((n - 1) * z + 1 + low + high - (k - 1) * d - 1) // s + 1
            for n, z, low, high, k, d, s in zip(
                input_size, self.zoom, self.low, self.high,
                self.size, self.dilation, self.stride, strict=True,
            )
        )  # fmt: skip
