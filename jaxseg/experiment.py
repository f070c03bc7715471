"""From a config to the objects of a run: the one place that knows what each config section makes."""

import dataclasses
import hashlib
import json
import logging
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import ml_collections
import numpy as np

from jaxseg import weights
from jaxseg.config import ConfigError, flatten
from jaxseg.data import loader, sources
from jaxseg.data.cache import DiskStore, FeatureCache, PreparedSource
from jaxseg.models import HEADS
from jaxseg.models.backbones import BACKBONES, AnyVariant
from jaxseg.models.segmenter import Segmenter, default_stride
from jaxseg.models.vit import Variant, from_variant
from jaxseg.ops.augment import Augmentation
from jaxseg.tasks.segmentation import SegmentationTask
from jaxseg.train.state import split_params

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Backbone:
    """Which backbone a run uses, and its pretrained parameters if there are any.

    Attributes:
      variant: its shape.
      params: its parameters, or None to start from scratch.
    """

    variant: AnyVariant
    params: Mapping[str, Any] | None = None

    @classmethod
    def load(cls, config: ml_collections.ConfigDict) -> "Backbone":
        """Reads what `config.backbone` asks for."""
        if not config.backbone.weights:
            return cls(BACKBONES[config.backbone.variant])
        loaded = weights.load(config.backbone.weights)
        log.info("backbone %s from %s", loaded.variant.name, loaded.source)
        return cls(loaded.variant, loaded.params)


def frozen_paths(config: ml_collections.ConfigDict) -> tuple[str, ...]:
    """Prefixes of the parameters that keep their values."""
    choice = config.backbone.train
    frozen = choice == "none" or (choice == "auto" and bool(config.backbone.weights))
    return ("backbone",) if frozen else ()


def make_model(config: ml_collections.ConfigDict, variant: Variant) -> Segmenter:
    """The segmenter of a config."""
    if not isinstance(variant, Variant):
        raise ConfigError(
            f"config.backbone.weights={config.backbone.weights!r} is a {variant.name}; segmentation "
            "takes a ViT"
        )
    for layer in config.backbone.layers:
        if not -variant.depth <= layer < variant.depth:
            raise ConfigError(
                f"config.backbone.layers has {layer}; {variant.name} allows {-variant.depth} to "
                f"{variant.depth - 1}"
            )
    options = config.head.get(config.head.name, {})
    return Segmenter(
        backbone=from_variant(variant, dtype=config.backbone.precision),
        head=HEADS[config.head.name](outputs=1, **options),
        stride=config.backbone.stride or default_stride(variant.patch),
        layers=tuple(config.backbone.layers),
        normalization=config.backbone.normalization,
    )


def make_source(
    config: ml_collections.ConfigDict, split: str, *, categories: tuple[str, ...] | None = None
) -> sources.Source:
    """The data source of a config for one split."""
    data = config.data
    chosen = tuple(data.categories) if categories is None else categories
    # `--config.data.categories=a,b` arrives as one name.
    chosen = tuple(name for names in chosen for name in names.split(","))
    options: dict[str, Any] = {}
    if data.name == "tfds":
        options = dict(
            dataset=data.tfds.name,
            image_key=data.tfds.image_key,
            mask_key=data.tfds.mask_key,
            label_key=data.tfds.label_key,
            foreground=tuple(data.tfds.foreground),
            void=tuple(data.tfds.void),
        )
    if data.name == "folder":
        options = dict(mask_values=data.mask_values, mask_threshold=data.mask_threshold or None)
    if data.name in ("shapes", "kinds"):
        options = dict(size=tuple(data.size)) if tuple(data.size) != (0, 0) else {}
        options |= dict(length=data.length) if data.length and split == "train" else {}
    source = sources.create(data.name, split, root=data.root, categories=chosen, **options)
    return sources.Some(source, data.limit) if data.limit else source


def make_task(
    config: ml_collections.ConfigDict, model: Segmenter, source: sources.Source
) -> SegmentationTask:
    """The task of a config on the images of a source."""
    return SegmentationTask(
        model=model,
        size=sources.working_size(source, tuple(config.data.size), model.stride),
        categories=tuple(source.categories),
        loss_weights=config.loss.to_dict(),
        threshold=config.eval.threshold,
    )


def make_params(
    task: SegmentationTask, backbone: Backbone, config: ml_collections.ConfigDict
) -> tuple[Mapping[str, Any], Mapping[str, Any]]:
    """Initial (trained, frozen) parameters as host arrays, equal on every process."""
    params = jax.device_get(jax.jit(task.init)(jax.random.key(config.seed)))
    if backbone.params is not None:
        params = {**params, "backbone": backbone.params}
    return split_params(params, frozen_paths(config))


class Reader:
    """Batches of a source for one task, with cached features where the backbone is frozen.

    Args:
      config: the run's config.
      task: says the size of the images, and computes the features.
      source: what to read.
      frozen: host arrays of the frozen parameters, without `backbone` if that is trained.
      digest: identifies them.
      train: whether the config's augmentation applies.
    """

    def __init__(
        self,
        config: ml_collections.ConfigDict,
        task: SegmentationTask,
        source: sources.Source,
        *,
        frozen: Mapping[str, Any],
        digest: str,
        train: bool,
    ):
        self._config = config
        augment = make_augmentation(config) if train else Augmentation()
        # A flip is the one change that leaves a finite set of images to compute features of.
        only_flips = dataclasses.replace(augment, flip=0.0) == Augmentation()
        features = None
        if "backbone" in frozen and only_flips:
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
        device = jax.local_devices()[0]
        local = jax.device_put({"backbone": dict(params)}, device)
        compute = jax.jit(task.features)

        def features(image: np.ndarray) -> np.ndarray:
            return jax.device_get(compute(local, jax.device_put(image[None], device)))[0]

        key = json.dumps([digest, flatten(self._config)["backbone.layers"], stride, task.size])
        key += self._config.backbone.normalization + self._config.backbone.precision
        store = None
        if config.cache_dir:
            store = DiskStore(Path(config.cache_dir), config.cache_gigabytes * 1e9)
        return FeatureCache(features, key=key, store=store)

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

    def subset(self, indices: list[int]) -> Iterator[Mapping[str, np.ndarray]]:
        """Batches of the examples at `indices`, in that order."""
        source = self._source.subset(indices)
        return loader.eval_batches(source, batch=self._config.eval.batch, **self._options())


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


def total_steps(config: ml_collections.ConfigDict, examples: int) -> int:
    """Length of the run: `train.steps`, or enough full batches for `epochs` and `min_steps`."""
    if config.train.steps:
        return config.train.steps
    epochs = math.ceil(examples * config.train.epochs / config.train.batch)
    return max(1, config.train.min_steps, epochs)
