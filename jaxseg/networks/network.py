"""A network ready to be trained: any Flax module from images to logits, with what training needs to know.

The contract of the module is `module(image_BxHxWx3, train=...) -> (logits, extras)`: images are float in
[0, 1], logits float32 `B x H x W x K` at the image's size, extras a mapping of arrays by name (`{}` for
none; `auxiliary` are logits for a second loss, `coarse` logits of a token grid that the loss is taken on).
A bare array of logits will do. Optional are the keyword `train`, and attributes, looked up here alone:

    multiple      sizes of images must be multiples of it (1)
    layer_names   paths of the parameters by layer, from the input on, for learning rates by layer (())
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxseg.backbones.contract import needed, taken
from jaxseg.heads.solved import Solved
from jaxseg.options import OptionError


@dataclasses.dataclass(frozen=True, eq=False)
class Network:
    """What tasks train. `jaxseg.Segmenter` makes one of a backbone and a head.

    Attributes:
      module: see the head of this file.
      multiple: sizes of images are multiples of it.
      params: initial parameters by path, in place of those that `module.init` draws: a nested dict of a
        part of them.
      statistics: initial running statistics of batch norm, likewise.
      frozen: path prefixes of the parameters that no step changes, such as `("backbone",)`.
      layer_names: paths by layer, from the input on; what is in none has the full learning rate.
      features: whether `module.features(image)` gives what its call takes as `features`, and rests: one
        map `B x h x w x C` that can be computed once for each image.
      backbone: the backbone in it, or None.
      solved: what is solved for before the first step, or None.
      needs: arguments that the module's call requires beside the image and `train`.
      name: for people.
    """

    module: nn.Module
    multiple: int = 1
    params: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    statistics: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    frozen: tuple[str, ...] = ()
    layer_names: tuple[tuple[str, ...], ...] = ()
    features: bool = False
    backbone: Any = None
    solved: Solved | None = None
    needs: tuple[str, ...] = ()
    name: str = ""

    def init(self, rng: jax.Array, size: tuple[int, int], **inputs: jax.Array) -> Any:
        """The variables that `module.init` draws for images of `size`."""
        rngs = {"params": rng, "dropout": rng}
        return self.module.init(
            rngs, jnp.zeros((1, *size, 3), jnp.float32), **self.example(**inputs)
        )

    def example(self, **inputs: jax.Array) -> dict[str, Any]:
        """What `module.init` is called with beside an image."""
        return {**taken(self.module, {"train": False}), **inputs}

    def apply(
        self, variables: Mapping[str, Any], *args: Any, train: bool = False, **options: Any
    ) -> Any:
        """`module.apply`; with `train`, (what it gives, the changed running statistics)."""
        if options.get("method") is not None:
            return self.module.apply(variables, *args, **options)
        options = {k: v for k, v in options.items() if k != "features" or v is not None}
        if train:
            out, changed = self.module.apply(
                variables,
                *args,
                **taken(self.module, {"train": True}),
                mutable=["batch_stats"],
                **options,
            )
            return with_extras(out), dict(changed)
        return with_extras(
            self.module.apply(variables, *args, **taken(self.module, {"train": False}), **options)
        )


def with_extras(out: Any) -> tuple[jax.Array, Mapping[str, Any]]:
    """(logits, extras) of what a head or network gives, which may be the logits alone.

    Raises:
      OptionError: it is neither.
    """
    logits, extras = out if isinstance(out, tuple) and len(out) == 2 else (out, {})
    extras = {} if extras is None else extras
    if not hasattr(logits, "shape") or not isinstance(extras, Mapping):
        raise OptionError(
            f"head or network gives {jax.tree.map(jnp.shape, out)}; allowed: logits, or (logits, {{name: "
            "extra})"
        )
    return logits, extras


def as_network(value: Network | nn.Module) -> Network:
    """A network of a Flax module; others unchanged.

    Raises:
      OptionError: it is neither.
    """
    if isinstance(value, Network):
        return value
    if not isinstance(value, nn.Module):
        raise OptionError(
            f"network is a {type(value).__name__}; allowed: jaxseg.Segmenter(backbone, head), or a Flax "
            "module from images to logits"
        )
    needs = needed(value, "network", ("image",))
    return Network(
        value,
        multiple=getattr(value, "multiple", 1),
        needs=needs,
        layer_names=tuple(map(tuple, getattr(value, "layer_names", ()))),
        name=type(value).__name__,
    )
