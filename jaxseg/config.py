"""Checks of a config, and the comparison of two, with errors that name key, value and choices."""

import ast
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import ml_collections

from jaxseg.data import source as sources
from jaxseg.data.formats.coco import CROWDS, OVERLAPS
from jaxseg.losses.multiclass import MULTICLASS, SCHEMES
from jaxseg.losses.binary import BINARY
from jaxseg.heads import HEADS
from jaxseg.backbones import BACKBONES, AnyVariant
from jaxseg.heads.attention import ATTENTIONS, CONTEXTS
from jaxseg.heads.deeplab import LOW_LEVELS
from jaxseg.backbones.resnet import NORMS
from jaxseg.networks.segmenter import NORMALIZATIONS
from jaxseg.train.optim import OPTIMIZERS, SCHEDULES
from jaxseg.train.partition import PARAMETER_LAYOUTS

DENSE_TASKS = tuple(HEADS)
_SPLITS = ("train", "val", "test")
CHOICES: dict[str, tuple[str, ...]] = {
    "task": (*DENSE_TASKS, "dino", "rotation"),
    "data.name": ("shapes", "kinds", "folder", "coco", "images", "tfds"),
    "data.mask_values": ("auto", "0/255", "0/1"),
    "backbone.normalization": tuple(NORMALIZATIONS),
    "backbone.precision": ("float32", "bfloat16"),
    "optim.name": OPTIMIZERS,
    "optim.schedule": SCHEDULES,
    "eval.split": _SPLITS,
    "eval.checkpoint": ("latest", "best"),
    "sharding.params": PARAMETER_LAYOUTS,
}

# key: (smallest, largest), both allowed.
RANGES: dict[str, tuple[float, float]] = {
    "seed": (0, 2**31 - 1),
    "data.mask_threshold": (0, 65535),
    "data.limit": (0, 2**31 - 1),
    "data.length": (0, 2**31 - 1),
    "data.threads": (1, 1024),
    "data.workers": (0, 1024),
    "data.memory_gigabytes": (0, 1e6),
    "data.cache_gigabytes": (0, 1e6),
    "optim.lr": (0, 1e3),
    "optim.lr_batch": (0, 2**20),
    "optim.warmup": (0, 1),
    "optim.final_lr": (0, 1e3),
    "optim.weight_decay": (0, 1e3),
    "optim.weight_decay_end": (-1, 1e3),
    "optim.clip_norm": (0, 1e9),
    "optim.clip_each": (0, 1e9),
    "optim.average": (0, 0.999999),
    "train.batch": (1, 2**20),
    "train.accumulate": (1, 2**20),
    "train.epochs": (0, 1e9),
    "train.min_steps": (0, 2**31 - 1),
    "train.steps": (0, 2**31 - 1),
    "train.log_every": (1, 2**31 - 1),
    "train.eval_every": (0, 2**31 - 1),
    "train.checkpoint_every": (0, 2**31 - 1),
    "eval.batch": (1, 2**20),
}

_COCO = {"data.overlap": OVERLAPS, "data.crowd": CROWDS}
_MORE_CHOICES: dict[str, dict[str, tuple[str, ...]]] = {
    "multiclass": {
        **_COCO,
        "class_weights": tuple(SCHEMES),
        "head.deeplabv3.norm": NORMS,
        "head.deeplabv3plus.norm": NORMS,
        "head.deeplabv3plus.low_level": LOW_LEVELS,
    },
    "attention": {
        **_COCO,
        "head.attention.attention": ATTENTIONS,
        "head.attention.context": CONTEXTS,
        "head.attention.norm": NORMS,
    },
}

