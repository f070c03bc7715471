"""Binary segmentation: one object class against the background."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from jaxseg.losses.segmentation import binary_loss
from jaxseg.metrics import image_counts, summarize
from jaxseg.models.segmenter import Segmenter
from jaxseg.ops.augment import Augmentation

VOID = 255


def coarse_labels(mask_BxHxW: jax.Array, factor: int) -> tuple[jax.Array, jax.Array]:
    """Max-pools masks to the token grid.

    Args:
      mask_BxHxW: uint8, 0 background, 1 foreground, 255 void.
      factor: pixels per token.

    Returns:
      (foreground, valid), boolean `B x h x w`: a token is foreground if any of its pixels is, and
      void if it has no foreground and not one valid pixel.
    """
    cells = mask_BxHxW.reshape(
        mask_BxHxW.shape[0], mask_BxHxW.shape[1] // factor, factor, -1, factor
    )
    return (cells == 1).any((2, 4)), (cells != VOID).any((2, 4))


@dataclasses.dataclass(frozen=True)
class SegmentationTask:
    """Trains and scores a `Segmenter` with one logit.

    Attributes:
      model: the segmenter.
      size: (H, W) of the images.
      categories: names; scores are kept for each.
      loss_weights: weight of each loss of `losses.segmentation.BINARY`.
      augmentation: applied on the device in training; None when the features come from the cache.
      threshold: probability from which a pixel is foreground.

    Batches hold `image` uint8 `B x H x W x 3`, `mask` uint8 `B x H x W` (0, 1, void 255), `category`
    int32 `B`, `index` int32 `B`, `valid` bool `B`, and `features` `B x h x w x C` where they are
    cached.
    """

    model: Segmenter
    size: tuple[int, int]
    categories: tuple[str, ...]
    loss_weights: Mapping[str, float]
    augmentation: Augmentation | None = None
    threshold: float = 0.5

    def init(self, rng: jax.Array) -> Mapping[str, Any]:
        """Initialises the parameters, `{"backbone": ..., "head": ...}`."""
        image = jnp.zeros((1, *self.size, 3), jnp.float32)
        return self.model.init({"params": rng, "dropout": rng}, image)["params"]

    def features(self, params: Mapping[str, Any], image: jax.Array) -> jax.Array:
        """Features of uint8 images `B x H x W x 3`, as float16 to be cached."""
        image = image.astype(jnp.float32) / 255.0
        return self.model.apply({"params": params}, image, method="features").astype(jnp.float16)

    def logits(
        self, params: Mapping[str, Any], batch: Mapping[str, jax.Array]
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """Logits `B x H x W x 1` of a batch's uint8 images (and cached features), with the extras."""
        image = batch["image"].astype(jnp.float32) / 255.0
        return self.model.apply({"params": params}, image, features_BxhxwxC=batch.get("features"))

    def init_extra(self, params: Mapping[str, Any]) -> None:
        """Nothing is carried beside the parameters."""

    def update_extra(self, extra: None, statistics, params, step) -> tuple[None, dict]:
        """Nothing is carried, and nothing logged beside the loss."""
        return None, {}

    def loss(
        self,
        params: Mapping[str, Any],
        extra: None,
        batch: Mapping[str, jax.Array],
        rng: jax.Array,
        step: jax.Array,
    ) -> tuple[jax.Array, dict]:
        """Mean loss of the valid images; a head with a coarse output is trained on that."""
        # Parts of one batch must not share their noise.
        key_augment, key_dropout = jax.random.split(jax.random.fold_in(rng, batch["row"][0]))
        image = batch["image"].astype(jnp.float32) / 255.0
        mask = batch["mask"]
        if self.augmentation is not None:
            image, mask = self.augmentation(key_augment, image, mask)
        logits, aux = self.model.apply(
            {"params": params},
            image,
            features_BxhxwxC=batch.get("features"),
            train=True,
            rngs={"dropout": key_dropout},
        )
        values = self._losses(logits, aux, mask)
        weight = batch["valid"].astype(jnp.float32)
        loss = (values * weight).sum() / jnp.maximum(weight.sum(), 1.0)
        return loss, {}

    def _losses(self, logits, aux, mask) -> jax.Array:
        if "coarse" in aux:
            logits = aux["coarse"]
            labels, valid = coarse_labels(mask, mask.shape[1] // logits.shape[1])
        else:
            labels, valid = mask == 1, mask != VOID
        return binary_loss(logits[..., 0], labels, valid, weights=self.loss_weights)

    def sums(
        self, params: Mapping[str, Any], batch: Mapping[str, jax.Array]
    ) -> tuple[dict[str, jax.Array], dict[str, jax.Array]]:
        """Evaluation sums by category, and `index`, `valid` and `foreground_iou` of each image.

        An image without foreground, rightly predicted, has no foreground IoU: it is -1.
        """
        logits, aux = self.logits(params, batch)
        mask, valid = batch["mask"], batch["valid"]
        counts = image_counts(self._decide(logits), mask == 1, mask != VOID)
        if "coarse" in aux:
            factor = mask.shape[1] // aux["coarse"].shape[1]
            labels, counted = coarse_labels(mask, factor)
            coarse = image_counts(self._decide(aux["coarse"]), labels, counted)
            counts["coarse_confusion"] = coarse["confusion"]
        values = self._losses(logits, aux, mask)
        counts["loss"] = jnp.stack([values, jnp.ones_like(values)], -1)
        counts["images"] = jnp.ones(len(valid), jnp.int32)
        member = jax.nn.one_hot(batch["category"], len(self.categories)) * valid[:, None]

        def by_category(x):
            # A masked sum rather than a matrix product: int32 counts must stay exact.
            rows = member.astype(x.dtype).reshape(*member.shape, *[1] * (x.ndim - 1))
            return (rows * x[:, None]).sum(0)

        hit, union = counts["confusion"][:, 1, 1], counts["confusion"].sum((1, 2))
        union = union - counts["confusion"][:, 0, 0]
        images = {
            "index": batch["index"],
            "valid": valid,
            "foreground_iou": jnp.where(union > 0, hit / jnp.maximum(union, 1), -1.0),
        }
        return jax.tree.map(by_category, counts), images

    def _decide(self, logits: jax.Array) -> jax.Array:
        # sigmoid(x) >= t, as the course decides; at x = 0 both sides of a tie are foreground.
        return jax.nn.sigmoid(logits[..., 0]) >= self.threshold

    def summarize(self, sums: Mapping[str, Any]) -> dict[str, Any]:
        """See `jaxseg.metrics.summarize`."""
        return summarize(sums, self.categories)
