"""A backbone ready for use: its module, its weights, and which of them a training changes."""

import dataclasses
import functools
import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import flax.core
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from jaxseg import backbones
from jaxseg.backbones import contract, pretrained
from jaxseg.nn.normalize import NORMALIZATIONS, normalize
from jaxseg.options import OptionError
from jaxseg.options import options as options_of

log = logging.getLogger(__name__)

TRAIN = ("auto", "none", "all")


@dataclasses.dataclass(frozen=True, eq=False)
class Backbone:
    """What `backbone` makes, and `Segmenter`, `tasks.Dino` and `tasks.Rotation` take.

    Attributes:
      module: a Flax module with the contract of `jaxseg.backbones.contract`.
      params: nested dict of its parameters, or None to start from scratch.
      statistics: running statistics of its batch norm (`batch_stats`), {} for fresh ones.
      normalization: a key of `NORMALIZATIONS`, of the images that it sees.
      trained: whether a training changes it.
      freeze: of a backbone that is trained, so many of its first layers rest, and what comes before.
      variant: its shape, of a family of ours; None for a module of a user.
      source: where the weights come from, for people.
    """

    module: nn.Module
    params: Mapping[str, Any] | None = None
    statistics: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    normalization: str = "imagenet"
    trained: bool = True
    freeze: int = 0
    variant: Any = None
    source: str = dataclasses.field(default="", compare=False)

    def __post_init__(self):
        if self.normalization not in NORMALIZATIONS:
            raise OptionError(
                f"normalization is {self.normalization!r}; allowed: {', '.join(NORMALIZATIONS)}"
            )
        layers = contract.contract(self.module).layer_names
        if self.freeze and self.freeze >= len(layers):
            most = max(len(layers) - 1, 0)
            raise OptionError(
                f"freeze is {self.freeze}; {self.name} allows 0 to {most} (or train='none')"
            )

    @property
    def name(self) -> str:
        return self.variant.name if self.variant is not None else type(self.module).__name__

    @property
    def resting(self) -> tuple[str, ...] | None:
        """Names of the parameters that no step changes: () for none, None for all of them."""
        if not self.trained:
            return None
        layers = contract.contract(self.module).layer_names
        resting = layers[: self.freeze + 1] if self.freeze else ()
        return tuple(name for names in resting for name in names)

    def with_weights(self, params: Mapping[str, Any], statistics: Mapping[str, Any]) -> "Backbone":
        """The same with other weights, which a training leaves as they are unless it is asked to."""
        changes: dict[str, Any] = dict(params=params, statistics=statistics)
        return dataclasses.replace(self, **changes, trained=False, freeze=0)

    def __call__(
        self, images: Any, *, layers: Sequence[int] = (), attention: bool = False
    ) -> dict[str, Any]:
        """Features of images, compiled once for each size.

        Args:
          images: `B x H x W x 3`, uint8, or float in [0, 1]; H and W multiples of the patch.
          layers: numbers of blocks whose tokens are wanted too; negative ones count from the end.
          attention: whether the last block's attention is wanted.

        Returns:
          float32 `cls` B x D and `patches` B x h x w x D, and what else the module gives (`layers`,
          `attention`, `stages`).

        Raises:
          OptionError: the images are none, or the module cannot give what was asked for.
        """
        images = np.asarray(images) if not isinstance(images, jax.Array) else images
        floating = jnp.issubdtype(images.dtype, jnp.floating)
        if images.ndim != 4 or images.shape[-1] != 3 or not (floating or images.dtype == np.uint8):
            raise OptionError(
                f"images are {images.dtype} {images.shape}; allowed: B x H x W x 3, uint8, or float in "
                "[0, 1]"
            )
        if self.params is None:
            raise OptionError(f"params is None: the backbone {self.name} has no weights yet")
        wanted = {"layers": tuple(layers)} if layers else {}
        wanted |= {"attention": True} if attention else {}
        if lacking := wanted.keys() - contract.contract(self.module).keywords:
            raise OptionError(f"backbone {self.name} has no {', '.join(sorted(lacking))} to give")
        key = tuple(sorted(wanted.items()))
        if key not in self._compiled:
            self._compiled[key] = jax.jit(functools.partial(self._features, wanted))
        return self._compiled[key](self._variables, images)

    @functools.cached_property
    def _compiled(self) -> dict[Any, Any]:
        return {}

    @functools.cached_property
    def _variables(self) -> dict[str, Any]:
        statistics = self.statistics
        if not statistics:
            side = contract.contract(self.module).patch * 32
            image, options = jnp.zeros((1, side, side, 3)), contract.init_options(self.module)
            statistics = contract.initial_statistics(self.module, image, **options)
        return {"params": self.params, "batch_stats": statistics}

    def _features(self, wanted, variables, images):
        scale = 255.0 if images.dtype == jnp.uint8 else 1.0
        x = normalize(images.astype(jnp.float32) / scale, self.normalization)
        return dict(contract.apply(self.module, variables, x, train=False, **wanted))


