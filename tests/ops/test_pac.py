"""PAC against reference outputs, a brute-force loop, plain convolution, and itself."""

import ast
import functools
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from shared import shared_path

from jaxseg.ops.pac import (
    Kernel,
    pac_conv,
    pac_conv_transpose,
    pac_kernel,
    pac_pool,
    pac_upsample_nearest,
    smooth_guide,
)
from jaxseg.ops.pac import fast as fast_form

FORMS = ("fast", "patches")
GOLDEN = [f"conv{i}" for i in range(10)] + [f"transpose{i}" for i in range(6)]


# Most of the time goes into compiling: LLVM need not optimise what runs once.
fast_to_compile = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


def close(actual, wanted, tolerance=1e-4):
    """Within `tolerance` of the largest value wanted, or absolutely where that is below 1."""
    wanted = np.asarray(wanted)
    np.testing.assert_allclose(
        np.asarray(actual), wanted, rtol=0, atol=tolerance * max(1.0, np.abs(wanted).max())
    )


def gradients(function, *arguments, dy):
    """The value and its vector-Jacobian product, compiled as one."""

    @fast_to_compile
    def run(*arguments):
        y, pull = jax.vjp(function, *arguments)
        return y, pull(jnp.asarray(dy, y.dtype))

    return run(*arguments)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", GOLDEN)
def test_golden(name, form):
    data = np.load(shared_path("golden/pac.npz"))
    config = ast.literal_eval(str(data[f"{name}_cfg"]))
    options = {"stride": config["s"], "padding": config["p"], "dilation": config["d"], "form": form}
    kernel = {"normalized": config.get("norm", False)}
    if "kt" in config:
        alpha, lam = map(float, config["kt"].split("_")[1:3])
        kernel |= {"kind": "inverse", "alpha": alpha, "lam": lam}
        kernel["asymmetric"] = config.get("asym", False)
    options["kernel"] = Kernel(**kernel)
    layout = (2, 3, 1, 0)
    function = pac_conv
    if name.startswith("transpose"):
        layout, function = (2, 3, 0, 1), pac_conv_transpose
        options["output_padding"] = config["op"]

    def nhwc(key):
        return data[f"{name}_{key}"].transpose(0, 2, 3, 1)

    y, (gx, gguide, gw, gb) = gradients(
        lambda *arrays: function(*arrays, **options),
        *(nhwc("x"), nhwc("guide"), data[f"{name}_w"].transpose(layout), data[f"{name}_b"]),
        dy=nhwc("gy"),
    )
    close(y, nhwc("y"))
    close(gx, nhwc("gx"))
    close(gguide, nhwc("gguide"))
    close(gw, data[f"{name}_gw"].transpose(layout))
    close(gb, data[f"{name}_gb"])
    if function is pac_conv and not options["kernel"].normalized:
        del options["form"]
        size = config["k"]
        values = fast_to_compile(lambda g: pac_kernel(g, size, form=form, **options))(nhwc("guide"))
        close(values, data[f"{name}_kernel"][:, 0].transpose(0, 3, 4, 1, 2))


