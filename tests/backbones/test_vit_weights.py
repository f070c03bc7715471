import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from checkpoints import vit_tensors

from jaxseg.backbones import build, vit, vit_weights
from jaxseg.weights.tensors import pick_branch


def _shapes(tree):
    return {jax.tree_util.keystr(k): v.shape for k, v in jax.tree_util.tree_leaves_with_path(tree)}


@pytest.mark.parametrize("extra", [{}, {"layerscale": True}, {"layerscale": True, "registers": 4}])
def test_params_are_those_of_the_module(extra):
    params, variant = vit_weights.to_flax(vit_tensors(**extra), source="x")
    model = build(variant)
    image = jnp.zeros((1, 12, 12, 3))
    expected = jax.eval_shape(model.init, jax.random.key(0), image)["params"]
    assert _shapes(params) == _shapes(expected)
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {np.dtype(np.float32)}


def test_layout_of_each_kind_of_tensor():
    tensors = vit_tensors()
    params, _ = vit_weights.to_flax(tensors, source="x")
    kernel, weight = params["patch_embed"]["kernel"], tensors["patch_embed.proj.weight"]
    assert kernel[1, 2, 0, 5] == weight[5, 0, 1, 2]
    kernel, weight = (
        params["blocks_1"]["attn"]["qkv"]["kernel"],
        tensors["blocks.1.attn.qkv.weight"],
    )
    assert kernel[3, 150] == weight[150, 3]
    np.testing.assert_array_equal(params["norm"]["scale"], tensors["norm.weight"])


def test_infers_released_variants():
    tensors = vit_tensors(patch=16, dim=384, depth=12, grid=14)
    assert vit_weights.to_flax(tensors, source="x")[1] is vit.VARIANTS["dino_vits16"]
    tensors = vit_tensors(patch=14, dim=384, depth=12, grid=37, layerscale=True, registers=4)
    assert vit_weights.to_flax(tensors, source="x")[1] is vit.VARIANTS["dinov2_vits14_reg"]


def _hugging_face(tensors, *, dinov2):
    """The same tensors in the key layout of `ViTModel` or `Dinov2Model`."""
    out = {
        "embeddings.cls_token": tensors["cls_token"],
        "embeddings.position_embeddings": tensors["pos_embed"],
        "embeddings.patch_embeddings.projection.weight": tensors["patch_embed.proj.weight"],
        "embeddings.patch_embeddings.projection.bias": tensors["patch_embed.proj.bias"],
        "layernorm.weight": tensors["norm.weight"],
        "layernorm.bias": tensors["norm.bias"],
    }
    if dinov2:
        names = ("norm1", "norm2", "mlp.fc1", "mlp.fc2")
        out["embeddings.mask_token"] = np.zeros((1, 64), np.float32)
    else:
        names = ("layernorm_before", "layernorm_after", "intermediate.dense", "output.dense")
        out["pooler.dense.weight"] = np.zeros((64, 64), np.float32)
    for i in range(2):
        ours, theirs = f"blocks.{i}", f"encoder.layer.{i}"
        for kind in ("weight", "bias"):
            for part, x in zip("qkv", np.split(tensors[f"{ours}.attn.qkv.{kind}"], 3), strict=True):
                name = {"q": "query", "k": "key", "v": "value"}[part]
                out[f"{theirs}.attention.attention.{name}.{kind}"] = x
            proj = tensors[f"{ours}.attn.proj.{kind}"]
            out[f"{theirs}.attention.output.dense.{kind}"] = proj
            pairs = zip(("norm1", "norm2", "mlp.fc1", "mlp.fc2"), names, strict=True)
            for name, renamed in pairs:
                out[f"{theirs}.{renamed}.{kind}"] = tensors[f"{ours}.{name}.{kind}"]
        for n in (1, 2):
            if dinov2:
                out[f"{theirs}.layer_scale{n}.lambda1"] = tensors[f"{ours}.ls{n}.gamma"]
    return out


@pytest.mark.parametrize("prefix", ["", "vit.", "dinov2."])
@pytest.mark.parametrize("dinov2", [False, True])
def test_hugging_face_layouts(dinov2, prefix):
    tensors = vit_tensors(layerscale=dinov2)
    expected, variant = vit_weights.to_flax(tensors, source="x")
    renamed = {prefix + k: v for k, v in _hugging_face(tensors, dinov2=dinov2).items()}
    got, got_variant = vit_weights.to_flax(renamed, source="x")
    assert got_variant == variant
    jax.tree.map(np.testing.assert_array_equal, got, expected)


