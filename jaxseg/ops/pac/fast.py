"""Pixel-adaptive convolution block by block: no window copies, nothing stored for the gradient.

A block is some rows of the output, small enough to stay in cache; what its gradient needs is
computed again. Within a block channels go first, and pixels are flattened with a row width that
includes the padding: the pixel under a tap is then one fixed step along the last axis, so every
tap is a contiguous slice: `y += K_t * shift(W_t x)`, all taps' W_t x in one matrix product.

What is strided is split into its phases beforehand. Upsampling by r makes r x r output phases,
each a dense convolution of the small input that only has the taps which do not fall on inserted
zeros; with repeated pixels instead of zeros all phases share the products.

Sums over channels are written out: XLA on CPU vectorises a sum of slices, not a reduction.
"""

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxseg.ops.pac.window import Kernel, Window, difference, similarity

_WRITTEN_OUT = 128  # longest sum over channels that is written out: compile time grows with it
_BLOCK_BYTES = {"cpu": 2 << 20}  # of the products of one block: a core's share of cache
_BLOCK_BYTES_ELSEWHERE = 1 << 30


@dataclasses.dataclass(frozen=True)
class _Tap:
    """One tap of one output phase: its weight, and where it reads (plane, shift)."""

    weight: int
    source: tuple[int, int]
    guide: tuple[int, int]
    rows: tuple[int, int]  # outputs whose tap sees a pixel of the input: first, and after the last
    columns: tuple[int, int]


@dataclasses.dataclass(frozen=True)
class _Plan:
    """What is static, per shape; rows and columns are those of one output phase."""

    window: Window
    columns: int
    blocks: int
    rows: int  # per block
    low: tuple[int, int]  # zeros before the first pixel of a plane
    span: tuple[int, int]  # how many rows and columns a window reaches across
    source_factor: tuple[int, int]  # the input is split into so many planes
    guide_factor: tuple[int, int]
    centres: tuple[tuple[int, int], ...]  # plane and shift in the guide, per output phase
    phases: tuple[tuple[_Tap, ...], ...]

    @property
    def width(self) -> int:
        """Of a flattened row."""
        return self.columns + self.span[1]

    @property
    def pixels(self) -> int:
        """Of a flattened block, per phase and image."""
        return self.rows * self.width

    @property
    def reach(self) -> int:
        """The largest shift."""
        return self.span[0] * self.width + self.span[1]


