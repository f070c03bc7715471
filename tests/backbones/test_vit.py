import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from checkpoints import vit_tensors
from jax import export
from shared import shared_path

from jaxseg.backbones import BACKBONES, build, pretrained, vit, vit_weights
from jaxseg.backbones.backbone import backbone
from jaxseg.options import OptionError

TINY = vit.Variant("tiny", patch=4, dim=64, depth=2, heads=2, grid=3)


def _formula(size: str) -> np.ndarray:
    """The images of the reference outputs, as their descriptions give them."""
    h, w = map(int, size.split("x"))
    y, x = np.mgrid[:h, :w].astype(np.float64)
    waves = (0.05 * x + 0.03 * y, 0.04 * x - 0.02 * y, 0.001 * x * y)
    base = np.stack([np.sin(waves[0]), np.cos(waves[1]), np.sin(waves[2])])
    base = np.moveaxis(base, 0, -1).astype(np.float32)
    return np.stack([base, base[:, ::-1]])


@pytest.fixture(scope="module")
def params() -> dict:
    """Parameters of `TINY`; drawn by NumPy, because compiling an initialisation takes seconds."""
    return {"params": vit_weights.to_flax(vit_tensors(), variant=TINY, source="test")[0]}


@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("dino_vitt16", 5_524_416),
        ("dino_vits16", 21_665_664),
        ("dino_vits8", 21_670_272),
        ("dino_vitb16", 85_798_656),
        ("dino_vitb8", 85_807_872),
        # The published counts, less the mask token, which only pretraining uses.
        ("dinov2_vits14", 22_056_576 - 384),
        ("dinov2_vitb14", 86_580_480 - 768),
        ("dinov2_vitl14", 304_368_640 - 1024),
        ("dinov2_vits14_reg", 22_056_576 - 384 + 4 * 384),
    ],
)
def test_parameter_count(name, count):
    model = build(BACKBONES[name])
    image = jnp.zeros((1, model.variant.patch, model.variant.patch, 3))
    shapes = jax.eval_shape(model.init, jax.random.key(0), image)
    assert sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(shapes)) == count


@pytest.mark.parametrize("size", ["64x64", "96x96", "128x192", "224x224", "336x224", "448x448"])
def test_matches_dino_reference(size):
    golden = np.load(shared_path("golden/dino_vit_tiny_random.npz"))
    variant = vit.Variant("golden", patch=16, dim=96, depth=3, heads=3, grid=14)
    path = shared_path("golden/dino_vit_tiny_random.pth")
    loaded = pretrained.load(path, variant=variant)
    image = golden[f"image_{size}"] if f"image_{size}" in golden else _formula(size)
    model = build(loaded.variant)
    apply = jax.jit(lambda params, x: model.apply({"params": params}, x, attention=True))
    out = apply(loaded.params, image)
    tokens = np.concatenate([out["cls"][:, None], out["patches"].reshape(2, -1, 96)], axis=1)
    np.testing.assert_allclose(out["cls"], golden[f"cls_{size}"], atol=1e-4)
    np.testing.assert_allclose(tokens, golden[f"tokens_{size}"], atol=1e-4)
    np.testing.assert_allclose(out["attention"][:, :, 0, 1:], golden[f"attn_{size}"], atol=1e-4)


@pytest.mark.parametrize(
    ("size", "step"),
    [("98x98", 2), ("224x336", 2), pytest.param("518x518", 6, marks=pytest.mark.slow)],
)
def test_matches_dinov2_reference_on_real_weights(size, step):
    golden = np.load(shared_path("golden/dinov2_vits14.npz"))
    loaded = pretrained.load(shared_path("weights/dinov2_vits14_derived_fp16.pth"))
    assert loaded.variant == vit.VARIANTS["dinov2_vits14"]
    model = build(loaded.variant)
    out = jax.jit(lambda params, x: model.apply({"params": params}, x))(
        loaded.params, _formula(size)
    )
    np.testing.assert_allclose(out["cls"], golden[f"cls_{size}"], atol=1e-3)
    patches = out["patches"][:, ::step, ::step]
    np.testing.assert_allclose(patches, golden[f"patches_{size}"], atol=1e-3)


