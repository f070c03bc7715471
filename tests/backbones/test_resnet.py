"""ResNets: dilation against subsampling, sizes, statistics over parts, and a NumPy restatement."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxseg.backbones import build
from jaxseg.backbones.contract import initial_statistics
from jaxseg.backbones.resnet import RESNETS, ResNet, ResNetVariant

TINY = ResNetVariant("tiny", (1, 2, 1, 1), bottleneck=False, width=8)
TINY_BOTTLENECK = ResNetVariant("tiny50", (1, 1, 2, 1), bottleneck=True, width=4)


def _variables(model, image, seed=0):
    """Parameters and running statistics that are not those of the start, without compiling that."""
    shapes = jax.eval_shape(model.init, jax.random.key(seed), image)
    rng = np.random.default_rng(seed)

    def draw(path, x):
        if path[-1].key == "kernel":
            drawn = rng.normal(0, (2 / np.prod(x.shape[:-1])) ** 0.5, x.shape)
        else:
            drawn = rng.uniform(0.5, 1.5, x.shape)
        return drawn.astype(x.dtype)

    return jax.tree_util.tree_map_with_path(draw, shapes)


def _apply(model, variables, image, **options):
    return jax.jit(partial(model.apply, **options))(variables, image)


# Of basic blocks the second convolution of the first one keeps the rate of the stage before, on a map that
# is twice as fine: with dilation it sees other places. Mending it changes the numbers of stored runs.
_ELSEWHERE = pytest.mark.xfail(
    strict=True, raises=AssertionError, reason="conv2 of a stage's first basic block"
)


@pytest.mark.parametrize(
    "variant",
    [
        pytest.param(TINY, marks=_ELSEWHERE, id="basic"),
        pytest.param(TINY_BOTTLENECK, id="bottleneck"),
    ],
)
def test_dilated_features_hold_those_of_larger_strides(variant):
    image = jax.random.uniform(jax.random.key(1), (1, 96, 64, 3))
    variables = _variables(build(variant), image)
    models = {s: build(variant).with_stride(s) for s in (8, 16, 32)}
    maps = {s: _apply(model, variables, image)["patches"] for s, model in models.items()}
    assert maps[8].shape[1:3] == (12, 8) and np.mean(maps[32] > 0) > 0.1
    np.testing.assert_allclose(maps[8][:, ::2, ::2], maps[16], atol=1e-4)
    np.testing.assert_allclose(maps[16][:, ::2, ::2], maps[32], atol=1e-4)


def _conv(x, kernel, stride):
    """x [h, w, c] with zero padding, as loops."""
    size = kernel.shape[0]
    x = np.pad(x, [(size // 2, size // 2)] * 2 + [(0, 0)])
    rows, columns = ((n - size) // stride + 1 for n in x.shape[:2])
    out = np.zeros((rows, columns, kernel.shape[-1]))
    for i in range(rows):
        for j in range(columns):
            window = x[i * stride : i * stride + size, j * stride : j * stride + size]
            out[i, j] = np.tensordot(window, kernel, 3)
    return out


def _restated(variables, x, variant):
    """Evaluation of basic blocks at stride 32, from the paper."""
    p, s = jax.device_get((variables["params"], variables["batch_stats"]))

    def norm(x, *path):
        a, b = p, s
        for key in path:
            a, b = a[key], b[key]
        return (x - b["mean"]) / np.sqrt(b["var"] + 1e-5) * a["scale"] + a["bias"]

    x = np.maximum(norm(_conv(x, p["conv1"]["kernel"], 2), "bn1"), 0)
    padded = np.pad(x, [(1, 1)] * 2 + [(0, 0)], constant_values=-np.inf)
    half = [(n + 1) // 2 for n in x.shape[:2]]
    x = np.array(
        [
            [padded[2 * i : 2 * i + 3, 2 * j : 2 * j + 3].max((0, 1)) for j in range(half[1])]
            for i in range(half[0])
        ]
    )
    for stage, blocks in enumerate(variant.blocks):
        for j in range(blocks):
            name, stride = f"layer{stage + 1}_{j}", 2 if stage and j == 0 else 1
            y = _conv(x, p[name]["conv1"]["kernel"], stride)
            y = np.maximum(norm(y, name, "bn1"), 0)
            y = norm(_conv(y, p[name]["conv2"]["kernel"], 1), name, "bn2")
            if "downsample_conv" in p[name]:
                x = _conv(x, p[name]["downsample_conv"]["kernel"], stride)
                x = norm(x, name, "downsample_bn")
            x = np.maximum(x + y, 0)
    return x


def test_against_loops():
    image = jax.random.uniform(jax.random.key(2), (1, 64, 33, 3))
    variables = _variables(build(TINY), image)
    out = _apply(build(TINY), variables, image)
    expected = _restated(variables, np.asarray(image[0], np.float64), TINY)
    assert np.mean(expected > 0) > 0.1
    np.testing.assert_allclose(out["patches"][0], expected, atol=1e-4)
    np.testing.assert_allclose(out["cls"][0], expected.mean((0, 1)), atol=1e-4)


def test_training_uses_and_keeps_the_statistics_of_the_batch():
    image = jax.random.normal(jax.random.key(3), (4, 32, 32, 3)) * 2 + 1
    model = build(TINY)
    variables = _variables(model, image)
    variables["batch_stats"] = initial_statistics(model, image)
    _, changed = _apply(model, variables, image, train=True, mutable=["batch_stats"])
    kernel = variables["params"]["conv1"]["kernel"]
    seen = np.stack([_conv(np.asarray(x), np.asarray(kernel), 2) for x in image])
    found = changed["batch_stats"]["bn1"]
    np.testing.assert_allclose(found["mean"], 0.1 * seen.mean((0, 1, 2)), atol=1e-4)
    np.testing.assert_allclose(found["var"], 0.9 + 0.1 * seen.var((0, 1, 2)), rtol=1e-3)


# Parameters without the classifier, torchvision.models.
@pytest.mark.parametrize("name, count", [("resnet18", 11176512), ("resnet50", 23508032)])
def test_sizes(name, count):
    shapes = jax.eval_shape(build(RESNETS[name]).init, jax.random.key(0), jnp.zeros((1, 64, 64, 3)))
    assert sum(np.prod(x.shape) for x in jax.tree.leaves(shapes["params"])) == count


def test_group_norm_has_no_statistics():
    model = ResNet(ResNetVariant("wide", (1, 1, 1, 1), bottleneck=False, width=32), norm="group")
    image = jax.random.uniform(jax.random.key(0), (2, 32, 32, 3))
    variables = _variables(model, image)
    assert "batch_stats" not in variables
    assert initial_statistics(model, image) == {}
    both, alone = (_apply(model, variables, x, train=True)["cls"] for x in (image, image[:1]))
    np.testing.assert_allclose(both[:1], alone, atol=1e-5)
