"""Segmentation of the class that is asked for."""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from jaxseg.backbones.contract import taken
from jaxseg.data.image_files import VOID
from jaxseg.evaluate.scoring import ClassScoring, Scoring
from jaxseg.heads import heads_that
from jaxseg.losses import MULTICLASS, multiclass_loss
from jaxseg.losses.weighted import Loss, Losses
from jaxseg.metrics import multiclass as metrics
from jaxseg.networks.network import Network
from jaxseg.ops.mask_augment import Augmentation
from jaxseg.options import OptionError, option, options
from jaxseg.tasks.base import Facts, Parts, by_bind
from jaxseg.tasks.masks import MaskTask, background
from jaxseg.tasks.multiclass import LOSSES, check_classes, class_counts


def queries(names: tuple[str, ...]) -> tuple[int, ...]:
    """The mask values that can be asked for: all but the background."""
    return tuple(i for i in range(len(names)) if i != background(names))


def _encode(model, features, image):
    return model.head.encode(features, image)


def _decode(model, encoded, query, size):
    return model.head.decode(encoded, query, size=size)


@dataclasses.dataclass(frozen=True, eq=False)
class Query(MaskTask):
    """The class that is asked for: a head with two logits for each question, others and that class.

    In training half of the questions are any class, half one that is present. For a prediction all
    classes are asked for; the logits are then the logarithms of each class's probability, and of the
    background what the likeliest class leaves.

    Attributes:
      network: with a head that takes `query_B`, such as `heads.ClassAttention`, and has the methods
        `encode` and `decode`.
      names: of the mask's values 0, 1, 2, ...; all but "background" can be asked for.
      losses: as in `Multiclass`, of the two logits.
      questions: asked about each image in training.
    """

    scoring: ClassVar[type[Scoring]] = ClassScoring
    reads: ClassVar[frozenset[str]] = frozenset({"classes"})
    best_metric: ClassVar[str] = "miou"
    known_losses: ClassVar[Mapping[str, Loss]] = MULTICLASS
    heads: ClassVar[tuple[str, ...]] = heads_that(ask=True, coarse=True)

    network: Network
    names: tuple[str, ...]
    losses: Losses = "cross_entropy"
    questions: int = option(4, "asked about each image in a training step", low=1, high=1000)
    facts: Facts | None = by_bind(None)
    size: tuple[int, int] = by_bind((0, 0))
    augmentation: Augmentation | None = by_bind(None)

    @classmethod
    def sections(cls) -> dict[str, Any]:
        return {"loss": LOSSES, **options(cls)}

    @classmethod
    def from_options(cls, parts: Parts, *, loss: Mapping[str, float], questions: int) -> "Query":
        check_classes(parts.names, 1)
        network = parts.network(classes=len(queries(parts.names)))
        return cls(network, parts.names, loss, questions)

    @property
    def outputs(self) -> int:
        return len(self.names)

    @property
    def logits_of_network(self) -> int:
        return 2

    @property
    def asked(self) -> tuple[int, ...]:
        return queries(self.names)

    def _check_network(self) -> None:
        head = getattr(self.network.module, "head", None)
        methods = ("encode", "decode")
        if not taken(head, {"query_B": 0}) or not all(hasattr(head, name) for name in methods):
            raise OptionError(
                f"network {self.network.name} has no head that takes query_B and has the methods encode and "
                "decode; allowed: one such as jaxseg.heads.ClassAttention"
            )
        classes = getattr(head, "classes", len(self.asked))
        if classes < len(self.asked):
            raise OptionError(
                f"classes of the head is {classes}; allowed for {', '.join(self.names)}: "
                f"{len(self.asked)}, all but the background"
            )
        super()._check_network()

    def _check_losses(self) -> None:
        shape = (2, self.questions, *self.size)
        logits = jax.ShapeDtypeStruct((*shape, self.logits_of_network), jnp.float32)
        mask = jax.ShapeDtypeStruct((2, *self.size), jnp.uint8)
        query = jnp.zeros(shape[:2], jnp.int32)
        losses = functools.partial(self.image_losses, query_B=query)
        jax.eval_shape(lambda logits, mask: losses(logits, {}, mask), logits, mask)

    def _inputs(self) -> dict[str, jax.Array]:
        return {"query_B": jnp.zeros(1, jnp.int32)}

    def mask_of_value(self, scores: np.ndarray, value: int) -> np.ndarray:
        """The answer by itself: where the score of the class reaches 1/2."""
        if value == self.background:
            return super().mask_of_value(scores, value)
        return (scores[..., value] >= 0.5).astype(np.uint8)

    def draw_inputs(self, rng: jax.Array, mask: jax.Array) -> dict[str, jax.Array]:
        """`query_B` `B x Q`: half of the questions any class, half one of those present."""
        values = jnp.asarray(queries(self.names))
        key_kind, key_any, key_present = jax.random.split(rng, 3)
        shape = (len(mask), self.questions)
        present = jnp.stack([(mask == v).any((1, 2)) for v in values], -1)
        some = present.any(-1)[:, None]
        anything = jax.random.randint(key_any, shape, 0, len(values))
        chance = jnp.where(present | ~some, 0.0, -jnp.inf)
        chosen = jax.random.categorical(key_present, chance[:, None], shape=shape)
        pick = jax.random.bernoulli(key_kind, 0.5, shape) & some
        return {"query_B": jnp.where(pick, chosen, anything)}

    def image_losses(self, logits, aux, mask, *, query_B) -> jax.Array:
        """Loss of "is it the class asked for?", the mean over the questions about each image."""
        asked = jnp.asarray(queries(self.names))[query_B]
        labels = (mask[:, None] == asked[..., None, None]).astype(jnp.int32)
        valid = jnp.broadcast_to((mask != VOID)[:, None], labels.shape)
        flat = (x.reshape(-1, *x.shape[2:]) for x in (logits, labels, valid))
        return multiclass_loss(*flat, weights=self.losses).reshape(query_B.shape).mean(1)

    def ask(
        self, params: Mapping[str, Any], batch: Mapping[str, jax.Array]
    ) -> tuple[jax.Array, jax.Array]:
        """Asks for every class.

        Returns:
          (probabilities `Q x B x H x W` of the class asked for, attention `Q x B x h x w`).
        """
        image = batch["image"].astype(jnp.float32) / 255.0
        features = batch.get("features")
        if features is None:
            features = self._apply(params, image, method="features")
        encoded = self._apply(params, features, image, method=_encode)

        def ask(q):
            query = jnp.full(len(image), q, jnp.int32)
            logits, aux = self._apply(params, encoded, query, image.shape[1:3], method=_decode)
            return jax.nn.softmax(logits)[..., 1], aux["attention"]

        return jax.lax.map(ask, jnp.arange(len(queries(self.names))))

    def logits(
        self, params: Mapping[str, Any], batch: Mapping[str, jax.Array]
    ) -> tuple[jax.Array, dict[str, Any]]:
        """Logarithms of the values' scores, `B x H x W x K`, and the answers and attention.

        Where there is a background, it is highest where no class reaches one half.
        """
        chances, attention = self.ask(params, batch)
        scores = jnp.zeros((*chances.shape[1:], len(self.names)))
        scores = scores.at[..., jnp.asarray(queries(self.names))].set(jnp.moveaxis(chances, 0, -1))
        empty = self.background
        if empty is not None:
            scores = scores.at[..., empty].set(1.0 - chances.max(0))
        return self.from_scores(scores), {"answers": chances, "attention": attention}

    def scores(self, logits: jax.Array) -> jax.Array:
        """The scores; those of the classes need not sum to 1."""
        return jnp.exp(logits)

    def count(
        self, logits: jax.Array, aux: Mapping[str, Any], batch: Mapping[str, jax.Array]
    ) -> tuple[dict[str, jax.Array], dict[str, jax.Array]]:
        """As `Multiclass.count`, and how the answers follow the questions."""
        mask = batch["mask"].astype(jnp.int32)
        known = (mask != VOID) & batch["valid"][:, None, None]
        # The mean of -log p(truth).
        log_p = jnp.take_along_axis(logits, jnp.where(known, mask, 0)[..., None], -1)[..., 0]
        pixels = jnp.maximum(known.sum((1, 2)), 1)
        losses = -jnp.where(known, log_p, 0.0).sum((1, 2)) / pixels
        sums, images = class_counts(self.decide(logits), losses, batch, self.names)
        asked = jnp.asarray(queries(self.names))
        answers = jnp.moveaxis(self.scores(logits)[..., asked], -1, 0) >= 0.5
        return sums | answer_counts(answers, mask, known, queries(self.names)), images

    def summarize(self, sums: Mapping[str, Any]) -> dict[str, Any]:
        """See `jaxseg.metrics.multiclass.summarize`.

        Beside it `queries` (see `answer_counts`): `pairs`, `iou_asked` and `iou_other`, means over the
        pairs, and `follows`, the share of pairs where the first is higher.
        """
        result = metrics.summarize(sums, self.names, background=self.background)
        if "queries" in sums:
            asked, other, follows, pairs = (float(x) for x in sums["queries"])
            mean = {"iou_asked": asked, "iou_other": other, "follows": follows}
            result["queries"] = {"pairs": int(pairs)}
            result["queries"] |= {k: v / pairs if pairs else None for k, v in mean.items()}
        return result