def _norm(x, weight, bias):
    x = x - x.mean(-1, keepdims=True)
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6) * weight + bias


def _slow_vit(t, image, *, heads, depth, patch):
    """One image through a ViT with LayerScale and registers, from the equations, one head at a time."""
    erf = np.vectorize(math.erf)
    rows, columns = image.shape[0] // patch, image.shape[1] // patch
    tokens = []
    for i in range(rows * columns):
        y, x = i // columns * patch, i % columns * patch
        cut = image[y : y + patch, x : x + patch].transpose(2, 0, 1)
        tokens.append((t["patch_embed.proj.weight"] * cut).sum((1, 2, 3)))
    x = np.stack(tokens) + t["patch_embed.proj.bias"]
    x = np.concatenate([t["cls_token"][0], x]) + t["pos_embed"][0]
    x = np.concatenate([x[:1], t["register_tokens"][0], x[1:]])
    for i in range(depth):
        p = {k.removeprefix(f"blocks.{i}."): v for k, v in t.items()}
        y = _norm(x, p["norm1.weight"], p["norm1.bias"])
        q, k, v = np.split(y @ p["attn.qkv.weight"].T + p["attn.qkv.bias"], 3, axis=1)
        d = x.shape[1] // heads
        mixed, maps = [], []
        for h in range(heads):
            cut = slice(h * d, (h + 1) * d)
            logits = np.exp(q[:, cut] @ k[:, cut].T / math.sqrt(d))
            maps.append(logits / logits.sum(1, keepdims=True))
            mixed.append(maps[-1] @ v[:, cut])
        y = np.concatenate(mixed, axis=1) @ p["attn.proj.weight"].T + p["attn.proj.bias"]
        x = x + p["ls1.gamma"] * y
        y = _norm(x, p["norm2.weight"], p["norm2.bias"])
        y = y @ p["mlp.fc1.weight"].T + p["mlp.fc1.bias"]
        y = y * (1 + erf(y / math.sqrt(2))) / 2
        x = x + p["ls2.gamma"] * (y @ p["mlp.fc2.weight"].T + p["mlp.fc2.bias"])
    x = _norm(x, t["norm.weight"], t["norm.bias"])
    n = t["register_tokens"].shape[1]
    return x[0], x[1 + n :].reshape(rows, columns, -1), np.stack(maps)


def test_registers_and_layerscale_match_the_equations():
    tensors = vit_tensors(layerscale=True, registers=2)
    variant = vit.Variant("r", 4, 64, 2, heads=4, grid=3, layerscale=True, registers=2)
    params, _ = vit_weights.to_flax(tensors, variant=variant, source="test")
    image = np.random.default_rng(1).normal(size=(12, 12, 3)).astype(np.float32)
    cls, patches, attention = _slow_vit(tensors, image, heads=4, depth=2, patch=4)
    model = build(variant)
    apply = jax.jit(lambda params, x: model.apply({"params": params}, x, attention=True))
    out = apply(params, image[None])
    np.testing.assert_allclose(out["cls"][0], cls, atol=1e-4)
    np.testing.assert_allclose(out["patches"][0], patches, atol=1e-4)
    np.testing.assert_allclose(out["attention"][0], attention, atol=1e-5)


def test_intermediate_layers_follow_the_index_asked_for(params):
    model = build(TINY)
    image = jax.random.normal(jax.random.key(1), (2, 8, 16, 3))
    out = jax.jit(lambda p, x: model.apply(p, x, layers=(0, -2, -1, 1)))(params, image)
    assert set(out["layers"]) == set(out["layers_cls"]) == {0, -2, -1, 1}
    np.testing.assert_allclose(out["layers"][-1], out["patches"], atol=1e-6)
    np.testing.assert_allclose(out["layers"][1], out["patches"], atol=1e-6)
    np.testing.assert_allclose(out["layers"][0], out["layers"][-2], atol=1e-6)
    np.testing.assert_allclose(out["layers_cls"][1], out["cls"], atol=1e-6)
    assert out["patches"].shape == (2, 2, 4, 64) and out["cls"].shape == (2, 64)
    # Truncating the network after block 0 gives the same as asking for block 0.
    short = build(vit.Variant("short", 4, 64, 1, 2, grid=3))
    kept = {k: v for k, v in params["params"].items() if k != "blocks_1"}
    truncated = jax.jit(short.apply)({"params": kept}, image)["patches"]
    np.testing.assert_allclose(out["layers"][0], truncated, atol=1e-5)
    assert "attention" not in out


