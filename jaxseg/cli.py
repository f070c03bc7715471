"""The command: its options, and one clear line for every mistake."""

import dataclasses
import logging
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jaxseg.huge_pages import restart_with_huge_pages

# What to do, what that needs, and an example after `jaxseg`.
MODES = {
    "train": (
        "train, or go on where a run was stopped, and score",
        "--config=pac_objseg --workdir=W",
    ),
    "eval": ("score a run again", "--mode=eval --workdir=W"),
    "predict": (
        "write masks of images",
        "--mode=predict --workdir=W --inputs='photos/*.jpg' --outputs=masks",
    ),
    "compare": ("runs on the same images", "--mode=compare --workdir=C --workdirs=D,A"),
    "analyze": ("what a backbone has learnt", "--mode=analyze --workdir=P"),
    "export": (
        "a run's backbone as one file",
        "--mode=export --workdir=P --outputs=vit.safetensors",
    ),
}
# Option -> (what it starts as, what it is).
OPTIONS: dict[str, tuple[Any, str]] = {
    "config": ("", "an experiment: the name of one of ours or a file, and presets after a colon"),
    "workdir": ("", "the folder of the run"),
    "mode": ("train", "what to do"),
    "inputs": ("", "predict: an image, a folder or a quoted glob"),
    "outputs": ("", "predict: the folder for masks; export: a .safetensors file"),
    "classes": ((), "predict: classes to write one by one, with commas; none for all in one"),
    "probabilities": (False, "predict: write the probabilities too"),
    "workdirs": ((), "compare: folders of the runs, with commas; --workdir gets the page"),
    "distributed": (False, "join the other processes of a TPU pod or GPU cluster"),
    "coordinator": ("", "for clusters that JAX does not know by itself: host:port of process 0"),
    "processes": (0, "how many processes there are"),
    "process": (-1, "which of them this is, from 0"),
}


class UsageError(ValueError):
    """A command that cannot be understood."""


@dataclasses.dataclass(frozen=True)
class Command:
    """A command line: the options, and the texts of `--config.a.b=value` by key."""

    options: dict[str, Any]
    overrides: dict[str, str]


def parse(arguments: Sequence[str]) -> Command:
    """Reads a command line.

    Raises:
      UsageError: naming the argument, and what is allowed.
    """
    options = {name: value for name, (value, _) in OPTIONS.items()}
    overrides: dict[str, str] = {}
    rest = list(arguments)
    while rest:
        argument = rest.pop(0)
        if not argument.startswith("-"):
            raise UsageError(f"unexpected argument {argument!r}; options begin with --")
        name, equals, text = argument.lstrip("-").partition("=")
        key = name.removeprefix("config.")
        default = None if key != name else OPTIONS.get(name, (None,))[0]
        negated = name.removeprefix("no")
        if name != negated and OPTIONS.get(negated, ("",))[0] is False:
            options[negated] = False
            continue
        if key == name and name not in OPTIONS:
            known = ", ".join(f"--{option}" for option in OPTIONS)
            raise UsageError(f"unknown option --{name}; allowed: {known}, --help")
        if default is False:
            options[name] = not equals or _boolean(name, text)
            continue
        if not equals:
            if not rest:
                raise UsageError(f"--{name} needs a value: --{name}=...")
            text = rest.pop(0)
        if key == name:
            options[name] = _value(name, text, default)
        elif key in overrides and text.strip().startswith("("):
            raise UsageError(f"config.{key} is given twice; allowed is once")
        else:
            overrides[key] = text
    if options["mode"] not in MODES:
        raise UsageError(f"--mode={options['mode']}; allowed: {'|'.join(MODES)}")
    return Command(options, overrides)


def _boolean(name: str, text: str) -> bool:
    if text.lower() not in ("true", "false", "1", "0"):
        raise UsageError(f"--{name}={text}; allowed: true, false")
    return text.lower() in ("true", "1")


def _value(name: str, text: str, default: Any) -> Any:
    if isinstance(default, tuple):
        return tuple(part for part in text.split(",") if part)
    if isinstance(default, int):
        try:
            return int(text)
        except ValueError:
            raise UsageError(f"--{name}={text}; allowed: a whole number") from None
    # Shells leave ~ alone behind an = sign.
    return os.path.expanduser(text) if name in ("workdir", "inputs", "outputs") else text


def help_text() -> str:
    """What `--help` prints."""
    from jaxseg import schema
    from jaxseg.backbones import BACKBONES
    from jaxseg.data.formats import FORMATS
    from jaxseg.heads import HEADS
    from jaxseg.networks import NETWORKS
    from jaxseg.tasks import TASKS
    from jaxseg.weights.catalog import NAMES

    lines = [
        "usage: jaxseg --config=NAME[:PRESET,...] --workdir=FOLDER [--config.KEY=VALUE ...]",
        "",
    ]
    lines += ["modes, with an example of each:"]
    for mode, (what, example) in MODES.items():
        lines += [f"  {mode:9s}{what}", f"           jaxseg {example}"]
    lines += ["", "configs by name or as a file, and presets (a task's name: its defaults):"]
    for name, (first, presets) in schema.config_summaries().items():
        lines += [f"  {name:22s}{first}", f"  {'':22s}  {', '.join(presets)}"]
    lines += ["", "options:"]
    lines += [f"  --{name:15s}{what}" for name, (_, what) in OPTIONS.items()]
    lines += ["", "names in configs:"]
    for what, names in {
        "task": TASKS,
        "data.name": FORMATS,
        "backbone.weights": NAMES,
        "backbone.variant": BACKBONES,
        "head.name": HEADS,
        "network.name": NETWORKS,
    }.items():
        lines.append(f"  {what:18s}{', '.join(names)}")
    losses = {n: None for t in TASKS.values() for n in t.sections().get("loss", ())}
    lines.append(f"  {'loss.*':18s}{', '.join(losses)}")
    return "\n".join(lines)


