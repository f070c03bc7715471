"""Training, evaluation and restoration of a run: the objects of `experiment` put to work."""

import contextlib
import dataclasses
import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import ml_collections
from jax.sharding import Mesh

from jaxseg import workdir as folder
from jaxseg.config import ConfigError, validate
from jaxseg.data import DataError
from jaxseg.data.source import working_size
from jaxseg.evaluate import masks as dense
from jaxseg.report import report
from jaxseg.experiment import (
    Backbone,
    Reader,
    check_batch,
    fit_prior,
    fit_task,
    frozen_paths,
    has_prior,
    make_class_weights,
    make_model,
    make_params,
    make_source,
    make_task,
    mask_names,
    params_digest,
    total_steps,
)
from jaxseg import backbones
from jaxseg.tasks.query import queries
from jaxseg.tasks.masks import DenseTask
from jaxseg.train import loop, optim, partition
from jaxseg.train.checkpoint import (
    Checkpointer,
    CheckpointError,
    restore_frozen,
    save_frozen,
)
from jaxseg.train.state import TrainState, merge_params, split_params
from jaxseg.train.writers import read_metrics, write_json

log = logging.getLogger(__name__)


def train(config: ml_collections.ConfigDict, workdir: Path) -> dict[str, Any]:
    """Trains (or resumes) the run in `workdir`, evaluates it, and writes the report.

    Returns:
      What is written to `eval.json`.
    """
    validate(config)
    folder.check(workdir, config)
    _train(config, workdir)
    # From the checkpoint, as `--mode=eval` does it, so that the two cannot differ.
    return evaluate(workdir, {})


def _train(config: ml_collections.ConfigDict, workdir: Path) -> None:
    source = make_source(config, "train")
    backbone = Backbone.load(config)
    names, weights = mask_names(source), make_class_weights(config, source)
    model = make_model(config, backbone.variant, names)
    task = make_task(
        config,
        model,
        size=working_size(source, tuple(config.data.size), model.stride),
        names=names,
        categories=tuple(source.categories),
        class_weights=weights,
        statistics=backbone.statistics,
    )
    _check_scored(config, task)
    norms = (jax.eval_shape(lambda: task.init_extra({})) or {}).get("batch_stats", {})
    # Those of a backbone that is not trained as a whole rest.
    check_batch(
        config, batch_norm=bool(set(norms) - {"backbone"}) or model.trains_backbone and bool(norms)
    )
    params, frozen = make_params(task, backbone, config)
    digest = params_digest({k: v for k, v in frozen.items() if k == "backbone"})
    description = folder.Description(
        backbone.variant,
        task.size,
        tuple(source.categories),
        digest,
        names=names,
        class_weights=weights,
    )
    with folder.lock(workdir):
        folder.begin(workdir, config, description)
        _train_in(workdir, config, task, source, params, frozen, digest)


def _check_scored(config: ml_collections.ConfigDict, task: DenseTask) -> None:
    """Looks before the first step at what is scored in the end, not hours after it.

    Raises:
      DataError: there are no images, or images and masks differ in size.
      ConfigError: their classes are others than those of training, or `config.eval` does not fit.
    """
    make_inference(config, task.model.stride)
    e = config.eval
    try:
        source = make_source(config, e.split, categories=tuple(e.get("categories", ())) or None)
        if hasattr(source, "sizes"):
            source.sizes()
        fit_task(task, config, source)
    except DataError as error:
        raise DataError(
            f"config.eval.split={e.split!r}, to be scored in the end: {error}"
        ) from error


def _train_in(workdir, config, task, source, params, frozen, digest) -> None:
    mesh = partition.make_mesh()
    reader = Reader(config, task, source, frozen=frozen, digest=digest, train=True)
    frozen_on_mesh = _put_frozen(workdir, config, task, reader, frozen, mesh)
    schedule = loop.Schedule(
        steps=total_steps(config, len(source)),
        log_every=config.train.log_every,
        eval_every=config.train.eval_every,
        checkpoint_every=config.train.checkpoint_every,
        average=config.optim.average,
    )
    learning_rate = optim.make_schedule(config.optim, schedule.steps, batch=config.train.batch)
    loop.Trainer(
        task=dataclasses.replace(task, augmentation=reader.augmentation),
        optimizer=make_optimizer(config, task, learning_rate, schedule.steps),
        learning_rate=learning_rate,
        schedule=schedule,
        mesh=mesh,
        layout=config.sharding.params,
        batches=reader.train_batches,
        batch_size=config.train.batch,
        seed=config.seed,
        workdir=workdir,
        evaluate=_validation(config, task, frozen, frozen_on_mesh, digest, mesh),
        best_metric=_best_metric(config),
        accumulate=config.train.accumulate,
    ).run(params, frozen_on_mesh)