# What the tasks add to both.
TASK_CHOICES: dict[str, dict[str, tuple[str, ...]]] = {
    **{
        task: {
            "backbone.variant": tuple(BACKBONES),
            "backbone.train": ("auto", "none", "all"),
            "backbone.norm": NORMS,
            "head.name": tuple(heads),
            **_MORE_CHOICES.get(task, {}),
        }
        for task, heads in HEADS.items()
    },
    **dict.fromkeys(
        ("dino", "rotation"),
        {"backbone.variant": tuple(BACKBONES), "eval.train_split": _SPLITS},
    ),
}
_PRETRAINING: dict[str, tuple[float, float]] = {
    "backbone.drop_path": (0, 0.9),
    **{f"views.{name}": (0, 1) for name in ("flip", "jitter", "gray")},
    "views.hue": (0, 0.5),
    **{f"views.{name}": (0, 1) for name in ("brightness", "contrast", "saturation")},
    "eval.limit": (0, 2**31 - 1),
    "eval.resolution": (0, 4096),
    "eval.crop": (0.05, 1),
    "eval.k": (1, 2**20),
    "eval.temperature": (1e-3, 1e3),
}
_DENSE: dict[str, tuple[float, float]] = {
    "backbone.freeze": (0, 1000),
    "optim.layer_decay": (0.01, 1),
    "augment.flip": (0, 1),
    "augment.brightness": (0, 1),
    "augment.contrast": (0, 1),
    "augment.saturation": (0, 1),
    "eval.overlap": (0, 0.9),
}
_GUIDED: dict[str, tuple[float, float]] = {
    "head.guided.width": (8, 2**16),
    "head.guided.dropout": (0, 0.99),
    "head.guided.prior": (0, 1e3),
}
TASK_RANGES: dict[str, dict[str, tuple[float, float]]] = {
    "segmentation": {
        **_DENSE,
        **_GUIDED,
        "head.pac_joint.channels": (1, 2**16),
        "head.pac_joint.guide_channels": (1, 16),
        "eval.threshold": (0, 1),
        **{f"loss.{name}": (0, 1e9) for name in BINARY},
    },
    "multiclass": {
        **_DENSE,
        **_GUIDED,
        "label_smoothing": (0, 1),
        "auxiliary": (0, 1e3),
        **{
            f"head.{head}.{key}": limits
            for head in ("deeplabv3", "deeplabv3plus")
            for key, limits in (("channels", (1, 2**16)), ("dropout", (0, 0.99)))
        },
        "head.deeplabv3plus.low_width": (4, 2**16),
        **{f"loss.{name}": (0, 1e9) for name in MULTICLASS},
    },
    "attention": {
        **_DENSE,
        "questions": (1, 1000),
        "head.attention.width": (1, 2**16),
        "head.attention.channels": (8, 2**16),
        "head.attention.low_channels": (8, 2**16),
        "head.attention.dropout": (0, 0.99),
        **{f"loss.{name}": (0, 1e9) for name in MULTICLASS},
    },
    "rotation": {**_PRETRAINING, "views.size": (8, 4096)},
    "dino": {
        **_PRETRAINING,
        "views.global_size": (8, 4096),
        "views.local_size": (8, 4096),
        "views.local_count": (0, 64),
        "dino.outputs": (2, 2**24),
        "dino.hidden": (1, 2**20),
        "dino.bottleneck": (1, 2**20),
        "dino.student_temperature": (1e-3, 10),
        "dino.teacher_temperature": (1e-3, 10),
        "dino.warmup_teacher_temperature": (1e-3, 10),
        "dino.warmup_teacher_epochs": (0, 1e6),
        "dino.momentum": (0, 1),
        "dino.center_momentum": (0, 1),
        "dino.freeze_last_layer": (0, 1e6),
    },
}

# Keys that do not change what a step computes: a run may go on with others.
_FREE = ("eval", "data.threads", "data.workers", "data.memory_gigabytes", "data.cache_dir")
_FREE += ("data.cache_gigabytes", "data.root", "train.log_every", "train.eval_every")
_FREE += ("train.checkpoint_every", "sharding")


class ConfigError(ValueError):
    """A config value that is not allowed; the message names the key and what is allowed."""


