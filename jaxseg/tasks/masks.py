"""What the segmentation tasks share: a network, how it is trained, and how it predicts."""

import abc
import dataclasses
import functools
import json
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Self

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from flax.traverse_util import flatten_dict

from jaxseg.backbones.backbone import Backbone
from jaxseg.backbones.contract import check_collections, contract, initial_statistics
from jaxseg.data.cache import DiskStore, FeatureCache
from jaxseg.data.image_files import VOID, DataError
from jaxseg.data.reader import Reader, Reading
from jaxseg.data.source import (
    Source,
    Splits,
    categories_of,
    example_of,
    names_of,
    sizes_of,
    spread,
    working_size,
)
from jaxseg.evaluate.scoring import MaskScoring, Scoring
from jaxseg.losses.weighted import Loss, weighted
from jaxseg.networks.network import Network, as_network
from jaxseg.ops.mask_augment import Augmentation
from jaxseg.options import OptionError, check
from jaxseg.tasks.base import Facts, Task
from jaxseg.tasks.mask_scores import MaskEvaluator
from jaxseg.train import ridge
from jaxseg.train.writers import Progress

log = logging.getLogger(__name__)

# So many examples are looked at before a training.
_LOOKED_AT = 16
# So many groups of categories at most are told apart when parameters are solved for.
GROUPS = 16


