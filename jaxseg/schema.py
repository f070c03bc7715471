"""The config: its keys, from the options of the classes that they configure, and their checks.

`table` is the whole list. What is checked here beyond the options themselves crosses several of them.
"""

import ast
import dataclasses
import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import ml_collections

from jaxseg import renames
from jaxseg.backbones import BACKBONES, FAMILIES
from jaxseg.backbones.backbone import TRAIN
from jaxseg.data.formats import FORMATS
from jaxseg.data.reader import Reading
from jaxseg.heads import HEADS
from jaxseg.networks import NETWORKS
from jaxseg.networks.segmenter import Joint
from jaxseg.nn.normalize import NORMALIZATIONS
from jaxseg.ops.mask_augment import Augmentation
from jaxseg.options import Option, option, options
from jaxseg.tasks import TASKS
from jaxseg.train.loop import Intervals
from jaxseg.train.optim import Recipe
from jaxseg.train.partition import PARAMETER_LAYOUTS

_MOST = 2**31 - 1
# Sections that evaluation, analysis and prediction may take otherwise than a run was trained.
OPEN = ("data", "eval", "sharding")


class ConfigError(ValueError):
    """A config value that is not allowed; the message names the key and what is allowed."""


@dataclasses.dataclass(frozen=True)
class Length:
    """How much a run is trained."""

    batch: int = option(16, "over all devices", low=1, high=2**20)
    accumulate: int = option(
        1,
        "parts in which a batch is taken, for less memory (batch norm sees one at a time)",
        low=1,
        high=2**20,
    )
    epochs: float = option(20.0, low=0, high=1e9)
    min_steps: int = option(0, "at least so many, whatever the epochs say", low=0, high=_MOST)
    steps: int = option(0, "exactly so many; 0 = from epochs", low=0, high=_MOST)


def formats(task: str) -> list[str]:
    """Names of the data formats that a task can read."""
    return [name for name, data in FORMATS.items() if data.gives & TASKS[task].reads]


def format_keys(name: str) -> dict[str, str]:
    """The keys of a format's options, `{field: "data.key"}`."""
    data = FORMATS[name]
    inside = f"data.{data.section}." if data.section else "data."
    return {k: f"data.{k}" if k in data.shared else inside + k for k in options(data)}


@functools.cache
def table(task: str) -> dict[str, Option]:
    """Every key of the configs of a task, as `{"section.key": option}`."""
    learned = TASKS[task]
    keys: dict[str, Option] = {
        "task": Option(task, "what is learned", choices=tuple(TASKS)),
        "seed": Option(0, "of all that is drawn", low=0, high=_MOST),
    }

    def add(section: str, found: Mapping[str, Option]) -> None:
        for name, one in found.items():
            keys.setdefault(f"{section}.{name}", one)

    readable = formats(task)
    default = next(name for name in readable if FORMATS[name].drawn)
    keys["data.name"] = Option(default, "how the data are read", choices=tuple(readable))
    keys["data.root"] = Option("", "where they are", free=True)
    add("data", options(Reading))
    for name in readable:
        for field, key in format_keys(name).items():
            keys.setdefault(key, options(FORMATS[name])[field])
    add(
        "backbone",
        {
            "weights": Option(
                "", "a name of the catalogue, a file, or a workdir; empty = from scratch"
            ),
            "variant": Option(
                "vit_micro16", "its shape, where there are no weights", choices=tuple(BACKBONES)
            ),
            "normalization": Option("imagenet", choices=tuple(NORMALIZATIONS)),
            "precision": Option("float32", choices=("float32", "bfloat16")),
        },
    )
    for family in FAMILIES.values():
        add("backbone", options(family.module))
    if learned.heads:
        add(
            "backbone",
            {
                "train": Option("auto", "auto: none with weights, all without", choices=TRAIN),
                "freeze": Option(
                    0, "of a trained backbone: so many of its first layers rest", low=0, high=1000
                ),
                **options(Joint),
            },
        )
        add("head", {"name": Option(learned.heads[0], choices=learned.heads)})
        for name in learned.heads:
            add(f"head.{name}", options(HEADS[name]))
        whole = "a whole network, in place of backbone and head"
        add("network", {"name": Option("", whole, choices=("", *NETWORKS))})
        for name, network in NETWORKS.items():
            add(f"network.{name}", options(network))
    for section, found in learned.sections().items():
        add(section, found) if isinstance(found, Mapping) else keys.update({section: found})
    if learned.augmented:
        add("augment", options(Augmentation))
    add("optim", options(Recipe))
    add("train", options(Length) | options(Intervals))
    free = {k: dataclasses.replace(o, free=True) for k, o in options(learned.scoring).items()}
    add("eval", free)
    keys["sharding.params"] = Option("replicated", choices=PARAMETER_LAYOUTS, free=True)
    return {
        k: dataclasses.replace(o, open=True) if k.split(".")[0] in OPEN else o
        for k, o in keys.items()
    }