def _log_to_terminal() -> None:
    """Shows warnings and our own messages, without the chatter of absl (Orbax, Grain)."""
    from absl import logging as absl_logging

    logging.basicConfig(level=logging.WARNING, format="%(message)s", force=True)
    # Only now: as long as absl's handler is the root's, this would set the root's level.
    absl_logging.set_verbosity(absl_logging.ERROR)
    logging.getLogger("jaxseg").setLevel(logging.INFO)


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the command of the process, or `arguments` within another program."""
    ours = arguments is None
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    if not arguments or {"--help", "-h", "-help", "--helpfull"} & set(arguments):
        print(help_text())
        if not arguments:
            sys.exit("error: nothing to do; see the examples above")
        return
    try:
        command = parse(arguments)
        if not command.options["workdir"]:
            raise UsageError("--workdir= is empty; give the folder of the run")
    except UsageError as error:
        sys.exit(f"error: {error}")
    if ours:
        restart_with_huge_pages(sys.argv[0])
    try:
        config, values = _config(command)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    _log_to_terminal()
    import jax

    options = command.options
    if options["distributed"]:
        jax.distributed.initialize(
            options["coordinator"] or None,
            options["processes"] or None,
            options["process"] if options["process"] >= 0 else None,
        )
    from jaxseg.train.loop import Interrupted

    try:
        _run(options, config, values)
    # Mistakes and conditions that a message explains better than a traceback.
    except (ValueError, OSError, Interrupted) as error:
        sys.exit(f"error: {error}")


def _config(command: Command) -> tuple[Any, dict[str, Any]]:
    """(the config asked for, with its overrides, or None; the overrides' values by key)."""
    from jaxseg import renames, schema, workdir

    options, texts = command.options, command.overrides
    for old, new in renames.KEYS.items():
        if old in texts:
            texts[new] = texts.pop(old)
            print(f"config.{old} is called config.{new} now", file=sys.stderr)
    config = schema.read_config(options["config"]) if options["config"] else None
    if config is None and not texts:
        return None, {}
    # Without a config the values are those of the run that is there.
    folders = [*options["workdirs"], options["workdir"]]
    base = workdir.read_config(Path(folders[0])) if config is None else config
    if config is None and options["mode"] == "train":
        raise schema.ConfigError(f"config.{next(iter(texts))} needs --config=NAME as well")
    values = schema.override(base, texts)
    flat, changed = renames.renamed(schema.flatten(base))
    for key, (old, new) in changed.items():
        if key in values:
            values[key] = new
        print(f"config.{key}={old} is called {new} now", file=sys.stderr)
    return (schema.nested(flat) if config is not None else None), values


def _run(options: dict[str, Any], config: Any, overrides: dict[str, Any]) -> None:
    """Runs the mode."""
    from jaxseg.schema import ConfigError

    mode, workdir = options["mode"], Path(options["workdir"])
    inputs, outputs = options["inputs"], options["outputs"]
    if mode == "train":
        from jaxseg import run

        if config is None:
            raise ConfigError("--mode=train needs --config=NAME, such as --config=pac_objseg")
        _check_variant(config, overrides)
        run.train(config, workdir)
    elif mode == "eval":
        from jaxseg import run

        run.evaluate(workdir, overrides)
    elif mode == "analyze":
        from jaxseg import analyze

        analyze.analyze(config, overrides, workdir)
    elif mode == "compare":
        from jaxseg import compare

        folders = [Path(os.path.expanduser(folder)) for folder in options["workdirs"]]
        compare.compare(folders, overrides, workdir)
    elif mode == "export":
        if not outputs:
            raise ConfigError("--mode=export needs --outputs=FILE.safetensors")
        if overrides:
            raise ConfigError(
                f"--mode=export takes no config.{next(iter(overrides))}: it writes what was saved last"
            )
        _export(workdir, outputs)
    else:
        from jaxseg import predict

        if not inputs or not outputs:
            raise ConfigError("--mode=predict needs --inputs=FILE|FOLDER|GLOB and --outputs=FOLDER")
        written = predict.predict(
            *(workdir, inputs, Path(outputs), overrides),
            classes=options["classes"],
            probabilities=options["probabilities"],
        )
        print(f"{len(written)} predictions in {outputs}")


def _export(workdir: Path, outputs: str) -> None:
    from jaxseg import workdir as folder
    from jaxseg.backbones import pretrained
    from jaxseg.tasks import TASKS

    exported = pretrained.export(workdir, outputs)
    size = Path(outputs).stat().st_size / 1e6
    print(f"{exported.variant.name}, {size:.1f} MB in {outputs}, sha256 {exported.digest}")
    if (workdir / "config.json").exists() and TASKS[folder.read_config(workdir).task].heads:
        print("this is the backbone alone: the head of the run is not in it")


def _check_variant(config: Any, overrides: dict[str, Any]) -> None:
    """Refuses a variant on the command line that the weights of the config would overrule."""
    from jaxseg.backbones import pretrained
    from jaxseg.schema import ConfigError

    asked, source = overrides.get("backbone.variant"), config.backbone.weights
    if asked is None or not source:
        return
    found = pretrained.load(source).variant.name
    if asked != found:
        raise ConfigError(
            f"config.backbone.variant is {asked}, but config.backbone.weights={source} holds a {found}; "
            "leave one of them out (--config.backbone.weights= starts from scratch)"
        )
