"""From a config to the objects of a run: the one place that knows what each config section makes.

Below it nothing takes a config.
"""

import contextlib
import dataclasses
import logging
import math
from collections.abc import Iterator, Mapping
from typing import Any

import ml_collections

from jaxseg.backbones import FAMILIES
from jaxseg.backbones.backbone import Backbone, backbone, described
from jaxseg.data.formats import FORMATS
from jaxseg.data.reader import Reading
from jaxseg.data.source import Some, Source, names_of
from jaxseg.heads import HEADS
from jaxseg.networks import NETWORKS, Network, Segmenter
from jaxseg.networks.network import as_network
from jaxseg.networks.segmenter import check_solved
from jaxseg.ops.mask_augment import Augmentation
from jaxseg.options import OptionError, options
from jaxseg.schema import ConfigError, format_keys
from jaxseg.tasks import TASKS, Facts, Task
from jaxseg.train.loop import Intervals
from jaxseg.train.optim import Recipe

log = logging.getLogger(__name__)


@contextlib.contextmanager
def section(name: str) -> Iterator[None]:
    """Puts the config key before the field that an object complains about."""
    try:
        yield
    except OptionError as error:
        raise ConfigError(f"config.{name}{error}") from error


def values(config: ml_collections.ConfigDict, cls: type) -> dict[str, Any]:
    """The values of a section that are options of a class."""
    return {
        name: tuple(config[name]) if isinstance(config[name], list | tuple) else config[name]
        for name in options(cls)
        if name in config
    }


@dataclasses.dataclass(frozen=True)
class Data:
    """The data set of a config, by split."""

    name: str
    root: str
    size: tuple[int, int]
    limit: int
    chosen: Mapping[str, Any]

    def split(self, name: str) -> Source:
        """Raises DataError if there is no such split, or something is wrong with it."""
        made = FORMATS[self.name](self.root, name, self.size, **self.chosen)
        return Some(made, self.limit) if self.limit else made


def make_data(config: ml_collections.ConfigDict, *, categories: tuple[str, ...] = ()) -> Data:
    """The data of a config; `categories` in place of those of `config.data`."""
    data = config.data
    chosen = {}
    for field, key in format_keys(data.name).items():
        node = data
        for part in key.split(".")[1:]:
            node = node[part]
        chosen[field] = tuple(node) if isinstance(node, list | tuple) else node
    for field in ("categories", "classes"):
        if field in chosen:
            # A list on the command line may arrive as one name, and =2016 as a number.
            names = tuple(str(name) for name in chosen[field])
            chosen[field] = tuple(names[0].split(",")) if len(names) == 1 else names
    if categories:
        chosen["categories"] = tuple(categories)
    return Data(data.name, data.root, tuple(data.size), data.limit, chosen)


def _backbone_options(config: ml_collections.ConfigDict) -> dict[str, Any]:
    chosen = config.backbone
    fields = {"normalization", "precision", "train", "freeze"}
    for family in FAMILIES.values():
        fields |= options(family.module).keys()
    return {name: chosen[name] for name in sorted(fields) if name in chosen}


def make_backbone(config: ml_collections.ConfigDict) -> Backbone:
    """The backbone of a config, with its weights."""
    chosen = config.backbone
    variant = "" if chosen.weights else chosen.variant
    with section("backbone."):
        return backbone(chosen.weights, variant=variant, **_backbone_options(config))


@dataclasses.dataclass(frozen=True)
class Parts:
    """What a task takes of a config, see `tasks.base.Parts`.

    With `variant`, that of a stored run, its backbone comes without weights.
    """

    config: ml_collections.ConfigDict
    names: tuple[str, ...]
    variant: Any = None

    def backbone(self) -> Backbone:
        if self.variant is None:
            return make_backbone(self.config)
        with section("backbone."):
            weights = bool(self.config.backbone.weights)
            return described(self.variant, weights=weights, **_backbone_options(self.config))

    def network(self, **told: int) -> Network:
        config = self.config
        if name := config.network.name:
            log.info("network %s: config.backbone and config.head are not used", name)
            kind = NETWORKS[name]
            with section(f"network.{name}."):
                return as_network(kind(**values(config.network[name], kind), **told))
        name, made = config.head.name, self.backbone()
        kind = HEADS[name]
        with section(f"head.{name}."):
            head = kind(**values(config.head.get(name, {}), kind), **told)
            check_solved(head, made)
        with section("backbone."):
            joint = dict(layers=tuple(config.backbone.layers), stride=config.backbone.stride)
            return Segmenter(made, head, **joint)


def make_task(
    config: ml_collections.ConfigDict, names: tuple[str, ...], *, variant: Any = None
) -> Task:
    """The task of a config, for masks whose values have these names; see `Parts`."""
    kind = TASKS[config.task]
    chosen = {}
    for name, found in kind.sections().items():
        chosen[name] = dict(config[name]) if isinstance(found, Mapping) else config[name]
    with section(""):
        return kind.from_options(Parts(config, names, variant), **chosen)


def stored_task(config: ml_collections.ConfigDict, facts: Facts, variant: Any) -> Task:
    """The task of a stored run, bound to what it was trained on."""
    task = make_task(config, facts.names or TASKS[config.task].usual_names, variant=variant)
    steps = total_steps(config.train, facts.examples)
    with section(""):
        return task.with_facts(facts, steps=steps, batch=config.train.batch)


def total_steps(train: ml_collections.ConfigDict, examples: int) -> int:
    """Length of the run: `steps`, or enough full batches for `epochs` and `min_steps`."""
    if train.steps:
        return train.steps
    return max(1, train.min_steps, math.ceil(examples * train.epochs / train.batch))


@dataclasses.dataclass(frozen=True)
class Settings:
    """What `run.fit` takes of a config beside the task and the data; see there."""

    recipe: Recipe
    intervals: Intervals
    reading: Reading
    scoring: Any
    augmentation: Augmentation | None
    batch: int
    accumulate: int
    seed: int
    sharding: str
    precision: str


def make_settings(config: ml_collections.ConfigDict) -> Settings:
    """The settings of a config."""
    kind = TASKS[config.task]
    augmentation = None
    if kind.augmented:
        with section("augment."):
            augmentation = Augmentation(**values(config.augment, Augmentation))
    with section("eval."):
        scoring = kind.scoring(**values(config.eval, kind.scoring))
    return Settings(
        Recipe(**values(config.optim, Recipe)),
        Intervals(**values(config.train, Intervals)),
        Reading(**values(config.data, Reading)),
        scoring,
        augmentation,
        config.train.batch,
        config.train.accumulate,
        config.seed,
        config.sharding.params,
        config.backbone.precision,
    )


def title(config: ml_collections.ConfigDict) -> str:
    """What a run of the config is called in its report."""
    network = config.network.name or config.head.name if "head" in config else config.task
    return f"{network} on {config.data.name}"


def names_in(source: Source, task: str) -> tuple[str, ...]:
    """The names of the values in a source's masks; () for a task that reads none."""
    kind = TASKS[task]
    if not kind.heads:
        return ()
    if names := names_of(source) or kind.usual_names:
        return names
    raise ConfigError("config.data.classes is empty; with these data it names the classes")
