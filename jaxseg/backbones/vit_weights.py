"""Turns the tensors of released checkpoints into the parameters of our ViT, and back.

Every key layout is first renamed to that of the DINO release (`blocks.0.attn.qkv.weight`), which is
then mapped onto the Flax parameters. Nothing is dropped without saying so.
"""

import logging
import math
import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from jaxseg.backbones.family import Family
from jaxseg.backbones.vit import VARIANTS, Variant, ViT
from jaxseg.weights import tensors as files

_log = logging.getLogger(__name__)

# Hugging Face: ViTModel (facebook/dino-vits16), Dinov2Model and Dinov2WithRegistersModel.
_HF_NAMES = [
    (r"embeddings\.(cls_token|mask_token|register_tokens)", r"\1"),
    (r"embeddings\.position_embeddings", "pos_embed"),
    (r"embeddings\.patch_embeddings\.projection\.", "patch_embed.proj."),
    (r"layernorm\.", "norm."),
    (r"encoder\.layer\.(\d+)\.", r"blocks.\1."),
    (r"(blocks\.\d+\.)layernorm_before\.", r"\1norm1."),
    (r"(blocks\.\d+\.)layernorm_after\.", r"\1norm2."),
    (r"(blocks\.\d+\.)attention\.attention\.", r"\1attn."),
    (r"(blocks\.\d+\.)attention\.output\.dense\.", r"\1attn.proj."),
    (r"(blocks\.\d+\.)intermediate\.dense\.", r"\1mlp.fc1."),
    (r"(blocks\.\d+\.)output\.dense\.", r"\1mlp.fc2."),
    (r"(blocks\.\d+\.)layer_scale([12])\.lambda1", r"\1ls\2.gamma"),
]
_PREFIX = re.compile(r"^(?:module\.|backbone\.|vit\.|dinov2\.|dinov2_with_registers\.)+")
# DINOv2's training files group the blocks: blocks.{chunk}.{block}.
_CHUNK = re.compile(r"^blocks\.\d+\.(\d+)\.")
_IGNORED = re.compile(r"^(mask_token$|head\.|dino_head\.|ibot_head\.|pooler\.|classifier\.)")


def to_flax(
    tensors: Mapping[str, Any], *, variant: Variant | None = None, source: str
) -> tuple[dict[str, Any], Variant]:
    """Converts tensors by name to the parameters of our ViT, and says which ViT it is.

    Args:
      tensors: arrays, or objects with `shape` and `read()`, in the key layout of DINO, DINOv2, their
        training files, or Hugging Face's `ViTModel` and `Dinov2Model`; float32, float16 or bfloat16.
      variant: the expected shape; inferred from the tensors (64 dimensions a head) if None.
      source: what to call the file in messages.

    Returns:
      Nested dict of float32 arrays in the layout of `ViT`, and the variant.

    Raises:
      ValueError: another architecture; or tensors missing, unknown or of another shape, all named.
    """
    found = _rename(tensors, source)
    ignored = {name: originals for name, originals in found.items() if _IGNORED.match(name)}
    if ignored:
        _log.info(
            "%s: left out, not part of the backbone: %s", source, files.all_names(ignored.values())
        )
    found = {name: originals for name, originals in found.items() if name not in ignored}
    shapes = {name: files.joint_shape([tensors[o] for o in found[name]]) for name in found}
    inferred = infer_variant(shapes, source=source)
    variant = variant or inferred
    if not variant.heads:
        raise ValueError(
            f"{source} is {variant.dim} wide, no multiple of 64: the number of heads cannot be "
            "inferred from it, give the variant"
        )
    params = files.fill(tensors, found, _expected(variant), f"{source} as {variant.name}")
    return params, variant


def from_flax(params: Mapping[str, Any], variant: Variant) -> dict[str, np.ndarray]:
    """The inverse of `to_flax`: float32 tensors in the key layout of the DINO and DINOv2 releases.

    Raises:
      ValueError: `params` are not those of the variant.
    """
    tensors = {}
    for name, (path, shape, transform) in _expected(variant).items():
        node: Any = params
        for key in path.split("/"):
            node = node.get(key) if isinstance(node, Mapping) else None
        array = None if node is None else files.INVERSE.get(transform, np.asarray)(np.asarray(node))
        if array is None or array.shape != shape:
            raise ValueError(f"parameters of {variant.name}: {path} is missing or no {shape}")
        tensors[name] = np.ascontiguousarray(array, np.float32)
    return tensors


