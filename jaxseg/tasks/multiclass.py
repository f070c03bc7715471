"""Segmentation of several classes."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from jaxseg.metrics import multiclass as metrics
from jaxseg.losses.multiclass import multiclass_loss
from jaxseg.tasks.masks import VOID, DenseTask


def background(names: tuple[str, ...]) -> int | None:
    """The place of the class called background, or None."""
    return names.index("background") if "background" in names else None


@dataclasses.dataclass(frozen=True, kw_only=True)
class MulticlassTask(DenseTask):
    """A `DenseTask` with one logit for each class.

    Attributes:
      class_weights: of the classes in the loss; () for equal ones.
      label_smoothing: of the cross-entropy.
      auxiliary: weight of the loss of the head's auxiliary logits, where it has them.
    """

    class_weights: tuple[float, ...] = ()
    label_smoothing: float = 0.0
    auxiliary: float = 0.4

    def losses(self, logits, aux, mask) -> jax.Array:
        """`multiclass_loss` of `loss_weights`, and the auxiliary one."""
        loss = self._losses(logits, mask)
        if "auxiliary" in aux:
            loss += self.auxiliary * self._losses(aux["auxiliary"], mask)
        return loss

    def _losses(self, logits, mask) -> jax.Array:
        return multiclass_loss(
            logits,
            mask.astype(jnp.int32),
            mask != VOID,
            weights=self.loss_weights,
            class_weights=jnp.asarray(self.class_weights) if self.class_weights else None,
            label_smoothing=self.label_smoothing,
        )

    def scores(self, logits: jax.Array) -> jax.Array:
        """The classes' probabilities."""
        return jax.nn.softmax(logits)

    def count(
        self, logits: jax.Array, aux: Mapping[str, Any], batch: Mapping[str, jax.Array]
    ) -> tuple[dict[str, jax.Array], dict[str, jax.Array]]:
        """Sums of the batch, and `index`, `valid` and the classes' mean `iou` of each image."""
        return class_counts(
            self.decide(logits), self._losses(logits, batch["mask"]), batch, self.names
        )

    def summarize(self, sums: Mapping[str, Any]) -> dict[str, Any]:
        """See `jaxseg.metrics.multiclass.summarize`."""
        return metrics.summarize(sums, self.names, background=background(self.names))


def class_counts(
    prediction_BxHxW: jax.Array,
    losses_B: jax.Array,
    batch: Mapping[str, jax.Array],
    names: tuple[str, ...],
) -> tuple[dict[str, jax.Array], dict[str, jax.Array]]:
    """(sums for `multiclass_metrics.summarize`, `index`, `valid` and mean `iou` of each image)."""
    valid = batch["valid"]
    known = (batch["mask"] != VOID) & valid[:, None, None]
    counts = metrics.image_counts(
        prediction_BxHxW, batch["mask"], known, classes=len(names), background=background(names)
    )
    counts["loss"] = jnp.stack([losses_B, jnp.ones_like(losses_B)], -1)
    counts["images"] = jnp.ones(len(valid), jnp.int32)

    def total(x):
        return jnp.where(valid.reshape(-1, *[1] * (x.ndim - 1)), x, 0).sum(0)

    table = counts["confusion"]
    hit = jnp.diagonal(table, axis1=1, axis2=2)
    union = table.sum(1) + table.sum(2) - hit
    number = (union > 0).sum(-1)
    iou = (hit / jnp.maximum(union, 1)).sum(-1) / jnp.maximum(number, 1)
    images = {
        "index": batch["index"],
        "valid": valid,
        "iou": jnp.where(number > 0, iou, -1.0),
    }
    return jax.tree.map(total, counts), images
