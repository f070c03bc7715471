"""Pixel-adaptive convolution without window copies: flat shifts, phases, one matmul per phase.

Layout. Channels go first and the pixels of an image last, flattened with a common row width that
includes the padding: the pixel under tap t is then one fixed step along the last axis, so every
tap is a contiguous slice. A strided input is split into its phases beforehand. When upsampling by
r, each of the r x r output phases is its own dense convolution of the small input, and only sees
the taps that do not fall on inserted zeros.
"""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np

from jaxseg.ops.pac_window import Kernel, Window, distance, weigh


@dataclasses.dataclass(frozen=True)
class Tap:
    """One tap of one output phase: which weight, and the plane and shift of its neighbour."""

    weight: int
    source: tuple[int, int]
    guide: tuple[int, int]
    valid_rows: tuple[int, int]
    valid_columns: tuple[int, int]


@dataclasses.dataclass(frozen=True)
class Plan:
    """Everything static: built once per shape."""

    grid: tuple[int, int]  # rows and columns of one output phase
    low: tuple[int, int]  # zeros before the first pixel of a plane
    width: int  # of a flattened row
    reach: int  # largest shift
    source_factor: tuple[int, int]  # the input is split into this many planes
    guide_factor: tuple[int, int]
    centres: tuple[tuple[int, int], ...]  # plane and shift, per output phase
    phases: tuple[tuple[Tap, ...], ...]

    @property
    def length(self) -> int:
        return self.grid[0] * self.width


@dataclasses.dataclass(frozen=True)
class _Line:
    """A tap along one dimension; positions are (plane, shift) of the split arrays."""

    index: int
    source: tuple[int, int]
    guide: tuple[int, int]
    valid: tuple[int, int]


