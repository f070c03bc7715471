"""The folder of a run: what it holds, and whether a call fits what is in it.

config.json      the config; objects.json in its place for a run begun from objects
model.json       what these do not say: the backbone's shape, and what was found in the training data
checkpoints/     the state at some steps            frozen/     parameters that never change
metrics.jsonl    one object for each logged step    tensorboard/
eval.json        the scores                         report/     pictures
features/        of held-out images in the course of a pretraining
"""

import contextlib
import dataclasses
import fcntl
import json
import logging
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import ml_collections
from jax.experimental import multihost_utils

from jaxseg import assembly, backbones, renames, schema
from jaxseg.schema import ConfigError
from jaxseg.tasks import Facts
from jaxseg.train.writers import write_json

log = logging.getLogger(__name__)

_LENGTH = ("train.steps", "train.epochs", "train.min_steps")


@dataclasses.dataclass(frozen=True)
class Description:
    """What `model.json` holds.

    Attributes:
      variant: the backbone's shape; None for a network without a backbone of ours.
      facts: of the training data.
      frozen_sha256: of the frozen parameters; empty where all are trained.
    """

    variant: Any
    facts: Facts
    frozen_sha256: str

    def to_json(self) -> dict[str, Any]:
        variant = None if self.variant is None else backbones.to_json(self.variant)
        fields = {"variant": variant, **dataclasses.asdict(self.facts)}
        return json.loads(json.dumps(fields | {"frozen_sha256": self.frozen_sha256}))

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> "Description":
        try:
            variant = value["variant"] and backbones.from_json(value["variant"])
            facts = Facts(
                tuple(value["size"]),
                tuple(value["categories"]),
                value["examples"],
                tuple(value.get("names", ())),
                tuple(value.get("class_weights", ())),
            )
            return cls(variant, facts, value["frozen_sha256"])
        except (KeyError, TypeError) as error:
            raise ConfigError(f"model.json is damaged or of another version: {error!r}") from error


def read_description(workdir: Path) -> Description:
    """Reads `model.json`."""
    return Description.from_json(read_json(workdir / "model.json"))


def check(workdir: Path, config: ml_collections.ConfigDict) -> None:
    """Checks, before anything is computed, that a run of `config` may begin or go on in `workdir`.

    A run that has ended may go on for longer.

    Raises:
      ConfigError: the folder holds a run of another config, or is none.
    """
    check_folder(workdir)
    if not has_checkpoint(workdir):
        return
    if (workdir / "objects.json").exists():
        raise ConfigError(
            f"{workdir} holds a run that was begun from objects; give another --workdir"
        )
    if (workdir / "config.json").exists():
        stored, _ = _stored(workdir)
        if not _longer(workdir, stored, config):
            schema.check_same_run(stored.to_dict(), config.to_dict(), workdir)


def check_folder(workdir: Path) -> None:
    """Raises ConfigError if a file is where a folder of the run should be."""
    for path in (workdir, workdir / "checkpoints"):
        if path.exists() and not path.is_dir():
            raise ConfigError(f"--workdir={workdir}: {path} is a file, not a folder")


def _longer(workdir: Path, stored: ml_collections.ConfigDict, config) -> bool:
    """Whether `config` is that of a run that has ended, but for a greater length."""
    differ = schema.differences(stored.to_dict(), config.to_dict(), lambda one: one.free)
    keys = {line.split(":")[0].strip() for line in differ.splitlines()}
    if not keys or not keys <= set(_LENGTH):
        return False
    examples = read_description(workdir).facts.examples
    if not examples and not stored.train.steps:
        return False
    ended, longer = (assembly.total_steps(c.train, examples) for c in (stored, config))
    return last_step(workdir) == ended < longer


def has_checkpoint(workdir: Path) -> bool:
    """Whether there is a finished one."""
    return last_step(workdir) > -1


def last_step(workdir: Path) -> int:
    """The step of the newest finished checkpoint, -1 where there is none."""
    # A save that was cut short has a longer name.
    names = (path.name for path in (workdir / "checkpoints").glob("*"))
    return max((int(name) for name in names if name.isdigit()), default=-1)


def begin(workdir: Path, config: ml_collections.ConfigDict, description: Description) -> None:
    """Writes `config.json` and `model.json`, or checks that a run to be resumed is the same.

    A folder without any checkpoint is begun anew: an attempt that came to nothing, because of a
    value that was wrong, must not stand in the way of the right one. Of a run that goes on after its end
    `config.json` keeps how long it was to be before.

    Raises:
      ConfigError: the folder cannot be written, or holds another run.
    """
    check(workdir, config)
    written = config.to_dict()
    if has_checkpoint(workdir) and (workdir / "config.json").exists():
        stored, history = _stored(workdir)
        if _longer(workdir, stored, config):
            steps = last_step(workdir)
            log.info("the run had ended after %d steps; it goes on from there", steps)
            history = [*history, {"steps": steps, "train": stored.train.to_dict()}]
        if history:
            written["history"] = history
    begin_with(workdir, description, {"config.json": written})


def begin_with(workdir: Path, description: Description, files: Mapping[str, Any]) -> None:
    """Writes `model.json` and `files`, or checks that what is there is the same model and data."""
    new = description.to_json()
    resumed = has_checkpoint(workdir)
    if resumed and (workdir / "model.json").exists():
        old = read_json(workdir / "model.json")
        # Runs of before they were kept have no examples, and no names.
        known = {k: v for k, v in new.items() if old.get(k) or k not in ("examples", "names")}
        differ = [
            f"  {k}: {old.get(k)} there, {v} now" for k, v in known.items() if old.get(k) != v
        ]
        if differ:
            lines = "\n".join(differ)
            raise ConfigError(f"{workdir} holds a run with another model or data:\n{lines}")
    if jax.process_index() == 0:
        try:
            if not resumed:
                # They would be taken for this run's.
                for name in ("frozen", "features"):
                    shutil.rmtree(workdir / name, ignore_errors=True)
                for name in ("config.json", "objects.json"):
                    (workdir / name).unlink(missing_ok=True)
            write_json(workdir / "model.json", new)
            for name, value in files.items():
                write_json(workdir / name, value)
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
    stored = read_config(workdir)
    flat, _ = renames.renamed({**schema.flatten(stored), **overrides})
    config = schema.nested(flat)
    schema.validate(config)
    lines = schema.differences(stored.to_dict(), config.to_dict(), lambda one: one.open)
    if lines:
        raise ConfigError(
            f"{workdir} holds a run of another config:\n{lines}\n"
            "Give another --workdir, the same config, or remove that folder."
        )
    return config, read_description(workdir)


def read_config(workdir: Path) -> ml_collections.ConfigDict:
    """The config of a run, in today's names and with today's keys.

    Raises:
      ConfigError: there is no run that was begun from a config.
    """
    return _stored(workdir)[0]


def _stored(workdir: Path) -> tuple[ml_collections.ConfigDict, list[Any]]:
    """(the stored config, how long its run was to be before)."""
    if not (workdir / "config.json").exists():
        if (workdir / "objects.json").exists():
            raise ConfigError(
                f"--workdir={workdir} holds a run that was begun from objects: only "
                "jaxseg.load(workdir, task=..., data=...) can restore it"
            )
        raise ConfigError(f"--workdir={workdir} holds no run: config.json is missing")
    value = read_json(workdir / "config.json")
    history = value.pop("history", [])
    return schema.modernized(value), history


def read_json(path: Path) -> dict[str, Any]:
    """Raises ConfigError where it cannot be read."""
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ConfigError(f"cannot read {path}: {error}") from error
