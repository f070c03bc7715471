"""ResNets in torchvision's layout: every tensor in its place, and loud where one is not."""

import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from checkpoints import vit_tensors, write_pth, write_safetensors

from jaxseg.backbones import build, pretrained, resnet_weights
from jaxseg.backbones.resnet import RESNETS


def _norm(name, count):
    parts = ("weight", "bias", "running_mean", "running_var")
    return {f"{name}.{part}": (count,) for part in parts} | {f"{name}.num_batches_tracked": ()}


def _shapes(blocks, *, bottleneck, width=64):
    """Names and shapes as torchvision has them."""
    shapes = {"conv1.weight": (width, 3, 7, 7), **_norm("bn1", width)}
    n_in = width
    for stage, count in enumerate(blocks, start=1):
        inner = width * 2 ** (stage - 1)
        out = inner * 4 if bottleneck else inner
        for j in range(count):
            block = f"layer{stage}.{j}"
            plan = [(inner, n_in, 3), (inner, inner, 3)]
            if bottleneck:
                plan = [(inner, n_in, 1), (inner, inner, 3), (out, inner, 1)]
            for i, (a, b, size) in enumerate(plan, start=1):
                shapes[f"{block}.conv{i}.weight"] = (a, b, size, size)
                shapes |= _norm(f"{block}.bn{i}", a)
            if j == 0 and (stage > 1 or bottleneck):
                shapes[f"{block}.downsample.0.weight"] = (out, n_in, 1, 1)
                shapes |= _norm(f"{block}.downsample.1", out)
            n_in = out
    return shapes | {"fc.weight": (7, n_in), "fc.bias": (7,)}


def _tensors(shapes, seed=0):
    rng = np.random.default_rng(seed)
    return {
        k: np.array(3) if k.endswith("tracked") else rng.normal(size=s).astype(np.float32)
        for k, s in shapes.items()
    }


TINY = _tensors(_shapes((1, 2, 1, 1), bottleneck=True, width=2))


def _expected_tree(module, *inputs):
    shapes = jax.eval_shape(module.init, jax.random.key(0), *inputs)
    return jax.tree.map(lambda x: x.shape, dict(shapes))


def _tree(params, statistics):
    tree = {"params": params, "batch_stats": statistics}
    assert {x.dtype for x in jax.tree.leaves(tree)} == {np.dtype(np.float32)}
    return jax.tree.map(lambda x: x.shape, tree)


@pytest.mark.parametrize(
    "name, blocks",
    [("resnet18", (2, 2, 2, 2)), ("resnet50", (3, 4, 6, 3)), ("resnet101", (3, 4, 23, 3))],
)
def test_which_resnet_it_is(name, blocks):
    shapes = _shapes(blocks, bottleneck=name != "resnet18")
    tensors = {k: np.broadcast_to(np.float32(0), s) for k, s in shapes.items()}
    params, statistics, variant = resnet_weights.to_flax(tensors, source="x.pth")
    assert variant is RESNETS[name]
    expected = _expected_tree(build(variant), jnp.zeros((1, 64, 64, 3)))
    assert _tree(params, statistics) == expected


@pytest.mark.parametrize("prefix", ["", "backbone.", "module.backbone."])
@pytest.mark.parametrize("write", [write_pth, write_safetensors])
def test_files(tmp_path, caplog, write, prefix):
    tensors = {prefix + k: v for k, v in TINY.items()}
    path = write(tmp_path / ("x.pth" if write is write_pth else "x.safetensors"), tensors)
    with caplog.at_level(logging.INFO):
        loaded = pretrained.load(path)
    v = loaded.variant
    assert (v.blocks, v.bottleneck, v.width, v.small_stem) == ((1, 2, 1, 1), True, 2, False)
    block, statistics = loaded.params["layer2_1"], loaded.statistics["layer2_1"]
    kernel = TINY["layer2.1.conv2.weight"]
    np.testing.assert_array_equal(block["conv2"]["kernel"], kernel.transpose(2, 3, 1, 0))
    np.testing.assert_array_equal(block["bn3"]["scale"], TINY["layer2.1.bn3.weight"])
    np.testing.assert_array_equal(block["bn3"]["bias"], TINY["layer2.1.bn3.bias"])
    np.testing.assert_array_equal(statistics["bn3"]["mean"], TINY["layer2.1.bn3.running_mean"])
    np.testing.assert_array_equal(statistics["bn3"]["var"], TINY["layer2.1.bn3.running_var"])
    expected = _expected_tree(build(v), jnp.zeros((1, 64, 64, 3)))
    assert _tree(loaded.params, loaded.statistics) == expected
    assert f"left out, not part of the backbone: {prefix}fc.weight, {prefix}fc.bias" in caplog.text
    assert "num_batches_tracked" not in caplog.text


def test_a_vit_has_no_statistics(tmp_path):
    assert pretrained.load(write_pth(tmp_path / "x.pth", vit_tensors())).statistics == {}


@pytest.mark.parametrize(
    "change, message",
    [
        ({"layer3.0.bn2.running_var": None}, "missing tensors: layer3.0.bn2.running_var"),
        ({"layer3.0.se.weight": np.zeros(3)}, "unknown tensors: layer3.0.se.weight"),
        (
            {"layer3.0.conv2.weight": np.zeros((8, 1, 3, 3))},
            r"layer3.0.conv2.weight has shape \(8, 1, 3, 3\), expected \(8, 8, 3, 3\)",
        ),
        ({"layer1.0.conv1.weight": np.zeros((2, 2, 1, 1), np.int64)}, "conv1.weight is int64"),
        (
            {"backbone.bn1.bias": np.zeros(2)},
            "bn1.bias twice: as bn1.bias and as backbone.bn1.bias",
        ),
        ({"conv1.weight": None}, r"not a ResNet in torchvision's layout .* holds .* in all\)"),
    ],
)
def test_loading_is_loud(change, message):
    tensors = {k: v for k, v in (TINY | change).items() if v is not None}
    with pytest.raises(ValueError, match=f"x.pth.*{message}"):
        resnet_weights.to_flax(tensors, source="x.pth")


def test_another_variant_than_asked_for(tmp_path):
    path = write_pth(tmp_path / "x.pth", TINY)
    with pytest.raises(ValueError, match="x.pth as resnet50: missing tensors: layer1.1.bn1.bias"):
        pretrained.load(path, variant="resnet50")
    with pytest.raises(ValueError, match="x.pth holds a ResNet, not a dino_vits16"):
        pretrained.load(path, variant="dino_vits16")
    path = write_pth(tmp_path / "y.pth", vit_tensors())
    with pytest.raises(ValueError, match="y.pth holds a ViT, not a resnet50"):
        pretrained.load(path, variant="resnet50")


def test_of_a_deeplab_the_backbone_is_taken(caplog):
    tensors = {f"backbone.{k}": v for k, v in TINY.items() if not k.startswith("fc.")}
    tensors["classifier.4.weight"] = tensors["aux_classifier.4.bias"] = np.zeros(5, np.float32)
    with caplog.at_level(logging.INFO):
        found = resnet_weights.to_flax(tensors, source="x.pth")
    assert "backbone: classifier.4.weight, aux_classifier.4.bias" in caplog.text
    jax.tree.map(np.testing.assert_array_equal, found, resnet_weights.to_flax(TINY, source="y.pth"))
