"""What a backbone is: any Flax module with this contract, ours or a user's.

Required is the call on normalised images `B x H x W x 3`, which gives a mapping with

    cls       B x D, of the whole image
    patches   B x h x w x C, the map that heads get

and perhaps

    stages    several maps, from shallow to deep, for the heads that take them by their stride

What else it gives is left alone. Sizes of images are whole multiples of those of `patches`.

Optional are keywords of the call, found in its signature:

    train         whether batch norm learns, and dropout (with the rng `dropout`) is on
    layers        numbers of blocks whose patch tokens are wanted too, under `layers` by number, and
                  their CLS tokens under `layers_cls`
    attention     whether the last block's attention is wanted, under `attention`
    drop_keys_B   a random key for each image, for stochastic depth

and attributes:

    patch         sizes of images must be multiples of it (1). Where it is above 1 and the stride of
                  `patches` too, images are resized so that this stride becomes the one asked for
    normalization of the images that it sees, a key of `NORMALIZATIONS` ("imagenet")
    depth         how many blocks `layers` numbers (0)
    layer_names   names of the parameters by layer, from the input on, for freezing and for learning
                  rates by layer (())
    dtype         of its matrix products (float32)
    with_stride   `with_stride(stride)` gives the module with another stride of its last map

This module is the only place where these are looked up.
"""

import dataclasses
import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxseg.options import OptionError

# Sides of the images at which modules are looked at, until one is a multiple of the stride.
_PROBES = (448, 480, 432)


@dataclasses.dataclass(frozen=True)
class Contract:
    """The optional part of the contract, as a module has it; see the head of this file."""

    keywords: frozenset[str]
    patch: int
    normalization: str
    depth: int
    layer_names: tuple[tuple[str, ...], ...]
    dtype: Any
    with_stride: Callable[[int], nn.Module] | None


def contract(module: nn.Module) -> Contract:
    """Looks at a backbone, bound or not."""

    def whole(name: str, default: int) -> int:
        # A bound module may have a submodule of that name.
        value = getattr(module, name, default)
        return value if isinstance(value, int) else default

    return Contract(
        _keywords(type(module)),
        whole("patch", 1),
        getattr(module, "normalization", "imagenet"),
        whole("depth", 0),
        tuple(tuple(names) for names in getattr(module, "layer_names", ())),
        getattr(module, "dtype", jnp.float32),
        getattr(module, "with_stride", None),
    )


@functools.cache
def _keywords(cls: type) -> frozenset[str]:
    parameters = inspect.signature(cls.__call__).parameters
    # Whoever takes anything is told the one keyword that changes what is learnt.
    some = {"train"} if any(p.kind is p.VAR_KEYWORD for p in parameters.values()) else set()
    return frozenset(parameters) | some


def call(module: nn.Module, image_BxHxWx3: jax.Array, **wanted: Any) -> Mapping[str, Any]:
    """Calls a bound backbone with those of the `wanted` keywords that it takes."""
    return module(image_BxHxWx3, **taken(module, wanted))


def apply(module: nn.Module, variables: Mapping[str, Any], image_BxHxWx3, **wanted: Any) -> Any:
    """`module.apply` with those of the `wanted` keywords that it takes, and `mutable`."""
    options = {k: wanted.pop(k) for k in ("mutable", "rngs") if k in wanted}
    return module.apply(variables, image_BxHxWx3, **options, **taken(module, wanted))


def taken(module: nn.Module, wanted: Mapping[str, Any]) -> dict[str, Any]:
    keywords = _keywords(type(module))
    return {k: v for k, v in wanted.items() if k in keywords}