def backbone(
    source: str | Path | nn.Module | tuple[nn.Module, Any] | Backbone = "",
    variables: Mapping[str, Any] | None = None,
    *,
    variant: str = "",
    train: str | bool = "auto",
    freeze: int = 0,
    normalization: str = "",
    precision: str = "float32",
    **options: Any,
) -> Backbone:
    """A backbone from wherever it comes.

    Args:
      source: a name of the catalogue (`jaxseg.weights.catalog.NAMES`), a `.pth` or `.safetensors`
        file, the workdir of a run of ours, or a Flax module of one's own with the contract of
        `jaxseg.backbones.contract`. Empty: `variant` from scratch.
      variables: of a module of one's own: `{"params": ..., "batch_stats": ...}` as its `init` gives
        them, or None to start from scratch. A bound module, or a tuple of the two, will do as `source`.
      variant: a name in `jaxseg.backbones.BACKBONES`, where there are no weights that tell.
      train: whether a training changes it: "none" (or False), "all" (or True), or "auto", all but
        where there are weights and nothing is said by `freeze`.
      freeze: of a backbone that is trained, so many of its first blocks or stages rest.
      normalization: of the images that it sees, "imagenet" or "none"; empty for that of the run in a
        workdir, for what a module of one's own says in its attribute `normalization`, else "imagenet".
      precision: of its matrix products, "float32" or "bfloat16" (a module of one's own has its own).
      **options: fields of the family's module, such as `norm` or `remat`.

    Raises:
      OptionError: an argument is not allowed.
      ValueError, OSError: the weights cannot be read; see `jaxseg.backbones.pretrained.load`.
    """
    train = {True: "all", False: "none"}.get(train, train)
    if train not in TRAIN:
        raise OptionError(f"train is {train!r}; allowed: {', '.join(TRAIN)}")
    if train == "none" and freeze:
        raise OptionError(f"freeze is {freeze}; with train='none' all is frozen: allowed is 0")
    if isinstance(source, tuple) and len(source) == 2 and isinstance(source[0], nn.Module):
        source, variables = source
    if isinstance(source, nn.Module) and source.scope is not None:
        source, variables = source.unbind()
    if variables is not None and not isinstance(source, nn.Module):
        raise OptionError("variables are given; allowed where source is a Flax module of one's own")
    if isinstance(source, Backbone):
        trained = source.trained if train == "auto" and not freeze else train != "none"
        freeze = freeze or source.freeze
        return dataclasses.replace(source, trained=trained, freeze=freeze if trained else 0)
    if isinstance(source, nn.Module):
        _refuse_unused("a module of one's own", variant=variant, **options)
        trained = is_trained(train, freeze, weights=variables is not None)
        params, statistics = (None, {}) if variables is None else _parts(source, variables)
        normalization = normalization or contract.contract(source).normalization
        shared = dict(normalization=normalization, trained=trained, freeze=freeze)
        return Backbone(source, params, statistics, **shared)
    if not isinstance(source, str | Path):
        raise OptionError(
            f"source is a {type(source).__name__}; allowed: a name, a file, a workdir, or a Flax (linen) "
            "module with its variables"
        )
    known = {name for family in backbones.FAMILIES.values() for name in options_of(family.module)}
    if unknown := sorted(options.keys() - known):
        raise OptionError(f"{unknown[0]} is no option; allowed: {', '.join(sorted(known))}")
    seen = _seen_by_run(source) if source else ""
    if normalization and seen not in ("", normalization):
        raise OptionError(
            f"normalization is {normalization!r}; the run in {source} was trained with {seen!r}: "
            "allowed is that"
        )
    shared = dict(normalization=normalization or seen or "imagenet", freeze=freeze)
    trained = is_trained(train, freeze, weights=bool(source))
    make = functools.partial(backbones.build, dtype=precision, **options)
    if not source:
        if variant not in backbones.BACKBONES:
            raise OptionError(f"variant is {variant!r}; allowed: {', '.join(backbones.BACKBONES)}")
        shape = backbones.BACKBONES[variant]
        return Backbone(make(shape), trained=trained, variant=shape, **shared)
    loaded = pretrained.load(source, variant=variant or None)
    log.info("backbone %s from %s", loaded.variant.name, loaded.source)
    return Backbone(
        make(loaded.variant),
        loaded.params,
        loaded.statistics,
        trained=trained,
        variant=loaded.variant,
        source=loaded.source,
        **shared,
    )


