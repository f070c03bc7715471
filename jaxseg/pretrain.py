"""Learning without labels: training, evaluation and restoration of a pretext task's run."""

import dataclasses
import logging
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from jax.sharding import Mesh

from jaxseg import workdir as folder
from jaxseg.config import ConfigError, check_crops, validate
from jaxseg.data import DataError, loader, sources
from jaxseg.data.cache import PreparedSource
from jaxseg.evaluate import features, knn, rank
from jaxseg.report import report
from jaxseg.experiment import Backbone, check_batch, make_source, total_steps
from jaxseg.files import replacing
from jaxseg import backbones
from jaxseg.heads.projection import ProjectionHead
from jaxseg.networks.segmenter import normalize
from jaxseg.ops.resize import resize_bilinear
from jaxseg.ops.crops import View, center_crops
from jaxseg.tasks.dino import DinoTask
from jaxseg.tasks.rotation import RotationTask
from jaxseg.train import loop, optim, partition, schedules
from jaxseg.train.checkpoint import Checkpointer
from jaxseg.train.collapse import CollapseMonitor
from jaxseg.train.state import TrainState
from jaxseg.train.writers import read_metrics, write_json

log = logging.getLogger(__name__)


Task = DinoTask | RotationTask
_LOOK = ("flip", "jitter", "brightness", "contrast", "saturation", "hue", "gray")


def make_views(config: ml_collections.ConfigDict) -> tuple[View, ...]:
    """The crops of `config.views` for DINO: two global ones, then the local ones."""
    v = config.views
    shared = {k: v[k] for k in _LOOK}

    def view(kind: str, which: int) -> View:
        size, scale = v[f"{kind}_size"], tuple(v[f"{kind}_scale"])
        return View(size, scale, blur=v.blur[which], solarize=v.solarize[which], **shared)

    return (view("global", 0), view("global", 1), *[view("local", 2)] * v.local_count)


def make_backbone(config: ml_collections.ConfigDict, variant: backbones.AnyVariant) -> nn.Module:
    """The backbone of a config, with what training adds."""
    return backbones.build(
        variant,
        dtype=config.backbone.precision,
        drop_path=config.backbone.drop_path,
        remat=config.backbone.remat,
    )


def make_task(
    config: ml_collections.ConfigDict,
    variant: backbones.AnyVariant,
    *,
    steps: int,
    examples: int,
    statistics: Mapping[str, Any] | None = None,
) -> Task:
    """The task of a config, for a run of `steps` on so many examples.

    `statistics` are running ones that the backbone's batch norm starts from.
    """
    backbone = make_backbone(config, variant)
    if config.task == "rotation":
        v = config.views
        view = View(v.size, tuple(v.scale), **{k: v[k] for k in _LOOK})
        normalization = config.backbone.normalization
        return RotationTask(backbone, view, normalization, statistics=statistics or {})
    options = config.dino
    return DinoTask(
        backbone=backbone,
        head=ProjectionHead(
            options.outputs,
            hidden=options.hidden,
            bottleneck=options.bottleneck,
            norm_last_layer=options.norm_last_layer,
            batch_norm=options.batch_norm,
            dtype=config.backbone.precision,
        ),
        views=make_views(config),
        normalization=config.backbone.normalization,
        student_temperature=options.student_temperature,
        teacher_temperature=schedules.staircase(
            options.warmup_teacher_temperature,
            options.teacher_temperature,
            options.warmup_teacher_epochs,
            examples / config.train.batch,
        ),
        momentum=schedules.cosine(options.momentum, 1.0, steps),
        center_momentum=options.center_momentum,
        statistics=statistics or {},
    )


def make_optimizer(config: ml_collections.ConfigDict, *, steps: int, examples: int):
    """(optimiser, learning rate by step): DINO's last layer rests at first."""
    learning_rate = optim.make_schedule(config.optim, steps, batch=config.train.batch)
    if config.task != "dino":
        return optim.make_optimizer(config.optim, learning_rate, steps=steps), learning_rate
    hold_steps = round(config.dino.freeze_last_layer * examples / config.train.batch)
    optimizer = optim.make_optimizer(
        config.optim, learning_rate, steps=steps, hold="last_layer", hold_steps=hold_steps
    )
    return optimizer, learning_rate