def test_attention_in_pieces_equals_whole_with_gradient(monkeypatch):
    monkeypatch.setattr(vit, "_PIECE_BYTES", 4 * 2 * 50 * 17)
    q, k, v = jax.random.normal(jax.random.key(0), (3, 2, 3, 50, 8))
    whole, whole_vjp = jax.vjp(jax.jit(vit._attend), q, k, v)
    pieces, pieces_vjp = jax.vjp(jax.jit(vit._attend_in_pieces), q, k, v)
    np.testing.assert_allclose(pieces, whole, atol=1e-6)
    for a, b in zip(pieces_vjp(whole), whole_vjp(whole), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-4)


def test_bfloat16_keeps_float32_parameters_and_outputs(params):
    model = build(TINY)
    half = build(TINY, dtype=jnp.bfloat16)
    image = jax.random.normal(jax.random.key(1), (2, 16, 16, 3))
    shapes = jax.eval_shape(half.init, jax.random.key(0), image)
    assert {leaf.dtype for leaf in jax.tree.leaves(shapes)} == {jnp.dtype(jnp.float32)}
    full, low = jax.jit(model.apply)(params, image), jax.jit(half.apply)(params, image)
    assert low["patches"].dtype == low["cls"].dtype == jnp.float32
    np.testing.assert_allclose(low["patches"], full["patches"], atol=0.1)
    assert not np.array_equal(low["patches"], full["patches"])


def test_long_sequences_export_for_every_platform_with_a_symbolic_batch(params):
    model = build(TINY)
    (batch,) = export.symbolic_shape("b")
    image = jax.ShapeDtypeStruct((batch, 80, 84, 3), jnp.float32)
    apply = jax.jit(lambda params, x: model.apply(params, x)["patches"])
    exported = export.export(apply, platforms=("cpu", "cuda", "tpu"))(params, image)
    x = jax.random.normal(jax.random.key(1), (3, 80, 84, 3))
    np.testing.assert_allclose(exported.call(params, x), apply(params, x), atol=1e-5)


@pytest.mark.parametrize(
    ("shape", "kwargs", "message"),
    [
        ((1, 12, 13, 3), {}, "12x13 .* multiples of 4"),
        ((1, 0, 12, 3), {}, "positive multiples of 4"),
        ((1, 12, 12, 4), {}, r"\[B, H, W, 3\]"),
        ((12, 12, 3), {}, r"\[B, H, W, 3\]"),
        ((1, 12, 12, 3), {"layers": (2,)}, "no block 2: allowed are -2 to 1"),
    ],
)
def test_bad_input(params, shape, kwargs, message):
    model = build(TINY)
    with pytest.raises(ValueError, match=message):
        model.apply(params, jnp.zeros(shape), **kwargs)


def test_unknown_variant_lists_the_allowed_ones():
    with pytest.raises(OptionError, match="'vit_huge'; allowed: dino_vitt16, dino_vits16"):
        backbone(variant="vit_huge")


@pytest.mark.skipif(jax.default_backend() != "gpu", reason="cuDNN's attention needs a CUDA GPU")
@pytest.mark.parametrize("tokens", [197, 256])
def test_fused_attention_is_attention(tokens):
    q, k, v, g = jax.random.normal(jax.random.key(tokens), (4, 2, 3, tokens, 64))
    q = q / 8

    def value_and_gradients(attend, dtype):
        out, back = jax.vjp(attend, *(x.astype(dtype) for x in (q, k, v)))
        return [np.asarray(x, np.float64) for x in (out, *back(g.astype(dtype)))]

    with jax.default_matmul_precision("highest"):
        expected = value_and_gradients(vit._attend, jnp.float32)
    for found, want in zip(
        value_and_gradients(vit._attend_fused, jnp.bfloat16), expected, strict=True
    ):
        assert np.linalg.norm(found - want) < 0.01 * np.linalg.norm(want)