def flatten(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """`{"a.b": value}` of a nested config; tuples become lists, as in JSON."""
    flat = {}
    for key, value in config.items():
        if isinstance(value, Mapping | ml_collections.ConfigDict):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = list(value) if isinstance(value, tuple) else value
    return flat


def check_overrides(arguments: Iterable[str], config: ml_collections.ConfigDict) -> None:
    """Checks that every `--config.a.b=value` names a key of `config` and fits its type.

    Raises:
      ConfigError: naming the key and the keys that exist beside it, or the type.
    """
    given = set()
    for argument in arguments:
        if not argument.startswith(("--config.", "-config.")):
            continue
        path, equals, text = argument.lstrip("-").partition("=")
        node: Any = config
        for depth, key in enumerate(keys := path.split(".")[1:]):
            if not isinstance(node, ml_collections.ConfigDict) or key not in node:
                here = ".".join(["config", *keys[:depth]])
                known = sorted(node) if isinstance(node, ml_collections.ConfigDict) else []
                raise ConfigError(
                    f"unknown key {path!r}; allowed in {here}: {', '.join(known) or 'nothing'}"
                )
            node = node[key]
        if isinstance(node, ml_collections.ConfigDict):
            raise ConfigError(f"{path} is a section; allowed in it: {', '.join(sorted(node))}")
        if isinstance(node, tuple) and path in given:
            raise ConfigError(f"{path} is given twice; allowed is once: its values would be joined")
        given.add(path)
        if equals:
            _check_type(path, text, node)


def _check_type(path: str, text: str, default: Any) -> None:
    expected = type(default)
    if expected is str:
        return
    try:
        value = {"true": True, "false": False}.get(text.lower(), None)
        value = ast.literal_eval(text) if value is None else value
    except (ValueError, SyntaxError):
        value = text
    fits = {
        bool: isinstance(value, bool),
        int: isinstance(value, int) and not isinstance(value, bool),
        float: isinstance(value, int | float) and not isinstance(value, bool),
        tuple: True,
    }
    if not fits.get(expected, True):
        raise ConfigError(f"{path}={text!r} is no {expected.__name__} (the default is {default!r})")


def validate(config: ml_collections.ConfigDict) -> None:
    """Checks every value against its choices and range, and the values against each other.

    Raises:
      ConfigError: for the first value that is not allowed.
    """
    flat = flatten(config)
    task = flat.get("task", "")
    choices = CHOICES | TASK_CHOICES.get(task, {})
    ranges = RANGES | TASK_RANGES.get(task, {})
    missing = sorted((choices.keys() | ranges.keys()) - flat.keys())
    if missing:
        raise ConfigError(
            f"the config lacks {', '.join(missing)}: it is damaged or of another version"
        )
    for key, allowed in choices.items():
        if flat[key] not in allowed:
            raise ConfigError(f"config.{key} is {flat[key]!r}; allowed: {', '.join(allowed)}")
    for key, (low, high) in ranges.items():
        # The negation also catches NaN.
        if not low <= flat[key] <= high:
            raise ConfigError(f"config.{key} is {flat[key]!r}; allowed: {low} to {high}")
    if any(size := _pair(config, "data.size", int)) and not all(size):
        raise ConfigError(f"config.data.size is {size}; allowed: (0, 0), or two sizes above 0")
    if task in DENSE_TASKS:
        _validate_dense(config)
    if task in ("dino", "rotation"):
        _validate_pretraining(config)
    if config.train.batch % config.train.accumulate:
        raise ConfigError(
            f"config.train.accumulate is {config.train.accumulate}; allowed: divisors of "
            f"config.train.batch={config.train.batch}"
        )
    if not config.train.steps and not config.train.epochs:
        raise ConfigError("config.train.steps and config.train.epochs are both 0; set one")
    if config.data.name in sources.DRAWN and config.data.root:
        raise ConfigError(
            f"config.data.root is {config.data.root!r}, but config.data.name={config.data.name!r} "
            "draws its own images; add --config.data.name="
            + ("folder, coco or tfds" if task in DENSE_TASKS else "images or tfds")
            + " to read it"
        )
    if config.data.name == "tfds" and not config.data.tfds.name:
        raise ConfigError("config.data.name='tfds' needs --config.data.tfds.name=NAME")
    if config.data.name in ("folder", "coco", "images") and not config.data.root:
        raise ConfigError(f"config.data.name={config.data.name!r} needs --config.data.root=FOLDER")


def _validate_dense(config: ml_collections.ConfigDict) -> None:
    low, high = _pair(config, "augment.scale", float)
    if not 0 < low <= high:
        raise ConfigError(f"config.augment.scale is ({low}, {high}); allowed: 0 < low <= high")
    layers = tuple(config.backbone.layers)
    if not layers or not all(isinstance(layer, int) for layer in layers):
        raise ConfigError(
            f"config.backbone.layers is {layers}; allowed: block numbers, as in (-1,)"
        )
    if "guided" in config.head:
        widths = tuple(config.head.guided.guide_widths)
        if not widths or not all(isinstance(w, int) and w > 0 for w in widths):
            raise ConfigError(
                f"config.head.guided.guide_widths is {widths}; allowed: channels at 1/2, 1/4, ... of "
                "the image, as in (16, 32, 64)"
            )
    if "guided" in config.head and config.head.guided.width % 8:
        raise ConfigError(
            f"config.head.guided.width is {config.head.guided.width}; allowed: multiples of 8"
        )
    if not any(config.loss.values()):
        raise ConfigError(f"all of config.loss is 0; give one of {', '.join(config.loss)} a weight")
    if config.task == "attention":
        for key in ("channels", "low_channels"):
            if config.head.attention[key] % 8:
                raise ConfigError(
                    f"config.head.attention.{key} is {config.head.attention[key]}; allowed: multiples "
                    "of 8"
                )
    if config.backbone.weights and config.backbone.norm != "batch":
        raise ConfigError(
            f"config.backbone.norm is {config.backbone.norm!r}; allowed with config.backbone.weights: "
            "'batch', which theirs is"
        )
    if config.backbone.train == "none" and config.backbone.freeze:
        raise ConfigError(
            f"config.backbone.freeze is {config.backbone.freeze}; with config.backbone.train='none' "
            "all is frozen: allowed is 0"
        )
    if config.backbone.stride not in (0, 4, 8, 16, 32):
        raise ConfigError(
            f"config.backbone.stride is {config.backbone.stride}; allowed: 0, 4, 8, 16, 32"
        )
    if config.data.name == "images":
        raise ConfigError(
            "config.data.name='images' has no masks; allowed: shapes, folder, coco, tfds"
        )
    if config.task == "segmentation" and config.data.name == "coco":
        raise ConfigError(
            "config.data.name='coco' has several classes; use configs/deeplab_multiclass.py or "
            "configs/attention_singleclass.py"
        )
    if config.task != "segmentation" and tuple(config.data.categories):
        raise ConfigError(
            f"config.data.categories is {tuple(config.data.categories)}; several classes are named in "
            "config.data.classes"
        )
    if config.task != "segmentation":
        _validate_classes(config)
    window = _pair(config, "eval.window", int)
    if any(window) and not all(window):
        raise ConfigError(f"config.eval.window is {window}; allowed: (0, 0), or two sizes above 0")
    scales = tuple(config.eval.scales)
    if not scales or not all(isinstance(s, int | float) and 0 < s <= 8 for s in scales):
        raise ConfigError(f"config.eval.scales is {scales}; allowed: numbers above 0, at most 8")


def _validate_classes(config: ml_collections.ConfigDict) -> None:
    data = config.data
    if tuple(data.classes) and data.name in sources.DRAWN:
        raise ConfigError(
            f"config.data.classes is {tuple(data.classes)}; allowed with config.data.name={data.name!r}, "
            "which has its own: ()"
        )
    if tuple(data.void) and data.name != "folder":
        raise ConfigError(
            f"config.data.void is {tuple(data.void)}; allowed with config.data.name={data.name!r}: ()"
            + (" (config.data.tfds.void is for tfds)" if data.name == "tfds" else "")
        )
    for name in ("deeplabv3", "deeplabv3plus"):
        if name not in config.head:
            continue
        rates, reduce = tuple(config.head[name].rates), config.head[name].reduce
        if not all(isinstance(rate, int) and rate > 0 for rate in rates):
            raise ConfigError(
                f"config.head.{name}.rates is {rates}; allowed: whole numbers above 0, or () for those of "
                "the stride"
            )
        if reduce < 0:
            raise ConfigError(
                f"config.head.{name}.reduce is {reduce}; allowed: 0 (off) or channels"
            )


def _validate_pretraining(config: ml_collections.ConfigDict) -> None:
    task = config.task
    if config.data.name == "coco":
        raise ConfigError(
            "config.data.name='coco' is read for its masks; allowed for pretraining: images, which takes "
            "the folder of the images, folder, tfds, shapes, kinds"
        )
    views = config.views
    for key in (f"views.{name}" for name in views if name.endswith("scale")):
        low, high = _pair(config, key, float)
        if not 0 < low <= high <= 1:
            raise ConfigError(f"config.{key} is ({low}, {high}); allowed: 0 < low <= high <= 1")
    for key in ("blur", "solarize"):
        value = tuple(views.get(key, (0, 0, 0)))
        if len(value) != 3 or not all(isinstance(v, int | float) and 0 <= v <= 1 for v in value):
            raise ConfigError(
                f"config.views.{key} is {value}; allowed: three probabilities, of the first and the "
                "second global crop and of the local ones"
            )
    if task == "dino" and config.optim.average:
        raise ConfigError(
            f"config.optim.average is {config.optim.average}; allowed for dino: 0 (its teacher is the "
            "average, by dino.momentum)"
        )
    if not config.backbone.weights:
        check_crops(config, BACKBONES[config.backbone.variant])


def check_crops(config: ml_collections.ConfigDict, variant: AnyVariant) -> None:
    """Raises ConfigError unless the patches of the backbone divide every crop of `config.views`."""
    for name, size in config.views.items():
        if name.endswith("size") and size % variant.patch:
            raise ConfigError(
                f"config.views.{name} is {size}; allowed: multiples of the patch {variant.patch} of "
                f"{variant.name}"
            )


def _pair(config: ml_collections.ConfigDict, key: str, kind: type) -> tuple[Any, Any]:
    section, name = key.split(".")
    value = tuple(config[section][name])
    numbers = (int,) if kind is int else (int, float)
    if len(value) != 2 or not all(
        isinstance(v, numbers) and not isinstance(v, bool) and v >= 0 for v in value
    ):
        raise ConfigError(
            f"config.{key} is {value!r}; allowed: two numbers ({kind.__name__}), not negative"
        )
    return value


def check_same_run(stored: Mapping[str, Any], config: Mapping[str, Any], workdir: Path) -> None:
    """Checks that a run begun with `stored` may go on with `config`.

    Raises:
      ConfigError: listing the keys that differ and matter.
    """
    old, new = flatten(stored), flatten(config)
    differ = [
        f"  {key}: {old.get(key)!r} there, {new.get(key)!r} now"
        for key in sorted(old.keys() | new.keys())
        if old.get(key) != new.get(key) and not key.startswith(_FREE)
    ]
    if differ:
        lines = "\n".join(differ)
        raise ConfigError(
            f"{workdir} holds a run of another config:\n{lines}\n"
            "Give another --workdir, the same config, or remove that folder."
        )
