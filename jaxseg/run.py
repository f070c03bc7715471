"""The modes of `main.py`: train and evaluate, and evaluate a finished or running run."""

import dataclasses
import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import ml_collections

from jaxseg.config import ConfigError, check_same_run, validate
from jaxseg.data import sources
from jaxseg.evaluate import dense, report
from jaxseg.experiment import (
    Backbone,
    Reader,
    is_frozen,
    make_model,
    make_params,
    make_source,
    make_task,
    params_digest,
    total_steps,
)
from jaxseg.models.vit import Variant
from jaxseg.tasks.segmentation import SegmentationTask
from jaxseg.train import loop, optim, partition
from jaxseg.train.checkpoint import Checkpointer, restore_frozen, save_frozen
from jaxseg.train.state import TrainState, merge_params, split_params
from jaxseg.train.writers import read_metrics, write_json

log = logging.getLogger(__name__)

# In evaluation and prediction these sections of the stored config are as they were trained.
_MODEL_SECTIONS = ("task", "backbone", "head")


@dataclasses.dataclass(frozen=True)
class Run:
    """A trained run, restored.

    Attributes:
      config: as stored, with the overrides of this call.
      task: for the images it was trained on.
      variant: of the backbone.
      digest: of a frozen backbone's parameters.
      params: the whole parameter tree on the mesh.
      frozen: the part of it that was not trained.
      step: of the checkpoint.
      mesh: all devices.
    """

    config: ml_collections.ConfigDict
    task: SegmentationTask
    digest: str
    params: Mapping[str, Any]
    frozen: Mapping[str, Any]
    step: int
    mesh: jax.sharding.Mesh


def open_workdir(config: ml_collections.ConfigDict, workdir: Path) -> None:
    """Creates the workdir and its `config.json`, or checks that it holds a run of the same config.

    Raises:
      ConfigError: it cannot be written, or holds another run.
    """
    path = workdir / "config.json"
    if path.exists():
        check_same_run(_read_json(path), config.to_dict(), workdir)
    if jax.process_index() != 0:
        return
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        write_json(path, config.to_dict())
    except OSError as error:
        raise ConfigError(f"cannot write to --workdir={workdir}: {error}") from error