def _refuse_unused(where: str, **options: Any) -> None:
    for name, value in options.items():
        if value:
            raise OptionError(f"{name} is {value!r}; it says nothing of {where}")


def _parts(module: nn.Module, variables: Any) -> tuple[Any, Any]:
    """(params, statistics) as plain dicts."""
    if not isinstance(variables, Mapping) or "params" not in variables:
        found = sorted(variables) if isinstance(variables, Mapping) else type(variables).__name__
        raise OptionError(
            f"variables are {found}; allowed: {{'params': ..., 'batch_stats': ...}}, as the init of "
            f"{type(module).__name__} gives them"
        )
    contract.check_collections("backbone", type(module).__name__, variables)
    parts = (variables["params"], variables.get("batch_stats", {}))
    return tuple(flax.core.unfreeze(part) for part in parts)


def is_trained(train: str, freeze: int, *, weights: bool) -> bool:
    """Whether a training changes a backbone, with pretrained weights or without."""
    return train == "all" or (train == "auto" and (not weights or freeze > 0))


def described(
    shape: Any,
    *,
    weights: bool,
    train: str = "auto",
    freeze: int = 0,
    normalization: str = "imagenet",
    precision: str = "float32",
    **options: Any,
) -> Backbone:
    """The backbone of a stored run, without its parameters; `weights` says whether it began with some."""
    module = backbones.build(shape, dtype=precision, **options)
    trained = is_trained(train, freeze, weights=weights)
    return Backbone(
        module, trained=trained, freeze=freeze, normalization=normalization, variant=shape
    )


def _seen_by_run(source: str | Path) -> str:
    """The normalization of the images that the backbone of a workdir was trained on; empty if it is none."""
    folder = Path(source).expanduser()
    # Others keep a config.json beside their weights too.
    if not (folder / "model.json").is_file():
        return ""
    if (stored := folder / "config.json").is_file():
        return json.loads(stored.read_text())["backbone"]["normalization"]
    if (stored := folder / "objects.json").is_file():
        task = json.loads(stored.read_text())["task"]
        made = task.get("backbone") or task["network"]["backbone"] or {}
        return made.get("normalization", "")
    return ""
