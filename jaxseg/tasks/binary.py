"""Binary segmentation: one object class against the background."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange

from jaxseg.data.image_files import VOID
from jaxseg.data.source import Source, categories_of
from jaxseg.evaluate.scoring import BinaryScoring, Scoring
from jaxseg.heads import heads_that
from jaxseg.losses import BINARY, binary_loss
from jaxseg.losses.weighted import Loss, Losses
from jaxseg.metrics.binary import image_counts, summarize
from jaxseg.networks.network import Network
from jaxseg.ops.mask_augment import Augmentation
from jaxseg.options import Option, OptionError, option, options
from jaxseg.tasks.base import Facts, Parts, by_bind
from jaxseg.tasks.masks import GROUPS, MaskTask


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


NAMES = ("background", "foreground")


@dataclasses.dataclass(frozen=True, eq=False)
class Binary(MaskTask):
    """One object class against the background: one logit, the mask's value 1 against 0.

    Attributes:
      network: gives one logit a pixel.
      losses: names in `losses.BINARY`, or functions of (logits, labels, valid), all `B x H x W`,
        with their weights; see `losses.weighted.weighted`.
      threshold: probability from which a pixel is foreground.
      names: of the two values.
      categories: names; scores are kept for each.
    """

    scoring: ClassVar[type[Scoring]] = BinaryScoring
    reads: ClassVar[frozenset[str]] = frozenset({"binary"})
    best_metric: ClassVar[str] = "iou"
    heads: ClassVar[tuple[str, ...]] = heads_that(ask=False, coarse=True)
    usual_names: ClassVar[tuple[str, ...]] = NAMES
    known_losses: ClassVar[Mapping[str, Loss]] = BINARY
    mask_file: ClassVar[tuple[str, int | None]] = ("mask.png", 1)

    network: Network
    losses: Losses = "bce"
    threshold: float = option(
        0.5, "probability from which a pixel is foreground", low=0, high=1, free=True, open=True
    )
    names: tuple[str, ...] = NAMES
    facts: Facts | None = by_bind(None)
    size: tuple[int, int] = by_bind((0, 0))
    categories: tuple[str, ...] = by_bind(("object",))
    augmentation: Augmentation | None = by_bind(None)

    @classmethod
    def sections(cls) -> dict[str, Any]:
        weights = {
            name: Option(float(name == "bce"), "weight of the loss", low=0, high=1e9)
            for name in BINARY
        }
        return {"loss": weights, **options(cls)}

    @classmethod
    def from_options(cls, parts: Parts, *, loss: Mapping[str, float], threshold: float) -> "Binary":
        return cls(parts.network(outputs=1), loss, threshold, parts.names)

    @property
    def outputs(self) -> int:
        return 1

    def _names(self, source: Source) -> tuple[str, ...]:
        names = super()._names(source)
        if len(names) != 2:
            raise OptionError(
                f"the data have the classes {', '.join(names)}; Binary takes two, the first of them the "
                "background"
            )
        return names

    def with_facts(self, facts: Facts, *, steps: int, batch: int) -> "Binary":
        bound = super().with_facts(facts, steps=steps, batch=batch)
        return dataclasses.replace(bound, categories=facts.categories)

    def for_source(self, source: Source, *, size: tuple[int, int]) -> "Binary":
        task = super().for_source(source, size=size)
        return dataclasses.replace(task, categories=categories_of(source))

    def _group(self, example: Mapping[str, Any], index: int, total: int) -> int:
        # What comes next is another category, where there are several.
        if len(self.categories) > 1:
            return int(example["category"]) % GROUPS
        return super()._group(example, index, total)

    def image_losses(self, logits, aux, mask) -> jax.Array:
        """`binary_loss` of `losses`; a head with a coarse output is trained on that."""
        if "coarse" in aux:
            logits = aux["coarse"]
            labels, valid = coarse_labels(mask, mask.shape[1] // logits.shape[1])
        else:
            labels, valid = mask == 1, mask != VOID
        return binary_loss(logits[..., 0], labels, valid, weights=self.losses)

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
        values = self.image_losses(logits, aux, mask)
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

    def mask_of(self, scores: np.ndarray) -> np.ndarray:
        """1 where the score reaches the threshold."""
        return (scores[..., 0] >= self.threshold).astype(np.uint8)

    def values_of(self, classes: Sequence[str]) -> dict[str, int]:
        """None: there is one class, which has no name."""
        if classes:
            raise OptionError(
                f"--classes has {classes[0]!r}; the run in --workdir knows one class without a name"
            )
        return {}

    def probabilities_of(self, scores: np.ndarray) -> np.ndarray:
        """float32 `H x W x 2`: of background and foreground."""
        return np.concatenate([1.0 - scores, scores], -1)
