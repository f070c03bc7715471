"""DeepLab's heads: NumPy and XLA restatements, PyTorch's logits, counts, statistics and sizes."""

import json
import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from heads import make_deeplab_torch as torch_side
from heads.torchvision_deeplab import deeplab_to_flax

from jaxseg.backbones import build
from jaxseg.heads.deeplab import (
    AtrousSpatialPyramid,
    ConvNorm,
    DeepLabV3,
    DeepLabV3Plus,
    SeparableConv,
    atrous_rates,
    depthwise_conv,
)
from jaxseg.heads.guided import depth_to_space

ROOT = Path(__file__).resolve().parents[2]
# Compiling takes most of the time here; without LLVM's optimisations it takes a third.
quick_jit = partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


def _normal(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def _stuffed(kernel, rate):
    """The kernel with rate - 1 zeros between its taps."""
    size = rate * (kernel.shape[0] - 1) + 1
    wide = np.zeros((size, size, *kernel.shape[2:]))
    wide[::rate, ::rate] = kernel
    return wide


def _conv(x, kernel):
    """x [h, w, c] by an odd kernel [k, k, c, d] with zeros at the border, as loops."""
    size = kernel.shape[0]
    padded = np.pad(x, [(size // 2, size // 2)] * 2 + [(0, 0)])
    out = np.zeros((*x.shape[:2], kernel.shape[-1]))
    for i, j in np.ndindex(x.shape[:2]):
        out[i, j] = np.tensordot(padded[i : i + size, j : j + size], kernel, 3)
    return out


@pytest.mark.parametrize("rate", [1, 2, 9])
def test_atrous_convolution_is_one_with_a_dilated_kernel(rate):
    x = _normal(0, 1, 8, 11, 3)
    dense = ConvNorm(4, size=3, rate=rate)
    kernel = _normal(1, 3, 3, 3, 4)
    fresh = {"scale": np.ones(4), "bias": np.zeros(4)}, {"mean": np.zeros(4), "var": np.ones(4)}
    variables = {
        "params": {"conv": {"kernel": kernel}, "norm": fresh[0]},
        "batch_stats": {"norm": fresh[1]},
    }
    expected = np.maximum(_conv(x[0], _stuffed(kernel, rate)), 0)
    found = quick_jit(dense.apply)(variables, x)[0] * np.sqrt(1 + 1e-5)
    np.testing.assert_allclose(found, expected, atol=1e-4)
    kernel = _normal(2, 3, 3, 3)
    own = kernel[..., None] * np.eye(3)
    np.testing.assert_allclose(
        depthwise_conv(x, kernel, rate, rate)[0],
        _conv(x[0], _stuffed(own, rate)),
        atol=1e-4,
    )


@pytest.mark.parametrize("size, rate, padding", [(3, 2, 2), (5, 1, 0), (3, 7, 7)])
def test_depthwise_gradients_are_those_of_the_grouped_convolution(size, rate, padding):
    x, kernel = _normal(0, 2, 8, 6, 5), _normal(1, size, size, 5)

    def grouped(x, kernel):
        return jax.lax.conv_general_dilated(
            x,
            kernel[:, :, None],
            (1, 1),
            [(padding, padding)] * 2,
            rhs_dilation=(rate, rate),
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
            feature_group_count=5,
        )

    def ours(x, kernel):
        return depthwise_conv(x, kernel, rate, padding)

    @partial(quick_jit, static_argnums=0)
    def result_and_gradients(f, x, kernel):
        # The gradient that arrives is the result itself, so that it differs from place to place.
        out, pull = jax.vjp(f, x, kernel)
        return out, *pull(out)

    found = [result_and_gradients(f, x, kernel) for f in (ours, grouped)]
    for a, b in zip(*found, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-4, rtol=1e-5)


def _multiplications(jaxpr):
    """Of a traced function, those of its norms left out; products by XLA's own count."""
    counts = []
    for eqn in jaxpr.eqns:
        if "norm" in str(eqn.source_info.name_stack):
            continue
        if eqn.primitive.name == "mul":
            counts.append(eqn.outvars[0].aval.size)
        elif eqn.primitive.name in ("dot_general", "conv_general_dilated"):
            operation = jax.jit(partial(eqn.primitive.bind, **eqn.params))
            flops = operation.lower(*[v.aval for v in eqn.invars]).cost_analysis()["flops"]
            counts.append(round(flops / 2))
        for inner in jax.tree.leaves(list(eqn.params.values()), is_leaf=_is_jaxpr):
            if _is_jaxpr(inner):
                counts += _multiplications(getattr(inner, "jaxpr", inner))
    return counts


def _is_jaxpr(x):
    return hasattr(x, "eqns") or hasattr(x, "jaxpr")


def test_multiplications_of_separable_convolution():
    x = jnp.zeros((1, 12, 12, 3))

    def counts(module):
        variables = module.init(jax.random.key(0), x)
        return _multiplications(jax.make_jaxpr(module.apply)(variables, x).jaxpr)

    *depthwise, pointwise = counts(SeparableConv(256, size=5, padding="VALID"))
    assert (sum(depthwise), pointwise) == (4_800, 49_152)
    assert counts(nn.Conv(256, (5, 5), padding="VALID", use_bias=False)) == [1_228_800]


def test_rates_reach_equally_far():
    assert [atrous_rates(s) for s in (4, 8, 12, 16, 32, 400)] == [
        (24, 48, 72),
        (12, 24, 36),
        (8, 16, 24),
        (6, 12, 18),
        (3, 6, 9),
        (1, 1, 1),
    ]
    fine = _normal(0, 1, 12, 9, 4)
    variables = _drawn(ConvNorm(3, size=3), fine)
    for at_8, at_16 in zip(atrous_rates(8), atrous_rates(16), strict=True):
        a = ConvNorm(3, size=3, rate=at_8).apply(variables, fine)[:, ::2, ::2]
        b = ConvNorm(3, size=3, rate=at_16).apply(variables, fine[:, ::2, ::2])
        np.testing.assert_allclose(a, b, atol=1e-5)


@pytest.mark.parametrize("size", [(1, 1), (5, 7)])
def test_image_pooling_trains_on_one_image(size):
    module = AtrousSpatialPyramid((1, 2), channels=4, dropout=0.0)
    x = _normal(0, 2, *size, 6)
    variables = _drawn(module, x)

    @quick_jit
    @partial(jax.grad, has_aux=True)
    def step(params, x):
        state = {**variables, "params": params}
        out, changed = module.apply(state, x, train=True, mutable=["batch_stats"])
        return (out**2).sum(), changed["batch_stats"]

    gradient, after_one = step(variables["params"], x[:1])
    assert all(np.isfinite(g).all() for g in jax.tree.leaves(gradient))
    assert np.any(gradient["pool"]["conv"]["kernel"])
    before = variables["batch_stats"]
    same = jax.tree.map(lambda a, b: bool((a == b).all()), before, after_one)
    assert all(jax.tree.leaves(same["pool"]))
    assert same["point"]["norm"]["var"] == (size == (1, 1))
    _, after_two = step(variables["params"], x)
    assert not np.array_equal(before["pool"]["norm"]["mean"], after_two["pool"]["norm"]["mean"])


def test_the_pooled_branch_is_the_mean_everywhere():
    module = AtrousSpatialPyramid((), channels=2)
    x = _normal(0, 1, 3, 5, 6)
    variables = _drawn(module, x)

    def block(name, x):
        p, s = (variables[kind][name]["norm"] for kind in ("params", "batch_stats"))
        x = x @ variables["params"][name]["conv"]["kernel"]
        x = (x - s["mean"]) / np.sqrt(s["var"] + 1e-5) * p["scale"] + p["bias"]
        return np.maximum(x, 0)

    point, pool = block("point", x[0]), block("pool", x[0].mean((0, 1)))
    joint = np.concatenate([point, np.broadcast_to(pool, point.shape)], -1)
    found = quick_jit(module.apply)(variables, x)[0]
    np.testing.assert_allclose(found, block("project", joint), atol=1e-5)


IMAGE = abs(_normal(5, 2, 48, 72, 3))
ODD = abs(_normal(5, 1, 65, 97, 3))
TOKENS = _normal(6, 2, 4, 6, 10)  # stride 12
MAPS = {"4": _normal(7, 1, 17, 25, 6), "16": _normal(8, 1, 5, 7, 12), "auxiliary": TOKENS[:1]}


HEADS = [
    DeepLabV3(auxiliary=True),
    DeepLabV3Plus(),
    DeepLabV3Plus(
        low_level="pyramid", norm="group", separable=True, reduce=16, auxiliary=True, low_width=8
    ),
]
HEADS = [head.clone(outputs=3, channels=16, rates=(2,)) for head in HEADS]
VIT, RESNET = (TOKENS, IMAGE), (MAPS, ODD)


def _drawn(module, *inputs):
    """Variables of the module's shapes, all different, without compiling its initialisation."""
    rng = np.random.default_rng(0)
    shapes = jax.eval_shape(module.init, jax.random.key(0), *inputs)
    return jax.tree.map(lambda x: rng.uniform(0.2, 1.2, x.shape).astype(x.dtype) / 4, shapes)


@pytest.mark.parametrize("head", HEADS, ids=lambda h: f"{type(h).__name__}-{h.norm}")
@pytest.mark.parametrize("features, image", [VIT, RESNET], ids=["vit", "resnet"])
def test_shapes(head, features, image):
    out, variables = jax.eval_shape(head.init_with_output, jax.random.key(0), features, image)
    logits = jax.ShapeDtypeStruct((*image.shape[:3], 3), jnp.float32)
    assert out == (logits, {"auxiliary": logits} if head.auxiliary else {})
    assert ("batch_stats" in variables) == (head.norm == "batch")


@pytest.mark.parametrize(
    "head, features, image",
    [(HEADS[0], *RESNET), (HEADS[1], *VIT), (HEADS[2], *VIT)],
    ids=["auxiliary", "stem", "pyramid"],
)
def test_every_parameter_learns(head, features, image):
    variables = _drawn(head, features, image)

    @quick_jit
    @jax.grad
    def gradient(params, features, image):
        out, _ = head.apply(
            {**variables, "params": params},
            features,
            image,
            train=True,
            rngs={"dropout": jax.random.key(1)},
            mutable=["batch_stats"],
        )
        return sum((x**2).mean() for x in jax.tree.leaves(out))

    for path, g in jax.tree.leaves_with_path(gradient(variables["params"], features, image)):
        assert np.isfinite(g).all() and np.any(g), path


def test_the_low_level_map():
    def paths(head, features, image):
        variables = jax.eval_shape(head.init, jax.random.key(0), features, image)
        return set(variables["params"])

    common = {"aspp", "low", "decode0", "decode1", "classify"}
    maps = {4: jnp.zeros((1, 17, 25, 6)), 32: jnp.zeros((1, 3, 4, 8))}
    assert paths(DeepLabV3Plus(), maps, ODD) == common
    assert paths(DeepLabV3Plus(), TOKENS, IMAGE) == common | {"stem0", "stem1"}
    pyramid = DeepLabV3Plus(low_level="pyramid")
    assert paths(pyramid, TOKENS, IMAGE) == common | {"expand0"}
    wide = {8: jnp.zeros((1, 6, 9, 4)), 16: jnp.zeros((1, 3, 5, 8))}
    assert paths(pyramid, wide, IMAGE[:1]) == common | {"expand0", "expand_norm1", "expand1"}


def test_expanding_is_a_transposed_convolution():
    x, kernel = _normal(0, 1, 3, 4, 5), _normal(1, 2, 2, 5, 6)
    # JAX's form turns the kernel round.
    expected = jax.lax.conv_transpose(x, kernel[::-1, ::-1], (2, 2), "VALID")
    ours = depth_to_space(x @ kernel.transpose(2, 0, 1, 3).reshape(5, -1), 2)
    np.testing.assert_allclose(ours, expected, atol=1e-5)


@pytest.mark.parametrize(
    "head, features, message",
    [
        (DeepLabV3(), jnp.zeros((1, 7, 10, 4)), "65x97 on features of 7x10"),
        (DeepLabV3(), jnp.zeros((1, 99, 99, 4)), "65x97 on features of 99x99"),
        (DeepLabV3(), {"auxiliary": TOKENS}, r"called \[\]: allowed are strides and 'auxiliary'"),
        (DeepLabV3(), {"last": TOKENS}, r"called \['last'\]: allowed are strides"),
        (DeepLabV3(norm="layer"), {16: TOKENS}, "norm is 'layer': allowed are batch, group"),
        (DeepLabV3(auxiliary=True), {8: TOKENS, 16: TOKENS}, r"'auxiliary'; there are \[8, 16\]"),
        (DeepLabV3Plus(low_level="x"), {16: TOKENS}, "low_level is 'x': allowed are stem, pyramid"),
        (DeepLabV3Plus(low_level="pyramid"), {14: TOKENS}, "stride 14: allowed are multiples of 4"),
    ],
)
def test_bad_features_and_options(head, features, message):
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(lambda: head.init(jax.random.key(0), features, ODD))


@pytest.fixture(scope="module")
def stored():
    with np.load(torch_side.STORED) as file:
        return dict(file)


@pytest.fixture(scope="module")
def converted(stored):
    shapes = json.loads(str(stored["shapes"]))
    drawn = {name: torch_side.draw(name, shape) for name, shape in shapes.items()}
    return deeplab_to_flax(drawn)


@pytest.mark.parametrize("stride", torch_side.OUTPUT_STRIDES)
def test_logits_of_torch(stored, converted, stride):
    params, statistics, variant = converted
    backbone = build(variant).with_stride(stride)
    head = DeepLabV3(outputs=torch_side.OUTPUTS, auxiliary=True)

    @jax.jit
    def logits(params, statistics, image):
        def variables(part):
            return {"params": params[part], "batch_stats": statistics[part]}

        stages = backbone.apply(variables("backbone"), image)["stages"]
        features = {stride: stages[3], "auxiliary": stages[2]}
        return head.apply(variables("head"), features, image)

    found, aux = logits(params, statistics, torch_side.IMAGE)
    step = torch_side.STEP
    for ours, name in [(found, "logits"), (aux["auxiliary"], "auxiliary")]:
        expected = stored[f"{name}{stride}"]
        error = np.abs(ours[0, ::step, ::step] - expected).max() / np.abs(expected).max()
        assert error < 1e-4, f"{name}: {error:.1e}"


def test_stored_logits_are_those_of_torch_here(stored):
    pytest.importorskip("torch")
    assert json.loads(str(stored["shapes"])) == torch_side.shapes()
    for stride in torch_side.OUTPUT_STRIDES:
        for x, name in zip(torch_side.logits(stride), ("logits", "auxiliary"), strict=True):
            expected = stored[f"{name}{stride}"]
            x = x[:: torch_side.STEP, :: torch_side.STEP]
            np.testing.assert_allclose(x, expected, atol=1e-4 * np.abs(expected).max())


EIGHT_DEVICES = """
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
from jaxseg.heads.deeplab import DeepLabV3

head = DeepLabV3(outputs=3, channels=8, rates=(1,), separable=True)
# Images that differ, so that statistics of parts would differ from those of the batch.
scale = jnp.arange(1.0, 9.0)[:, None, None, None]
features = scale * jax.random.normal(jax.random.key(0), (8, 2, 3, 4))
image = jnp.zeros((8, 8, 12, 3))
shapes = jax.eval_shape(head.init, jax.random.key(0), features, image)
rng = np.random.default_rng(0)
variables = jax.tree.map(lambda x: rng.uniform(0.2, 1.2, x.shape).astype("f4"), shapes)

@jax.jit
def step(variables, features, image):
    def loss(params):
        (logits, _), changed = head.apply({**variables, "params": params}, features, image,
            train=True, mutable=["batch_stats"], rngs={"dropout": jax.random.key(3)})
        return (logits**2).mean(), (changed["batch_stats"], logits)
    return jax.grad(loss, has_aux=True)(variables["params"])

mesh = Mesh(jax.devices(), "data")
assert mesh.size == 8
one = step(variables, features, image)
put = lambda x, spec: jax.device_put(x, NamedSharding(mesh, spec))
many = step(put(variables, P()), put(features, P("data")), put(image, P("data")))
assert len(many[1][1].sharding.device_set) == 8
for (path, a), b in zip(jax.tree.leaves_with_path(one), jax.tree.leaves(many), strict=True):
    np.testing.assert_allclose(a, b, atol=1e-5 * max(1, np.abs(a).max()), err_msg=str(path))
"""


def test_batch_norm_on_eight_devices_is_that_on_one():
    flags = "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0"
    done = subprocess.run(
        [sys.executable, "-c", EIGHT_DEVICES],
        cwd=ROOT,
        env=os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
