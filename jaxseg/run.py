"""A run: a task trained on data in a folder, stopped and resumed, scored, and put to use.

`train`, `restore` and `evaluate` are the program's, from a config; `fit` and `load` the library's, from
objects. Both go the same way.
"""

import dataclasses
import functools
import inspect
import json
import logging
import numbers as numbers_of
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import ml_collections
import numpy as np
import optax
from jax.sharding import Mesh

from jaxseg import assembly, objects
from jaxseg import workdir as folder
from jaxseg.backbones.backbone import Backbone
from jaxseg.data.image_files import DataError
from jaxseg.data.reader import Reading
from jaxseg.data.source import Some, Splits, as_splits, check_function
from jaxseg.evaluate.scoring import Scoring, summary
from jaxseg.ops.mask_augment import Augmentation
from jaxseg.options import OptionError
from jaxseg.options import check as check_options
from jaxseg.predictor import Predictor
from jaxseg.quiet import Quiet
from jaxseg.schema import ConfigError, validate
from jaxseg.tasks import Facts, Task
from jaxseg.train import loop, partition
from jaxseg.train.checkpoint import Checkpointer, CheckpointError, restore_frozen, save_frozen
from jaxseg.train.digest import params_digest
from jaxseg.train.loop import Intervals
from jaxseg.train.optim import Recipe
from jaxseg.train.state import ScoredState, merge_params
from jaxseg.train.writers import read_metrics, write_json

log = logging.getLogger(__name__)

_PREDICTOR = threading.Lock()
# Kinds of arguments that are given by their place.
_PLACED = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)


@dataclasses.dataclass(frozen=True)
class Plan:
    """All that a training is made of.

    Attributes:
      task: bound to its data.
      data: its splits.
      steps: length of the run.
      batch: images in a global batch, which is taken in `accumulate` parts.
      seed: of the order, of initial values and of all that is drawn.
      optimizer: an optax optimiser, a recipe, or a function of (steps, layers) that makes the first;
        layers are the task's `layer_names`.
      average: decay of the parameters' moving average, 0 for none.
      augmentation: of training images, on the device; None for none.
      intervals: when things happen.
      reading: how examples are read.
      scoring: what is scored in the end.
      sharding: layout of the parameters, see `partition`.
      precision: of `share_of_peak`, see `loop.Trainer`.
    """

    task: Task
    data: Splits
    steps: int
    batch: int = 16
    accumulate: int = 1
    seed: int = 0
    optimizer: Recipe | optax.GradientTransformation | Callable[..., Any] = Recipe()
    average: float = 0.0
    augmentation: Augmentation | None = None
    intervals: Intervals = Intervals()
    reading: Reading = Reading()
    scoring: Scoring = Scoring()
    sharding: str = "replicated"
    precision: str = "float32"

    def make_optimizer(self) -> tuple[optax.GradientTransformation, optax.Schedule | None]:
        """(the optimiser, its learning rate by step where that is known)."""
        if not isinstance(self.optimizer, Recipe):
            return _made_optimizer(self.optimizer, self.steps, self.task.layer_names), None
        hold, hold_steps = self.task.held
        optimizer = self.optimizer.optimizer(
            self.steps,
            batch=self.batch,
            hold=hold,
            hold_steps=hold_steps,
            layers=self.task.layer_names,
        )
        return optimizer, self.optimizer.learning_rate(self.steps, batch=self.batch)


def _made_optimizer(given: Any, steps: int, layers: Any) -> optax.GradientTransformation:
    made = given
    if callable(given):
        positional = [p for p in inspect.signature(given).parameters.values() if p.kind in _PLACED]
        made = given(*(steps, layers)[: len(positional)])
    if not all(callable(getattr(made, name, None)) for name in ("init", "update")):
        raise OptionError(
            f"optimizer is a {type(made).__name__}; allowed: an optax optimizer, a jaxseg.Recipe, or a "
            "function of (steps, layers) that gives an optax optimizer"
        )
    return made


def _check_whole(low: int, **numbers: Any) -> None:
    for name, value in numbers.items():
        whole = isinstance(value, numbers_of.Integral) and not isinstance(value, bool)
        if not whole or value < low:
            raise OptionError(f"{name} is {value!r}; allowed: whole numbers from {low}")