def _read_json(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ConfigError(f"cannot read {path}: {error}") from error


def train(config: ml_collections.ConfigDict, workdir: Path) -> dict[str, Any]:
    """Trains (or resumes) the run in `workdir`, evaluates it, and writes the report.

    Returns:
      What is written to `eval.json`.
    """
    validate(config)
    source = make_source(config, "train")
    backbone = Backbone.load(config)
    model = make_model(config, backbone.variant)
    task = make_task(config, model, source)
    open_workdir(config, workdir)
    frozen_backbone = is_frozen(config)
    params, frozen = make_params(task, backbone, seed=config.seed, frozen=frozen_backbone)
    digest = params_digest(frozen) if frozen else ""
    _describe(workdir, backbone.variant, task, digest)
    mesh = partition.make_mesh()
    frozen_on_mesh = partition.put_tree(
        frozen, partition.tree_sharding(mesh, frozen, config.sharding.params)
    )
    save_frozen(workdir, frozen_on_mesh)
    reader = Reader(
        config,
        task,
        source,
        backbone_params=frozen.get("backbone"),
        digest=digest,
        train=True,
    )
    task = dataclasses.replace(task, augmentation=reader.augmentation)
    steps = total_steps(config, len(source))
    learning_rate = optim.make_schedule(config.optim, steps)
    state = loop.train(
        task,
        optim.make_optimizer(config.optim, learning_rate),
        params,
        frozen_on_mesh,
        mesh=mesh,
        layout=config.sharding.params,
        batches=reader.train_batches,
        batch_size=config.train.batch,
        schedule=loop.Schedule(
            steps=steps,
            log_every=config.train.log_every,
            eval_every=config.train.eval_every,
            checkpoint_every=config.train.checkpoint_every,
            average=config.optim.average,
        ),
        learning_rate=learning_rate,
        seed=config.seed,
        workdir=workdir,
        evaluate=_validation(config, task, frozen, frozen_on_mesh, digest, mesh),
    )
    if config.eval.checkpoint == "best":
        return evaluate(workdir, {})
    run = Run(
        config,
        task,
        digest,
        merge_params(state.best_params, frozen_on_mesh),
        frozen_on_mesh,
        int(state.step),
        mesh,
    )
    return _evaluate(run, workdir)


def _describe(workdir: Path, variant: Variant, task: SegmentationTask, digest: str) -> None:
    """Writes `model.json`: what the config alone does not say about the trained model."""
    description = {
        "variant": dataclasses.asdict(variant),
        "size": list(task.size),
        "categories": list(task.categories),
        "frozen_sha256": digest,
    }
    path = workdir / "model.json"
    if path.exists():
        stored = _read_json(path)
        differ = [k for k, v in description.items() if stored.get(k) != v]
        if differ:
            key = differ[0]
            raise ConfigError(
                f"{workdir} holds a run with another {key}: {stored.get(key)} there, "
                f"{description[key]} now. Give another --workdir."
            )
    elif jax.process_index() == 0:
        write_json(path, description)


def _validation(config, task, frozen, frozen_on_mesh, digest, mesh):
    """A function from a state to validation metrics, or None where there is no val split."""
    if not config.train.eval_every:
        return None
    try:
        source = make_source(config, "val")
    except sources.DataError as error:
        log.warning("no validation during training, so no best checkpoint: %s", error)
        return None
    task = dataclasses.replace(
        task, size=make_task(config, task.model, source).size, categories=tuple(source.categories)
    )
    reader = Reader(
        config,
        task,
        source,
        backbone_params=frozen.get("backbone"),
        digest=digest,
        train=False,
    )

    def evaluate_state(state: TrainState) -> dict[str, float]:
        params = merge_params(state.best_params, frozen_on_mesh)
        result, _ = dense.evaluate(
            task, params, reader.eval_batches(), mesh=mesh, total=len(reader), label="validate"
        )
        return {k: v for k, v in result.items() if isinstance(v, float)}

    return evaluate_state


def restore(workdir: Path, overrides: Mapping[str, Any]) -> Run:
    """Restores the run in `workdir`.

    Args:
      workdir: the run's folder.
      overrides: `{"data.root": value}` of config values that replace the stored ones.

    Raises:
      ConfigError: there is no run, or an override changes the model.
      CheckpointError: there is no checkpoint that can be read.
    """
    if not (workdir / "config.json").exists():
        raise ConfigError(f"--workdir={workdir} holds no run: config.json is missing")
    stored = _read_json(workdir / "config.json")
    config = _tuples(stored)
    config.update_from_flattened_dict(dict(overrides))
    validate(config)
    models = [{k: c[k] for k in _MODEL_SECTIONS} for c in (stored, config.to_dict())]
    check_same_run(*models, workdir)
    description = _read_json(workdir / "model.json")
    variant = Variant(**description["variant"])
    task = SegmentationTask(
        model=make_model(config, variant),
        size=tuple(description["size"]),
        categories=tuple(description["categories"]),
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
    return Run(config, task, description["frozen_sha256"], params, frozen, step, mesh)


def _tuples(stored: Mapping[str, Any]) -> ml_collections.ConfigDict:
    """A ConfigDict of parsed JSON, lists as tuples."""

    def convert(value):
        if isinstance(value, Mapping):
            return {k: convert(v) for k, v in value.items()}
        return tuple(value) if isinstance(value, list) else value

    return ml_collections.ConfigDict(convert(stored))


def _abstract(config, task, mesh) -> tuple[TrainState, Mapping[str, Any]]:
    """Shapes and shardings of the (state, frozen parameters) of a config."""
    params = jax.eval_shape(task.init, jax.random.key(0))
    trained, frozen = split_params(params, ("backbone",) if is_frozen(config) else ())
    optimizer = optim.make_optimizer(config.optim, optim.make_schedule(config.optim, 1))
    state = jax.eval_shape(lambda p: loop.make_state(p, optimizer, config.optim.average), trained)

    def placed(tree):
        shardings = partition.tree_sharding(mesh, tree, config.sharding.params)
        return jax.tree.map(
            lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), tree, shardings
        )

    return placed(state), placed(frozen)


def evaluate(workdir: Path, overrides: Mapping[str, Any]) -> dict[str, Any]:
    """Restores the run in `workdir` and evaluates it; see `restore` for the arguments.

    Returns:
      What is written to `eval.json`.
    """
    return _evaluate(restore(workdir, overrides), workdir)


def _evaluate(run: Run, workdir: Path) -> dict[str, Any]:
    config = run.config
    source = make_source(
        config, config.eval.split, categories=tuple(config.eval.categories) or None
    )
    task = dataclasses.replace(make_task(config, run.task.model, source), augmentation=None)
    host_backbone = None
    if run.frozen:
        host_backbone = _to_host(run.frozen, run.mesh)["backbone"]
    reader = Reader(
        config, task, source, backbone_params=host_backbone, digest=run.digest, train=False
    )
    scores, images = dense.evaluate(
        task, run.params, reader.eval_batches(), mesh=run.mesh, total=len(reader)
    )
    result = {"step": run.step, "split": config.eval.split, **scores}
    if jax.process_index() == 0:
        write_json(workdir / "eval.json", result)
        print(_summary(result), flush=True)
    if config.eval.report:
        _report(run, workdir, task, reader, result, images)
    return result


def _to_host(tree: Any, mesh: jax.sharding.Mesh) -> Any:
    """Host copies of a tree on the mesh, whole on every process."""
    gather = jax.jit(lambda x: x, out_shardings=partition.replicated(mesh))
    return jax.device_get(gather(tree))


def _summary(result: Mapping[str, Any]) -> str:
    shown = {k: v for k, v in result.items() if isinstance(v, float)}
    rows = [f"{result['split']} at step {result['step']}, {result['images']} images"]
    rows += [f"  {k:22s} {v:.4f}" for k, v in shown.items()]
    if "coarse" in result:
        rows.append(f"  {'coarse iou':22s} {result['coarse']['iou']:.4f}")
    return "\n".join(rows)


def _report(run: Run, workdir: Path, task, reader: Reader, result, images) -> None:
    """Pictures of the best, median and worst images, the curves and the table."""
    picked = report.pick_examples(images)
    batches = reader.subset([index for _, index, _ in picked])
    examples = list(dense.probabilities(task, run.params, batches, mesh=run.mesh))
    if jax.process_index() != 0:
        return
    rows = [
        (f"{label}\nIoU {iou:.3f}", shown["image"], shown["mask"], chance >= task.threshold)
        for (label, _, iou), (shown, chance) in zip(picked, examples, strict=True)
    ]
    folder = workdir / "report"
    figures = {}
    if report.plot_curves(read_metrics(workdir), folder / "curves.png"):
        figures["curves.png"] = "Training"
    report.plot_examples(rows, folder / "examples.png")
    figures["examples.png"] = "Best, median and worst images (orange: missed, blue: wrongly taken)"
    report.plot_categories(result, folder / "categories.png")
    figures["categories.png"] = "Categories"
    report.write_page(
        folder,
        title=f"{run.config.head.name} on {run.config.data.name}",
        result=result,
        figures=figures,
        config=json.dumps(run.config.to_dict(), indent=2),
    )
