"""Pixel-adaptive convolution without window copies: flat shifts, shared products, phases.

Layout: channels first, and the pixels of an image flattened last, with a row width that includes
the padding. The pixel under a tap is then one fixed step along the last axis, so that every tap is
a contiguous slice: `y += K_t * shift(W_t x)`. What is strided is split into its phases beforehand:
upsampling by r makes r x r output phases, each a dense convolution of the small input that only
has the taps which do not fall on inserted zeros.

All matrix products run on the unshifted input, several taps in one product; nothing of the size
of a window is stored. The gradient computes kernels and products again. Sums over channels are
written out, because XLA on CPU vectorises a sum of slices but not a reduction.
"""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np

from jaxseg.ops.pac_window import Kernel, Window, difference, similarity

_TAPS_PER_PRODUCT = 9  # more is no faster, and needs more memory
_WRITTEN_OUT = 128  # longest sum over channels that is written out: compile time grows with it


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
    """What is static, per shape. An array of outputs has `length` pixels per image and phase."""

    grid: tuple[int, int]  # rows and columns of one output phase
    low: tuple[int, int]  # zeros before the first pixel of a plane
    width: int  # of a flattened row
    reach: int  # largest shift
    source_factor: tuple[int, int]  # the input is split into so many planes
    guide_factor: tuple[int, int]
    centres: tuple[tuple[int, int], ...]  # plane and shift in the guide, per output phase
    phases: tuple[tuple[_Tap, ...], ...]

    @property
    def length(self) -> int:
        return self.grid[0] * self.width


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
def _make_plan(window: Window, input_size: tuple[int, int]) -> _Plan:
    """Lays out the taps of every output phase; places are flattened to (plane, shift)."""
    output = window.output_size(input_size)
    grid = tuple(-(-n // z) for n, z in zip(output, window.zoom, strict=True))
    axes = [list(_axis_taps(window, a, input_size[a], grid[a])) for a in (0, 1)]
    shifts = [
        [place[1] for centre, taps in axis for place in (centre, *(p for t in taps for p in t[1:3]))]
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
    reach = span[0] * width + span[1]
    return _Plan(
        grid, low, width, reach, window.stride, guide_factor, tuple(centres), tuple(phases)
    )


def _split(x_BxHxWxC: jax.Array, factor: tuple[int, int], plan: _Plan) -> jax.Array:
    """Every phase of x, padded and flattened: PxCxBxL, L at least length + reach."""
    fh, fw = factor
    _, height, width, channels = x_BxHxWxC.shape
    rows = -(-(plan.length + plan.reach) // plan.width)
    top, left = plan.low[0] * fh, plan.low[1] * fw
    bottom, right = rows * fh - top - height, plan.width * fw - left - width
    padding = ((0, 0, 0), (top, bottom, 0), (left, right, 0), (0, 0, 0))
    x = jax.lax.pad(x_BxHxWxC, jnp.zeros((), x_BxHxWxC.dtype), padding)
    x = x.reshape(-1, rows, fh, plan.width, fw, channels).transpose(2, 4, 5, 0, 1, 3)
    return x.reshape(fh * fw, channels, -1, rows * plan.width)


def _merge(phases_CxBxN: list[jax.Array], plan: _Plan, window: Window, input_size) -> jax.Array:
    """Interleaves the output phases and drops the padding: BxHoxWoxC."""
    (rows, columns), (zh, zw) = plan.grid, window.zoom
    c, b, _ = phases_CxBxN[0].shape
    y = jnp.stack(phases_CxBxN).reshape(zh, zw, c, b, rows, plan.width)[..., :columns]
    y = y.transpose(3, 4, 0, 5, 1, 2).reshape(b, rows * zh, columns * zw, c)
    height, width = window.output_size(input_size)
    return y[:, :height, :width]


def _at(x: jax.Array, shift: int, length: int) -> jax.Array:
    return jax.lax.slice_in_dim(x, shift, shift + length, axis=-1)


def _sum_products(a_CxBxN: jax.Array, b_CxBxN: jax.Array) -> jax.Array:
    """Sum over channels of a * b, in float32."""
    a, b = a_CxBxN.astype(jnp.float32), b_CxBxN.astype(jnp.float32)
    if a.shape[0] > _WRITTEN_OUT:
        return jnp.sum(a * b, axis=0)
    return functools.reduce(jnp.add, [a[i] * b[i] for i in range(a.shape[0])])


def _pad_ends(x: jax.Array, before: int, after: int) -> jax.Array:
    return jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(before, after)])


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _distances(guide_PxGxBxL, centre_PxGxBxL, asymmetric: bool, plan: _Plan):
    """Squared distance to the centre, per phase and tap: BxN each."""
    kernel, n = Kernel(asymmetric=asymmetric), plan.length
    result = []
    for (plane, shift), taps in zip(plan.centres, plan.phases, strict=True):
        middle = _at(centre_PxGxBxL[plane], shift, n)
        ds = [difference(_at(guide_PxGxBxL[t.guide[0]], t.guide[1], n), middle, kernel) for t in taps]
        result.append([_sum_products(d, d) for d in ds])
    return result


def _distances_forward(guide, centre, asymmetric, plan):
    return _distances(guide, centre, asymmetric, plan), (guide, centre)


def _distances_backward(asymmetric, plan, residuals, gradients):
    """Gathers: every pixel collects from the windows in which it is a neighbour or the centre."""
    guide, centre = residuals
    kernel, n, reach, length = Kernel(asymmetric=asymmetric), plan.length, plan.reach, guide.shape[-1]
    as_neighbour = [jnp.zeros_like(guide[0])] * len(guide)
    as_centre = [jnp.zeros_like(centre[0])] * len(centre)
    centre_wide = _pad_ends(centre, reach, reach)
    for (plane, shift), taps, es in zip(plan.centres, plan.phases, gradients, strict=True):
        middle, total = _at(centre[plane], shift, n), 0.0
        for t, e in zip(taps, es, strict=True):
            p, s = t.guide
            total += 2.0 * e * difference(_at(guide[p], s, n), middle, kernel)
            e_wide = _at(_pad_ends(e, reach, length - n), reach - s, length)
            centre_there = _at(centre_wide[plane], reach + shift - s, length)
            as_neighbour[p] += 2.0 * e_wide * difference(guide[p], centre_there, kernel)
        if taps:
            as_centre[plane] -= _pad_ends(total, shift, length - n - shift)
    return jnp.stack(as_neighbour), jnp.stack(as_centre)


_distances.defvjp(_distances_forward, _distances_backward)


def _valid(tap: _Tap, plan: _Plan) -> np.ndarray:
    """Which outputs see a pixel of the input through a tap: 1xN."""
    row, column = np.arange(plan.grid[0]), np.arange(plan.width)
    rows = (row >= tap.rows[0]) & (row < tap.rows[1])
    columns = (column >= tap.columns[0]) & (column < tap.columns[1])
    return (rows[:, None] & columns).reshape(1, -1)


def _normalized(d2s: list[jax.Array], kernel: Kernel, taps: tuple[_Tap, ...], plan: _Plan):
    """Kernel values of one phase that sum to 1 over the valid taps."""
    valid = [_valid(t, plan) for t in taps]
    if kernel.kind == "gaussian":
        # The nearest valid neighbour counts 1 before the division, so that the sum cannot vanish.
        nearest = functools.reduce(
            jnp.minimum, [jnp.where(v, d2, jnp.inf) for d2, v in zip(d2s, valid, strict=True)]
        )
        nearest = jax.lax.stop_gradient(jnp.where(jnp.isinf(nearest), 0.0, nearest))
        d2s = [jnp.where(v, d2 - nearest, 0.0) for d2, v in zip(d2s, valid, strict=True)]
    values = [jnp.where(v, similarity(d2, kernel), 0.0) for d2, v in zip(d2s, valid, strict=True)]
    total = functools.reduce(jnp.add, values)
    return [value / jnp.where(total == 0.0, 1.0, total) for value in values]


def _kernels(guide_BxHxWxG, centre_BxHxWxG, kernel: Kernel, plan: _Plan) -> list[list[jax.Array]]:
    """Kernel values per phase and tap: BxN each."""
    guide = _split(guide_BxHxWxG, plan.guide_factor, plan)
    same = centre_BxHxWxG is guide_BxHxWxG
    centre = guide if same else _split(centre_BxHxWxG, plan.guide_factor, plan)
    d2s = _distances(guide, centre, kernel.asymmetric, plan)
    if not kernel.normalized:
        return jax.tree.map(lambda d2: similarity(d2, kernel), d2s)
    pairs = zip(d2s, plan.phases, strict=True)
    return [_normalized(d2, kernel, taps, plan) if taps else [] for d2, taps in pairs]


def _groups(plan: _Plan):
    """Weights whose products with the input are made together, and who reads which."""
    order = dict.fromkeys(t.weight for taps in plan.phases for t in taps)
    order = list(order)
    for start in range(0, len(order), _TAPS_PER_PRODUCT):
        weights = order[start : start + _TAPS_PER_PRODUCT]
        readers = [
            (phase, i, weights.index(t.weight), *t.source)
            for phase, taps in enumerate(plan.phases)
            for i, t in enumerate(taps)
            if t.weight in weights
        ]
        yield np.array(weights), readers


def _products(x_PxCxBxL: jax.Array, weight_TxCxO: jax.Array) -> jax.Array:
    """Every tap's weight times the unshifted input: PxTxOxBxL."""
    p, c, b, n = x_PxCxBxL.shape
    t, _, o = weight_TxCxO.shape
    w = weight_TxCxO.transpose(0, 2, 1).reshape(t * o, c)
    y = [jax.lax.dot(w, x_PxCxBxL[i].reshape(c, b * n)).reshape(t, o, b, n) for i in range(p)]
    return y


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _mix(x_PxCxBxL, kernels, weight_TxCxO, plan: _Plan) -> list[jax.Array]:
    """Sum over taps of kernel times shifted product, per phase: OxBxN each, float32."""
    n = plan.length
    outputs = [0.0] * len(plan.phases)
    for weights, readers in _groups(plan):
        products = _products(x_PxCxBxL, weight_TxCxO[weights])
        for phase, i, j, plane, shift in readers:
            outputs[phase] += kernels[phase][i] * _at(products[plane][j], shift, n)
    shape = (weight_TxCxO.shape[-1], x_PxCxBxL.shape[2], n)
    return [jnp.zeros(shape) if isinstance(y, float) else y for y in outputs]


def _mix_forward(x, kernels, weight, plan):
    return _mix(x, kernels, weight, plan), (x, kernels, weight)


def _mix_backward(plan, residuals, gradients):
    x, kernels, weight = residuals
    n, reach, (_, c, b, length) = plan.length, plan.reach, x.shape
    dk = jax.tree.map(lambda k: k, kernels)
    dx = [0.0] * len(x)
    dw = jnp.zeros_like(weight)
    for weights, readers in _groups(plan):
        w = weight[weights]
        products = _products(x, w)
        # The gradient of every product, gathered from the outputs that read it.
        dp = [[0.0] * len(weights) for _ in range(len(x))]
        for phase, i, j, plane, shift in readers:
            g = gradients[phase]
            dk[phase][i] = _sum_products(g, _at(products[plane][j], shift, n))
            kg = _pad_ends(kernels[phase][i] * g, shift, length - n - shift)
            dp[plane][j] += kg
        for plane in range(len(x)):
            used = [j for j, d in enumerate(dp[plane]) if not isinstance(d, float)]
            if not used:
                continue
            d = jnp.concatenate([dp[plane][j].astype(x.dtype) for j in used]).reshape(-1, b * length)
            wu = w[np.array(used)].transpose(1, 0, 2).reshape(c, -1)
            dx[plane] += jax.lax.dot(wu, d).reshape(c, b, length)
            dwu = jax.lax.dot_general(d, x[plane].reshape(c, -1), (((1,), (1,)), ((), ())))
            dw = dw.at[weights[np.array(used)]].add(dwu.reshape(len(used), -1, c).transpose(0, 2, 1))
    dx = jnp.stack([jnp.zeros((c, b, length), x.dtype) if isinstance(d, float) else d for d in dx])
    return dx, dk, dw


_mix.defvjp(_mix_forward, _mix_backward)


def conv(x_BxHxWxC, guide_BxHxWxG, centre_BxHxWxG, weight_kxkxCxO, kernel: Kernel, window: Window):
    """Convolution, transposed convolution, or convolution of the repeated input: BxHoxWoxO."""
    size = x_BxHxWxC.shape[1:3]
    plan = _make_plan(window, size)
    kernels = _kernels(guide_BxHxWxG, centre_BxHxWxG, kernel, plan)
    x_PxCxBxL = _split(x_BxHxWxC, plan.source_factor, plan)
    weight_TxCxO = weight_kxkxCxO.reshape(-1, *weight_kxkxCxO.shape[2:])
    y = _mix(x_PxCxBxL, kernels, weight_TxCxO, plan)
    return _merge(y, plan, window, size).astype(x_BxHxWxC.dtype)


def pool(x_BxHxWxC, guide_BxHxWxG, centre_BxHxWxG, kernel: Kernel, window: Window) -> jax.Array:
    """Sum of every window times its kernel: BxHoxWoxC."""
    size = x_BxHxWxC.shape[1:3]
    plan = _make_plan(window, size)
    (values,) = _kernels(guide_BxHxWxG, centre_BxHxWxG, kernel, plan)
    x = _split(x_BxHxWxC, plan.source_factor, plan)
    shifted = [_at(x[t.source[0]], t.source[1], plan.length) for t in plan.phases[0]]
    y = functools.reduce(jnp.add, [k * s for k, s in zip(values, shifted, strict=True)])
    return _merge([y], plan, window, size).astype(x_BxHxWxC.dtype)


def kernel_BxHxWxT(guide_BxHxWxG, centre_BxHxWxG, kernel: Kernel, window: Window, input_size):
    """Kernel values of the T = k * k taps of every output pixel of a convolution."""
    plan = _make_plan(window, input_size)
    (values,) = _kernels(guide_BxHxWxG, centre_BxHxWxG, kernel, plan)
    return _merge([jnp.stack(values)], plan, window, input_size)
