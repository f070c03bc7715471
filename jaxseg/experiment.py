"""From a config to the objects of a run: the one place that knows what each config section makes."""

import dataclasses
import hashlib
import json
import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import ml_collections
import numpy as np
from einops import rearrange

from jaxseg import weights
from jaxseg.config import ConfigError, flatten
from jaxseg.data import loader, sources
from jaxseg.data.cache import DiskStore, FeatureCache, PreparedSource
from jaxseg.losses.multiclass import class_weights
from jaxseg import backbones
from jaxseg.heads import HEADS
from jaxseg.backbones import BACKBONES, AnyVariant
from jaxseg.heads.guided import relative, standardise
from jaxseg.backbones.resnet import OUTPUT_STRIDES, ResNetVariant
from jaxseg.networks.segmenter import Segmenter, default_stride
from jaxseg.backbones.vit import Variant, from_variant
from jaxseg.ops.mask_augment import Augmentation
from jaxseg.tasks.query import AttentionTask, queries
from jaxseg.tasks.masks import VOID, DenseTask
from jaxseg.tasks.multiclass import MulticlassTask
from jaxseg.tasks.binary import SegmentationTask
from jaxseg.train import ridge
from jaxseg.train.state import split_params
from jaxseg.train.writers import Progress

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Backbone:
    """Which backbone a run uses, and its pretrained parameters if there are any.

    Attributes:
      variant: its shape.
      params: its parameters, or None to start from scratch.
      statistics: of its batch norm; empty where there is none.
    """

    variant: AnyVariant
    params: Mapping[str, Any] | None = None
    statistics: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    @classmethod
    def load(cls, config: ml_collections.ConfigDict) -> "Backbone":
        """Reads what `config.backbone` asks for."""
        if not config.backbone.weights:
            return cls(BACKBONES[config.backbone.variant])
        _check_normalization(config)
        loaded = weights.load(config.backbone.weights)
        log.info("backbone %s from %s", loaded.variant.name, loaded.source)
        return cls(loaded.variant, loaded.params, loaded.statistics)


def _check_normalization(config: ml_collections.ConfigDict) -> None:
    """Refuses to show a backbone from a workdir images of another kind than it was trained on."""
    stored = Path(config.backbone.weights).expanduser() / "config.json"
    # Others keep a config.json beside their weights too.
    if not stored.is_file() or not stored.with_name("model.json").is_file():
        return
    there = json.loads(stored.read_text())["backbone"]["normalization"]
    if there != config.backbone.normalization:
        raise ConfigError(
            f"config.backbone.normalization is {config.backbone.normalization!r}; the run in "
            f"{config.backbone.weights} was trained with {there!r}: allowed is that"
        )


def frozen_backbone(config: ml_collections.ConfigDict) -> bool:
    """Whether the whole backbone keeps its values."""
    choice, some = config.backbone.train, config.backbone.freeze > 0
    return choice == "none" or (choice == "auto" and bool(config.backbone.weights) and not some)


def frozen_paths(config: ml_collections.ConfigDict, variant: AnyVariant) -> tuple[str, ...]:
    """Prefixes of the parameters that no step changes: of the backbone, or a part, and the prior's."""
    if frozen_backbone(config):
        return ("backbone", "head/prior") if has_prior(config) else ("backbone",)
    layers = backbones.layers(variant)
    if config.backbone.freeze >= len(layers):
        raise ConfigError(
            f"config.backbone.freeze is {config.backbone.freeze}; {variant.name} allows 0 to "
            f"{len(layers) - 1} (or config.backbone.train=none)"
        )
    frozen = layers[: config.backbone.freeze + 1] if config.backbone.freeze else []
    return tuple(f"backbone/{name}" for names in frozen for name in names)


def has_prior(config: ml_collections.ConfigDict) -> bool:
    """Whether the head's linear prior is solved for before training."""
    return config.head.name == "guided" and config.head.guided.prior > 0