def _rename(tensors: Mapping[str, Any], source: str) -> dict[str, tuple[str, ...]]:
    """Maps names in the layout of the DINO release to the file's, three of them where q, k, v are."""
    found: dict[str, tuple[str, ...]] = {}
    for original in tensors:
        name = _CHUNK.sub(r"blocks.\1.", _PREFIX.sub("", original))
        for pattern, replacement in _HF_NAMES:
            name = re.sub("^" + pattern, replacement, name)
        if name in found:
            raise ValueError(f"{source} holds {name} twice: as {found[name][0]} and as {original}")
        found[name] = (original,)
    for name in [n for n in found if ".attn.query." in n]:
        parts = [name.replace(".query.", f".{part}.") for part in ("query", "key", "value")]
        shapes = {tuple(tensors[found[part][0]].shape) for part in parts if part in found}
        if all(part in found for part in parts) and len(shapes) == 1:
            joint = name.replace(".query.", ".qkv.")
            found[joint] = tuple(found.pop(part)[0] for part in parts)
    return found


def infer_variant(shapes: Mapping[str, tuple[int, ...]], *, source: str) -> Variant:
    """Returns the variant that tensors of these shapes, named as in the DINO release, belong to.

    `heads` is 0 where the width is no multiple of 64: no tensor's shape tells it. Raises ValueError
    if this is no ViT of the DINO family.
    """
    patch, pos = shapes.get("patch_embed.proj.weight", ()), shapes.get("pos_embed", ())
    blocks = {int(m[1]) for name in shapes if (m := re.match(r"blocks\.(\d+)\.", name))}
    if len(patch) != 4 or patch[1] != 3 or patch[2] != patch[3] or 0 in patch:
        blocks = set()
    if not blocks or len(pos) != 3 or pos[1] < 2:
        raise ValueError(
            f"{source} is not a ViT of DINO or DINOv2 (no patch embedding of RGB images, position "
            f"embedding and blocks): it holds {files.some_of(shapes)}"
        )
    dim = patch[0]
    registers = shapes.get("register_tokens", ())
    registers = registers[1] if len(registers) == 3 else 0
    fields = {
        "patch": patch[3],
        "dim": dim,
        "depth": max(blocks) + 1,
        "heads": 0 if dim % 64 else dim // 64,
        "grid": math.isqrt(pos[1] - 1),
        "mlp_ratio": (shapes.get("blocks.0.mlp.fc1.bias") or (4 * dim,))[0] // dim,
        "layerscale": "blocks.0.ls1.gamma" in shapes,
        "registers": registers,
    }
    for known in VARIANTS.values():
        if all(getattr(known, key) == value for key, value in fields.items()):
            return known
    # The releases with registers also changed how positions are resized.
    resizing = {"pos_offset": 0.0, "pos_antialias": True} if registers else {}
    return Variant(name=f"vit{fields['patch']}_{dim}x{fields['depth']}", **fields, **resizing)


def _expected(v: Variant) -> files.Expected:
    """Maps names in the DINO release to (Flax path, shape in the release, transform)."""
    d, hidden = v.dim, v.mlp_ratio * v.dim
    table: files.Expected = {}

    def same(name: str, path: str, *shape: int) -> None:
        table[name] = (path, shape, np.asarray)

    def linear(name: str, path: str, n_out: int, n_in: int) -> None:
        table[f"{name}.weight"] = (f"{path}/kernel", (n_out, n_in), np.transpose)
        same(f"{name}.bias", f"{path}/bias", n_out)

    def norm(name: str, path: str) -> None:
        same(f"{name}.weight", f"{path}/scale", d)
        same(f"{name}.bias", f"{path}/bias", d)

    same("cls_token", "cls_token", 1, 1, d)
    same("pos_embed", "pos_embed", 1, 1 + v.grid**2, d)
    if v.registers:
        same("register_tokens", "register_tokens", 1, v.registers, d)
    shape = (d, 3, v.patch, v.patch)
    table["patch_embed.proj.weight"] = ("patch_embed/kernel", shape, files.conv_kernel)
    same("patch_embed.proj.bias", "patch_embed/bias", d)
    for i in range(v.depth):
        theirs, ours = f"blocks.{i}", f"blocks_{i}"
        norm(f"{theirs}.norm1", f"{ours}/norm1")
        linear(f"{theirs}.attn.qkv", f"{ours}/attn/qkv", 3 * d, d)
        linear(f"{theirs}.attn.proj", f"{ours}/attn/proj", d, d)
        norm(f"{theirs}.norm2", f"{ours}/norm2")
        linear(f"{theirs}.mlp.fc1", f"{ours}/mlp/fc1", hidden, d)
        linear(f"{theirs}.mlp.fc2", f"{ours}/mlp/fc2", d, hidden)
        if v.layerscale:
            same(f"{theirs}.ls1.gamma", f"{ours}/ls1/gamma", d)
            same(f"{theirs}.ls2.gamma", f"{ours}/ls2/gamma", d)
    norm("norm", "norm")
    return table


FAMILY = Family(
    "vit",
    ViT,
    Variant,
    VARIANTS,
    holds=lambda names: any(name.endswith(("pos_embed", "position_embeddings")) for name in names),
    to_flax=lambda tensors, **options: _without_statistics(*to_flax(tensors, **options)),
    from_flax=from_flax,
)


def _without_statistics(params, variant):
    return params, {}, variant