def brute_force(x, guide, weight, window, kernel):
    """Loops over every output pixel and tap; `window` is (stride, zoom, insert, dilation, lows...)."""
    stride, zoom, mode, dilation, low, guide_low, output = window
    batch, _, _, channels = x.shape
    size = weight.shape[:2]
    y = np.zeros((batch, *output, weight.shape[3]))
    for b, i, j in itertools.product(range(batch), *map(range, output)):
        entries = []
        for t in itertools.product(*map(range, size)):

            def place(taps, low, i=i, j=j):
                pixel = zip((i, j), taps, stride, dilation, low, strict=True)
                return [p * s + t * d - lo for p, t, s, d, lo in pixel]

            def feature(position, b=b):
                inside = all(0 <= p < n for p, n in zip(position, guide.shape[1:3], strict=True))
                return guide[b][tuple(position)] if inside else np.zeros(guide.shape[-1])

            source = place(t, low)
            real = mode == "nearest" or all(p % z == 0 for p, z in zip(source, zoom, strict=True))
            source = [p // z for p, z in zip(source, zoom, strict=True)]
            real = real and all(0 <= p < n for p, n in zip(source, x.shape[1:3], strict=True))
            difference = feature(place(t, guide_low)) - feature(
                place([k // 2 for k in size], guide_low)
            )
            if kernel.asymmetric:
                difference = np.maximum(difference, 0)
            d2 = np.sum(difference**2)
            if kernel.kind == "gaussian":
                value = np.exp(-d2 / 2)
            else:
                value = kernel.alpha + (d2 + 1e-4) ** (kernel.lam / 2)
            if real:
                entries.append((value, x[b][tuple(source)] @ weight[t]))
        total = sum(v for v, _ in entries) if kernel.normalized else 1.0
        for value, product in entries:
            y[b, i, j] += value / (total or 1.0) * product
    return y


CASES = [
    # mode, size of x, kernel size, stride, padding, dilation, output padding
    ("conv", (5, 7), (3, 3), (1, 1), (1, 1), (1, 1), None),
    ("conv", (7, 6), (5, 3), (2, 1), (2, 0), (1, 2), None),
    ("conv", (9, 8), (3, 2), (3, 2), (4, 1), (2, 3), None),
    ("conv", (1, 1), (3, 3), (1, 1), (1, 1), (1, 1), None),
    ("transposed", (3, 4), (5, 5), (2, 2), (2, 2), (1, 1), (1, 1)),
    ("transposed", (4, 3), (3, 4), (3, 2), (0, 1), (1, 2), (1, 0)),
    ("transposed", (3, 3), (2, 3), (3, 4), (1, 0), (2, 1), (2, 3)),
    ("transposed", (4, 4), (3, 3), (2, 2), (3, 3), (1, 1), (1, 0)),
    ("nearest", (3, 4), (3, 3), (2, 2), (1, 1), (1, 1), None),
    ("nearest", (3, 2), (5, 2), (3, 2), (1, 0), (1, 2), None),
]
KERNELS = [
    Kernel(),
    Kernel(normalized=True),
    Kernel(kind="inverse", alpha=0.3, lam=-0.7, normalized=True),
    Kernel(kind="inverse", alpha=0.1, lam=0.5, asymmetric=True),
]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("case", range(len(CASES)))
def test_brute_force(case, form, monkeypatch):
    monkeypatch.setitem(fast_form._BLOCK_BYTES, "cpu", 1)  # the smallest blocks, so several
    fast_form._make_plan.cache_clear()
    mode, size, k, stride, padding, dilation, extra = CASES[case]
    kernel = KERNELS[case % len(KERNELS)]
    rng = np.random.default_rng(case)
    x, weight = rng.standard_normal((2, *size, 3)), rng.standard_normal((*k, 3, 2))
    reach = [(n - 1) * d for n, d in zip(k, dilation, strict=True)]
    options = {"padding": padding, "dilation": dilation, "kernel": kernel, "form": form}
    zoom, low, guide_low = (1, 1), padding, padding
    if mode == "conv":
        function, options["stride"], guide_size = pac_conv, stride, size
        sizes = zip(size, padding, reach, stride, strict=True)
        output = [(n + 2 * p - r - 1) // s + 1 for n, p, r, s in sizes]
    elif mode == "nearest":
        function, options["factor"], zoom = pac_upsample_nearest, stride, stride
        guide_size = [n * z for n, z in zip(size, zoom, strict=True)]
        sizes = zip(guide_size, padding, reach, strict=True)
        output = [n + 2 * p - r for n, p, r in sizes]
        stride = (1, 1)
    else:
        function, options["stride"], options["output_padding"] = pac_conv_transpose, stride, extra
        zoom, stride = stride, (1, 1)
        sizes = zip(size, zoom, padding, reach, extra, strict=True)
        output = guide_size = [(n - 1) * z - 2 * p + r + e + 1 for n, z, p, r, e in sizes]
        low = [r - p for r, p in zip(reach, padding, strict=True)]
        guide_low = [n // 2 * d for n, d in zip(k, dilation, strict=True)]
    guide = 0.7 * rng.standard_normal((2, *guide_size, 3))
    window = (stride, zoom, mode, dilation, low, guide_low, output)
    wanted = brute_force(x, guide, weight, window, kernel)
    arrays = [jnp.asarray(a, jnp.float32) for a in (x, guide, weight)]
    close(fast_to_compile(lambda *arrays: function(*arrays, **options))(*arrays), wanted, 1e-5)
    fast_form._make_plan.cache_clear()


@pytest.mark.parametrize("kind", ("gaussian", "inverse"))
@pytest.mark.parametrize("mode", ("conv", "transposed", "nearest"))
def test_gradients_of_both_forms(mode, kind, monkeypatch):
    """For every input, among them a centre of its own, temperature, alpha and lambda."""
    monkeypatch.setitem(fast_form._BLOCK_BYTES, "cpu", 1)  # the smallest blocks, so several
    fast_form._make_plan.cache_clear()
    rng = np.random.default_rng(0)
    size, guide_size = (9, 5), (9, 5) if mode == "conv" else (18, 10)
    inputs = {
        "x": rng.standard_normal((2, *size, 3)),
        "guide": rng.standard_normal((2, *guide_size, 4)),
        "centre": rng.standard_normal((2, *guide_size, 4)),
        "weight": rng.standard_normal((3, 3, 3, 2)),
        "bias": rng.standard_normal(2),
        "alpha": 0.4,
        "lam": -0.8,
        "temperature": np.array([0.5, 0.6, 0.7, 0.8]),
    }
    inputs = jax.tree.map(lambda a: jnp.asarray(a, jnp.float32), inputs)

    def run(inputs, form):
        arrays = [inputs[name] for name in ("x", "guide", "weight", "bias")]
        learned = {name: inputs[name] for name in ("alpha", "lam", "temperature")}
        options = {"centre": inputs["centre"], "form": form, "padding": 1}
        options["kernel"] = Kernel(kind=kind, normalized=kind == "gaussian", **learned)
        if mode == "conv":
            return pac_conv(*arrays, **options, stride=2)
        if mode == "nearest":
            return pac_upsample_nearest(*arrays, **options)
        return pac_conv_transpose(*arrays, **options, output_padding=1)

    shape = jax.eval_shape(lambda i: run(i, "fast"), inputs).shape
    dy = rng.standard_normal(shape)
    y, (fast,) = gradients(lambda i: run(i, "fast"), inputs, dy=dy)
    wanted, (patches,) = gradients(lambda i: run(i, "patches"), inputs, dy=dy)
    close(y, wanted, 1e-5)
    assert (np.abs(patches["alpha"]) > 0) == (kind == "inverse")
    for name in inputs:
        close(fast[name], patches[name], 2e-5)
    fast_form._make_plan.cache_clear()


@pytest.mark.parametrize("form", FORMS)
def test_constant_guide_is_plain_convolution(form):
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.standard_normal((2, 6, 7, 3)), jnp.float32)
    weight = jnp.asarray(rng.standard_normal((3, 3, 3, 4)), jnp.float32)
    numbers = ("NHWC", "HWIO", "NHWC")
    wanted = jax.lax.conv_general_dilated(
        x, weight, (2, 2), [(1, 1), (1, 1)], dimension_numbers=numbers, precision="highest"
    )
    guide = jnp.full((2, 6, 7, 5), 0.3)
    close(pac_conv(x, guide, weight, stride=2, padding=1, form=form), wanted, 1e-5)
    wanted = jax.lax.conv_general_dilated(
        x, weight, (1, 1), [(1, 2)] * 2, (2, 2), dimension_numbers=numbers, precision="highest"
    )
    guide = jnp.full((2, 12, 14, 5), 0.3)
    actual = pac_conv_transpose(x, guide, weight, padding=1, output_padding=1, form=form)
    close(actual, wanted, 1e-5)


@pytest.mark.parametrize("form", FORMS)
def test_nearest_is_repeat_then_conv(form):
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.standard_normal((2, 5, 4, 3)), jnp.float32)
    guide = jnp.asarray(rng.standard_normal((2, 10, 8, 3)), jnp.float32)
    weight = jnp.asarray(rng.standard_normal((3, 3, 3, 4)), jnp.float32)
    repeated = jnp.repeat(jnp.repeat(x, 2, axis=1), 2, axis=2)
    wanted = pac_conv(repeated, guide, weight, padding=1, form="patches")
    close(pac_upsample_nearest(x, guide, weight, form=form), wanted, 1e-5)


@pytest.mark.parametrize("form", FORMS)
def test_gaussian_entries_of_known_guides(form):
    """exp(-1) for a difference of sqrt(2) and exp(-3) for sqrt(6), 1 at the centre."""
    guide = jnp.sqrt(jnp.array([2.0, 0.0, 6.0])).reshape(1, 1, 3, 1)
    values = pac_kernel(guide, (1, 3), padding=(0, 1), form=form)[0, 0, 1, 0]
    close(values, [math.exp(-1), 1.0, math.exp(-3)], 1e-6)


@pytest.mark.parametrize("form", FORMS)
def test_normalized_kernel_far_apart(form):
    """Where exp(-d2 / 2) is 0 in float32 for every tap but the masked centre, or for all."""
    rng = np.random.default_rng(0)
    guide = jnp.asarray(1e3 * rng.standard_normal((1, 6, 5, 8)), jnp.float32)
    kernel = Kernel(normalized=True)
    options = {"padding": 1, "kernel": kernel, "form": form}
    values, grads = gradients(
        lambda g: pac_kernel(g, 3, centre=smooth_guide(g), **options),
        guide,
        dy=rng.standard_normal((1, 6, 5, 3, 3)),
    )
    close(values.sum((-1, -2)), np.ones((1, 6, 5)), 1e-5)
    assert np.isfinite(grads[0]).all()
    guide = jnp.asarray(1e3 * rng.standard_normal((1, 8, 8, 8)), jnp.float32)
    y = pac_conv_transpose(
        jnp.ones((1, 4, 4, 1)), guide, jnp.ones((5, 5, 1, 1)),
        padding=2, output_padding=1, kernel=kernel, form=form,
    )  # fmt: skip
    close(y, np.ones((1, 8, 8, 1)), 1e-5)


@pytest.mark.parametrize("form", FORMS)
def test_window_without_a_valid_tap_is_zero(form):
    """A 1x1 transposed window falls on inserted zeros only, in three outputs of four."""
    y, grads = gradients(
        lambda x, g: pac_conv_transpose(
            x, g, jnp.ones((1, 1, 1, 1)), kernel=Kernel(normalized=True), form=form
        ),
        jnp.full((1, 2, 2, 1), 3.0),
        jnp.ones((1, 3, 3, 2)),
        dy=np.ones((1, 3, 3, 1)),
    )
    assert y[0, :, :, 0].tolist() == [[3, 0, 3], [0, 0, 0], [3, 0, 3]]
    assert all(np.isfinite(g).all() for g in grads)


@pytest.mark.parametrize("form", FORMS)
def test_pool(form):
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.standard_normal((2, 7, 6, 3)), jnp.float32)
    guide = jnp.asarray(rng.standard_normal((2, 7, 6, 2)), jnp.float32)
    identity = jnp.broadcast_to(jnp.eye(3), (3, 3, 3, 3))
    for kernel in KERNELS[1:3]:
        options = {"stride": 2, "padding": 1, "kernel": kernel}
        wanted = pac_conv(x, guide, identity, form="patches", **options)
        pool = fast_to_compile(
            lambda x, g, options=options: pac_pool(x, g, 3, form=form, **options)
        )
        close(pool(x, guide), wanted, 1e-5)
    mean = pac_pool(
        jnp.ones_like(x), guide, 3, padding=1, kernel=Kernel(normalized=True), form=form
    )
    close(mean, np.ones(x.shape), 1e-5)


def test_smooth_guide():
    guide = jnp.zeros((1, 5, 5, 2)).at[0, 2, 2, 1].set(16.0)
    smooth = smooth_guide(guide)
    assert smooth[0, 1:4, 1:4, 1].tolist() == [[1, 2, 1], [2, 4, 2], [1, 2, 1]]
    assert float(smooth[..., 0].max()) == 0.0
    average = smooth_guide(guide, jnp.full((3, 3), 1 / 16))
    assert average[0, 1:4, 1:4, 1].tolist() == [[1] * 3] * 3


def test_bfloat16_and_many_channels():
    """The kernel stays float32; sums over many channels take another path."""
    rng = np.random.default_rng(0)
    x, guide = rng.standard_normal((1, 4, 4, 3)), 0.05 * rng.standard_normal((1, 4, 4, 130))
    weight = rng.standard_normal((3, 3, 3, 130))
    dy = rng.standard_normal((1, 4, 4, 130))
    arrays = [jnp.asarray(a, jnp.float32) for a in (x, guide, weight)]
    results = [
        gradients(lambda *a, form=form: pac_conv(*a, padding=1, form=form), *arrays, dy=dy)
        for form in FORMS
    ]
    jax.tree.map(lambda a, b: close(a, b, 1e-5), *results)
    halves = [arrays[0].astype(jnp.bfloat16), arrays[1], arrays[2].astype(jnp.bfloat16)]
    y = pac_conv(*halves, padding=1)
    assert y.dtype == jnp.bfloat16
    close(y.astype(jnp.float32), results[0][0], 2e-2)


def test_saved_for_the_gradient():
    """What waits for the backward pass is the size of the inputs, not k * k times that."""
    x, guide, weight = jnp.ones((2, 16, 16, 8)), jnp.ones((2, 32, 32, 4)), jnp.ones((5, 5, 8, 8))
    _, pull = jax.vjp(
        lambda *a: pac_conv_transpose(*a, padding=2, output_padding=1), x, guide, weight
    )
    saved = sum(leaf.size for leaf in jax.tree.leaves(pull))
    assert saved < 1.5 * (x.size + guide.size + weight.size)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"form": "quick"}, "'fast', 'patches'"),
        ({"kernel": Kernel(kind="box")}, "'gaussian' and 'inverse'"),
        ({"kernel": Kernel(temperature=jnp.ones(3))}, "temperature"),
        ({"padding": -1}, "padding"),
        ({"stride": 0}, "stride"),
        ({"dilation": (1, 2, 3)}, "dilation"),
        ({"dilation": 9}, "at least 1x1"),
        ({"x": jnp.ones((1, 4, 4, 5))}, "same C"),
        ({"guide": jnp.ones((1, 8, 8, 2))}, "guide must have shape"),
        ({"centre": jnp.ones((1, 4, 4, 3))}, "centre must have"),
        ({"bias": jnp.ones(2)}, "bias"),
    ],
)
def test_bad_arguments(change, message):
    options = {"x": jnp.ones((1, 4, 4, 2)), "guide": jnp.ones((1, 4, 4, 2)), "bias": None} | change
    arrays = options.pop("x"), options.pop("guide"), jnp.ones((3, 3, 2, 1)), options.pop("bias")
    with pytest.raises(ValueError, match=message):
        pac_conv(*arrays, **options)


def test_bad_output_padding():
    with pytest.raises(ValueError, match="output_padding"):
        pac_conv_transpose(
            jnp.ones((1, 2, 2, 1)), jnp.ones((1, 6, 6, 1)), jnp.ones((3, 3, 1, 1)), output_padding=2
        )
