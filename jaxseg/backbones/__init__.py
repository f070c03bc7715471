"""Backbones: features of images. A new family is a file here and a line in `_Families`."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from jaxseg.backbones.family import Family
from jaxseg.options import listed, options


class _Families:
    # The default first.
    # isort: off
    from jaxseg.backbones.vit_weights import FAMILY as vit
    from jaxseg.backbones.resnet_weights import FAMILY as resnet


FAMILIES: dict[str, Family] = listed(_Families)
# Their modules, as `jaxseg.backbones.ResNet`.
globals().update({family.module.__name__: family.module for family in FAMILIES.values()})
BACKBONES: dict[str, Any] = {
    name: shape for family in FAMILIES.values() for name, shape in family.variants.items()
}


def family_of(variant: Any) -> Family:
    """The family of a shape."""
    return next(family for family in FAMILIES.values() if isinstance(variant, family.shape))


def build(variant: Any, *, dtype: Any = jnp.float32, **chosen: Any) -> nn.Module:
    """The module of a shape; `chosen` are options, of which those of other families are left out."""
    module = family_of(variant).module
    known = options(module)
    return module(variant=variant, dtype=dtype, **{k: v for k, v in chosen.items() if k in known})


def to_json(variant: Any) -> dict[str, Any]:
    """A description from which `from_json` makes the same shape."""
    return {"family": family_of(variant).name, **dataclasses.asdict(variant)}


def from_json(value: Mapping[str, Any]) -> Any:
    """Inverse of `to_json`; raises KeyError or TypeError where something is missing or unknown."""
    fields = {k: tuple(v) if isinstance(v, list) else v for k, v in value.items()}
    return FAMILIES[fields.pop("family")].shape(**fields)
