"""A family of backbones: one module in several shapes, and how its released weights are read."""

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import flax.linen as nn
import numpy as np

Tensors = Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Family:
    """What `jaxseg.backbones.FAMILIES` lists.

    Attributes:
      name: of the family, in stored descriptions.
      module: made as `module(variant=shape, dtype=..., **options)`; its fields made by
        `jaxseg.options.option` are keys of `config.backbone`.
      shape: the dataclass of a shape, with `name`, `dim` and `layer_names`.
      variants: shapes by name, over all families unique.
      holds: whether tensors of these names are of this family.
      to_flax: `to_flax(tensors, source=name of the file, variant=shape or None)` gives (parameters,
        running statistics or {}, shape); ValueError names what does not fit.
      from_flax: its inverse `from_flax(parameters, shape)`, or None where there is none.
    """

    name: str
    module: type[nn.Module]
    shape: type
    variants: Mapping[str, Any]
    holds: Callable[[Iterable[str]], bool]
    to_flax: Callable[..., tuple[dict[str, Any], dict[str, Any], Any]]
    from_flax: Callable[[Tensors, Any], dict[str, np.ndarray]] | None = None
