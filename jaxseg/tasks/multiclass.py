"""Segmentation of several classes."""

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from jaxseg.data.image_files import VOID
from jaxseg.data.source import Source, example_of, spread
from jaxseg.evaluate.scoring import ClassScoring, Scoring
from jaxseg.heads import heads_that
from jaxseg.losses import MULTICLASS, multiclass_loss
from jaxseg.losses.multiclass import SCHEMES
from jaxseg.losses.multiclass import class_weights as weights_of
from jaxseg.losses.weighted import Loss, Losses
from jaxseg.metrics import multiclass as metrics
from jaxseg.networks.network import Network
from jaxseg.ops.mask_augment import Augmentation
from jaxseg.options import Option, OptionError, option, options
from jaxseg.tasks.base import Facts, Parts, by_bind
from jaxseg.tasks.masks import MaskTask, background

LOSSES = {
    name: Option(float(name == "cross_entropy"), "weight of the loss", low=0, high=1e9)
    for name in MULTICLASS
}
# Class weights are taken from the masks of so many examples at most.
_COUNTED = 1000


def check_classes(names: tuple[str, ...], least: int) -> None:
    """Refuses data with too few classes to be told apart, or to be asked for."""
    if len(names) < least or all(name == "background" for name in names):
        raise OptionError(
            f"the data have the classes {', '.join(names)}; allowed are at least two, one of them not "
            "background"
        )


@dataclasses.dataclass(frozen=True, eq=False)
class Multiclass(MaskTask):
    """Several classes, with one logit for each.

    Attributes:
      network: gives as many logits a pixel as there are names.
      names: of the mask's values 0, 1, 2, ...
      losses: names in `losses.MULTICLASS`, or functions of (logits `B x H x W x K`, integer
        labels and valid `B x H x W`), with their weights; see `losses.weighted.weighted`.
      class_weights: a scheme in `losses.multiclass.SCHEMES`, of the training masks.
      label_smoothing: of the cross-entropy.
      auxiliary: weight of the loss of the network's auxiliary logits, where it has them.
    """

    scoring: ClassVar[type[Scoring]] = ClassScoring
    reads: ClassVar[frozenset[str]] = frozenset({"classes"})
    best_metric: ClassVar[str] = "miou"
    known_losses: ClassVar[Mapping[str, Loss]] = MULTICLASS
    heads: ClassVar[tuple[str, ...]] = heads_that(ask=False, coarse=False)

    network: Network
    names: tuple[str, ...]
    losses: Losses = "cross_entropy"
    class_weights: str = option(
        "none", "of the training masks, in the loss", choices=tuple(SCHEMES)
    )
    label_smoothing: float = option(0.0, "of the cross-entropy", low=0, high=1)
    auxiliary: float = option(0.4, "weight of the auxiliary head's loss", low=0, high=1e3)
    facts: Facts | None = by_bind(None)
    size: tuple[int, int] = by_bind((0, 0))
    augmentation: Augmentation | None = by_bind(None)

    @classmethod
    def sections(cls) -> dict[str, Any]:
        return {"loss": LOSSES, **options(cls)}

    @classmethod
    def from_options(
        cls, parts: Parts, *, loss: Mapping[str, float], **chosen: Any
    ) -> "Multiclass":
        check_classes(parts.names, 2)
        return cls(parts.network(outputs=len(parts.names)), parts.names, loss, **chosen)

    @property
    def outputs(self) -> int:
        return len(self.names)

    def look(self, source: Source, *, size: tuple[int, int] = (0, 0)) -> Facts:
        """Looks at the training data, and weighs their classes."""
        facts = super().look(source, size=size)
        if self.class_weights == "none":
            return facts
        counts = []
        for index in spread(len(source), _COUNTED):
            mask = example_of(source, index)["mask"]
            counts.append(np.bincount(mask.ravel(), minlength=256)[: len(facts.names)])
        weights = weights_of(np.stack(counts), self.class_weights)
        return dataclasses.replace(facts, class_weights=tuple(float(w) for w in weights))

    def image_losses(self, logits, aux, mask) -> jax.Array:
        """`multiclass_loss` of `losses`, and the auxiliary one."""
        loss = self._losses(logits, mask)
        if "auxiliary" in aux:
            loss += self.auxiliary * self._losses(aux["auxiliary"], mask)
        return loss

    def _losses(self, logits, mask) -> jax.Array:
        weights = self.facts.class_weights if self.facts else ()
        return multiclass_loss(
            logits,
            mask.astype(jnp.int32),
            mask != VOID,
            weights=self.losses,
            class_weights=jnp.asarray(weights) if weights else None,
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
        return metrics.summarize(sums, self.names, background=self.background)


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
