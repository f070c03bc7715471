"""The folder of a run: what it holds, and whether a call fits what is in it.

config.json      the config
model.json       what the config alone does not say: the backbone's shape, image size, categories, classes
checkpoints/     the state at some steps            frozen/     parameters that never change
metrics.jsonl    one object for each logged step    tensorboard/
eval.json        the scores                         report/     pictures
features/        of held-out images in the course of a pretraining
"""

import contextlib
import dataclasses
import fcntl
import json
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import ml_collections
from jax.experimental import multihost_utils

from jaxseg.config import ConfigError, check_same_run, validate
from jaxseg import backbones
from jaxseg.train.writers import write_json

# Evaluation, analysis and prediction take all but these sections as they were trained.
_OPEN_SECTIONS = ("data", "eval", "sharding")


@dataclasses.dataclass(frozen=True)
class Description:
    """What `model.json` holds.

    Attributes:
      variant: the backbone's shape.
      size: (H, W) of the training images.
      categories: of the training data.
      frozen_sha256: of the frozen parameters; empty where all are trained.
      examples: number of training images, from which schedules count epochs; 0 where none does.
      names: of the values in masks; empty where there are none.
      class_weights: of the classes in the loss; empty for equal ones.
    """

    variant: backbones.AnyVariant
    size: tuple[int, int]
    categories: tuple[str, ...]
    frozen_sha256: str
    examples: int = 0
    names: tuple[str, ...] = ()
    class_weights: tuple[float, ...] = ()

    def to_json(self) -> dict[str, Any]:
        fields = dataclasses.asdict(self) | {"variant": backbones.to_json(self.variant)}
        return json.loads(json.dumps(fields))

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> "Description":
        try:
            return cls(
                backbones.from_json(value["variant"]),
                tuple(value["size"]),
                tuple(value["categories"]),
                value["frozen_sha256"],
                value["examples"],
                tuple(value.get("names", ())),
                tuple(value.get("class_weights", ())),
            )
        except (KeyError, TypeError) as error:
            raise ConfigError(f"model.json is damaged or of another version: {error!r}") from error


def check(workdir: Path, config: ml_collections.ConfigDict) -> None:
    """Checks, before anything is computed, that a run of `config` may begin or go on in `workdir`.

    Raises:
      ConfigError: the folder holds a run of another config, or is none.
    """
    for path in (workdir, workdir / "checkpoints"):
        if path.exists() and not path.is_dir():
            raise ConfigError(f"--workdir={workdir}: {path} is a file, not a folder")
    if _has_checkpoint(workdir) and (workdir / "config.json").exists():
        check_same_run(_read(workdir / "config.json"), config.to_dict(), workdir)


def _has_checkpoint(workdir: Path) -> bool:
    # A save that was cut short has a longer name.
    return any(path.name.isdigit() for path in (workdir / "checkpoints").glob("*"))


def begin(workdir: Path, config: ml_collections.ConfigDict, description: Description) -> None:
    """Writes `config.json` and `model.json`, or checks that a run to be resumed is the same.

    A folder without any checkpoint is begun anew: an attempt that came to nothing, because of a
    value that was wrong, must not stand in the way of the right one.

    Raises:
      ConfigError: the folder cannot be written, or holds another run.
    """
    check(workdir, config)
    new = description.to_json()
    resumed = _has_checkpoint(workdir)
    if resumed and (workdir / "model.json").exists():
        old = _read(workdir / "model.json")
        differ = [f"  {k}: {old.get(k)} there, {new[k]} now" for k in new if old.get(k) != new[k]]
        if differ:
            lines = "\n".join(differ)
            raise ConfigError(f"{workdir} holds a run with another model or data:\n{lines}")
    if jax.process_index() == 0:
        try:
            if not resumed:
                # They would be taken for this run's.
                for name in ("frozen", "features"):
                    shutil.rmtree(workdir / name, ignore_errors=True)
            write_json(workdir / "model.json", new)
            write_json(workdir / "config.json", config.to_dict())
        except OSError as error:
            raise ConfigError(f"cannot write to --workdir={workdir}: {error}") from error
    if jax.process_count() > 1:
        # Or another process would still find, and wait to share, what is being removed.
        multihost_utils.sync_global_devices("workdir begun")


@contextlib.contextmanager
def lock(workdir: Path) -> Iterator[None]:
    """Makes the workdir and holds it for this process until it ends, however it ends.

    Raises:
      ConfigError: it cannot be written, or another process is training in it.
    """
    if jax.process_index() != 0:
        yield
        return
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        file = (workdir / ".lock").open("w")
    except OSError as error:
        raise ConfigError(f"cannot write to --workdir={workdir}: {error}") from error
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ConfigError(f"--workdir={workdir} is in use by another training") from error
        except OSError:
            pass  # Some network file systems have no locks.
        yield


def load(
    workdir: Path, overrides: Mapping[str, Any]
) -> tuple[ml_collections.ConfigDict, Description]:
    """Reads the config of a run, with overrides, and the description of its model.

    Args:
      workdir: the run's folder.
      overrides: `{"data.root": value}` of values that replace the stored ones.

    Raises:
      ConfigError: there is no run, or an override is not allowed or changes the model.
    """
    if not (workdir / "config.json").exists():
        raise ConfigError(f"--workdir={workdir} holds no run: config.json is missing")
    stored = _read(workdir / "config.json")
    config = _with_tuples(stored)
    config.update_from_flattened_dict(dict(overrides))
    validate(config)
    before, after = (
        {k: v for k, v in c.items() if k not in _OPEN_SECTIONS} for c in (stored, config.to_dict())
    )
    check_same_run(before, after, workdir)
    return config, Description.from_json(_read(workdir / "model.json"))


def _read(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ConfigError(f"cannot read {path}: {error}") from error


def _with_tuples(stored: Mapping[str, Any]) -> ml_collections.ConfigDict:
    """A ConfigDict of parsed JSON, lists as tuples."""

    def convert(value):
        if isinstance(value, Mapping):
            return {k: convert(v) for k, v in value.items()}
        return tuple(value) if isinstance(value, list) else value

    return ml_collections.ConfigDict(convert(stored))