def test_training_files():
    tensors = vit_tensors()
    student = {f"module.backbone.{k}": v for k, v in tensors.items()}
    teacher = {f"backbone.{k}": v + 1 for k, v in tensors.items()}
    tree = {"student": student, "teacher": teacher, "epoch": 3, "optimizer": {"state": {}}}
    for branch, shift in [("teacher", 1), ("student", 0)]:
        picked = pick_branch(tree, branch=branch, source="x")
        params, _ = vit_weights.to_flax(picked, source="x")
        np.testing.assert_array_equal(params["cls_token"], tensors["cls_token"] + shift)


def test_blocks_in_chunks():
    tensors = vit_tensors()
    chunked = {
        k.replace("blocks.", "blocks.0.", 1) if ".0." in k else k.replace("blocks.", "blocks.1."): v
        for k, v in tensors.items()
    }
    got, _ = vit_weights.to_flax(chunked, source="x")
    jax.tree.map(np.testing.assert_array_equal, got, vit_weights.to_flax(tensors, source="x")[0])


def test_what_is_left_out_is_named(caplog):
    extra = {"mask_token": np.zeros((1, 64)), "head.mlp.0.weight": np.zeros((2, 2))}
    with caplog.at_level(logging.INFO):
        vit_weights.to_flax(vit_tensors() | extra, source="some.pth")
    assert "some.pth: left out" in caplog.text
    assert "mask_token" in caplog.text and "head.mlp.0.weight" in caplog.text


def test_one_error_names_all_that_does_not_fit():
    tensors = vit_tensors()
    del tensors["blocks.1.norm1.bias"], tensors["norm.weight"]
    tensors["blocks.0.attn.rel_pos"] = np.zeros(3, np.float32)
    tensors["blocks.0.mlp.fc2.bias"] = np.zeros(63, np.float32)
    with pytest.raises(ValueError) as e:
        vit_weights.to_flax(tensors, source="some.pth")
    for text in (
        "some.pth",
        "missing tensors: blocks.1.norm1.bias, norm.weight",
        "unknown tensors: blocks.0.attn.rel_pos",
        "blocks.0.mlp.fc2.bias has shape (63,), expected (64,)",
    ):
        assert text in str(e.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"module.cls_token": np.zeros((1, 1, 64))}, "cls_token twice"),
        ({"norm.bias": np.zeros(64, np.int64)}, "norm.bias is int64: allowed are float32"),
        ({"pos_embed": np.zeros((1, 12, 64))}, r"pos_embed has shape \(1, 12, 64\), expected"),
        ({"pos_embed": np.zeros((1, 0, 64))}, "not a ViT"),
        ({"patch_embed.proj.weight": np.zeros((64, 1, 4, 4))}, "not a ViT"),
        ({"register_tokens": np.zeros(64)}, "unknown tensors: register_tokens"),
        ({"blocks.0.attn.query.weight": np.zeros(())}, "unknown tensors: blocks.0.attn.query"),
    ],
)
def test_tensors_that_do_not_fit(change, message):
    with pytest.raises(ValueError, match=f"some.pth.*{message}"):
        vit_weights.to_flax(vit_tensors() | change, source="some.pth")


def test_another_architecture_is_one_clear_error():
    resnet = {"conv1.weight": np.zeros((64, 3, 7, 7)), "bn1.weight": np.zeros(64)}
    resnet |= {f"layer1.{i}.conv1.weight": np.zeros((64, 64, 3, 3)) for i in range(9)}
    with pytest.raises(ValueError, match=r"r50.pth is not a ViT .*conv1.weight.*\(11 in all\)"):
        vit_weights.to_flax(resnet, source="r50.pth")


def test_heads_must_be_given_where_the_width_does_not_tell():
    tensors = vit_tensors(dim=96)
    with pytest.raises(ValueError, match="96 wide.*give the variant"):
        vit_weights.to_flax(tensors, source="x")
    variant = vit.Variant("mine", 4, 96, 2, heads=3, grid=3)
    assert vit_weights.to_flax(tensors, variant=variant, source="x")[1] is variant


@pytest.mark.parametrize("tree", [[], 3, {}, {"epoch": 3}, {"teacher": {"epoch": 1}}])
def test_files_without_tensors(tree):
    with pytest.raises(ValueError, match="some.pth holds"):
        pick_branch(tree, source="some.pth")
