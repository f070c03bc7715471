"""Runs that are begun from objects: what is written down of them, so that they go on with the same.

`objects.json` takes the place of `config.json`. It holds the names of classes, their fields, and digests of
arrays; the objects themselves cannot be made again from it.
"""

import dataclasses
import enum
import functools
import hashlib
import inspect
import json
import logging
import types
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path, PurePath
from typing import Any

import flax.linen as nn
import jax
import numpy as np

from jaxseg import workdir as folder
from jaxseg.data.reader import Reading
from jaxseg.evaluate.scoring import Scoring
from jaxseg.options import options
from jaxseg.schema import ConfigError

log = logging.getLogger(__name__)

FILE = "objects.json"
# No step depends on it.
_FREE = ("run.sharding", "run.scoring")


def describe(value: Any, above: tuple[int, ...] = ()) -> Any:
    """A value as JSON, the same in every process that makes it in the same way.

    Modules and dataclasses are given by their fields, but for those with `compare=False` and options that
    are free; arrays by a digest; functions by their name and what they close over; other things that can be
    called by their public attributes; and whatever else by the name of its class. Code is in none of it.

    Args:
      value: anything.
      above: ids of what `value` is in, which must not be described again.
    """
    if isinstance(value, np.generic):
        value = value.item()
    if value is None or isinstance(value, str | bool | int | float):
        return value
    if isinstance(value, enum.Enum | PurePath):
        return str(value)
    if id(value) in above:
        return {"class": _name(type(value))}
    inner = functools.partial(describe, above=(*above, id(value)))
    if _is_arrays(value):
        leaves = jax.tree.leaves(value)
        return {"arrays": len(leaves), "sha256": _digest(value)}
    if isinstance(value, Mapping):
        return _mapping(value, inner)
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return _object(value, value._fields, inner)
    if isinstance(value, tuple | list | range):
        return [inner(one) for one in value]
    if isinstance(value, set | frozenset):
        return sorted((inner(one) for one in value), key=repr)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        chosen, free = dataclasses.fields(value), _free(type(value))
        names = [f.name for f in chosen if f.compare and f.name not in free]
        if isinstance(value, nn.Module):  # where it is bound is none of its fields
            names = [name for name in names if name not in ("parent", "name")]
        return _object(value, names, inner)
    if callable(value):
        return _callable(value, inner)
    return {"class": _name(type(value))}


def _free(cls: type) -> set[str]:
    return {name for name, one in options(cls).items() if one.free}


def _object(value: Any, names: Iterable[str], inner: Callable[[Any], Any]) -> dict[str, Any]:
    found = {name: inner(getattr(value, name)) for name in names}
    return {"class": _name(type(value)), **found}


def _mapping(value: Mapping[Any, Any], inner: Callable[[Any], Any]) -> dict[str, Any]:
    """Keys may be functions, which have names and perhaps more."""
    found: dict[str, Any] = {}
    for key, one in value.items():
        known = inner(key)
        name = known.get("class", "") if isinstance(known, Mapping) else str(known)
        while name in found:
            name += "'"
        found[name] = {"of": known, "is": inner(one)} if isinstance(known, Mapping) else inner(one)
    return found


def _callable(value: Any, inner: Callable[[Any], Any]) -> Any:
    value = inspect.unwrap(value)
    if isinstance(value, functools.partial):
        return _object(value, ("func", "args", "keywords"), inner)
    if isinstance(value, types.MethodType):
        return {"class": _name(value), "of": inner(value.__self__)}
    if isinstance(value, types.FunctionType):
        closed = zip(value.__code__.co_freevars, value.__closure__ or (), strict=True)
        filled = {name: cell.cell_contents for name, cell in closed if _is_filled(cell)}
        known = {name: inner(one) for name, one in filled.items()}
        return {"class": _name(value), **known} if known else _name(value)
    if isinstance(value, type) or hasattr(value, "__qualname__"):
        return _name(value)
    public = sorted(name for name in getattr(value, "__dict__", {}) if not name.startswith("_"))
    return _object(value, public, inner)


def _is_filled(cell: Any) -> bool:
    try:
        return cell.cell_contents is not None
    except ValueError:
        return False


def _name(value: Any) -> str:
    # Not the module's: a script is __main__ where it is run, and has a name where it is imported.
    return getattr(value, "__qualname__", type(value).__qualname__)


def _is_arrays(value: Any) -> bool:
    if isinstance(value, Mapping):
        return bool(value) and all(map(_is_arrays, value.values()))
    return isinstance(value, np.ndarray | jax.Array)


def _digest(tree: Any) -> str:
    digest = hashlib.sha256()
    for path, leaf in jax.tree_util.tree_leaves_with_path(_plain_dicts(tree)):
        if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            leaf = jax.random.key_data(leaf)
        array = np.ascontiguousarray(leaf)
        digest.update(f"{jax.tree_util.keystr(path)} {array.dtype} {array.shape}".encode())
        digest.update(array.tobytes())
    return digest.hexdigest()


def _plain_dicts(tree: Any) -> Any:
    return {k: _plain_dicts(v) for k, v in tree.items()} if isinstance(tree, Mapping) else tree