def needed(module: Any, field: str, given: Sequence[str]) -> tuple[str, ...]:
    """Names of the arguments that a module's call requires beside those `given` by place, and `train`.

    Raises:
      OptionError: `field` is no Flax module, or its call does not take what is given.
    """
    allowed = f"a Flax (linen) module that is called with ({', '.join(given)}, train=...)"
    if not isinstance(module, nn.Module):
        found = module if isinstance(module, type) else type(module)
        what = "the class" if isinstance(module, type) else "a"
        raise OptionError(f"{field} is {what} {found.__name__}; allowed: {allowed}")
    signature = inspect.signature(type(module).__call__)
    try:
        placed = signature.bind_partial(module, *given).arguments
    except TypeError as error:
        name = f"{type(module).__name__}{signature}"
        raise OptionError(f"{field} is {name}; allowed: {allowed}") from error
    variable = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    return tuple(
        name
        for name, one in signature.parameters.items()
        if one.default is one.empty and one.kind not in variable and name not in {*placed, "train"}
    )


def outputs(module: nn.Module) -> Mapping[str, Any]:
    """Shapes of what a module gives for one square image, which is not computed.

    Raises:
      OptionError: it is not what the contract says.
    """
    return _look(module)[1]


def stride_of(module: nn.Module) -> int:
    """Image pixels per cell of `patches`.

    Raises:
      OptionError: it is no whole number.
    """
    side, out = _look(module)
    return side // out["patches"].shape[1]


def _look(module: nn.Module) -> tuple[int, Mapping[str, Any]]:
    """(side of an image, shapes of what the module gives for it)."""
    patch = contract(module).patch
    for probe in _PROBES:
        side = max(probe // patch, 1) * patch
        out = _checked(module, side)
        h, w = out["patches"].shape[1:3]
        if h == w and h and side % h == 0:
            return side, out
    raise OptionError(
        f"backbone {type(module).__name__} gives {h}x{w} patches of an image of {side}x{side}; "
        "the image's sides must be whole multiples of theirs"
    )


def _checked(module: nn.Module, side: int) -> Mapping[str, Any]:
    name, image = type(module).__name__, jax.ShapeDtypeStruct((1, side, side, 3), jnp.float32)
    init = functools.partial(module.init_with_output, **init_options(module))
    out, variables = jax.eval_shape(init, jax.random.key(0), image)
    if not isinstance(out, Mapping) or not {"cls", "patches"} <= set(out):
        found = ", ".join(map(str, out)) if isinstance(out, Mapping) else type(out).__name__
        raise OptionError(f"backbone {name} gives {found}; it must give cls and patches")
    check_collections("backbone", name, variables)
    cls, patches = (getattr(out[key], "shape", None) for key in ("cls", "patches"))
    if len(cls or ()) != 2 or len(patches or ()) != 4:
        raise OptionError(
            f"backbone {name} gives cls {cls} and patches {patches}; allowed: B x D and B x h x w x C"
        )
    return out


def check_collections(kind: str, name: str, variables: Mapping[str, Any]) -> None:
    """Raises OptionError for variables of a Flax module that no training carries on."""
    if others := sorted(variables.keys() - {"params", "batch_stats"}):
        raise OptionError(
            f"{kind} {name} has variables in {', '.join(others)}; allowed: params and batch_stats"
        )


def initial_statistics(module: nn.Module, *inputs, **named) -> Mapping[str, Any]:
    """The running statistics before the first step, as batch norm has them: mean 0, variance 1.

    {} for none. Others than batch norm's are those of `module.init`.
    """
    key = jax.random.key(0)

    def init(key):
        return module.init(key, *inputs, **named)

    shapes = jax.eval_shape(init, key).get("batch_stats", {})
    names = {path[-1].key for path, _ in jax.tree_util.tree_leaves_with_path(shapes)}
    if not names <= {"mean", "var"}:
        return jax.jit(init)(key)["batch_stats"]

    def leaf(path, x):
        return jnp.full(x.shape, float(path[-1].key == "var"), x.dtype)

    return jax.tree_util.tree_map_with_path(leaf, shapes)


def init_options(module: nn.Module) -> dict[str, bool]:
    """What `module.init` is called with beside images."""
    return taken(module, {"train": False})