class Reader:
    """Batches of images alone, in the canvas `config.data.size`.

    Args:
      config: the run's config.
      source: what to read; masks are left out.
      size: (H, W) of the canvas.
      share: of `config.data.memory_gigabytes` that it may keep.
    """

    def __init__(self, config, source: sources.Source, size: tuple[int, int], share: float = 0.25):
        self._config = config
        memory = share * config.data.memory_gigabytes * 1e9
        self._source = PreparedSource(_WithoutMasks(source), size, multiple=1, memory=memory)

    def _options(self) -> dict[str, Any]:
        return dict(
            size=None,
            process_index=jax.process_index(),
            process_count=jax.process_count(),
            local_devices=jax.local_device_count(),
            num_threads=self._config.data.threads,
            num_workers=self._config.data.workers,
        )

    def train_batches(self, start: int, stop: int) -> Iterator[Mapping[str, np.ndarray]]:
        """This process's share of the training batches of steps start .. stop - 1."""
        config = self._config
        return loader.train_batches(
            self._source,
            batch=config.train.batch,
            seed=config.seed,
            start_step=start,
            stop_step=stop,
            **self._options(),
        )

    def spread(self, limit: int) -> tuple[Iterator[Mapping[str, np.ndarray]], int]:
        """(batches of `limit` examples, evenly spaced over the source, their number); 0 = all.

        An example's `index` is its place among them.
        """
        picked = sources.spread(len(self._source), limit or len(self._source))
        chosen, count = self._source.subset(picked), len(picked)
        batches = loader.eval_batches(chosen, batch=self._config.eval.batch, **self._options())
        return batches, count


class _WithoutMasks:
    """A source that leaves masks out, so that they are not carried to the device."""

    def __init__(self, source: sources.Source):
        self.categories, self._source = source.categories, source

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, index: int) -> dict:
        return {k: v for k, v in self._source[index].items() if k != "mask"}


def train(config: ml_collections.ConfigDict, workdir: Path) -> dict[str, Any]:
    """Pretrains (or resumes) the run in `workdir` and evaluates it.

    Returns:
      What is written to `eval.json`; nothing, with a warning, where there is no split to score on.
    """
    validate(config)
    folder.check(workdir, config)
    source = make_source(config, "train")
    size = sources.working_size(source, tuple(config.data.size), 1)
    backbone = Backbone.load(config)
    check_crops(config, backbone.variant)
    steps = total_steps(config, len(source))
    task = make_task(
        config,
        backbone.variant,
        steps=steps,
        examples=len(source),
        statistics=backbone.statistics,
    )
    params = jax.device_get(jax.jit(task.init)(jax.random.key(config.seed)))
    check_batch(config, batch_norm=_has_batch_norm(jax.eval_shape(task.init_extra, params)))
    if backbone.params is not None:
        params = {**params, "backbone": backbone.params}
    description = folder.Description(
        backbone.variant, size, tuple(source.categories), "", examples=len(source)
    )
    mesh = partition.make_mesh()
    optimizer, learning_rate = make_optimizer(config, steps=steps, examples=len(source))
    with folder.lock(workdir):
        folder.begin(workdir, config, description)
        loop.Trainer(
            task=task,
            optimizer=optimizer,
            learning_rate=learning_rate,
            schedule=loop.Schedule(
                steps=steps,
                log_every=config.train.log_every,
                eval_every=config.train.eval_every,
                checkpoint_every=config.train.checkpoint_every,
                average=config.optim.average,
                evaluate_first=True,
            ),
            mesh=mesh,
            layout=config.sharding.params,
            batches=Reader(config, source, size, share=0.5).train_batches,
            batch_size=config.train.batch,
            seed=config.seed,
            workdir=workdir,
            evaluate=_validation(config, task, size, mesh, workdir),
            best_metric="knn",
            accumulate=config.train.accumulate,
            watch=_monitor(config, workdir),
            precision=config.backbone.precision,
        ).run(params, {})
    try:
        return evaluate(workdir, {})
    except DataError as error:
        log.warning(
            "the run is saved, but not scored: %s. --mode=eval --config=configs/%s.py "
            "--config.eval.split=train scores it on the images it was trained on",
            error,
            config.task,
        )
        return {}