def base_config(task: str) -> ml_collections.ConfigDict:
    """The config of a task with every key at its default, for a file in `configs/` to change."""
    return nested({key: one.default for key, one in table(task).items()})


def parse_presets(arg: str | None, allowed: Sequence[str]) -> tuple[str, ...]:
    """Reads `config.py:preset,preset`.

    Raises:
      ValueError: naming the unknown preset and those allowed.
    """
    presets = tuple(p for p in (arg or "").split(",") if p)
    for preset in presets:
        if preset not in allowed:
            raise ValueError(f"no preset {preset!r}; allowed after the colon: {', '.join(allowed)}")
    return presets


def nested(flat: Mapping[str, Any]) -> ml_collections.ConfigDict:
    """A config of `{"a.b": value}`; lists become tuples."""
    tree: dict[str, Any] = {}
    for key, value in flat.items():
        *sections, name = key.split(".")
        node = tree
        for section in sections:
            node = node.setdefault(section, {})
        node[name] = tuple(value) if isinstance(value, list) else value
    return ml_collections.ConfigDict(tree)


def flatten(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """`{"a.b": value}` of a nested config; tuples become lists, as in JSON."""
    flat = {}
    for key, value in config.items():
        if isinstance(value, Mapping | ml_collections.ConfigDict):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = list(value) if isinstance(value, tuple) else value
    return flat


def modernized(stored: Mapping[str, Any]) -> ml_collections.ConfigDict:
    """A stored config, of whatever version, with today's names and all of today's keys.

    Keys that it lacks have the value that says what was done before there was the key.

    Raises:
      ConfigError: its task is unknown.
    """
    flat, _ = renames.renamed(flatten(stored))
    task = flat.get("task")
    if task not in TASKS:
        raise ConfigError(f"the config's task is {task!r}; allowed: {', '.join(TASKS)}")
    return nested({**{k: o.before for k, o in table(task).items()}, **flat})


def override(config: ml_collections.ConfigDict, given: Mapping[str, str]) -> dict[str, Any]:
    """Sets values of a config from text, as `--config.a.b=value` gives them.

    Returns:
      `{"a.b": value}` as set, in today's names.

    Raises:
      ConfigError: naming the key and the keys that exist beside it, or the type.
    """
    values: dict[str, Any] = {}
    for key, text in given.items():
        node: Any = config
        for depth, name in enumerate(names := key.split(".")):
            if not isinstance(node, ml_collections.ConfigDict) or name not in node:
                here = ".".join(["config", *names[:depth]])
                known = sorted(node) if isinstance(node, ml_collections.ConfigDict) else []
                raise ConfigError(
                    f"unknown key 'config.{key}'; allowed in {here}: {', '.join(known) or 'nothing'}"
                )
            node = node[name]
        if isinstance(node, ml_collections.ConfigDict):
            raise ConfigError(
                f"config.{key} is a section; allowed in it: {', '.join(sorted(node))}"
            )
        values[key] = _parsed(f"config.{key}", text, node)
    config.update_from_flattened_dict(values)
    return values


def _parsed(key: str, text: str, default: Any) -> Any:
    expected = type(default)
    if expected is str:
        return text
    try:
        value = {"true": True, "false": False}.get(text.lower(), None)
        value = ast.literal_eval(text) if value is None else value
    except (ValueError, SyntaxError):
        value = tuple(text.split(",")) if expected is tuple else text
    if expected is tuple:
        return tuple(value) if isinstance(value, tuple | list) else (value,)
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if expected is float and number:
        return float(value)
    if type(value) is not expected:
        raise ConfigError(f"{key}={text!r} is no {expected.__name__} (the default is {default!r})")
    return value


def validate(config: ml_collections.ConfigDict) -> None:
    """Checks every value against its option, and the values against each other.

    Raises:
      ConfigError: for the first value that is not allowed.
    """
    flat = flatten(config)
    keys = table(config.task) if config.get("task") in TASKS else {}
    if not keys or (missing := sorted(keys.keys() - flat.keys())):
        lacking = ", ".join(missing) if keys else "a task"
        raise ConfigError(f"the config lacks {lacking}: it is damaged or of another version")
    for key, one in keys.items():
        if not one.fits(flat[key]):
            value = tuple(flat[key]) if isinstance(flat[key], list) else flat[key]
            raise ConfigError(f"config.{key} is {value!r}; allowed: {one.allowed()}")
    if any(size := tuple(config.data.size)) and not all(size):
        raise ConfigError(f"config.data.size is {size}; allowed: (0, 0), or two sizes above 0")
    if config.train.batch % config.train.accumulate:
        raise ConfigError(
            f"config.train.accumulate is {config.train.accumulate}; allowed: divisors of "
            f"config.train.batch={config.train.batch}"
        )
    if not config.train.steps and not config.train.epochs:
        raise ConfigError("config.train.steps and config.train.epochs are both 0; set one")
    _validate_data(config, flat)
    if "loss" in config and not any(config.loss.values()):
        raise ConfigError(f"all of config.loss is 0; give one of {', '.join(config.loss)} a weight")
    if config.backbone.weights and config.backbone.norm != "batch":
        raise ConfigError(
            f"config.backbone.norm is {config.backbone.norm!r}; allowed with config.backbone.weights: "
            "'batch', which theirs is"
        )
    if config.optim.average and (why := TASKS[config.task].no_average):
        raise ConfigError(
            f"config.optim.average is {config.optim.average}; allowed for {config.task}: 0 ({why})"
        )


def _validate_data(config: ml_collections.ConfigDict, flat: Mapping[str, Any]) -> None:
    name, root = config.data.name, config.data.root
    data, readable = FORMATS[name], formats(config.task)
    if data.drawn and root:
        others = [n for n in readable if not FORMATS[n].drawn]
        raise ConfigError(
            f"config.data.root is {root!r}, but config.data.name={name!r} draws its own images; add "
            f"--config.data.name={', '.join(others[:-1])} or {others[-1]} to read it"
        )
    if not data.section and not data.drawn and not root:
        raise ConfigError(f"config.data.name={name!r} needs --config.data.root=FOLDER")
    own = set(format_keys(name).values())
    for other in readable:
        for field, key in format_keys(other).items():
            default = options(FORMATS[other])[field].default
            value = tuple(flat[key]) if isinstance(flat[key], list) else flat[key]
            if key not in own and key.count(".") == 1 and value != default:
                raise ConfigError(
                    f"config.{key} is {value!r}; allowed with config.data.name={name!r}, which has no "
                    f"such option: {default!r}"
                )


def check_same_run(stored: Mapping[str, Any], config: Mapping[str, Any], workdir: Path) -> None:
    """Checks that a run begun with `stored` may go on with `config`.

    Raises:
      ConfigError: listing the keys that differ and matter.
    """
    lines = differences(stored, config, lambda one: one.free)
    if lines:
        raise ConfigError(
            f"{workdir} holds a run of another config:\n{lines}\n"
            "Give another --workdir, the same config, or remove that folder."
        )


def differences(stored: Mapping[str, Any], config: Mapping[str, Any], may_differ: Any) -> str:
    """Lines about the keys that differ, but for those of options that `may_differ` says may."""
    old, new = flatten(stored), flatten(config)
    keys = table(config["task"])
    return "\n".join(
        f"  {key}: {old.get(key)!r} there, {new.get(key)!r} now"
        for key in sorted(old.keys() | new.keys())
        if old.get(key) != new.get(key) and not (key in keys and may_differ(keys[key]))
    )


def config_files() -> dict[str, Path]:
    """The shipped configs by name."""
    for folder in (Path(__file__).parent / "configs", Path(__file__).parents[1] / "configs"):
        if folder.is_dir():
            return {path.stem: path for path in sorted(folder.glob("*.py"))}
    return {}


def config_summaries() -> dict[str, tuple[str, tuple[str, ...]]]:
    """(first line of the docstring, presets) of the shipped configs by name, which are not run for it."""
    found = {}
    for name, path in config_files().items():
        tree = ast.parse(path.read_text())
        presets: tuple[str, ...] = ()
        for node in tree.body:
            if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "PRESETS":
                presets = tuple(ast.literal_eval(node.value))
        found[name] = ((ast.get_docstring(tree) or "").split("\n")[0], presets)
    return found


def read_config(text: str) -> ml_collections.ConfigDict:
    """The config that `--config=` asks for.

    Args:
      text: a file or the name of a shipped config, and after a colon presets: `pac_objseg:real`. A file
        that exists goes before a name. The name of a task stands for its defaults.

    Raises:
      ConfigError: there is no such file.
      ValueError: there is no such preset.
    """
    name, _, arg = text.partition(":")
    path = Path(name).expanduser()
    if not path.is_file():
        shipped = config_files()
        # As a command in the checkout names it.
        stem = (
            Path(name).stem
            if name.endswith(".py") and Path(name).parent.name == "configs"
            else name
        )
        if stem not in shipped and name in TASKS and not arg:
            return base_config(name)
        if stem not in shipped:
            raise ConfigError(
                f"--config={text}: there is no file {name!r}; the configs by name are: "
                f"{', '.join(shipped)}; and the tasks, for their defaults: {', '.join(TASKS)}"
            )
        path = shipped[stem]
    namespace: dict[str, Any] = {"__name__": path.stem, "__file__": str(path)}
    exec(compile(path.read_text(), str(path), "exec"), namespace)
    if "get_config" not in namespace:
        raise ConfigError(f"--config={text}: {path} has no function get_config(arg)")
    return namespace["get_config"](arg or None)