def _best_metric(config: ml_collections.ConfigDict) -> str:
    return "iou" if config.task == "segmentation" else "miou"


def make_optimizer(config: ml_collections.ConfigDict, task: DenseTask, learning_rate, steps: int):
    """The optimiser of a run of `steps`; see `optim.make_optimizer`."""
    layers = backbones.layers(task.model.backbone.variant)
    return optim.make_optimizer(config.optim, learning_rate, steps=steps, layers=layers)


class Scorer:
    """Scores parameters on one split.

    Args:
      config: says the data.
      task: of the run; the images of this split may have another size.
      split: its name.
      categories: those to read; None for `config.data.categories`.
      frozen: host arrays of the frozen parameters; `digest` identifies them.
      mesh: all devices.

    Raises:
      DataError: there is no such split, or something is wrong with it.
    """

    def __init__(
        self,
        config: ml_collections.ConfigDict,
        task: DenseTask,
        split: str,
        *,
        categories: tuple[str, ...] | None,
        frozen: Mapping[str, Any],
        digest: str,
        mesh: Mesh,
    ):
        source = make_source(config, split, categories=categories)
        self.task = fit_task(task, config, source)
        self._mesh = mesh
        self._inference = make_inference(config, self.task.model.stride)
        options = dict(train=False, cache=self._inference is None)
        self._reader = Reader(config, self.task, source, frozen=frozen, digest=digest, **options)

    def __call__(
        self, params: Mapping[str, Any], *, label: str
    ) -> tuple[dict[str, Any], list[tuple[int, float]]]:
        """(metrics, [(example, IoU)]) of the whole split; see `dense.evaluate`."""
        return dense.evaluate(
            *(self.task, params, self._reader.eval_batches()),
            mesh=self._mesh,
            total=len(self._reader),
            label=label,
            inference=self._inference,
        )

    def examples(self, params: Mapping[str, Any], indices: list[int]):
        """What is predicted for some examples; see `dense.predictions`."""
        batches = self._reader.subset(indices)
        options = dict(mesh=self._mesh, inference=self._inference)
        return list(dense.predictions(self.task, params, batches, **options))


def make_inference(config: ml_collections.ConfigDict, stride: int) -> dense.Inference | None:
    """How the config wants images predicted in evaluation; None for once and whole."""
    if any(side % stride for side in config.eval.window):
        raise ConfigError(
            f"config.eval.window is {tuple(config.eval.window)}; allowed: multiples of the stride "
            f"{stride}"
        )
    e = config.eval
    how = dense.Inference(tuple(e.scales), e.flip, tuple(e.window), e.overlap)
    if how == dataclasses.replace(dense.Inference(), overlap=e.overlap):
        return None
    if jax.process_count() > 1:
        raise ConfigError("config.eval.scales, flip and window are for one process")
    return how


def _put_frozen(workdir, config, task, reader: Reader, frozen, mesh: Mesh) -> Any:
    """The frozen parameters on the mesh: those that the run was begun with, else made and saved now."""
    layout = config.sharding.params
    with contextlib.suppress(CheckpointError):
        return restore_frozen(workdir, partition.abstract(mesh, frozen, layout))
    if has_prior(config):
        frozen = {**frozen, "head": {"prior": fit_prior(config, task, reader, frozen)}}
    placed = partition.put_tree(frozen, partition.tree_sharding(mesh, frozen, layout))
    save_frozen(workdir, placed)
    return placed


def _validation(config, task, frozen, frozen_on_mesh, digest, mesh):
    """A function from a state to its validation metrics, or None where there are none."""
    if not config.train.eval_every:
        return None
    options = dict(categories=None, frozen=frozen, digest=digest, mesh=mesh)
    try:
        score = Scorer(config, task, "val", **options)
    except DataError as error:
        log.warning("no validation during training, and so no best checkpoint: %s", error)
        return None

    def evaluate_state(state: TrainState) -> dict[str, float]:
        params = task.predicting(merge_params(state.best_params, frozen_on_mesh), state.extra)
        metrics, _ = score(params, label="validate")
        return {k: v for k, v in metrics.items() if isinstance(v, float)}

    return evaluate_state