def make_model(
    config: ml_collections.ConfigDict, variant: AnyVariant, names: tuple[str, ...]
) -> Segmenter:
    """The segmenter of a config, for masks whose values have these names."""
    heads = HEADS[config.task]
    options = {
        k: tuple(v) if isinstance(v, list) else v
        for k, v in config.head.get(config.head.name, {}).items()
    }
    if config.head.name == "guided":
        options["prior"] = has_prior(config)
        if has_prior(config) and not frozen_backbone(config):
            raise ConfigError(
                f"config.head.guided.prior is {config.head.guided.prior}; allowed with a backbone "
                "that is trained: 0"
            )
        if has_prior(config) and isinstance(variant, ResNetVariant):
            raise ConfigError(
                f"config.head.guided.prior is {config.head.guided.prior}; allowed with a "
                f"{variant.name}: 0 (it is solved for on the tokens of a ViT)"
            )
    if config.task == "attention":
        head = heads[config.head.name](classes=len(queries(names)), **options)
    else:
        outputs = 1 if config.task == "segmentation" else len(names)
        head = heads[config.head.name](outputs=outputs, **options)
    if isinstance(variant, ResNetVariant):
        stride = config.backbone.stride or 16
        if stride not in OUTPUT_STRIDES:
            raise ConfigError(
                f"config.backbone.stride is {stride}; {variant.name} allows {OUTPUT_STRIDES}"
            )
        if config.task == "segmentation":
            raise ConfigError(
                f"config.backbone is a {variant.name}; the heads for one object class take a ViT "
                "(configs/deeplab_multiclass.py takes both)"
            )
        backbone = backbones.build(
            variant,
            dtype=config.backbone.precision,
            output_stride=stride,
            norm=config.backbone.norm,
        )
    else:
        stride = config.backbone.stride or default_stride(variant.patch)
        for layer in config.backbone.layers:
            if not -variant.depth <= layer < variant.depth:
                raise ConfigError(
                    f"config.backbone.layers has {layer}; {variant.name} allows {-variant.depth} to "
                    f"{variant.depth - 1}"
                )
        backbone = from_variant(variant, dtype=config.backbone.precision)
    return Segmenter(
        backbone=backbone,
        head=head,
        stride=stride,
        layers=tuple(config.backbone.layers),
        normalization=config.backbone.normalization,
        # A backbone that is trained in part keeps the statistics of its batch norm.
        trains_backbone=not frozen_paths(config, variant),
    )


def make_source(
    config: ml_collections.ConfigDict, split: str, *, categories: tuple[str, ...] | None = None
) -> sources.Source:
    """The data source of a config for one split."""
    data = config.data
    chosen = tuple(data.categories) if categories is None else categories
    chosen = _names(chosen)
    options: dict[str, Any] = {}
    several = config.task in ("multiclass", "attention")
    name = {"folder": "labelled", "shapes": "scenes"}.get(data.name, data.name)
    name = name if several else data.name
    if data.name == "tfds":
        options = dict(
            dataset=data.tfds.name,
            image_key=data.tfds.image_key,
            mask_key=data.tfds.mask_key,
            label_key=data.tfds.label_key,
            foreground=tuple(data.tfds.foreground),
            void=tuple(data.tfds.void),
        )
        if several:
            if not data.classes:
                raise ConfigError("config.data.classes is empty; with tfds it names the classes")
            options |= dict(classes=_names(data.classes), ids=tuple(data.tfds.ids))
    if name == "folder":
        options = dict(mask_values=data.mask_values, mask_threshold=data.mask_threshold or None)
    if name == "labelled":
        options = dict(classes=_names(data.classes), void=tuple(data.void))
        options |= dict(images=data.images or "images", labels=data.labels or "labels")
    if name == "coco":
        options = dict(classes=_names(data.classes), annotations=data.labels, images=data.images)
        options |= dict(overlap=data.overlap, crowd=data.crowd)
    if name == "images" and tuple(data.size) != (0, 0):
        options = dict(at_least=tuple(data.size))
    if name in sources.DRAWN:
        options = dict(size=tuple(data.size)) if tuple(data.size) != (0, 0) else {}
        options |= dict(length=data.length) if data.length and split == "train" else {}
    source = sources.create(name, split, root=data.root, categories=chosen, **options)
    return sources.Some(source, data.limit) if data.limit else source