def _axis_taps(window: Window, axis: int, input_size: int, grid: int):
    """Per phase along one axis: the centre's place in the guide, and the taps."""
    stride, zoom = window.stride[axis], window.zoom[axis]
    for phase in range(zoom):
        taps = []
        for k in range(window.size[axis]):
            step = phase + k * window.dilation[axis]
            source, inserted = divmod(step - window.low[axis], zoom)
            if inserted and window.transposed:
                continue
            sees = (max(0, -(source // stride)), min(grid, (input_size - 1 - source) // stride + 1))
            guide = divmod(step - window.guide_low[axis], stride * zoom)
            taps.append((k, divmod(source, stride)[::-1], guide[::-1], sees))
        middle = phase + window.size[axis] // 2 * window.dilation[axis] - window.guide_low[axis]
        yield divmod(middle, stride * zoom)[::-1], taps


@functools.lru_cache(maxsize=256)
def _make_plan(window: Window, input_size: tuple[int, int], bytes_per_pixel: int) -> _Plan:
    """Lays out blocks and the taps of every output phase."""
    output = window.output_size(input_size)
    grid = tuple(-(-n // z) for n, z in zip(output, window.zoom, strict=True))
    axes = [list(_axis_taps(window, a, input_size[a], grid[a])) for a in (0, 1)]
    shifts = [
        [
            place[1]
            for centre, taps in axis
            for place in (centre, *(p for t in taps for p in t[1:3]))
        ]
        for axis in axes
    ]
    low = tuple(max(0, -min(s)) for s in shifts)
    span = tuple(max(0, max(s)) + lo for s, lo in zip(shifts, low, strict=True))
    width = grid[1] + span[1]
    guide_factor = tuple(s * z for s, z in zip(window.stride, window.zoom, strict=True))

    def flat(row, column, factor):
        shift = (row[1] + low[0]) * width + column[1] + low[1]
        return row[0] * factor[1] + column[0], shift

    centres, phases = [], []
    for (row_centre, rows), (column_centre, columns) in itertools.product(*axes):
        centres.append(flat(row_centre, column_centre, guide_factor))
        taps = [
            _Tap(
                r[0] * window.size[1] + c[0],
                flat(r[1], c[1], window.stride),
                flat(r[2], c[2], guide_factor),
                r[3],
                c[3],
            )
            for r, c in itertools.product(rows, columns)
        ]
        phases.append(tuple(taps))
    budget = _BLOCK_BYTES.get(jax.default_backend(), _BLOCK_BYTES_ELSEWHERE)
    # With one block XLA would unroll the loop, and undo what `_apart` does.
    blocks = max(2, -(-grid[0] // max(4, budget // (bytes_per_pixel * width))))
    rows_per_block = -(-grid[0] // blocks)
    return _Plan(
        window, grid[1], blocks, rows_per_block, low, span, window.stride, guide_factor,
        tuple(centres), tuple(phases),
    )  # fmt: skip


def _split(x_BxHxWxC: jax.Array, factor: tuple[int, int], plan: _Plan) -> list[jax.Array]:
    """Every phase of x, with zeros around, flattened: CxBxL each."""
    (fh, fw), (batch, height, width, channels) = factor, x_BxHxWxC.shape
    rows = plan.blocks * plan.rows + plan.span[0]
    top, left = plan.low[0] * fh, plan.low[1] * fw
    bottom, right = rows * fh - top - height, plan.width * fw - left - width
    padding = ((0, 0, 0), (top, bottom, 0), (left, right, 0), (0, 0, 0))
    x = jax.lax.pad(x_BxHxWxC, jnp.zeros((), x_BxHxWxC.dtype), padding)
    x = x.reshape(batch, rows, fh, plan.width, fw, channels).transpose(2, 4, 5, 0, 1, 3)
    x_PxCxBxL = _pad_ends(x.reshape(fh * fw, channels, batch, -1), 0, plan.span[1])
    return [x_PxCxBxL[i] for i in range(fh * fw)]


def _merge(phases_CxBxN: list[jax.Array], plan: _Plan) -> jax.Array:
    """Interleaves the output phases of a block: BxHxWxC."""
    zh, zw = plan.window.zoom
    c, b, _ = phases_CxBxN[0].shape
    y = jnp.stack(phases_CxBxN).reshape(zh, zw, c, b, plan.rows, plan.width)
    y = y[..., : plan.columns].transpose(3, 4, 0, 5, 1, 2)
    return y.reshape(b, plan.rows * zh, plan.columns * zw, c)


def _at(x: jax.Array, shift: int, length: int) -> jax.Array:
    return jax.lax.slice_in_dim(x, shift, shift + length, axis=-1)


def _pad_ends(x: jax.Array, before: int, after: int) -> jax.Array:
    return jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(before, after)])


def _sum_channels(term: Callable[[Any], jax.Array], channels: int) -> jax.Array:
    """Sum over c of term(c), where term also takes all channels at once."""
    if channels > _WRITTEN_OUT:
        return jnp.sum(term(slice(None)), axis=0)
    return functools.reduce(jnp.add, [term(c) for c in range(channels)])


def _apart(function: Callable, first_row: jax.Array, *arguments):
    """Calls function, whose arguments and results XLA on CPU then really stores.

    Left alone it fuses a sum into everything that reads it, and so computes it again for every
    reader and channel; padding fused so keeps loops from being vectorised. An optimization barrier
    does not stop it; a branch does.
    """
    if jax.default_backend() != "cpu":
        return function(*arguments)

    def never(*arguments):
        shapes = jax.eval_shape(function, *arguments)
        return jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)

    return jax.lax.cond(first_row >= 0, function, never, *arguments)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def _distances(guides_GxBxL, centres_GxBxL, first_row, asymmetric: bool, plan: _Plan):
    """Squared distance to the centre, per phase and tap: BxN each."""
    kernel, n = Kernel(asymmetric=asymmetric), plan.pixels

    def d2(plane, shift, tap):
        def term(c):
            neighbour = _at(guides_GxBxL[tap.guide[0]][c], tap.guide[1], n)
            return difference(neighbour, _at(centres_GxBxL[plane][c], shift, n), kernel) ** 2

        return _sum_channels(term, guides_GxBxL[0].shape[0])

    pairs = zip(plan.centres, plan.phases, strict=True)
    return [[d2(plane, shift, tap) for tap in taps] for (plane, shift), taps in pairs]


def _distances_forward(guide, centre, first_row, asymmetric, plan):
    return _distances(guide, centre, first_row, asymmetric, plan), (guide, centre, first_row)


def _distances_backward(asymmetric, plan, residuals, gradients):
    """Gathers: every pixel collects from the windows in which it is a neighbour or the centre."""
    guide, centre, first_row = residuals
    kernel, n, reach = Kernel(asymmetric=asymmetric), plan.pixels, plan.reach
    widen = functools.partial(jax.tree.map, lambda a: _pad_ends(a, reach, reach))
    gradients_wide, centre_wide = _apart(widen, first_row, (gradients, centre))
    as_neighbour = [jnp.zeros_like(plane) for plane in guide]
    as_centre = [jnp.zeros_like(plane) for plane in centre]
    for phase, ((plane, shift), taps) in enumerate(zip(plan.centres, plan.phases, strict=True)):
        middle, total = _at(centre[plane], shift, n), 0.0
        for i, t in enumerate(taps):
            p, s = t.guide
            e = gradients[phase][i]
            total += 2.0 * e * difference(_at(guide[p], s, n), middle, kernel)
            e = _at(gradients_wide[phase][i], reach - s, n + reach)
            there = _at(centre_wide[plane], reach + shift - s, n + reach)
            as_neighbour[p] += 2.0 * e * difference(guide[p], there, kernel)
        if taps:
            as_centre[plane] -= _pad_ends(total, shift, reach - shift)
    return as_neighbour, as_centre, None


_distances.defvjp(_distances_forward, _distances_backward)


def _valid(tap: _Tap, plan: _Plan, first_row: jax.Array) -> jax.Array:
    """Which outputs of a block see a pixel of the input through a tap: 1xN."""
    row, column = first_row + jnp.arange(plan.rows), np.arange(plan.width)
    rows = (row >= tap.rows[0]) & (row < tap.rows[1])
    columns = (column >= tap.columns[0]) & (column < tap.columns[1])
    return (rows[:, None] & columns).reshape(1, -1)


def _normalized(d2s: list[jax.Array], kernel: Kernel, valid: list[jax.Array], first_row):
    """Kernel values of one phase that sum to 1 over the valid taps."""
    if kernel.kind == "gaussian":
        # The nearest valid neighbour counts 1 before the division, so that the sum cannot vanish.
        masked = [jnp.where(v, d2, jnp.inf) for d2, v in zip(d2s, valid, strict=True)]
        least = functools.partial(functools.reduce, jnp.minimum)
        nearest = _apart(least, first_row, jax.lax.stop_gradient(masked))
        nearest = jnp.where(jnp.isinf(nearest), 0.0, nearest)
        d2s = [jnp.where(v, d2 - nearest, 0.0) for d2, v in zip(d2s, valid, strict=True)]
    values = [jnp.where(v, similarity(d2, kernel), 0.0) for d2, v in zip(d2s, valid, strict=True)]
    total = _apart(functools.partial(functools.reduce, jnp.add), first_row, values)
    return [value / jnp.where(total == 0.0, 1.0, total) for value in values]


def _kernels(guide, centre, kernel: Kernel, plan: _Plan, first_row) -> list[list[jax.Array]]:
    """Kernel values of a block per phase and tap: BxN each; the guide is its centre if None."""
    d2s = _distances(guide, guide if centre is None else centre, first_row, kernel.asymmetric, plan)
    if not kernel.normalized:
        return jax.tree.map(lambda d2: similarity(d2, kernel), d2s)
    valid = [[_valid(t, plan, first_row) for t in taps] for taps in plan.phases]
    pairs = zip(d2s, valid, strict=True)
    return [_normalized(d2, kernel, v, first_row) if d2 else [] for d2, v in pairs]


def _products(x_CxBxL: jax.Array, weight_TxCxO: jax.Array) -> jax.Array:
    """Every tap's weight times the unshifted input: TxOxBxL."""
    (c, b, n), (t, _, o) = x_CxBxL.shape, weight_TxCxO.shape
    w = weight_TxCxO.transpose(0, 2, 1).reshape(t * o, c)
    return jax.lax.dot(w, x_CxBxL.reshape(c, b * n)).reshape(t, o, b, n)


def _readers(plan: _Plan, plane: int):
    """The weights used on a plane of the input, and (phase, tap, which of them, shift) of all uses."""
    found = [
        (phase, i, tap)
        for phase, taps in enumerate(plan.phases)
        for i, tap in enumerate(taps)
        if tap.source[0] == plane
    ]
    weights = sorted({tap.weight for _, _, tap in found})
    return np.array(weights, int), [
        (phase, i, weights.index(tap.weight), tap.source[1]) for phase, i, tap in found
    ]


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _mix(xs_CxBxL, kernels, weight_TxCxO, first_row, plan: _Plan) -> list[jax.Array]:
    """Sum over taps of kernel times shifted product, per phase: OxBxN each."""
    n = plan.pixels
    zeros = jnp.zeros((weight_TxCxO.shape[-1], xs_CxBxL[0].shape[1], n), xs_CxBxL[0].dtype)
    outputs = [zeros] * len(plan.phases)
    for plane, x in enumerate(xs_CxBxL):
        weights, readers = _readers(plan, plane)
        if not readers:
            continue
        products = _products(x, weight_TxCxO[weights])
        for phase, i, j, shift in readers:
            outputs[phase] += kernels[phase][i] * _at(products[j], shift, n)
    return outputs


def _mix_forward(x, kernels, weight, first_row, plan):
    return _mix(x, kernels, weight, first_row, plan), (x, kernels, weight, first_row)


def _mix_backward(plan, residuals, gradients):
    x, kernels, weight, first_row = residuals
    gradient = functools.partial(_mix_gradient, plan)
    return *_apart(gradient, first_row, x, kernels, weight, gradients), None


def _mix_gradient(plan, xs_CxBxL, kernels, weight, gradients):
    n, (c, b, length) = plan.pixels, xs_CxBxL[0].shape
    o = weight.shape[-1]
    dk = [list(taps) for taps in kernels]
    dx, dw = [], jnp.zeros_like(weight)
    for plane, x in enumerate(xs_CxBxL):
        weights, readers = _readers(plan, plane)
        if not readers:
            dx.append(jnp.zeros_like(x))
            continue
        w = weight[weights]
        products = _products(x, w)
        d_products = [jnp.zeros((o, b, length), x.dtype)] * len(weights)
        for phase, i, j, shift in readers:
            g = gradients[phase]
            dk[phase][i] = _sum_channels(
                lambda q, g=g, y=products[j], s=shift: g[q] * _at(y[q], s, n), o
            ).astype(kernels[phase][i].dtype)
            back = (kernels[phase][i] * g).astype(x.dtype)
            d_products[j] += _pad_ends(back, shift, length - n - shift)
        d = jnp.concatenate(d_products).reshape(-1, b * length)
        wt = w.transpose(1, 0, 2).reshape(c, -1)
        dx.append(jax.lax.dot(wt, d).reshape(c, b, length))
        dw_here = jax.lax.dot_general(d, x.reshape(c, -1), (((1,), (1,)), ((), ())))
        dw = dw.at[weights].add(dw_here.reshape(-1, o, c).transpose(0, 2, 1))
    return dx, dk, dw


_mix.defvjp(_mix_forward, _mix_backward)


def _conv_block(xs, guides, centres, weight_TxCxO, kernel: Kernel, plan: _Plan, first_row):
    kernels = _kernels(guides, centres, kernel, plan, first_row)
    return _merge(_mix(xs, kernels, weight_TxCxO, first_row, plan), plan).astype(xs[0].dtype)


def _pool_block(xs, guides, centres, weight: None, kernel: Kernel, plan: _Plan, first_row):
    (values,) = _kernels(guides, centres, kernel, plan, first_row)
    shifted = [_at(xs[t.source[0]], t.source[1], plan.pixels) for t in plan.phases[0]]
    y = functools.reduce(jnp.add, [k * s for k, s in zip(values, shifted, strict=True)])
    return _merge([y], plan).astype(xs[0].dtype)


def _kernel_block(xs: None, guides, centres, weight: None, kernel: Kernel, plan: _Plan, first_row):
    (values,) = _kernels(guides, centres, kernel, plan, first_row)
    return _merge([jnp.stack(values)], plan)


class _Inputs(NamedTuple):
    """What a block computes on."""

    xs: list[jax.Array] | None  # planes are CxBxL
    guides: list[jax.Array]
    centres: list[jax.Array] | None  # the guide's if None
    weight: jax.Array | None
    kernel: Kernel

    def block(self, plan: _Plan, index: jax.Array) -> "_Inputs":
        """The pixels that a block of the output needs."""
        length = plan.pixels + plan.reach
        planes = jax.tree.map(
            lambda plane: jax.lax.dynamic_slice_in_dim(plane, index * plan.pixels, length, axis=-1),
            self[:3],
        )
        return _Inputs(*planes, *self[3:])


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _run(function, plan: _Plan, inputs: _Inputs) -> jax.Array:
    """The output BxHxWxO, block by block; its last rows may be surplus."""

    def part(index):
        return function(*inputs.block(plan, index), plan, index * plan.rows)

    def body(y, index):
        rows = part(index)
        return jax.lax.dynamic_update_slice_in_dim(y, rows, index * rows.shape[1], axis=1), None

    one = jax.eval_shape(part, 0)
    batch, height, *rest = one.shape
    y = jnp.zeros((batch, plan.blocks * height, *rest), one.dtype)
    return jax.lax.scan(body, y, jnp.arange(plan.blocks))[0]


def _run_forward(function, plan, inputs):
    return _run(function, plan, inputs), inputs


def _run_backward(function, plan, inputs, dy):
    def add(total, part, start):
        old = jax.lax.dynamic_slice_in_dim(total, start, part.shape[-1], axis=-1)
        return jax.lax.dynamic_update_slice_in_dim(total, old + part, start, axis=-1)

    def body(gradients, index):
        _, pull = jax.vjp(
            lambda i: function(*i, plan, index * plan.rows), inputs.block(plan, index)
        )
        height = dy.shape[1] // plan.blocks
        (parts,) = pull(jax.lax.dynamic_slice_in_dim(dy, index * height, height, axis=1))
        planes = jax.tree.map(lambda t, p: add(t, p, index * plan.pixels), gradients[:3], parts[:3])
        return _Inputs(*planes, *jax.tree.map(jnp.add, gradients[3:], parts[3:])), None

    zeros = jax.tree.map(jnp.zeros_like, inputs)
    return (jax.lax.scan(body, zeros, jnp.arange(plan.blocks))[0],)


_run.defvjp(_run_forward, _run_backward)


def _apply(function, window: Window, floats_per_pixel: int, input_size, x, guide, centre, *rest):
    plan = _make_plan(window, input_size, 4 * floats_per_pixel * guide.shape[0])
    factors = (plan.source_factor, plan.guide_factor, plan.guide_factor)
    planes = [
        None if image is None else _split(image, factor, plan)
        for image, factor in zip((x, guide, centre), factors, strict=True)
    ]
    y = _run(function, plan, _Inputs(*planes, *rest))
    height, width = window.output_size(input_size)
    return y[:, :height, :width]


def conv(x_BxHxWxC, guide_BxHxWxG, centre_BxHxWxG, weight_kxkxCxO, kernel: Kernel, window: Window):
    """Convolution, transposed convolution, or convolution of the repeated input: BxHoxWoxO."""
    weight_TxCxO = weight_kxkxCxO.reshape(-1, *weight_kxkxCxO.shape[2:])
    images = (x_BxHxWxC, guide_BxHxWxG, centre_BxHxWxG)
    floats, size = weight_TxCxO.shape[0] * weight_TxCxO.shape[2], x_BxHxWxC.shape[1:3]
    return _apply(_conv_block, window, floats, size, *images, weight_TxCxO, kernel)


def pool(x_BxHxWxC, guide_BxHxWxG, centre_BxHxWxG, kernel: Kernel, window: Window) -> jax.Array:
    """Sum of every window times its kernel: BxHoxWoxC."""
    images = (x_BxHxWxC, guide_BxHxWxG, centre_BxHxWxG)
    floats, size = x_BxHxWxC.shape[-1] + math.prod(window.size), x_BxHxWxC.shape[1:3]
    return _apply(_pool_block, window, floats, size, *images, None, kernel)


def kernel_BxHxWxT(guide_BxHxWxG, centre_BxHxWxG, kernel: Kernel, window: Window, input_size):
    """Kernel values of the T taps of every output pixel of a convolution."""
    images = (None, guide_BxHxWxG, centre_BxHxWxG)
    return _apply(_kernel_block, window, math.prod(window.size), input_size, *images, None, kernel)