def _has_batch_norm(extra: Mapping[str, Any]) -> bool:
    """Whether there are running statistics, which Flax calls `mean` and `var`."""
    paths = [path for path, _ in jax.tree_util.tree_leaves_with_path(extra)]
    return any(getattr(path[-1], "key", None) == "var" for path in paths)


def _monitor(config: ml_collections.ConfigDict, workdir: Path):
    """Watches a run of DINO, with what its folder says of the steps before; None for other tasks."""
    if config.task != "dino":
        return None
    monitor: list[CollapseMonitor] = []

    def watch(step: int, values: Mapping[str, float]) -> dict[str, str]:
        # Not sooner: what an earlier attempt logged after the newest checkpoint is gone only now.
        if not monitor:
            rows = (row.get("teacher_kl", 0.0) for row in read_metrics(workdir))
            monitor.append(
                CollapseMonitor(config.dino.student_temperature, highest=max(rows, default=0.0))
            )
        mode = monitor[0](step, values)
        return {"collapse": mode} if mode else {}

    return watch


def knn_reference(
    config: ml_collections.ConfigDict, held_out: sources.Source
) -> sources.Source | None:
    """The images with classes that those of `held_out` are compared with; None where it makes no sense.

    Raises:
      DataError: the splits have different classes.
    """
    if len(held_out.categories) < 2:
        return None
    if config.eval.train_split == config.eval.split:
        log.warning(
            "no k-NN: config.eval.split and config.eval.train_split are both %s, where every image would "
            "find itself",
            config.eval.split,
        )
        return None
    reference = make_source(config, config.eval.train_split)
    if tuple(held_out.categories) != tuple(reference.categories):
        here, there = set(held_out.categories), set(reference.categories)
        raise DataError(
            f"the classes of the splits {config.eval.split} and {config.eval.train_split} must be the "
            f"same, in the same order: only the one has {sorted(here - there)}, only the other "
            f"{sorted(there - here)}"
        )
    return reference