def _names(values: Sequence[Any]) -> tuple[str, ...]:
    # `--config.data.categories=a,b` arrives as one name, and =2016 as a number.
    names = tuple(str(value) for value in values)
    return tuple(names[0].split(",")) if len(names) == 1 else names


def mask_names(source: sources.Source) -> tuple[str, ...]:
    """The names of the values in a source's masks."""
    return tuple(getattr(source, "mask_names", ("background", "foreground")))


def make_task(
    config: ml_collections.ConfigDict,
    model: Segmenter,
    *,
    size: tuple[int, int],
    names: tuple[str, ...],
    categories: tuple[str, ...],
    class_weights: tuple[float, ...] = (),
    statistics: Mapping[str, Any] | None = None,
) -> DenseTask:
    """The task of a config; see `DenseTask` for the arguments."""
    least = {"multiclass": len(names) >= 2, "attention": len(queries(names)) >= 1}
    if not least.get(config.task, True):
        raise ConfigError(
            f"the data have the classes {', '.join(names)}; {config.task} needs at least two, one of "
            "them not background"
        )
    common = dict(
        model=model,
        size=size,
        names=names,
        loss_weights=config.loss.to_dict(),
        statistics=statistics or {},
    )
    if config.task == "segmentation":
        return SegmentationTask(categories=categories, threshold=config.eval.threshold, **common)
    if config.task == "attention":
        return AttentionTask(questions=config.questions, **common)
    return MulticlassTask(
        class_weights=class_weights,
        label_smoothing=config.label_smoothing,
        auxiliary=config.auxiliary,
        **common,
    )


def fit_task(
    task: DenseTask, config: ml_collections.ConfigDict, source: sources.Source
) -> DenseTask:
    """The task for the images of another source.

    Raises:
      ConfigError: its masks hold other classes than the task predicts.
    """
    if mask_names(source) != task.names:
        raise ConfigError(
            f"the classes of the data are {', '.join(mask_names(source))}; the run was trained for "
            f"{', '.join(task.names)}"
        )
    size = sources.working_size(source, tuple(config.data.size), task.model.stride)
    changes: dict[str, Any] = dict(size=size)
    if isinstance(task, SegmentationTask):
        changes["categories"] = tuple(source.categories)
    return dataclasses.replace(task, **changes)


def make_class_weights(
    config: ml_collections.ConfigDict, source: sources.Source
) -> tuple[float, ...]:
    """The classes' weights in the loss, from the masks of at most 1,000 examples; () for none."""
    if config.task != "multiclass" or config.class_weights == "none":
        return ()
    names = mask_names(source)
    counts = []
    for index in sources.spread(len(source), 1000):
        mask = source[int(index)]["mask"]
        counts.append(np.bincount(mask.ravel(), minlength=256)[: len(names)])
    return tuple(float(w) for w in class_weights(np.stack(counts), config.class_weights))


def make_params(
    task: DenseTask, backbone: Backbone, config: ml_collections.ConfigDict
) -> tuple[Mapping[str, Any], Mapping[str, Any]]:
    """Initial (trained, frozen) parameters as host arrays, equal on every process."""
    params = jax.device_get(jax.jit(task.init)(jax.random.key(config.seed)))
    if backbone.params is not None:
        params = {**params, "backbone": backbone.params}
    return split_params(params, frozen_paths(config, backbone.variant))


