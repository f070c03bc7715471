"""Training, evaluation and restoration of a run: the objects of `experiment` put to work."""

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
from jaxseg.evaluate import dense, report
from jaxseg.experiment import (
    Backbone,
    Reader,
    frozen_paths,
    make_model,
    make_params,
    make_source,
    make_task,
    params_digest,
    total_steps,
)
from jaxseg.tasks.segmentation import SegmentationTask
from jaxseg.train import loop, optim, partition
from jaxseg.train.checkpoint import Checkpointer, restore_frozen, save_frozen
from jaxseg.train.state import TrainState, merge_params, split_params
from jaxseg.train.writers import read_metrics, write_json

log = logging.getLogger(__name__)


def train(config: ml_collections.ConfigDict, workdir: Path) -> dict[str, Any]:
    """Trains (or resumes) the run in `workdir`, evaluates it, and writes the report.

    Returns:
      What is written to `eval.json`.
    """
    validate(config)
    _train(config, workdir)
    # From the checkpoint, as `--mode=eval` does it, so that the two cannot differ.
    return evaluate(workdir, {})


def _train(config: ml_collections.ConfigDict, workdir: Path) -> None:
    source = make_source(config, "train")
    backbone = Backbone.load(config)
    task = make_task(config, make_model(config, backbone.variant), source)
    params, frozen = make_params(task, backbone, config)
    digest = params_digest(frozen)
    description = folder.Description(backbone.variant, task.size, task.categories, digest)
    folder.begin(workdir, config, description)
    with folder.lock(workdir):
        _train_in(workdir, config, task, source, params, frozen, digest)


def _train_in(workdir, config, task, source, params, frozen, digest) -> None:
    mesh = partition.make_mesh()
    shardings = partition.tree_sharding(mesh, frozen, config.sharding.params)
    frozen_on_mesh = partition.put_tree(frozen, shardings)
    save_frozen(workdir, frozen_on_mesh)
    reader = Reader(config, task, source, frozen=frozen, digest=digest, train=True)
    schedule = loop.Schedule(
        steps=total_steps(config, len(source)),
        log_every=config.train.log_every,
        eval_every=config.train.eval_every,
        checkpoint_every=config.train.checkpoint_every,
        average=config.optim.average,
    )
    learning_rate = optim.make_schedule(config.optim, schedule.steps)
    loop.Trainer(
        task=dataclasses.replace(task, augmentation=reader.augmentation),
        optimizer=optim.make_optimizer(config.optim, learning_rate),
        learning_rate=learning_rate,
        schedule=schedule,
        mesh=mesh,
        layout=config.sharding.params,
        batches=reader.train_batches,
        batch_size=config.train.batch,
        seed=config.seed,
        workdir=workdir,
        evaluate=_validation(config, task, frozen, frozen_on_mesh, digest, mesh),
    ).run(params, frozen_on_mesh)


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
        task: SegmentationTask,
        split: str,
        *,
        categories: tuple[str, ...] | None,
        frozen: Mapping[str, Any],
        digest: str,
        mesh: Mesh,
    ):
        source = make_source(config, split, categories=categories)
        self.task = make_task(config, task.model, source)
        self._reader = Reader(config, self.task, source, frozen=frozen, digest=digest, train=False)
        self._mesh = mesh

    def __call__(
        self, params: Mapping[str, Any], *, label: str
    ) -> tuple[dict[str, Any], list[tuple[int, float]]]:
        """(metrics, [(example, foreground IoU)]) of the whole split; see `dense.evaluate`."""
        batches, total = self._reader.eval_batches(), len(self._reader)
        return dense.evaluate(self.task, params, batches, mesh=self._mesh, total=total, label=label)

    def examples(self, params: Mapping[str, Any], indices: list[int]):
        """(image and mask, probability) of some examples; see `dense.probabilities`."""
        batches = self._reader.subset(indices)
        return list(dense.probabilities(self.task, params, batches, mesh=self._mesh))


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
        metrics, _ = score(merge_params(state.best_params, frozen_on_mesh), label="validate")
        return {k: v for k, v in metrics.items() if isinstance(v, float)}

    return evaluate_state


@dataclasses.dataclass(frozen=True)
class Run:
    """A trained run, restored.

    Attributes:
      config: as stored, with the overrides of this call.
      task: for images of the size it was trained on.
      params: the whole parameter tree, on the mesh.
      frozen: the part of it that was not trained.
      digest: identifies the frozen part.
      step: of the checkpoint.
      mesh: all devices.
    """

    config: ml_collections.ConfigDict
    task: SegmentationTask
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
    task = SegmentationTask(
        model=make_model(config, description.variant),
        size=description.size,
        categories=description.categories,
        loss_weights=config.loss.to_dict(),
        threshold=config.eval.threshold,
    )
    mesh = partition.make_mesh()
    state, frozen = _abstract(config, task, mesh)
    checkpointer = Checkpointer(workdir, read_only=True)
    restored = checkpointer.restore(state, which=config.eval.checkpoint)
    checkpointer.close()
    if restored is None:
        raise ConfigError(f"--workdir={workdir} holds no checkpoint yet")
    state, step = restored
    frozen = restore_frozen(workdir, frozen)
    params = merge_params(state.best_params, frozen)
    return Run(config, task, params, frozen, description.frozen_sha256, step, mesh)


def _abstract(config, task: SegmentationTask, mesh: Mesh) -> tuple[TrainState, Any]:
    """Shapes and shardings of (the state, the frozen parameters) of a config."""
    params = jax.eval_shape(task.init, jax.random.key(0))
    trained, frozen = split_params(params, frozen_paths(config))
    optimizer = optim.make_optimizer(config.optim, optim.make_schedule(config.optim, 1))
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
        categories=tuple(config.eval.categories) or None,
        frozen=run.host(run.frozen),
        digest=run.digest,
        mesh=run.mesh,
    )
    metrics, images = score(run.params, label="evaluate")
    result = {"step": run.step, "split": config.eval.split, **metrics}
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
    rows = [
        (f"{label}\nIoU {iou:.3f}", shown["image"], shown["mask"], chance >= run.task.threshold)
        for (label, _, iou), (shown, chance) in zip(picked, examples, strict=True)
    ]
    report.write(
        workdir / "report",
        title=f"{run.config.head.name} on {run.config.data.name}",
        result=result,
        metrics=read_metrics(workdir),
        examples=rows,
        config=json.dumps(run.config.to_dict(), indent=2),
    )