def check_batch(batch: int, accumulate: int, *, batch_norm: bool) -> None:
    """Checks that all devices, and the parts of a batch, divide it where that matters.

    Args:
      batch: images in a global batch.
      accumulate: parts in which it is taken.
      batch_norm: whether statistics of the batch are learned from, which padding would change.

    Raises:
      OptionError: they do not.
    """
    devices = jax.device_count()
    padded = -(-batch // devices) * devices
    if padded != batch and batch_norm:
        raise OptionError(
            f"batch is {batch}; allowed with batch norm on {devices} devices: multiples of "
            f"{devices} (padding would count in its statistics)"
        )
    if padded % accumulate:
        raise OptionError(
            f"accumulate is {accumulate}; allowed on {devices} devices: divisors of {padded}"
        )


def execute(plan: Plan, workdir: Path, begin: Any) -> None:
    """Trains, or resumes, the run in `workdir`; `begin(description)` writes down what it is of."""
    task = plan.task
    source = plan.data.split("train")
    params, frozen = task.parameters(plan.seed)
    digest = params_digest({k: v for k, v in frozen.items() if k == "backbone"})
    with folder.lock(workdir):
        begin(folder.Description(task.variant, task.facts, digest))
        mesh = partition.make_mesh()
        reader = task.reader(
            source,
            reading=plan.reading,
            batch=plan.batch,
            seed=plan.seed,
            frozen=frozen,
            digest=digest,
            augmentation=plan.augmentation,
        )
        placed = _put_frozen(plan, workdir, reader, frozen, mesh)
        optimizer, learning_rate = plan.make_optimizer()
        on_device = None if reader.cached else plan.augmentation
        loop.Trainer(
            task=task.trained_on(on_device if on_device != Augmentation() else None),
            optimizer=optimizer,
            learning_rate=learning_rate,
            steps=plan.steps,
            intervals=plan.intervals,
            mesh=mesh,
            layout=plan.sharding,
            batches=reader.train_batches,
            batch_size=plan.batch,
            seed=plan.seed,
            workdir=workdir,
            evaluate=_validation(plan, workdir, frozen, placed, digest, mesh),
            best_metric=task.best_metric,
            accumulate=plan.accumulate,
            watch=task.watch(workdir),
            precision=plan.precision if task.measures_peak else "",
            average=plan.average,
            evaluate_first=task.scores_untrained,
        ).run(params, placed)


def _put_frozen(plan: Plan, workdir: Path, reader, frozen, mesh: Mesh) -> Any:
    """The frozen parameters on the mesh: those that the run was begun with, else made and saved now."""
    try:
        return restore_frozen(workdir, partition.abstract(mesh, frozen, plan.sharding))
    except CheckpointError:
        pass
    frozen = plan.task.solve(reader, frozen)
    placed = partition.put_tree(frozen, partition.tree_sharding(mesh, frozen, plan.sharding))
    save_frozen(workdir, placed)
    return placed


def _validation(plan: Plan, workdir: Path, frozen, placed, digest: str, mesh: Mesh):
    """A function from a state to its validation metrics, or None where there are none."""
    if not plan.intervals.eval_every:
        return None
    try:
        score = plan.task.evaluator(
            plan.data,
            plan.task.for_validation(plan.scoring),
            reading=plan.reading,
            seed=plan.seed,
            frozen=frozen,
            digest=digest,
            mesh=mesh,
        )
    except DataError as error:
        log.warning("no validation during training, and so no best checkpoint: %s", error)
        return None

    def evaluate_state(state) -> dict[str, float]:
        found = score(state, placed, label="validate")
        found.keep(workdir, int(state.step))
        return found.scores

    return evaluate_state


# From a config.


def train(config: ml_collections.ConfigDict, workdir: Path) -> dict[str, Any]:
    """Trains (or resumes) the run in `workdir`, evaluates it, and writes the report.

    Returns:
      What is written to `eval.json`; nothing, with a warning, where a pretraining has no split to be
      scored on.
    """
    validate(config)
    folder.check(workdir, config)
    plan = make_plan(config)
    with assembly.section("train."):
        check_batch(plan.batch, plan.accumulate, batch_norm=plan.task.learns_batch_norm())
    with assembly.section(""):
        _check_scored(config, plan)
        execute(plan, workdir, functools.partial(folder.begin, workdir, config))
    # From the checkpoint, as `--mode=eval` does it, so that the two cannot differ.
    try:
        return evaluate(workdir, {})
    except DataError as error:
        if plan.task.must_be_scored:
            raise
        log.warning(
            "the run is saved, but not scored: %s. --mode=eval --config.eval.split=train scores it on the "
            "images it was trained on",
            error,
        )
        return {}


def make_plan(config: ml_collections.ConfigDict) -> Plan:
    """The training of a config."""
    data, settings = assembly.make_data(config), assembly.make_settings(config)
    source = data.split("train")
    task = assembly.make_task(config, assembly.names_in(source, config.task))
    steps = assembly.total_steps(config.train, len(source))
    with assembly.section(""):
        size = settings.reading.size
        task = task.bind(source, steps=steps, batch=settings.batch, size=size)
    return Plan(
        task,
        data,
        steps,
        optimizer=settings.recipe,
        average=settings.recipe.average,
        **{
            field.name: getattr(settings, field.name)
            for field in dataclasses.fields(settings)
            if field.name != "recipe"
        },
    )


def _check_scored(config: ml_collections.ConfigDict, plan: Plan) -> None:
    split = plan.scoring.split
    try:
        data = assembly.make_data(config, categories=plan.scoring.categories)
        plan.task.check_scored(data, plan.scoring, reading=plan.reading)
    except DataError as error:
        raise DataError(f"config.eval.split={split!r}, to be scored in the end: {error}") from error


@dataclasses.dataclass(frozen=True)
class Run:
    """A trained run, restored; made by `restore`, `fit` and `load`.

    Attributes:
      workdir: its folder.
      task: as it was trained, for images of the size it was trained on.
      state: what evaluation reads of the checkpoint, on the mesh.
      frozen: the parameters that were not trained, on the mesh.
      digest: identifies them.
      step: of the checkpoint.
      mesh: all devices.
      data: its splits, or None where only objects know them.
      reading, scoring: how examples are read, and what is scored.
      seed: of the run.
      title: of its report.
      config: as stored, with the overrides of this call; of a run that was begun from objects what is
        written down of them, a dict with `task` and `run`.
    """

    workdir: Path
    task: Task
    state: ScoredState
    frozen: Mapping[str, Any]
    digest: str
    step: int
    mesh: Mesh
    data: Splits | None
    reading: Reading
    scoring: Scoring
    seed: int
    title: str = ""
    config: ml_collections.ConfigDict | Mapping[str, Any] | None = None

    @functools.cached_property
    def variables(self) -> Mapping[str, Any]:
        """What predictions take: all parameters, and running statistics where there are any."""
        params = merge_params(self.state.best_params, self.frozen)
        return self.task.predicting(params, self.state.extra)

    @property
    def params(self) -> Mapping[str, Any]:
        """The whole parameter tree."""
        return {k: v for k, v in self.variables.items() if k != "batch_stats"}

    def host(self, tree: Any) -> Any:
        """Host copies of a tree that is on the mesh, whole on every process."""
        return partition.gather(self.mesh, tree)

    def scores(self, params: Mapping[str, Any], image_BxHxWx3: jax.Array) -> jax.Array:
        """Scores float32 `B x H x W x K` in [0, 1] of uint8 images; pure.

        `params` are `variables`; sizes of images must be multiples of `task.multiple`.
        """
        masks = self.task.masks
        return masks.scores(masks.logits(params, {"image": image_BxHxWx3})[0])

    def backbone(self) -> Backbone:
        """The backbone as it was learnt (a teacher's where there is one), for `jaxseg.Segmenter` and others.

        Raises:
          OptionError: a whole network has none.
        """
        params = merge_params(self.state.best_params, self.frozen)
        return self.task.learnt_backbone(*self.host((params, self.state.extra)))

    @property
    def _predictor(self) -> Any:
        # One for all threads, however many ask first.
        with _PREDICTOR:
            if "_made_predictor" not in self.__dict__:
                self.__dict__["_made_predictor"] = Predictor(self)
        return self.__dict__["_made_predictor"]

    def predict(self, image: np.ndarray) -> np.ndarray:
        """The mask, uint8 `H x W` of class numbers (0 and 1 for one class), of an image.

        Args:
          image: uint8 `H x W x 3` of any size; it is seen at about the size that was trained at. Safe to
            call from several threads.
        """
        return self._predictor.predict(image)

    def probabilities(self, image: np.ndarray) -> np.ndarray:
        """Probabilities, float32 `H x W x classes`, of an image as in `predict`.

        Of one object class they are those of background and foreground.
        """
        return self._predictor.probabilities(image)

    @Quiet()
    def evaluate(self, split: str = "", *, write: bool = False) -> dict[str, Any]:
        """Scores a split; with `write` into `eval.json` and the report of the workdir, as the program does.

        Args:
          split: its name; empty for that of `scoring`.
          write: whether files are written.

        Raises:
          DataError: there is no such split, or something is wrong with it.
        """
        if self.data is None:
            raise OptionError(
                f"data is None: the run in {self.workdir} was begun from objects; load it with "
                "jaxseg.load(workdir, task=..., data=...)"
            )
        scoring = dataclasses.replace(self.scoring, split=split or self.scoring.split)
        score = self.task.evaluator(
            self.data,
            scoring,
            reading=self.reading,
            seed=self.seed,
            frozen=self.host(self.frozen),
            digest=self.digest,
            mesh=self.mesh,
        )
        found = score(self.state, self.frozen, label="evaluate")
        result = {"step": self.step, "split": scoring.split, **found.metrics}
        if scoring.checkpoint != "latest":
            result["checkpoint"] = scoring.checkpoint
        if write:
            self._write(result, found)
        return result

    def _write(self, result: Mapping[str, Any], found: Any) -> None:
        if jax.process_index() == 0:
            write_json(self.workdir / "eval.json", result)
            print(summary(result), flush=True)
        if self.scoring.report:
            found.report(
                self.workdir / "report",
                title=self.title,
                result=result,
                metrics=read_metrics(self.workdir),
                config=json.dumps(_plain(self.config), indent=2),
            )


def _plain(config: ml_collections.ConfigDict | Mapping[str, Any]) -> Mapping[str, Any]:
    return config.to_dict() if isinstance(config, ml_collections.ConfigDict) else config


def restore(workdir: Path, overrides: Mapping[str, Any]) -> Run:
    """Restores the run in `workdir`.

    Args:
      workdir: the run's folder.
      overrides: see `workdir.load`.

    Raises:
      ConfigError: there is no run, or an override is not allowed.
      CheckpointError: there is no checkpoint that can be read.
    """
    config, description = folder.load(workdir, overrides)
    task = assembly.stored_task(config, description.facts, description.variant)
    settings = assembly.make_settings(config)
    data = assembly.make_data(config, categories=settings.scoring.categories)
    return _restored(
        workdir,
        task,
        description,
        average=settings.recipe.average,
        sharding=settings.sharding,
        scoring=settings.scoring,
        reading=settings.reading,
        seed=settings.seed,
        data=data,
        title=assembly.title(config),
        config=config,
    )


def _restored(
    workdir: Path, task: Task, description, *, average: float, sharding: str, scoring, **known
) -> Run:
    mesh = partition.make_mesh()
    whole = jax.eval_shape(task.init, jax.random.key(0))
    trained, frozen = task.split(whole)
    like = jax.eval_shape(lambda p: loop.scored_state(task, p, average), trained)
    like, frozen = (partition.abstract(mesh, tree, sharding) for tree in (like, frozen))
    checkpointer = Checkpointer(workdir, read_only=True, best_metric=task.best_metric)
    restored = checkpointer.restore(like, which=scoring.checkpoint, whole=False)
    checkpointer.close()
    if restored is None:
        raise ConfigError(f"--workdir={workdir} holds no checkpoint yet")
    state, step = restored
    frozen = restore_frozen(workdir, frozen)
    digest = description.frozen_sha256
    return Run(workdir, task, state, frozen, digest, step, mesh, scoring=scoring, **known)


def evaluate(workdir: Path, overrides: Mapping[str, Any]) -> dict[str, Any]:
    """Restores the run in `workdir`, evaluates it, and writes `eval.json` and the report.

    Args:
      workdir, overrides: see `restore`.

    Returns:
      What is written to `eval.json`.
    """
    with assembly.section(""):
        return restore(workdir, overrides).evaluate(write=True)


# From objects.


@Quiet()
def fit(
    task: Task,
    data: Any,
    *,
    steps: int,
    workdir: str | Path,
    validation: Any = None,
    batch: int = 16,
    seed: int = 0,
    optimizer: Recipe | optax.GradientTransformation | Callable[..., Any] | None = None,
    average: float | None = None,
    accumulate: int = 1,
    augmentation: Augmentation | None = None,
    intervals: Intervals | None = None,
    reading: Reading | None = None,
    scoring: Scoring | None = None,
    sharding: str = "replicated",
) -> Run:
    """Trains a task in a folder, or goes on with it, exactly as the program does.

    A run that was stopped, however it was, goes on from its newest checkpoint when it is called again,
    and ends bit for bit where it would have. The folder gets checkpoints, `metrics.jsonl`, `tensorboard/`,
    and, where there is a split to score on, `eval.json` and the report.

    Args:
      task: one of `jaxseg.tasks`, of a network or backbone.
      data: a source, a mapping of sources by split, or a data set with `split(name)`; see
        `jaxseg.data.as_splits`.
      steps: length of the run.
      workdir: the run's folder.
      validation: a source of the split "val".
      batch: images in a batch, over all devices.
      seed: of the order of examples, of initial values and of all that is drawn.
      optimizer: an optax optimiser, a `jaxseg.Recipe`, or a function of (steps, layers) that gives an
        optax optimiser; layers are paths of parameters by layer, from the input on. None for the
        default recipe.
      average: decay of a moving average of the parameters, which is then evaluated; None for that of the
        recipe.
      accumulate: parts in which a batch is taken, for less memory.
      augmentation: of training images, on the device.
      intervals: when to log, validate and save; None: validates four times where there is a split "val".
      reading: how examples are read: their size, threads, what is kept of them.
      scoring: how the run is scored: split, batch, windows; None for the split "test", else "val".
      sharding: layout of the parameters over the devices, "replicated" or "fsdp".

    Returns:
      The run, restored from its last checkpoint.

    Raises:
      OptionError: something does not fit; it names the field.
      DataError: something is wrong with the data; it names the example.
    """
    workdir = Path(workdir).expanduser()
    _check_whole(1, steps=steps, batch=batch, accumulate=accumulate)
    _check_whole(0, seed=seed)
    _check_given("reading", reading, Reading)
    _check_given("scoring", scoring, task.scoring)
    _check_given("intervals", intervals, Intervals)
    _check_given("augmentation", augmentation, Augmentation)
    if isinstance(optimizer, Recipe):
        _check_given("optimizer", optimizer, Recipe)
    reading = reading or Reading()
    splits = _splits(data, validation, reading)
    source = splits.split("train")
    if not len(source):
        raise DataError("the data have no examples to train on")
    check_function(source)
    scoring = scoring or _default_scoring(task.scoring(), splits)
    if intervals is None:
        validated = _has(splits, task.for_validation(scoring).split)
        intervals = Intervals(
            log_every=max(1, min(20, steps // 10)),
            eval_every=max(1, steps // 4) if validated else 0,
            checkpoint_every=max(1, min(200, steps // 4)),
        )
    bound = task.bind(source, steps=steps, batch=batch, size=tuple(reading.size))
    bound.check_data(source)
    optimizer = Recipe() if optimizer is None else optimizer
    if average is None:
        average = optimizer.average if isinstance(optimizer, Recipe) else 0.0
    if average and task.no_average:
        raise OptionError(f"average is {average}; allowed: 0 ({task.no_average})")
    plan = Plan(
        bound,
        splits,
        steps,
        batch,
        accumulate,
        seed,
        optimizer,
        average,
        augmentation,
        intervals,
        reading,
        scoring,
        sharding,
    )
    check_batch(batch, accumulate, batch_norm=bound.learns_batch_norm())
    plan.make_optimizer()
    record = objects.Record.of(plan, task)
    objects.check(workdir, record)
    scored = _has(splits, scoring.split)
    if scored:
        bound.check_scored(splits, scoring, reading=reading)
        bound.check_data(splits.split(scoring.split))
    execute(plan, workdir, functools.partial(objects.begin, workdir, record))
    run = load(workdir, task=task, data=data, validation=validation, checkpoint=scoring.checkpoint)
    run = dataclasses.replace(run, scoring=scoring, reading=reading)
    if scored:
        run.evaluate(write=True)
    elif scoring.report and jax.process_index() == 0:
        from jaxseg.report.pictures import plot_curves

        (workdir / "report").mkdir(exist_ok=True)
        plot_curves(read_metrics(workdir), workdir / "report" / "curves.png")
    return run


def _check_given(name: str, value: Any, kind: type) -> None:
    if value is None:
        return
    if not isinstance(value, kind):
        raise OptionError(f"{name} is a {type(value).__name__}; allowed: {kind.__name__}(...)")
    # Splits may have any names where they are not from a config.
    check_options(value, f"{name}.", leave_out=("split",))


def _splits(data: Any, validation: Any, reading: Reading) -> Splits:
    splits = as_splits(data, validation)
    return _Limited(splits, reading.limit) if reading.limit else splits


@dataclasses.dataclass(frozen=True)
class _Limited:
    """Splits of at most `limit` examples."""

    splits: Splits
    limit: int

    def split(self, name: str) -> Any:
        return Some(self.splits.split(name), self.limit)


def _has(splits: Splits, name: str) -> bool:
    try:
        return len(splits.split(name)) > 0
    except DataError:
        return False


def _default_scoring(usual: Scoring, splits: Splits) -> Scoring:
    for split in ("test", "val"):
        if _has(splits, split):
            return dataclasses.replace(usual, split=split)
    return usual


@Quiet()
def load(
    workdir: str | Path,
    task: Task | None = None,
    data: Any = None,
    *,
    validation: Any = None,
    checkpoint: str = "",
) -> Run:
    """Restores a run, for prediction or evaluation.

    Args:
      workdir: its folder.
      task: of a run that was begun from objects by `fit`: the same again. A run of the program has its
        own.
      data, validation: as in `fit`, for `Run.evaluate`. A run of the program has its own, unless others
        are given.
      checkpoint: "latest" or "best"; empty for what the run says.

    Raises:
      ConfigError: there is no run, or it was begun from other objects.
      CheckpointError: there is no checkpoint that can be read.
    """
    workdir = Path(workdir).expanduser()
    if checkpoint not in ("", "latest", "best"):
        raise OptionError(f"checkpoint is {checkpoint!r}; allowed: latest, best")
    if not objects.stored(workdir):
        overrides = {"eval.checkpoint": checkpoint} if checkpoint else {}
        with assembly.section(""):
            run = restore(workdir, overrides)
        if task is not None:
            raise ConfigError(f"task is given, but the run in {workdir} has its own, of its config")
        if data is None and validation is None:
            return run
        splits = _splits(run.data if data is None else data, validation, run.reading)
        return dataclasses.replace(run, data=splits)
    record, description = objects.read(workdir)
    if task is None:
        raise ConfigError(
            f"{workdir} holds a run of {record.task_name} that was begun from objects: load it with "
            "jaxseg.load(workdir, task=..., data=...), the task that it was begun with"
        )
    record.check_task(workdir, task)
    bound = task.with_facts(description.facts, steps=record.steps, batch=record.batch)
    scoring, splits = record.scoring(task.scoring), None
    if data is not None or validation is not None:
        splits = _splits({} if data is None else data, validation, record.reading)
        if not _has(splits, scoring.split):
            scoring = _default_scoring(scoring, splits)
    if checkpoint:
        scoring = dataclasses.replace(scoring, checkpoint=checkpoint)
    return _restored(
        workdir,
        bound,
        description,
        average=record.average,
        sharding=record.sharding,
        scoring=scoring,
        reading=record.reading,
        seed=record.seed,
        data=splits,
        title=record.task_name,
        config=dataclasses.asdict(record),
    )


__all__ = ["Facts", "Plan", "Run", "evaluate", "execute", "fit", "load", "restore", "train"]