def _lines(window: Window, axis: int, input_size: int, grid: int):
    """Per phase along one axis: the centre's position and the taps that see a real pixel."""
    k, d, zoom = window.size[axis], window.dilation[axis], window.zoom[axis]
    stride, low = window.stride[axis], window.low[axis]
    factor = stride if window.spread is None else zoom
    for phase in range(zoom):
        lines = []
        for tap in range(k):
            shift, inserted = divmod(phase + tap * d - low, zoom)
            if inserted:
                continue
            first = max(0, -(shift // stride))
            last = min(grid, (input_size - 1 - shift) // stride + 1)
            guide = phase + tap * d - window.guide_low[axis]
            lines.append(
                _Line(
                    tap, divmod(shift, stride)[::-1], divmod(guide, factor)[::-1], (first, last)
                )
            )
        centre = phase + k // 2 * d - window.guide_low[axis]
        yield divmod(centre, factor)[::-1], lines


@functools.cache
def make_plan(window: Window, input_size: tuple[int, int]) -> Plan:
    """Lays out the taps of every output phase."""
    output = window.output_size(input_size)
    grid = tuple(-(-n // z) for n, z in zip(output, window.zoom, strict=True))
    axes = [list(_lines(window, a, input_size[a], grid[a])) for a in (0, 1)]
    shifts = [
        [centre[1] for centre, _ in axis]
        + [s[1] for _, lines in axis for line in lines for s in (line.source, line.guide)]
        for axis in axes
    ]
    low = tuple(max(0, -min(s)) for s in shifts)
    span = tuple(lo + max(0, max(s)) for s, lo in zip(shifts, low, strict=True))
    width = grid[1] + span[1]
    factor = window.stride if window.spread is None else window.zoom

    def place(row, column, columns):
        flat = (row[1] + low[0]) * width + column[1] + low[1]
        return row[0] * columns + column[0], flat

    phases, centres = [], []
    for (row_centre, rows), (column_centre, columns) in itertools.product(*axes):
        centres.append(place(row_centre, column_centre, factor[1]))
        phases.append(
            tuple(
                Tap(
                    r.index * window.size[1] + c.index,
                    place(r.source, c.source, window.stride[1]),
                    place(r.guide, c.guide, factor[1]),
                    r.valid,
                    c.valid,
                )
                for r, c in itertools.product(rows, columns)
            )
        )
    return Plan(
        grid, low, width, span[0] * width + span[1], window.stride, factor,
        tuple(centres), tuple(phases),
    )  # fmt: skip


def _planes(x_BxHxWxC: jax.Array, factor: tuple[int, int], plan: Plan) -> jax.Array:
    """Splits into factor x factor planes, pads and flattens: PxCxBxL."""
    rows = (plan.length + plan.reach) // plan.width + 1
    tall, wide = rows * factor[0], plan.width * factor[1]
    (fh, fw), (_, height, width, _) = factor, x_BxHxWxC.shape
    top, left = plan.low[0] * fh, plan.low[1] * fw
    padding = ((0, 0, 0), (top, tall - top - height, 0), (left, wide - left - width, 0), (0, 0, 0))
    x = jax.lax.pad(x_BxHxWxC, jnp.zeros((), x_BxHxWxC.dtype), padding)
    x = x.reshape(x.shape[0], rows, fh, plan.width, fw, x.shape[-1]).transpose(2, 4, 5, 0, 1, 3)
    return x.reshape(fh * fw, *x.shape[2:4], rows * plan.width)


def _shifted(planes_PxCxBxL: jax.Array, where: tuple[int, int], length: int) -> jax.Array:
    plane, shift = where
    return jax.lax.slice_in_dim(planes_PxCxBxL[plane], shift, shift + length, axis=-1)


def _valid(plan: Plan, taps: tuple[Tap, ...]) -> jax.Array:
    """Which taps see a pixel of the input: Tx1xN."""
    row = np.arange(plan.grid[0])
    column = np.arange(plan.width)
    rows = np.stack([(row >= t.valid_rows[0]) & (row < t.valid_rows[1]) for t in taps])
    columns = np.stack([(column >= t.valid_columns[0]) & (column < t.valid_columns[1]) for t in taps])
    both = jnp.asarray(rows)[:, :, None] & jnp.asarray(columns)[:, None, :]
    return both.reshape(len(taps), 1, plan.length)


def kernels(guide_BxHxWxG, centre_BxHxWxG, kernel: Kernel, plan: Plan) -> list[jax.Array]:
    """Kernel values of every phase: TxBxN each."""
    guide = _planes(guide_BxHxWxG, plan.guide_factor, plan)
    centre = guide if centre_BxHxWxG is guide_BxHxWxG else _planes(centre_BxHxWxG, plan.guide_factor, plan)
    values = []
    for where, taps in zip(plan.centres, plan.phases, strict=True):
        if not taps:
            values.append(None)
            continue
        middle = _shifted(centre, where, plan.length)
        d2 = jnp.stack(
            [distance(_shifted(guide, t.guide, plan.length), middle, kernel, axis=0) for t in taps]
        )
        values.append(weigh(d2, kernel, _valid(plan, taps) if kernel.normalized else None, axis=0))
    return values


def conv(x, guide, centre, weight_kxkxCxO, kernel: Kernel, window: Window):
    plan = make_plan(window, x.shape[1:3])
    output = window.output_size(x.shape[1:3])
    ks = kernels(guide, centre, kernel, plan)
    xp = _planes(x, plan.source_factor, plan)
    w = weight_kxkxCxO.reshape(-1, *weight_kxkxCxO.shape[2:])
    ys = []
    for taps, k in zip(plan.phases, ks, strict=True):
        if not taps:
            ys.append(jnp.zeros((x.shape[0], plan.length, w.shape[-1]), x.dtype))
            continue
        a = jnp.stack([k[i] * _shifted(xp, t.source, plan.length) for i, t in enumerate(taps)])
        ys.append(jnp.einsum("tcbn,tco->bno", a, w[np.array([t.weight for t in taps])]))
    return join(ys, plan, window, output)


def join(ys, plan, window, output):
    """Interleaves the phases, drops the padding columns."""
    (zh, zw) = window.zoom
    y = jnp.stack(ys)
    z, b, n, o = y.shape
    y = y.reshape(zh, zw, b, plan.grid[0], plan.width, o)[..., : plan.grid[1], :]
    y = y.transpose(2, 3, 0, 4, 1, 5).reshape(b, plan.grid[0] * zh, plan.grid[1] * zw, o)
    return y[:, : output[0], : output[1]]


def kernel_BxHxWxT(guide, centre, kernel, window, input_size):
    plan = make_plan(window, input_size)
    (k,) = kernels(guide, centre, kernel, plan)
    k = k.reshape(*k.shape[:2], plan.grid[0], plan.width)[..., : plan.grid[1]]
    return k.transpose(1, 2, 3, 0)


def pool(x, guide, centre, kernel, window):
    plan = make_plan(window, x.shape[1:3])
    (k,), (taps,) = kernels(guide, centre, kernel, plan), plan.phases
    xp = _planes(x, plan.source_factor, plan)
    y = sum(k[i] * _shifted(xp, t.source, plan.length) for i, t in enumerate(taps))
    y = y.reshape(*y.shape[:2], plan.grid[0], plan.width)[..., : plan.grid[1]]
    return y.transpose(1, 2, 3, 0)
