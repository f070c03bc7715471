"""Binary segmentation: one object class against the background."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from einops import rearrange

from jaxseg.losses.binary import binary_loss
from jaxseg.metrics.binary import image_counts, summarize
from jaxseg.tasks.masks import VOID, DenseTask


def coarse_labels(mask_BxHxW: jax.Array, factor: int) -> tuple[jax.Array, jax.Array]:
    """Max-pools masks to the token grid.

    Args:
      mask_BxHxW: uint8, 0 background, 1 foreground, 255 void.
      factor: pixels per token.

    Returns:
      (foreground, valid), boolean `B x h x w`: a token is foreground if any of its pixels is, and
      void if it has no foreground and not one valid pixel.
    """
    cells = rearrange(mask_BxHxW, "b (h i) (w j) -> b h w (i j)", i=factor, j=factor)
    return (cells == 1).any(-1), (cells != VOID).any(-1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class SegmentationTask(DenseTask):
    """A `DenseTask` with one logit: the mask's value 1 against 0.

    Attributes:
      categories: names; scores are kept for each.
      threshold: probability from which a pixel is foreground.
    """

    categories: tuple[str, ...]
    threshold: float = 0.5

    def losses(self, logits, aux, mask) -> jax.Array:
        """`binary_loss` of `loss_weights`; a head with a coarse output is trained on that."""
        if "coarse" in aux:
            logits = aux["coarse"]
            labels, valid = coarse_labels(mask, mask.shape[1] // logits.shape[1])
        else:
            labels, valid = mask == 1, mask != VOID
        return binary_loss(logits[..., 0], labels, valid, weights=self.loss_weights)

    def decide(self, logits: jax.Array) -> jax.Array:
        """1 where the probability reaches the threshold."""
        # sigmoid(x) >= t, as the course decides; at x = 0 both sides of a tie are foreground.
        return (jax.nn.sigmoid(logits[..., 0]) >= self.threshold).astype(jnp.uint8)

    def scores(self, logits: jax.Array) -> jax.Array:
        """The foreground's probability, `... x H x W x 1`."""
        return jax.nn.sigmoid(logits)

    def from_scores(self, scores: jax.Array) -> jax.Array:
        """The log odds."""
        return jax.scipy.special.logit(jnp.clip(scores, 1e-6, 1 - 1e-6))

    def count(
        self, logits: jax.Array, aux: Mapping[str, Any], batch: Mapping[str, jax.Array]
    ) -> tuple[dict[str, jax.Array], dict[str, jax.Array]]:
        """Sums by category, and `index`, `valid` and the foreground's `iou` of each image.

        An image without foreground, rightly predicted, has no foreground IoU: it is -1.
        """
        mask, valid = batch["mask"], batch["valid"]
        counts = image_counts(self.decide(logits), mask == 1, mask != VOID)
        if "coarse" in aux:
            factor = mask.shape[1] // aux["coarse"].shape[1]
            labels, counted = coarse_labels(mask, factor)
            coarse = image_counts(self.decide(aux["coarse"]), labels, counted)
            counts["coarse_confusion"] = coarse["confusion"]
        values = self.losses(logits, aux, mask)
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
            "iou": jnp.where(union > 0, hit / jnp.maximum(union, 1), -1.0),
        }
        return jax.tree.map(by_category, counts), images

    def summarize(self, sums: Mapping[str, Any]) -> dict[str, Any]:
        """See `jaxseg.metrics.summarize`."""
        return summarize(sums, self.categories)