@dataclasses.dataclass(frozen=True)
class Run:
    """A trained run, restored.

    Attributes:
      config: as stored, with the overrides of this call.
      task: for images of the size it was trained on.
      params: the whole parameter tree (and running statistics), on the mesh.
      frozen: the part of it that was not trained.
      digest: identifies the frozen part.
      step: of the checkpoint.
      mesh: all devices.
    """

    config: ml_collections.ConfigDict
    task: DenseTask
    params: Mapping[str, Any]
    frozen: Mapping[str, Any]
    digest: str
    step: int
    mesh: Mesh

    def host(self, tree: Any) -> Any:
        """Host copies of a tree that is on the mesh, whole on every process."""
        gather = jax.jit(lambda x: x, out_shardings=partition.replicated(self.mesh))
        return jax.device_get(gather(tree))


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
    task = make_task(
        config,
        make_model(config, description.variant, description.names),
        size=description.size,
        names=description.names,
        categories=description.categories,
        class_weights=description.class_weights,
    )
    mesh = partition.make_mesh()
    state, frozen = _abstract(config, task, mesh)
    checkpointer = Checkpointer(workdir, read_only=True, best_metric=_best_metric(config))
    restored = checkpointer.restore(state, which=config.eval.checkpoint)
    checkpointer.close()
    if restored is None:
        raise ConfigError(f"--workdir={workdir} holds no checkpoint yet")
    state, step = restored
    frozen = restore_frozen(workdir, frozen)
    params = task.predicting(merge_params(state.best_params, frozen), state.extra)
    return Run(config, task, params, frozen, description.frozen_sha256, step, mesh)


def _abstract(config, task: DenseTask, mesh: Mesh) -> tuple[TrainState, Any]:
    """Shapes and shardings of (the state, the frozen parameters) of a config."""
    params = jax.eval_shape(task.init, jax.random.key(0))
    trained, frozen = split_params(params, frozen_paths(config, task.model.backbone.variant))
    optimizer = make_optimizer(config, task, optim.make_schedule(config.optim, 1), 1)
    average = config.optim.average
    state = jax.eval_shape(lambda p: loop.make_state(task, p, optimizer, average), trained)
    layout = config.sharding.params
    return partition.abstract(mesh, state, layout), partition.abstract(mesh, frozen, layout)


def evaluate(workdir: Path, overrides: Mapping[str, Any]) -> dict[str, Any]:
    """Restores the run in `workdir`, evaluates it, and writes `eval.json` and the report.

    Args:
      workdir, overrides: see `restore`.

    Returns:
      What is written to `eval.json`.
    """
    run = restore(workdir, overrides)
    config = run.config
    score = Scorer(
        config,
        run.task,
        config.eval.split,
        categories=tuple(config.eval.get("categories", ())) or None,
        frozen=run.host(run.frozen),
        digest=run.digest,
        mesh=run.mesh,
    )
    metrics, images = score(run.params, label="evaluate")
    size = list(score.task.size)  # of images and masks, which need not be the files' own
    result = {"step": run.step, "split": config.eval.split, "scored_size": size, **metrics}
    if config.eval.checkpoint != "latest":
        result["checkpoint"] = config.eval.checkpoint
    if make_inference(config, run.task.model.stride) is not None:
        e = config.eval
        how = dict(scales=list(e.scales), flip=e.flip, window=list(e.window), overlap=e.overlap)
        result["inference"] = how
    if jax.process_index() == 0:
        write_json(workdir / "eval.json", result)
        print(_summary(result), flush=True)
    if config.eval.report:
        _report(run, workdir, score, result, images)
    return result


def _summary(result: Mapping[str, Any]) -> str:
    rows = [f"{result['split']} at step {result['step']}, {result['images']} images"]
    rows += [f"  {k:22s} {v:.4f}" for k, v in result.items() if isinstance(v, float)]
    if "coarse" in result:
        rows.append(f"  {'coarse iou':22s} {result['coarse']['iou']:.4f}")
    return "\n".join(rows)


def _report(run: Run, workdir: Path, score: Scorer, result, images) -> None:
    """Pictures of the best, median and worst images, the curves and the table."""
    picked = report.pick_examples(images)
    examples = score.examples(run.params, [index for _, index, _ in picked])
    if jax.process_index() != 0:
        return
    labels = [f"{label}\nIoU {iou:.3f}" for label, _, iou in picked]
    report.write(
        workdir / "report",
        title=f"{run.config.head.name} on {run.config.data.name}",
        result=result,
        metrics=read_metrics(workdir),
        examples=list(zip(labels, examples, strict=True)),
        names=run.task.names,
        asked=queries(run.task.names) if run.config.task == "attention" else (),
        config=json.dumps(run.config.to_dict(), indent=2),
    )