class Reader:
    """Batches of a source for one task, with cached features where the backbone is frozen.

    Args:
      config: the run's config.
      task: says the size of the images, and computes the features.
      source: what to read.
      frozen: host arrays of the frozen parameters; its `backbone` is used if that is frozen as a whole.
      digest: identifies it.
      train: whether the config's augmentation applies.
      cache: whether features are wanted at all.
    """

    def __init__(
        self,
        config: ml_collections.ConfigDict,
        task: DenseTask,
        source: sources.Source,
        *,
        frozen: Mapping[str, Any],
        digest: str,
        train: bool,
        cache: bool = True,
    ):
        self._config = config
        augment = make_augmentation(config) if train else Augmentation()
        # A flip is the one change that leaves a finite set of images to compute features of.
        only_flips = dataclasses.replace(augment, flip=0.0) == Augmentation()
        features = None
        one_map = isinstance(task.model.backbone.variant, Variant)
        if cache and frozen_backbone(config) and only_flips and one_map:
            orientations = 2 if augment.flip else 1
            features = self._make_cache(task, source, frozen["backbone"], digest, orientations)
        self.cached = features is not None
        self.augmentation = None if self.cached or augment == Augmentation() else augment
        self._source = PreparedSource(
            source,
            task.size,
            multiple=task.model.stride,
            memory=config.data.memory_gigabytes * 1e9,
            features=features,
            flip=augment.flip if self.cached else 0.0,
            seed=config.seed,
        )

    def __len__(self) -> int:
        return len(self._source)

    def _make_cache(self, task, source, params, digest, orientations) -> FeatureCache | None:
        config = self._config.data
        stride, dim = task.model.stride, task.model.backbone.variant.dim
        pixels = task.size[0] * task.size[1]
        each = 4 * pixels + 2 * dim * len(task.model.layers) * pixels // stride**2
        needed = len(source) * orientations * each / 1e9
        if needed > config.memory_gigabytes and not config.cache_dir:
            log.warning(
                "cached features would take %.1f GB, over config.data.memory_gigabytes=%.1f: they are "
                "computed anew in every step (or set config.data.cache_dir)",
                *(needed, config.memory_gigabytes),
            )
            return None
        key = json.dumps([digest, flatten(self._config)["backbone.layers"], stride, task.size])
        key += self._config.backbone.normalization + self._config.backbone.precision
        store = None
        if config.cache_dir:
            try:
                store = DiskStore(Path(config.cache_dir), config.cache_gigabytes * 1e9)
            except OSError as error:
                raise ConfigError(
                    f"config.data.cache_dir={config.cache_dir!r} cannot be written: {error}"
                ) from error
        return FeatureCache(_make_features(task, params), key=key, store=store)

    def _options(self) -> dict[str, Any]:
        return dict(
            size=None,  # `PreparedSource` brings its examples to one size itself
            process_index=jax.process_index(),
            process_count=jax.process_count(),
            local_devices=jax.local_device_count(),
            num_threads=self._config.data.threads,
            num_workers=0 if self.cached else self._config.data.workers,
        )

    def train_batches(self, start: int, stop: int) -> Iterator[Mapping[str, np.ndarray]]:
        """This process's share of the training batches of steps start .. stop - 1."""
        return loader.train_batches(
            self._source,
            batch=self._config.train.batch,
            seed=self._config.seed,
            start_step=start,
            stop_step=stop,
            **self._options(),
        )

    def eval_batches(self) -> Iterator[Mapping[str, np.ndarray]]:
        """This process's share of the whole source, once and in order."""
        return loader.eval_batches(self._source, batch=self._config.eval.batch, **self._options())

    def example(self, index: int) -> Mapping[str, np.ndarray]:
        """One example, unflipped, with features where they are cached."""
        return self._source.read(index, flipped=False)

    def subset(self, indices: list[int]) -> Iterator[Mapping[str, np.ndarray]]:
        """Batches of the examples at `indices`, in that order."""
        source = self._source.subset(indices)
        return loader.eval_batches(source, batch=self._config.eval.batch, **self._options())