def answer_counts(
    answers_QxBxHxW: jax.Array,
    mask_BxHxW: jax.Array,
    known_BxHxW: jax.Array,
    values: tuple[int, ...],
) -> dict[str, jax.Array]:
    """How the masks follow the questions.

    Args:
      answers_QxBxHxW: boolean, the mask that each question gives.
      mask_BxHxW: int, the truth.
      known_BxHxW: boolean, the pixels that count.
      values: of the classes asked for, Q.

    Returns:
      `course_attention` float32 `2` (see `multiclass_metrics.course_attention`); `queries` float32 `4`:
      sums over all ordered pairs of classes (a, b) that an image holds of the IoU of the mask asked
      for a with class a, of the same mask with class b, of whether the first is higher, and of 1.
    """
    truth = jnp.stack([mask_BxHxW == v for v in values]) & known_BxHxW
    answers = answers_QxBxHxW & known_BxHxW
    both = jnp.einsum("qbhw,rbhw->qrb", *(x.astype(jnp.float32) for x in (answers, truth)))
    size, true = answers.sum((2, 3)), truth.sum((2, 3))  # Q x B
    union = size[:, None] + true[None] - both
    iou = both / jnp.maximum(union, 1.0)  # asked for q, class r
    q = jnp.arange(len(values))
    asked = iou[q, q]
    present = true > 0
    pair = present[:, None] & present[None] & (q[:, None] != q[None])[..., None]
    own = jnp.broadcast_to(asked[:, None], iou.shape)
    sums = [own, iou, own > iou, jnp.ones_like(iou)]
    real = known_BxHxW.any((1, 2))
    course = metrics.course_attention(both[q, q].T, union[q, q].T)
    return {
        "course_attention": jnp.where(real[:, None], course, 0.0).sum(0),
        "queries": jnp.stack([jnp.where(pair, x, 0.0).sum() for x in sums]),
    }
