"""What the segmentation tasks share: a `Segmenter`, how it is trained, and how it predicts."""

import abc
import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from jaxseg.backbones import initial_statistics
from jaxseg.networks.segmenter import Segmenter
from jaxseg.ops.mask_augment import Augmentation

VOID = 255


@dataclasses.dataclass(frozen=True, kw_only=True)
class DenseTask(abc.ABC):
    """Trains and scores a `Segmenter`. Parameters are `{"backbone": ..., "head": ...}`.

    Where the model has batch norm, its running statistics are the extra state; methods that predict
    then find them in `params["batch_stats"]` (see `predicting`).

    Attributes:
      model: the segmenter.
      size: (H, W) of the images.
      names: of the mask's values 0, 1, 2, ...
      loss_weights: weight of each loss.
      augmentation: applied on the device in training; None when the features come from the cache.
      statistics: of a pretrained backbone's batch norm.

    Batches hold `image` uint8 `B x H x W x 3`, `mask` uint8 `B x H x W` (values 0, 1, ... and void
    255), `category` int32 `B`, `index` int32 `B`, `row` int32 `B`, `valid` bool `B`, and `features`
    `B x h x w x C` where they are cached.
    """

    model: Segmenter
    size: tuple[int, int]
    names: tuple[str, ...]
    loss_weights: Mapping[str, float]
    augmentation: Augmentation | None = None
    statistics: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def init(self, rng: jax.Array) -> Mapping[str, Any]:
        """Initialises the parameters, `{"backbone": ..., "head": ...}`."""
        return self.model.init({"params": rng, "dropout": rng}, **self._example())["params"]

    def init_extra(self, params: Mapping[str, Any]) -> dict[str, Any] | None:
        """The running statistics of batch norm; None where there is none."""
        statistics = initial_statistics(self.model, **self._example())
        if self.statistics:
            statistics = {**statistics, "backbone": self.statistics}
        return {"batch_stats": statistics} if statistics else None

    def _example(self) -> dict[str, jax.Array]:
        """What the model takes."""
        return {"image_BxHxWx3": jnp.zeros((1, *self.size, 3), jnp.float32)}

    def predicting(self, params: Mapping[str, Any], extra: Any) -> Mapping[str, Any]:
        """What `logits` and `sums` take as `params`, from the whole parameters and the extra state."""
        return {**params, **(extra or {})}

    def features(self, params: Mapping[str, Any], image: jax.Array) -> jax.Array:
        """Features of uint8 images `B x H x W x 3`, as float16 to be cached."""
        image = image.astype(jnp.float32) / 255.0
        return self._apply(params, image, method="features").astype(jnp.float16)

    def logits(
        self, params: Mapping[str, Any], batch: Mapping[str, jax.Array]
    ) -> tuple[jax.Array, dict[str, Any]]:
        """Logits `B x H x W x K` of a batch's uint8 images (and cached features), with the extras."""
        image = batch["image"].astype(jnp.float32) / 255.0
        return self._apply(params, image, features=batch.get("features"))

    def _apply(self, params: Mapping[str, Any], *args, **options) -> Any:
        variables = {"params": {k: params[k] for k in ("backbone", "head") if k in params}}
        if "batch_stats" in params:
            variables["batch_stats"] = params["batch_stats"]
        return self.model.apply(variables, *args, **options)

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
            mutable=["batch_stats"],
            **inputs,
        )
        values = self.losses(logits, aux, mask, **inputs)
        weight = batch["valid"].astype(jnp.float32)
        loss = (values * weight).sum() / jnp.maximum(weight.sum(), 1.0)
        return loss, jax.lax.stop_gradient(dict(changed)) if extra else {}

    def update_extra(
        self, extra: Any, statistics: Any, params: Mapping[str, Any], step: jax.Array
    ) -> tuple[Any, dict[str, jax.Array]]:
        """(the new running statistics, nothing to log beside the loss)."""
        return statistics or None, {}

    def draw_inputs(self, rng: jax.Array, mask: jax.Array) -> dict[str, jax.Array]:
        """What the head takes besides features and image, drawn for a training batch."""
        return {}

    @abc.abstractmethod
    def losses(
        self, logits: jax.Array, aux: Mapping[str, Any], mask: jax.Array, **inputs: jax.Array
    ) -> jax.Array:
        """The loss of each image, `B`."""

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