class MaskTask(Task):
    """Trains and scores a network that predicts masks; subclasses are frozen dataclasses with these fields.

    Where the network has batch norm, its running statistics are the extra state; methods that predict
    then find them in `params["batch_stats"]` (see `predicting`).

    Attributes:
      network: from `jaxseg.Segmenter`, or a Flax module from images to logits.
      names: of the mask's values 0, 1, 2, ...
      losses: weight of each loss, see `losses.weighted.weighted`.
      facts: of the training data, by `bind`.
      size: (H, W) of the images; that of `facts`, but for other data of which scores are taken.
      augmentation: applied on the device in training; None when the features come from the cache.

    Batches hold `image` uint8 `B x H x W x 3`, `mask` uint8 `B x H x W` (values 0, 1, ... and void
    255), `category` int32 `B`, `index` int32 `B`, `row` int32 `B`, `valid` bool `B`, and `features`
    `B x h x w x C` where they are cached.
    """

    scoring: ClassVar[type[Scoring]] = MaskScoring
    augmented: ClassVar[bool] = True
    known_losses: ClassVar[Mapping[str, Loss]] = {}

    network: Network
    names: tuple[str, ...]
    losses: Mapping[Any, float]
    size: tuple[int, int]
    augmentation: Augmentation | None

    def __post_init__(self):
        several = isinstance(self.names, Sequence) and not isinstance(self.names, str)
        if not several or not all(isinstance(name, str) for name in self.names):
            raise OptionError(f"names is {self.names!r}; allowed: the names of the mask's values")
        check(self)
        object.__setattr__(self, "names", tuple(self.names))
        object.__setattr__(self, "network", as_network(self.network))
        object.__setattr__(self, "losses", weighted(self.losses, self.known_losses))

    # Before the first step.

    @property
    def multiple(self) -> int:
        return self.network.multiple

    @property
    @abc.abstractmethod
    def outputs(self) -> int:
        """Scores of a pixel, K."""

    @property
    def logits_of_network(self) -> int:
        """Logits that the network gives of a pixel."""
        return self.outputs

    def _names(self, source: Source) -> tuple[str, ...]:
        return names_of(source) or tuple(self.names)

    def with_facts(self, facts: Facts, *, steps: int, batch: int) -> Self:
        """The task for these training data.

        Raises:
          OptionError: the network does not give what the task takes.
        """
        bound = dataclasses.replace(
            self, facts=facts, size=facts.size, names=facts.names or self.names
        )
        bound._check_network()
        if any(map(callable, bound.losses)):
            bound._check_losses()
        return bound

    def _check_network(self) -> None:
        network, inputs, kind = self.network, self._inputs(), type(self).__name__
        if lacking := sorted(set(network.needs) - set(inputs)):
            raise OptionError(
                f"network {network.name} needs {', '.join(lacking)}, which {kind} does not give"
            )
        key = jax.random.key(0)
        variables = jax.eval_shape(lambda: self._module_init(key))
        check_collections("network", network.name, variables)
        self._check_initial(variables)
        image = jax.ShapeDtypeStruct((1, *self.size, 3), jnp.float32)
        logits, _ = jax.eval_shape(lambda v, x: network.apply(v, x, **inputs), variables, image)
        expected = (1, *self.size, self.logits_of_network)
        if logits.shape != expected:
            raise OptionError(
                f"network {network.name} gives logits {logits.shape} of images {image.shape}; "
                f"allowed for the classes {', '.join(self.names)}: {expected}"
            )

    def _check_initial(self, variables: Mapping[str, Any]) -> None:
        """Raises OptionError unless the network's own initial values fit its module."""
        given = {"params": self.network.params, "batch_stats": self.network.statistics}
        drawn = flatten_dict({"params": {}, **variables}, sep="/")
        for path, value in flatten_dict(given, sep="/").items():
            there = drawn.get(path)
            if np.shape(value) != getattr(there, "shape", None):
                module = "nothing of that name" if there is None else there.shape
                raise OptionError(
                    f"network {self.network.name} is given {path} of {np.shape(value)}; its module has "
                    f"{module}"
                )

    def _check_losses(self) -> None:
        """Raises OptionError unless the functions among the losses give what they should."""
        logits = jax.ShapeDtypeStruct((2, *self.size, self.logits_of_network), jnp.float32)
        mask = jax.ShapeDtypeStruct((2, *self.size), jnp.uint8)
        jax.eval_shape(lambda logits, mask: self.image_losses(logits, {}, mask), logits, mask)

    def look(self, source: Source, *, size: tuple[int, int] = (0, 0)) -> Facts:
        """Looks at the training data.

        Raises:
          OptionError: its masks hold other classes than those of `names`.
        """
        facts = super().look(source, size=size)
        if self.names not in (facts.names, self.usual_names):
            raise OptionError(
                f"names is {', '.join(self.names)}; the data have {', '.join(facts.names)}"
            )
        return facts

    def check_data(self, source: Source) -> None:
        values: set[int] = set()
        categories = categories_of(source)
        for index in spread(len(source), _LOOKED_AT):
            example = example_of(source, index)
            if "mask" not in example:
                raise DataError(
                    f"example {index} has no mask, which {type(self).__name__} is trained and scored on"
                )
            values.update(np.unique(example["mask"]).tolist())
            if not -1 <= example["category"] < len(categories):
                raise DataError(
                    f"example {index} has the category {example['category']}; the categories are "
                    f"{', '.join(categories)}"
                )
        if others := sorted(values - {*range(len(self.names)), VOID}):
            raise DataError(
                f"masks hold {others}; allowed for the classes {', '.join(self.names)}: 0 to "
                f"{len(self.names) - 1}, and {VOID} where nobody knows"
            )
        if VOID in values and not values & set(range(1, len(self.names))):
            log.warning(
                "the masks of some examples hold 0 and %d alone; %d says that nobody knows what is there",
                *(VOID, VOID),
            )

    def for_source(self, source: Source, *, size: tuple[int, int]) -> Self:
        """The task for the images of another source.

        Raises:
          OptionError: its masks hold other classes than the task predicts.
        """
        if (names := self._names(source)) != tuple(self.names):
            raise OptionError(
                f"the classes of the data are {', '.join(names)}; the run was trained for "
                f"{', '.join(self.names)}"
            )
        return dataclasses.replace(self, size=working_size(source, size, self.multiple))

    @property
    def initial(self) -> Mapping[str, Any]:
        return self.network.params

    @property
    def frozen(self) -> tuple[str, ...]:
        return self.network.frozen

    @property
    def layer_names(self) -> tuple[tuple[str, ...], ...]:
        return self.network.layer_names

    @property
    def variant(self) -> Any:
        made = self.network.backbone
        return None if made is None else made.variant

    def learns_batch_norm(self) -> bool:
        statistics = self._statistics
        made = self.network.backbone
        # Those of a backbone that is not trained as a whole rest.
        resting = {"backbone"} if made is not None and made.resting != () else set()
        return bool(set(statistics) - resting)

    def trained_on(self, augmentation: Augmentation | None) -> Self:
        return dataclasses.replace(self, augmentation=augmentation)

    def reader(
        self,
        source: Source,
        *,
        reading: Reading,
        batch: int,
        seed: int,
        frozen: Mapping[str, Any],
        digest: str,
        augmentation: Augmentation | None = None,
        cache: bool = True,
    ) -> Reader:
        augmentation = augmentation or Augmentation()
        # A flip is the one change that leaves a finite set of images to compute features of.
        only_flips = dataclasses.replace(augmentation, flip=0.0) == Augmentation()
        features = None
        if cache and self.network.features and only_flips:
            orientations = 2 if augmentation.flip else 1
            features = self._cache(source, frozen, digest, orientations, reading)
        return Reader(
            source,
            self.size,
            reading=reading,
            batch=batch,
            seed=seed,
            multiple=self.multiple,
            features=features,
            flip=augmentation.flip,
        )

    def _cache(
        self, source, frozen, digest: str, orientations: int, reading: Reading
    ) -> FeatureCache | None:
        pixels = self.size[0] * self.size[1]
        numbers = math.prod(self._feature_shape(frozen))
        needed = len(source) * orientations * (4 * pixels + 2 * numbers) / 1e9
        if needed > reading.memory_gigabytes and not reading.cache_dir:
            log.warning(
                "cached features would take %.1f GB, over config.data.memory_gigabytes=%.1f: they are "
                "computed anew in every step (or set config.data.cache_dir)",
                *(needed, reading.memory_gigabytes),
            )
            return None
        module = self.network.module
        key = json.dumps([digest, list(module.layers), module.stride, self.size])
        key += module.normalization + str(contract(module.backbone).dtype)
        store = None
        # Files are found again by weights and options: the code of a user's backbone is in neither.
        if reading.cache_dir and self.variant is not None:
            try:
                store = DiskStore(Path(reading.cache_dir), reading.cache_gigabytes * 1e9)
            except OSError as error:
                raise OptionError(
                    f"data.cache_dir is {reading.cache_dir!r}, which cannot be written: {error}"
                ) from error
        return FeatureCache(self._compute_features(frozen), key=key, store=store)

    def _feature_shape(self, frozen: Mapping[str, Any]) -> tuple[int, ...]:
        image = jax.ShapeDtypeStruct((1, *self.size, 3), jnp.uint8)
        return jax.eval_shape(self.features, self._resting(frozen), image).shape

    def _resting(self, frozen: Mapping[str, Any]) -> dict[str, Any]:
        """What `features` takes: the frozen backbone, with its statistics."""
        params = {"backbone": dict(frozen["backbone"])}
        statistics = {k: v for k, v in self._statistics.items() if k == "backbone"}
        return {**params, "batch_stats": statistics} if statistics else params

    def _compute_features(self, frozen: Mapping[str, Any]) -> Callable[[np.ndarray], np.ndarray]:
        """A function from one uint8 image to its features, on a device of this process."""
        device = jax.local_devices()[0]
        local = jax.device_put(self._resting(frozen), device)
        compute = jax.jit(self.features)

        def features(image: np.ndarray) -> np.ndarray:
            return jax.device_get(compute(local, jax.device_put(image[None], device)))[0]

        return features

    def solve(self, reader: Reader, frozen: Mapping[str, Any]) -> Mapping[str, Any]:
        """Adds the network's `solved` parameters, from all training images, unaugmented."""
        solved = self.network.solved
        if solved is None:
            return frozen
        features = None if reader.cached else self._compute_features(frozen)
        tokens = jax.jit(lambda x: solved.inputs(x[None])[0])
        total = len(reader)
        progress = Progress("linear prior", 2 * total)

        def read(index, again):
            shown = reader.example(index)
            found = features(shown["image"]) if features else shown["features"]
            x = np.asarray(tokens(found))
            h, w, channels = x.shape
            cells = rearrange(shown["mask"], "(h i) (w j) -> (h w) (i j)", h=h, w=w)
            values = [1] if self.outputs == 1 else range(self.outputs)
            share = np.stack([(cells == v).mean(1) for v in values], 1)
            known = (cells != VOID).mean(1)
            progress.update(index + 1 + again * total)
            group = self._group(shown, index, total)
            x = x.reshape(h * w, channels)
            return x, share / np.maximum(known, 1e-9)[:, None], known, group

        kernel, bias = ridge.fit(read, total, penalty=solved.penalty)
        progress.close()
        *parents, leaf = solved.path.split("/")
        tree: dict[str, Any] = {leaf: {"kernel": kernel, "bias": bias}}
        for name in reversed(parents):
            tree = {name: tree}
        return {**frozen, **tree}

    def _group(self, example: Mapping[str, Any], index: int, total: int) -> int:
        """Which images are left out of a fit together: what comes next is a later image."""
        return 4 * index // total

    # What is learned.

    def init(self, rng: jax.Array) -> Mapping[str, Any]:
        """Initialises the parameters."""
        return self._module_init(rng)["params"]

    def _module_init(self, rng: jax.Array) -> Mapping[str, Any]:
        return self.network.init(rng, self.size, **self._inputs())

    def _inputs(self) -> dict[str, jax.Array]:
        """What the network takes beside images, as an example of one."""
        return {}

    def init_extra(self, params: Mapping[str, Any]) -> dict[str, Any] | None:
        """The running statistics of batch norm; None where there is none."""
        statistics = self._statistics
        return {"batch_stats": statistics} if statistics else None

    @functools.cached_property
    def _statistics(self) -> Mapping[str, Any]:
        # It may be asked for first where something is traced, and is kept for longer.
        with jax.ensure_compile_time_eval():
            image = jnp.zeros((1, *self.size, 3), jnp.float32)
            example = self.network.example(**self._inputs())
            fresh = initial_statistics(self.network.module, image, **example)
        return {**fresh, **{k: v for k, v in self.network.statistics.items() if k in fresh}}

    def features(self, params: Mapping[str, Any], image: jax.Array) -> jax.Array:
        """Features of uint8 images `B x H x W x 3`, as float16 to be cached."""
        image = image.astype(jnp.float32) / 255.0
        return self._apply(params, image, method="features").astype(jnp.float16)

    def logits(
        self, params: Mapping[str, Any], batch: Mapping[str, jax.Array]
    ) -> tuple[jax.Array, Mapping[str, Any]]:
        """Logits `B x H x W x K` of a batch's uint8 images (and cached features), with the extras."""
        image = batch["image"].astype(jnp.float32) / 255.0
        return self._apply(params, image, features=batch.get("features"))

    def _apply(self, params: Mapping[str, Any], *args, **options) -> Any:
        variables = {"params": {k: v for k, v in params.items() if k != "batch_stats"}}
        if "batch_stats" in params:
            variables["batch_stats"] = params["batch_stats"]
        return self.network.apply(variables, *args, **options)

    def loss(
        self,
        params: Mapping[str, Any],
        extra: Any,
        batch: Mapping[str, jax.Array],
        rng: jax.Array,
        step: jax.Array,
    ) -> tuple[jax.Array, Any]:
        """(mean loss of the valid images, the new running statistics)."""
        # Parts of one batch must not share their noise.
        rng = jax.random.fold_in(rng, batch["row"][0])
        key_augment, key_dropout = jax.random.split(rng)
        image = batch["image"].astype(jnp.float32) / 255.0
        mask = batch["mask"]
        if self.augmentation is not None:
            image, mask = self.augmentation(key_augment, image, mask)
        inputs = self.draw_inputs(jax.random.fold_in(rng, 2), mask)
        (logits, aux), changed = self._apply(
            self.predicting(params, extra),
            image,
            features=batch.get("features"),
            train=True,
            rngs={"dropout": key_dropout},
            **inputs,
        )
        values = self.image_losses(logits, aux, mask, **inputs)
        weight = batch["valid"].astype(jnp.float32)
        loss = (values * weight).sum() / jnp.maximum(weight.sum(), 1.0)
        return loss, jax.lax.stop_gradient(changed) if extra else {}

    def update_extra(
        self, extra: Any, statistics: Any, params: Mapping[str, Any], step: jax.Array
    ) -> tuple[Any, dict[str, jax.Array]]:
        """(the new running statistics, nothing to log beside the loss)."""
        return statistics or None, {}

    def draw_inputs(self, rng: jax.Array, mask: jax.Array) -> dict[str, jax.Array]:
        """What the head takes besides features and image, drawn for a training batch."""
        return {}

    @abc.abstractmethod
    def image_losses(
        self, logits: jax.Array, aux: Mapping[str, Any], mask: jax.Array, **inputs: jax.Array
    ) -> jax.Array:
        """The loss of each image, `B`."""

    # Scores.

    def check_scored(self, data: Splits, scoring: MaskScoring, *, reading: Reading) -> None:
        """Looks before the first step at what is scored in the end.

        Raises:
          DataError: there are no images, or images and masks differ in size.
          OptionError: their classes are others than those of training, or the options do not fit.
        """
        scoring.inference(self.multiple)
        source = data.split(scoring.split)
        sizes_of(source)
        self.for_source(source, size=reading.size)

    def for_validation(self, scoring: Scoring) -> Scoring:
        return dataclasses.replace(scoring, split="val")

    def evaluator(self, data, scoring, *, reading, seed, frozen, digest, mesh) -> MaskEvaluator:
        source = data.split(scoring.split)
        task = self.for_source(source, size=reading.size)
        inference = scoring.inference(self.multiple)
        if inference is not None and jax.process_count() > 1:
            raise OptionError("eval.scales, flip and window are for one process")
        reader = task.reader(
            source,
            reading=reading,
            batch=scoring.batch,
            seed=seed,
            frozen=frozen,
            digest=digest,
            cache=inference is None,
        )
        return MaskEvaluator(task, reader, inference, mesh)

    # Predictions.

    def learnt_backbone(self, params: Mapping[str, Any], extra: Any) -> Backbone:
        made = self.network.backbone
        if made is None:
            raise OptionError(f"network {self.network.name} has no backbone")
        statistics = (extra or {}).get("batch_stats", {})
        return made.with_weights(params["backbone"], statistics.get("backbone", {}))

    @property
    def masks(self) -> "MaskTask":
        return self

    def decide(self, logits: jax.Array) -> jax.Array:
        """The mask `... x H x W` uint8 that logits `... x H x W x K` stand for: the highest one's."""
        return logits.argmax(-1).astype(jnp.uint8)

    @abc.abstractmethod
    def scores(self, logits: jax.Array) -> jax.Array:
        """Probabilities `... x H x W x K`, those of the mask's values (K = 1: of value 1)."""

    def from_scores(self, scores: jax.Array) -> jax.Array:
        """Logits that have these `scores`."""
        return jnp.log(jnp.maximum(scores, 1e-6))

    @abc.abstractmethod
    def count(
        self, logits: jax.Array, aux: Mapping[str, Any], batch: Mapping[str, jax.Array]
    ) -> tuple[dict[str, jax.Array], dict[str, jax.Array]]:
        """Sums of a batch, and `index`, `valid` and `iou` of each image (-1: it has none)."""

    def sums(
        self, params: Mapping[str, Any], batch: Mapping[str, jax.Array]
    ) -> tuple[dict[str, jax.Array], dict[str, jax.Array]]:
        """`count` of what the model predicts for a batch."""
        logits, aux = self.logits(params, batch)
        return self.count(logits, aux, batch)

    @abc.abstractmethod
    def summarize(self, sums: Mapping[str, Any]) -> dict[str, Any]:
        """The metrics of a split, from its added `sums`."""

    @property
    def background(self) -> int | None:
        """The place of the class called background, or None."""
        return background(self.names)

    @property
    def asked(self) -> tuple[int, ...]:
        """Mask values that are asked for one by one, which pictures show; () for none."""
        return ()

    def mask_of(self, scores: np.ndarray) -> np.ndarray:
        """The mask uint8 `H x W` that scores `H x W x K` stand for, on the host."""
        return scores.argmax(-1).astype(np.uint8)

    def mask_of_value(self, scores: np.ndarray, value: int) -> np.ndarray:
        """uint8 `H x W`, 1 where the mask has a value."""
        return (self.mask_of(scores) == value).astype(np.uint8)

    # Ending of the file that a prediction is written to, and the value that is foreground in it; None for
    # a file of class numbers.
    mask_file: ClassVar[tuple[str, int | None]] = ("classes.png", None)

    def values_of(self, classes: Sequence[str]) -> dict[str, int]:
        """The mask values of classes that are to be written one by one, by name."""
        for name in classes:
            if name not in self.names:
                known = ", ".join(self.names)
                raise OptionError(
                    f"--classes has {name!r}; the run in --workdir knows the classes {known}"
                )
        return {name: self.names.index(name) for name in classes}

    def probabilities_of(self, scores: np.ndarray) -> np.ndarray:
        """float32 `H x W x len(names)` of scores `H x W x K`."""
        return scores


def background(names: tuple[str, ...]) -> int | None:
    """The place of the class called background, or None."""
    return names.index("background") if "background" in names else None