def _make_features(task: DenseTask, backbone: Mapping[str, Any]):
    """A function from one uint8 image to its features, on a device of this process."""
    device = jax.local_devices()[0]
    local = jax.device_put({"backbone": dict(backbone)}, device)
    compute = jax.jit(task.features)

    def features(image: np.ndarray) -> np.ndarray:
        return jax.device_get(compute(local, jax.device_put(image[None], device)))[0]

    return features


# So many groups of categories at most are told apart when the prior is solved for.
GROUPS = 16


def fit_prior(
    config: ml_collections.ConfigDict,
    task: DenseTask,
    reader: Reader,
    frozen: Mapping[str, Any],
) -> dict[str, np.ndarray]:
    """The parameters of the guided head's prior, from all training images, unaugmented."""
    features = None if reader.cached else _make_features(task, frozen["backbone"])
    tokens = jax.jit(lambda x: relative(standardise(x[None]))[0])
    outputs, total = task.model.head.outputs, len(reader)
    several = len(getattr(task, "categories", ())) > 1
    progress = Progress("linear prior", 2 * total)

    def read(index, again):
        shown = reader.example(index)
        found = features(shown["image"]) if features else shown["features"]
        x = np.asarray(tokens(found))
        h, w, channels = x.shape
        cells = rearrange(shown["mask"], "(h i) (w j) -> (h w) (i j)", h=h, w=w)
        values = [1] if outputs == 1 else range(outputs)
        share = np.stack([(cells == v).mean(1) for v in values], 1)
        known = (cells != VOID).mean(1)
        progress.update(index + 1 + again * total)
        # What comes next is another category, or else, as far as anyone can tell, a later image.
        group = int(shown["category"]) % GROUPS if several else 4 * index // total
        return x.reshape(h * w, channels), share / np.maximum(known, 1e-9)[:, None], known, group

    kernel, bias = ridge.fit(read, total, penalty=config.head.guided.prior)
    progress.close()
    return {"kernel": kernel, "bias": bias}


def make_augmentation(config: ml_collections.ConfigDict) -> Augmentation:
    """The augmentation of a config."""
    return Augmentation(**{k: tuple(v) if k == "scale" else v for k, v in config.augment.items()})


def params_digest(params: Mapping[str, Any]) -> str:
    """sha256 over the bytes of all tensors in the order of their paths; empty without any."""
    if not jax.tree.leaves(params):
        return ""
    digest = hashlib.sha256()
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        digest.update(jax.tree_util.keystr(path).encode() + np.ascontiguousarray(leaf).tobytes())
    return digest.hexdigest()


def check_batch(config: ml_collections.ConfigDict, *, batch_norm: bool) -> None:
    """Checks that all devices, and `train.accumulate` parts, divide a batch where that matters.

    Args:
      config: the run's config.
      batch_norm: whether statistics of the batch are learned from, which padding would change.

    Raises:
      ConfigError: they do not.
    """
    batch, devices, parts = config.train.batch, jax.device_count(), config.train.accumulate
    padded = -(-batch // devices) * devices
    if padded != batch and batch_norm:
        raise ConfigError(
            f"config.train.batch is {batch}; allowed with batch norm on {devices} devices: multiples "
            f"of {devices} (padding would count in its statistics)"
        )
    if padded % parts:
        raise ConfigError(
            f"config.train.accumulate is {parts}; allowed on {devices} devices: divisors of {padded}"
        )


def total_steps(config: ml_collections.ConfigDict, examples: int) -> int:
    """Length of the run: `train.steps`, or enough full batches for `epochs` and `min_steps`."""
    if config.train.steps:
        return config.train.steps
    epochs = math.ceil(examples * config.train.epochs / config.train.batch)
    return max(1, config.train.min_steps, epochs)
