"""What `main.py` can do, by the name of the mode."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import ml_collections

from jaxseg import analyze, compare, predict, pretrain, run, weights
from jaxseg import workdir as folder
from jaxseg.config import DENSE_TASKS, ConfigError
from jaxseg.train.loop import Interrupted

# Mistakes and conditions that a message explains better than a traceback.
USER_ERRORS = (ValueError, OSError, Interrupted)


def main(
    mode: str,
    *,
    config: ml_collections.ConfigDict | None,
    overrides: Mapping[str, Any],
    workdir: Path,
    inputs: str | None = None,
    outputs: str | None = None,
    classes: Sequence[str] = (),
    probabilities: bool = False,
    workdirs: Sequence[str] = (),
) -> None:
    """Runs a mode: `train` (needs `config`), `eval`, `analyze` (a run, or the weights of `config`),
    `predict` (needs `inputs` and `outputs`), `compare` (needs `workdirs`) or `export` (of the backbone;
    needs `outputs`)."""
    if mode == "train":
        if config is None:
            raise ConfigError("--mode=train needs --config=configs/FILE.py")
        _check_variant(config, overrides)
        _module(config.task).train(config, workdir)
    elif mode == "eval":
        _module(folder.load(workdir, overrides)[0].task).evaluate(workdir, overrides)
    elif mode == "analyze":
        analyze.analyze(config, overrides, workdir)
    elif mode == "compare":
        compare.compare([Path(w) for w in workdirs], overrides, workdir)
    elif mode == "export":
        if not outputs:
            raise ConfigError("--mode=export needs --outputs=FILE.safetensors")
        if overrides:
            raise ConfigError(
                f"--mode=export takes no config.{next(iter(overrides))}: it writes what was saved last"
            )
        exported = weights.export(workdir, outputs)
        size = Path(outputs).stat().st_size / 1e6
        print(f"{exported.variant.name}, {size:.1f} MB in {outputs}, sha256 {exported.digest}")
    else:
        if not inputs or not outputs:
            raise ConfigError("--mode=predict needs --inputs=FILE|FOLDER|GLOB and --outputs=FOLDER")
        task = folder.load(workdir, overrides)[0].task
        if task not in DENSE_TASKS:
            raise ConfigError(
                f"--workdir={workdir} holds a run of {task}, which predicts no masks: train "
                f"configs/pac_objseg.py with --config.backbone.weights={workdir} first"
            )
        masks = predict.predict(
            *(workdir, inputs, Path(outputs), overrides),
            classes=tuple(classes),
            probabilities=probabilities,
        )
        print(f"{len(masks)} masks and overlays in {outputs}")


def _check_variant(config: ml_collections.ConfigDict, overrides: Mapping[str, Any]) -> None:
    """Refuses a variant on the command line that the weights of the config would overrule."""
    asked, source = overrides.get("backbone.variant"), config.backbone.weights
    if asked is None or not source:
        return
    found = weights.load(source).variant.name
    if asked != found:
        raise ConfigError(
            f"config.backbone.variant is {asked}, but config.backbone.weights={source} holds a {found}; "
            "leave one of them out (--config.backbone.weights= starts from scratch)"
        )


def _module(task: str):
    """What trains and evaluates a task."""
    return run if task in DENSE_TASKS else pretrain
