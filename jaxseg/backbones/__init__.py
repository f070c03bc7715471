"""All backbones by name, of whatever family."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxseg.backbones.resnet import RESNETS, ResNet, ResNetVariant
from jaxseg.backbones.vit import VARIANTS, Variant, ViT

AnyVariant = Variant | ResNetVariant
BACKBONES: dict[str, AnyVariant] = {**VARIANTS, **RESNETS}
_FAMILIES = {"vit": Variant, "resnet": ResNetVariant}


def build(variant: AnyVariant, *, dtype: Any = jnp.float32, **options) -> nn.Module:
    """The module of a variant; `options` are fields of `ViT` or `ResNet`, others are left out."""
    module = ViT if isinstance(variant, Variant) else ResNet
    known = {field.name for field in dataclasses.fields(module)}
    return module(variant=variant, dtype=dtype, **{k: v for k, v in options.items() if k in known})


def to_json(variant: AnyVariant) -> dict[str, Any]:
    """A description from which `from_json` makes the same variant."""
    family = next(name for name, kind in _FAMILIES.items() if isinstance(variant, kind))
    return {"family": family, **dataclasses.asdict(variant)}


def from_json(value: Mapping[str, Any]) -> AnyVariant:
    """Inverse of `to_json`; raises KeyError or TypeError where something is missing or unknown."""
    fields = {k: tuple(v) if isinstance(v, list) else v for k, v in value.items()}
    return _FAMILIES[fields.pop("family")](**fields)


def layers(variant: AnyVariant) -> list[tuple[str, ...]]:
    """The parameters' names by layer, from the input on; a ViT's final norm belongs to none."""
    if isinstance(variant, Variant):
        embedding = ("cls_token", "pos_embed", "register_tokens", "patch_embed")
        return [embedding, *((f"blocks_{i}",) for i in range(variant.depth))]
    stages = [tuple(f"layer{i + 1}_{j}" for j in range(n)) for i, n in enumerate(variant.blocks)]
    return [("conv1", "bn1"), *stages]


def initial_statistics(module: nn.Module, *inputs, **named) -> Mapping[str, Any]:
    """The running statistics of batch norm before the first step: mean 0, variance 1; {} for none."""
    shapes = jax.eval_shape(module.init, jax.random.key(0), *inputs, **named)
    shapes = shapes.get("batch_stats", {})

    def leaf(path, x):
        return jnp.full(x.shape, float(path[-1].key == "var"), x.dtype)

    return jax.tree_util.tree_map_with_path(leaf, shapes)
