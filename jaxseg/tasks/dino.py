"""Self-distillation without labels: DINO (Caron et al., ICCV 2021)."""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

from jaxseg.losses.dino import dino_loss, teacher_probabilities
from jaxseg.backbones import initial_statistics
from jaxseg.heads.projection import ProjectionHead
from jaxseg.networks.segmenter import normalize
from jaxseg.ops.crops import View, draw_views, example_keys

Schedule = Callable[[jax.Array], jax.Array | float]
GLOBAL_VIEWS = 2


@dataclasses.dataclass(frozen=True)
class DinoTask:
    """Trains a student to predict, from any crop, what its own moving average says of a global one.

    The student's parameters are the loop's, `{"backbone", "head"}`. The extra state is the teacher (the
    same tree), the centre, and each network's running statistics where it has batch norm; none of it
    is an argument of the differentiated function, so no gradient can reach it. As in the reference
    both networks normalise by the batch, and the teacher's statistics are its own, no average. With
    batch norm a batch in parts is not the same as the whole: each part is normalised by itself.

    Attributes:
      backbone: gives `cls` [B, D] of normalised images.
      head: projects them to K logits.
      views: crops of an image; the first two are the global ones, which the teacher sees.
      normalization: a key of `segmenter.NORMALIZATIONS`.
      student_temperature: of the student's softmax.
      teacher_temperature, momentum: by step; the teacher is m teacher + (1 - m) student.
      center_momentum: the centre is m centre + (1 - m) batch mean.
      statistics: running ones that the backbone starts from; empty for fresh ones.

    Batches hold `image` uint8 `B x H x W x 3`, `extent` int32 `B x 2` (the height and width of the
    part that is image), `row` and `valid`.
    """

    backbone: nn.Module
    head: ProjectionHead
    views: tuple[View, ...]
    normalization: str
    student_temperature: float
    teacher_temperature: Schedule
    momentum: Schedule
    center_momentum: float = 0.9
    statistics: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def init(self, rng: jax.Array) -> Mapping[str, Any]:
        """Initialises the student, `{"backbone": ..., "head": ...}`."""
        keys = jax.random.split(rng)
        cls, variables = self.backbone.init_with_output(keys[0], self._example())
        head = self.head.init(keys[1], cls["cls"])
        return {"backbone": variables["params"], "head": head["params"]}

    def init_extra(self, params: Mapping[str, Any]) -> dict[str, Any]:
        """The teacher, equal to the student, a centre of zeros, and running statistics."""
        features = jnp.zeros((1, self.backbone.variant.dim))
        statistics = {
            "backbone": self.statistics or initial_statistics(self.backbone, self._example()),
            "head": initial_statistics(self.head, features),
        }
        return {
            "teacher": params,
            "center": jnp.zeros(self.head.outputs, jnp.float32),
            "student_statistics": statistics,
            "teacher_statistics": statistics,
        }

    @property
    def _most(self) -> float:
        """The largest entropy there is, ln K."""
        return math.log(self.head.outputs)

    def _example(self) -> jax.Array:
        return jnp.zeros((1, self.views[0].size, self.views[0].size, 3))

    def project(
        self,
        params: Mapping[str, Any],
        statistics: Mapping[str, Any],
        views: Sequence[jax.Array],
        drop_keys_B: jax.Array | None = None,
        *,
        train: bool = True,
    ) -> tuple[jax.Array, jax.Array, Mapping[str, Any]]:
        """(logits V x B x K, features V x B x D, new statistics) of V views [B, s, s, 3] in [0, 1].

        Views of one resolution go through the backbone together, and all through the head at once.
        """
        count, batch = len(views), len(views[0])
        features: dict[int, jax.Array] = {}
        for size in dict.fromkeys(view.shape[1] for view in views):
            members = [i for i, view in enumerate(views) if view.shape[1] == size]
            images = normalize(jnp.concatenate([views[i] for i in members]), self.normalization)
            keys = None
            if drop_keys_B is not None:
                fold = jax.vmap(jax.random.fold_in, (0, None))
                keys = jnp.concatenate([fold(drop_keys_B, i) for i in members])
            out, changed = self.backbone.apply(
                {"params": params["backbone"], "batch_stats": statistics["backbone"]},
                images,
                drop_keys_B=keys,
                train=train,
                mutable=["batch_stats"],
            )
            if train:
                statistics = statistics | {"backbone": changed.get("batch_stats", {})}
            cls = out["cls"].reshape(len(members), batch, -1)
            features |= dict(zip(members, cls, strict=True))
        stacked = jnp.stack([features[i] for i in range(count)])
        logits, changed = self.head.apply(
            {"params": params["head"], "batch_stats": statistics["head"]},
            stacked.reshape(count * batch, -1),
            train=train,
            mutable=["batch_stats"],
        )
        if train:
            statistics = statistics | {"head": changed.get("batch_stats", {})}
        return logits.reshape(count, batch, -1), stacked, statistics

    def loss(
        self,
        params: Mapping[str, Any],
        extra: Mapping[str, Any],
        batch: Mapping[str, jax.Array],
        rng: jax.Array,
        step: jax.Array,
        *,
        train: bool = True,
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """The loss over all pairs of views; statistics are what `update_extra` needs.

        In evaluation there is no stochastic depth, and batch norm uses its running statistics; the
        views are drawn all the same.
        """
        keys = example_keys(rng, batch["row"])
        extent = jnp.maximum(batch["extent"], 1)  # 0 in padding, where it would make NaN
        views = draw_views(keys[:, 0], batch["image"], extent, self.views)
        teacher, features, teacher_statistics = self.project(
            extra["teacher"], extra["teacher_statistics"], views[:GLOBAL_VIEWS], train=train
        )
        student, _, student_statistics = self.project(
            params,
            extra["student_statistics"],
            views,
            keys[:, 1] if train else None,
            train=train,
        )
        probabilities = teacher_probabilities(
            teacher, extra["center"], self.teacher_temperature(step)
        )
        losses = dino_loss(student, probabilities, temperature=self.student_temperature)
        weight = batch["valid"] / jnp.maximum(batch["valid"].sum(), 1)

        def mean(x_VxBx):
            """Over views and valid examples."""
            return jnp.tensordot(weight, x_VxBx.mean(0), (0, 0))

        entropy = -(probabilities * jnp.log(probabilities + 1e-12)).sum(-1) / self._most
        unit = features / (jnp.linalg.norm(features, axis=-1, keepdims=True) + 1e-12)
        statistics = {
            "logits": mean(teacher),
            "probabilities": mean(probabilities),
            "direction": mean(unit),
            "scores": {"teacher_entropy": mean(entropy)},
            "student_statistics": student_statistics,
            "teacher_statistics": teacher_statistics,
        }
        return (losses * weight).sum(), jax.lax.stop_gradient(statistics)

    def update_extra(
        self,
        extra: Mapping[str, Any],
        statistics: Mapping[str, jax.Array],
        params: Mapping[str, Any],
        step: jax.Array,
    ) -> tuple[dict[str, Any], dict[str, jax.Array]]:
        """Moves the teacher towards the student and the centre towards the mean teacher logits.

        Logs, besides the schedules, what tells a collapse (see `train.collapse`): the teacher's mean
        entropy and the mean KL divergence of its outputs from their average, both as shares of ln K;
        the norm of the centre; the spread of the features, 1 - |mean direction|^2; the student's
        distance from the teacher relative to the teacher's norm.
        """
        momentum = self.momentum(step)
        teacher = optax.incremental_update(params, extra["teacher"], 1.0 - momentum)
        center = optax.incremental_update(
            statistics["logits"], extra["center"], 1.0 - self.center_momentum
        )
        average = statistics["probabilities"]
        entropy_of_average = -(average * jnp.log(average + 1e-12)).sum() / self._most
        apart = optax.tree.norm(optax.tree.sub(params, teacher)) / optax.tree.norm(teacher)
        logged = {
            **statistics["scores"],
            "teacher_kl": entropy_of_average - statistics["scores"]["teacher_entropy"],
            "center_norm": jnp.linalg.norm(center),
            "feature_spread": 1.0 - (statistics["direction"] ** 2).sum(),
            "teacher_distance": apart,
            "teacher_temperature": self.teacher_temperature(step),
            "teacher_momentum": momentum,
        }
        kept = {k: statistics[k] for k in ("student_statistics", "teacher_statistics")}
        return {"teacher": teacher, "center": center, **kept}, logged

    def backbone_variables(
        self, params: Mapping[str, Any], extra: Mapping[str, Any]
    ) -> dict[str, Any]:
        """What `backbone.apply` takes, of the network to be judged: the teacher."""
        return {
            "params": extra["teacher"]["backbone"],
            "batch_stats": extra["teacher_statistics"]["backbone"],
        }