@dataclasses.dataclass(frozen=True)
class Record:
    """What `objects.json` holds.

    Attributes:
      task: the task as it was given, described.
      run: what else the steps follow from, described.
    """

    task: Mapping[str, Any]
    run: Mapping[str, Any]

    @classmethod
    def of(cls, plan: Any, task: Any) -> "Record":
        """The record of a `run.Plan`, for the task that it was made from."""

        def chosen(value: Any, *, free: bool) -> dict[str, Any]:
            known = options(type(value)).items()
            return {name: getattr(value, name) for name, one in known if free or not one.free}

        run = dict(
            steps=plan.steps,
            batch=plan.batch,
            accumulate=plan.accumulate,
            seed=plan.seed,
            average=plan.average,
            optimizer=plan.optimizer,
            augmentation=plan.augmentation,
            reading=chosen(plan.reading, free=False),
            sharding=plan.sharding,
            scoring=chosen(plan.scoring, free=True),
        )
        return cls(_plain(describe(task)), _plain(describe(run)))

    @property
    def task_name(self) -> str:
        return self.task["class"]

    @property
    def steps(self) -> int:
        return self.run["steps"]

    @property
    def batch(self) -> int:
        return self.run["batch"]

    @property
    def seed(self) -> int:
        return self.run["seed"]

    @property
    def average(self) -> float:
        return self.run["average"]

    @property
    def sharding(self) -> str:
        return self.run["sharding"]

    @property
    def reading(self) -> Reading:
        return Reading(**_tuples(self.run["reading"]))

    def scoring(self, kind: type[Scoring]) -> Scoring:
        """How the run is scored, as a task of this `kind` is."""
        stored = _tuples(self.run["scoring"])
        return kind(**{name: stored[name] for name in options(kind) if name in stored})

    def check_task(self, workdir: Path, task: Any) -> None:
        """Raises ConfigError, naming the differences, unless `task` is the one of the record.

        Initial parameters may differ: what is restored takes their place, and another device may have
        drawn others.
        """
        differ = _differences({"task": self.task}, {"task": _plain(describe(task))})
        initial = tuple(f".{name}.sha256" for name in ("params", "statistics"))
        _refuse(workdir, {k: v for k, v in differ.items() if not k.endswith(initial)})


def _tuples(stored: Mapping[str, Any]) -> dict[str, Any]:
    return {k: tuple(v) if isinstance(v, list) else v for k, v in stored.items()}


def _plain(value: Any) -> Any:
    return json.loads(json.dumps(value))


def _differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    before, after = dict(_leaves(old)), dict(_leaves(new))
    keys = sorted(before.keys() | after.keys())
    return {k: (before.get(k), after.get(k)) for k in keys if before.get(k) != after.get(k)}


def _leaves(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """(path, value) of what is in a record, but for lists of plain values, which stay whole."""
    inside: Iterable[tuple[Any, Any]] = ()
    if isinstance(value, Mapping):
        inside = value.items()
    elif isinstance(value, list) and any(isinstance(one, list | Mapping) for one in value):
        inside = enumerate(value)
    else:
        yield path, value
    for key, one in inside:
        yield from _leaves(one, f"{path}.{key}" if path else str(key))


def _refuse(workdir: Path, differ: Mapping[str, tuple[Any, Any]]) -> None:
    if differ:
        lines = "\n".join(
            f"  {key}: {old!r} there, {new!r} now" for key, (old, new) in differ.items()
        )
        raise ConfigError(f"{workdir} holds a run of other objects:\n{lines}")


def stored(workdir: Path) -> bool:
    """Whether the folder holds a run that was begun from objects."""
    return (workdir / FILE).exists()


def read(workdir: Path) -> tuple[Record, folder.Description]:
    """The record and description of a run."""
    value = folder.read_json(workdir / FILE)
    try:
        return Record(value["task"], value["run"]), folder.read_description(workdir)
    except KeyError as error:
        raise ConfigError(f"{workdir / FILE} is damaged: {error} is missing") from error


def check(workdir: Path, record: Record) -> None:
    """Checks that a run of these objects may begin or go on in a folder; one that has ended may be longer.

    Raises:
      ConfigError: it holds another run.
    """
    folder.check_folder(workdir)
    if not folder.has_checkpoint(workdir):
        return
    if not stored(workdir):
        raise ConfigError(
            f"{workdir} holds a run that was begun from a config; give another workdir"
        )
    there, _ = read(workdir)
    if not _longer(workdir, there, record):
        _refuse(workdir, _compared(there, record))


def _compared(there: Record, record: Record) -> dict[str, tuple[Any, Any]]:
    differ = _differences(dataclasses.asdict(there), dataclasses.asdict(record))
    return {key: values for key, values in differ.items() if not key.startswith(_FREE)}


def _longer(workdir: Path, there: Record, record: Record) -> bool:
    """Whether `record` is that of a run that has ended, but for a greater length."""
    ended = folder.last_step(workdir) == there.steps < record.steps
    return ended and set(_compared(there, record)) == {"run.steps"}


def begin(workdir: Path, record: Record, description: folder.Description) -> None:
    """Writes the record, or checks that the run to be resumed is the same.

    Of a run that goes on after its end `history` keeps how long it was to be before.
    """
    check(workdir, record)
    written = dataclasses.asdict(record)
    if folder.has_checkpoint(workdir):
        there, _ = read(workdir)
        history = folder.read_json(workdir / FILE).get("history", [])
        if _longer(workdir, there, record):
            log.info("the run had ended after %d steps; it goes on from there", there.steps)
            history = [*history, {"steps": there.steps}]
        if history:
            written["history"] = history
    folder.begin_with(workdir, description, {FILE: written})