def labelled(found: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The rows that have a class; images that lie in no class's folder have category -1."""
    return {k: v[found["category"] >= 0] for k, v in found.items()}


def image_size(
    config: ml_collections.ConfigDict, source: sources.Source, stored: tuple[int, int] | None
) -> tuple[int, int]:
    """(H, W) of the canvas: `config.data.size`, else that of the run, else that of the images."""
    asked = tuple(config.data.size)
    if asked == (0, 0) and stored is not None:
        return stored
    return sources.working_size(source, asked, 1)


class Judge:
    """Scores a state: loss on held-out images, and k-NN of the backbone's features.

    Args:
      config: says the data.
      task: of the run.
      size: (H, W) of the canvas.
      mesh: all devices.

    Attributes:
      classes: their names.
      compared_with: once called, the `k` and the number of `train_images` of k-NN, where there is one.

    Raises:
      DataError: there is no such split, or something is wrong with it.
    """

    def __init__(self, config, task: Task, size: tuple[int, int], mesh: Mesh):
        self._config, self._task, self._mesh = config, task, mesh
        held_out = make_source(config, config.eval.split)
        self._held_out = Reader(config, held_out, size)
        self.classes = tuple(held_out.categories)
        self.compared_with: dict[str, int] = {}
        reference = knn_reference(config, held_out)
        self._reference = None if reference is None else Reader(config, reference, size)
        self._embed = features.Gatherer(make_embedding(config, task.backbone), mesh)
        rng = jax.random.key(config.seed)

        def score(state, batch):
            # A padding row's index is 0; it counts for nothing.
            batch = {**batch, "row": batch["index"]}
            params = state.best_params
            loss, found = task.loss(params, state.extra, batch, rng, state.step, train=False)
            return {"loss": loss, **found["scores"]}, batch["valid"].sum()

        self._score = jax.jit(score)

    def __call__(self, state: TrainState) -> tuple[dict[str, float], dict[str, np.ndarray]]:
        """(metrics, features `cls` [N, D] of the held-out images with `index` and `category`)."""
        limit = self._config.eval.limit
        batches, count = self._held_out.spread(limit)
        scores = self._scores(state, batches)
        backbone = self._task.backbone_variables(state.best_params, state.extra)
        batches, count = self._held_out.spread(limit)
        found = self._embed(backbone, batches, total=count)
        metrics = {
            **scores,
            "rankme": rank.rankme(found["cls"]),
            "embedding_std": rank.embedding_std(found["cls"]),
        }
        if self._reference is None:
            return metrics, found
        batches, count = self._reference.spread(limit)
        train = labelled(self._embed(backbone, batches, total=count))
        queries = labelled(found)
        if len(train["cls"]) and len(queries["cls"]):
            k = min(self._config.eval.k, len(train["cls"]))
            self.compared_with = {"k": k, "train_images": len(train["cls"])}
            metrics["knn"] = knn.knn_accuracy(
                train["cls"],
                train["category"],
                queries["cls"],
                queries["category"],
                k=k,
                temperature=self._config.eval.temperature,
                classes=len(self.classes),
            )[k]
        return metrics, found

    def _scores(self, state: TrainState, batches) -> dict[str, float]:
        """Mean loss and scores; an example's crops follow from the seed and its index alone."""
        parts = [
            jax.device_get(self._score(state, partition.put_batch(self._mesh, batch)))
            for batch in batches
        ]
        total = sum(n for _, n in parts)
        return {key: float(sum(s[key] * n for s, n in parts) / total) for key in parts[0][0]}


def network_size(
    config: ml_collections.ConfigDict, backbone: nn.Module, size: tuple[int, int]
) -> tuple[int, int]:
    """(height, width) at which the backbone sees images of `size` in evaluation.

    Their shorter side is `config.eval.resolution` (0: as it is), or less where the longer one would be
    more than four times as much; both are multiples of the patch.
    """
    patch, shorter = backbone.variant.patch, config.eval.resolution or min(size)
    scale = min(shorter / min(size), max(1.0, 4 * shorter / max(size)))
    return tuple(max(round(side * scale / patch), 1) * patch for side in size)


def make_input(config: ml_collections.ConfigDict, backbone: nn.Module):
    """`prepare(uint8 [B, H, W, 3])`: resized and normalised, as the backbone sees whole images."""

    def prepare(image):
        size = network_size(config, backbone, image.shape[1:3])
        image = resize_bilinear(image.astype(jnp.float32) / 255.0, size, antialias=True)
        return normalize(image, config.backbone.normalization)

    return prepare


def make_crops(config: ml_collections.ConfigDict, backbone: nn.Module):
    """`crops(batch) -> [B, h, w, 3]`, normalised: the images' centres, as k-NN and the probe see them.

    The cut has the shape of the canvas and `config.eval.crop` of the sides that fit into the image; so
    the network never sees what is around the image in the canvas.
    """

    def crops(batch):
        size = network_size(config, backbone, batch["image"].shape[1:3])
        images = center_crops(batch["image"], batch["extent"], size, share=config.eval.crop)
        return normalize(images, config.backbone.normalization)

    return crops


def make_embedding(config: ml_collections.ConfigDict, backbone: nn.Module):
    """`embed(variables of the backbone, batch)`: `cls` [B, D] of the images' centres, and their `mean`.

    The mean [B, 3] of what the network saw tells later whether two features are of the same image.
    """
    crops = make_crops(config, backbone)

    def embed(variables, batch):
        seen = crops(batch)
        return {"cls": backbone.apply(variables, seen)["cls"], "mean": seen.mean((1, 2))}

    return embed


def _validation(config, task, size, mesh, workdir):
    """A function from a state to its metrics, or None where there is nothing to score on."""
    if not config.train.eval_every:
        return None
    try:
        judge = Judge(config, task, size, mesh)
    except DataError as error:
        log.warning("no evaluation during training: %s", error)
        return None

    def evaluate_state(state: TrainState) -> dict[str, float]:
        metrics, found = judge(state)
        if jax.process_index() == 0:
            seen = network_size(config, task.backbone, size)
            _keep_features(workdir, int(state.step), found, judge.classes, seen)
        return metrics

    return evaluate_state


def _keep_features(
    workdir: Path,
    step: int,
    found: Mapping[str, np.ndarray],
    names: Sequence[str],
    size: tuple[int, int],
) -> None:
    """Keeps the features for the t-SNE over the epochs, with what tells whose they are."""
    target = workdir / "features"
    target.mkdir(exist_ok=True)
    with replacing(target / f"{step:08d}.npz") as temporary:
        np.savez(
            temporary,
            cls=found["cls"].astype(np.float16),
            category=found["category"],
            mean=found["mean"],
            names=np.array(names, np.str_),
            size=np.array(size),
        )


def same_images(
    kept: Mapping[str, np.ndarray],
    found: Mapping[str, np.ndarray],
    names: Sequence[str],
    size: tuple[int, int],
) -> bool:
    """Whether what `_keep_features` wrote is of the images of `found`, seen in the same way."""
    return (
        "mean" in kept
        and tuple(kept["names"]) == tuple(names)
        and tuple(kept["size"]) == size
        and kept["mean"].shape == found["mean"].shape
        # Sums differ in their last digits between numbers of devices.
        and np.allclose(kept["mean"], found["mean"], atol=1e-4)
    )


@dataclasses.dataclass(frozen=True)
class Run:
    """A pretraining run, restored: its config (with overrides), task, state, step and image size."""

    config: ml_collections.ConfigDict
    task: Task
    state: TrainState
    step: int
    size: tuple[int, int]
    mesh: Mesh


def restore(workdir: Path, overrides: Mapping[str, Any]) -> Run:
    """Restores the run in `workdir`; see `run.restore`."""
    config, description = folder.load(workdir, overrides)
    examples = description.examples
    steps = total_steps(config, examples)
    task = make_task(config, description.variant, steps=steps, examples=examples)
    optimizer, _ = make_optimizer(config, steps=steps, examples=examples)
    mesh = partition.make_mesh()
    params = jax.eval_shape(task.init, jax.random.key(0))
    like = jax.eval_shape(
        lambda p: loop.make_state(task, p, optimizer, config.optim.average), params
    )
    like = partition.abstract(mesh, like, config.sharding.params)
    checkpointer = Checkpointer(workdir, read_only=True, best_metric="knn")
    restored = checkpointer.restore(like, which=config.eval.checkpoint)
    checkpointer.close()
    if restored is None:
        raise ConfigError(f"--workdir={workdir} holds no checkpoint yet")
    return Run(config, task, *restored, description.size, mesh)


def evaluate(workdir: Path, overrides: Mapping[str, Any]) -> dict[str, Any]:
    """Restores the run in `workdir`, scores it, and writes `eval.json` and the curves."""
    run = restore(workdir, overrides)
    size = image_size(run.config, make_source(run.config, run.config.eval.split), run.size)
    judge = Judge(run.config, run.task, size, run.mesh)
    metrics, found = judge(run.state)
    split, count = run.config.eval.split, len(found["cls"])
    result = {"step": run.step, "split": split, "images": count, **metrics, **judge.compared_with}
    if jax.process_index() == 0:
        lines = [f"{split} at step {run.step}, {count} images"]
        print("\n".join(lines + [f"  {k:22s} {v:.4f}" for k, v in metrics.items()]), flush=True)
        write_json(workdir / "eval.json", result)
        if run.config.eval.report:
            report.plot_curves(read_metrics(workdir), workdir / "report/curves.png")
    return result
