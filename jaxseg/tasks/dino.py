"""Self-distillation without labels: DINO (Caron et al., ICCV 2021)."""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from jaxseg.backbones import contract
from jaxseg.backbones.backbone import Backbone
from jaxseg.heads.projection import ProjectionHead
from jaxseg.losses.dino import dino_loss, teacher_probabilities
from jaxseg.nn.normalize import normalize
from jaxseg.ops.crops import View, draw_views, example_keys
from jaxseg.options import option, options
from jaxseg.tasks.base import Facts, Parts, by_bind
from jaxseg.tasks.pretext import Look, PretextTask
from jaxseg.train import schedules
from jaxseg.train.collapse import CollapseMonitor
from jaxseg.train.writers import read_metrics

GLOBAL_VIEWS = 2


def _temperature(default: float, help: str = "") -> Any:
    return option(default, help, low=1e-3, high=10)


@dataclasses.dataclass(frozen=True)
class DinoViews(Look):
    """DINO's crops of an image: two global ones, then the local ones."""

    global_size: int = option(224, low=8, high=4096)
    global_scale: tuple[float, float] = option((0.4, 1.0), "share of the image's area", length=2)
    local_size: int = option(96, low=8, high=4096)
    local_scale: tuple[float, float] = option((0.05, 0.4), length=2)
    local_count: int = option(8, low=0, high=64)
    blur: tuple[float, ...] = option(
        (1.0, 0.1, 0.5),
        "probability in the first and the second global view, and in the local ones",
        length=3,
        low=0,
        high=1,
    )
    solarize: tuple[float, ...] = option((0.0, 0.2, 0.0), "likewise", length=3, low=0, high=1)

    def __post_init__(self):
        self.check_scales()

    def crops(self) -> tuple[View, ...]:
        """All crops; the first two are the global ones."""

        def view(size: int, scale: tuple[float, float], which: int) -> View:
            changes = dict(blur=self.blur[which], solarize=self.solarize[which])
            return View(size, tuple(scale), **changes, **self.shared())

        first, second = (view(self.global_size, self.global_scale, i) for i in range(2))
        local = view(self.local_size, self.local_scale, 2)
        return (first, second, *[local] * self.local_count)


def _folded(noise: Mapping[str, jax.Array] | None, number: int) -> dict[str, jax.Array] | None:
    """Other streams for something else that must not share them."""
    return noise and {name: jax.random.fold_in(key, number) for name, key in noise.items()}


@dataclasses.dataclass(frozen=True, eq=False)
class Dino(PretextTask):
    """Trains a student to predict, from any crop, what its own moving average says of a global one.

    The student's parameters are the loop's, `{"backbone", "head"}`. The extra state is the teacher (the
    same tree), the centre, and each network's running statistics where it has batch norm; none of it
    is an argument of the differentiated function, so no gradient can reach it. As in the reference
    both networks normalise by the batch, and the teacher's statistics are its own, no average. With
    batch norm a batch in parts is not the same as the whole: each part is normalised by itself.

    Attributes:
      backbone: gives `cls` [B, D] of normalised images.
      views: crops of an image; the first two are the global ones, which the teacher sees.
      outputs, hidden, bottleneck, norm_last_layer, batch_norm: of the `ProjectionHead`.
      student_temperature: of the student's softmax.
      teacher_temperature: of the teacher's, reached from `warmup_teacher_temperature` in
        `warmup_teacher_epochs`.
      momentum: the teacher is m teacher + (1 - m) student; m reaches 1 along a cosine.
      center_momentum: the centre is m centre + (1 - m) batch mean.
      freeze_last_layer: epochs in which the last layer rests at first.
    """

    backbone: Backbone
    views: DinoViews = DinoViews()
    outputs: int = option(65536, low=2, high=2**24)
    hidden: int = option(2048, low=1, high=2**20)
    bottleneck: int = option(256, low=1, high=2**20)
    norm_last_layer: bool = option(True)
    batch_norm: bool = option(False, "in the projection head")
    student_temperature: float = _temperature(0.1)
    teacher_temperature: float = _temperature(0.04)
    warmup_teacher_temperature: float = _temperature(0.04)
    warmup_teacher_epochs: int = option(0, low=0, high=1e6)
    momentum: float = option(0.996, "of the teacher; reaches 1 along a cosine", low=0, high=1)
    center_momentum: float = option(0.9, low=0, high=1)
    freeze_last_layer: float = option(1.0, "epochs", low=0, high=1e6)
    facts: Facts | None = by_bind(None)
    steps: int = by_bind(0)
    batch: int = by_bind(0)

    no_average: ClassVar[str] = "its teacher is the average, by dino.momentum"

    @classmethod
    def sections(cls) -> dict[str, Any]:
        return {"views": options(DinoViews), "dino": options(cls)}

    @classmethod
    def from_options(
        cls, parts: Parts, *, views: Mapping[str, Any], dino: Mapping[str, Any]
    ) -> "Dino":
        return cls(parts.backbone(), DinoViews(**views), **dino)

    @property
    def head(self) -> ProjectionHead:
        """From features to logits."""
        return ProjectionHead(
            self.outputs,
            hidden=self.hidden,
            bottleneck=self.bottleneck,
            norm_last_layer=self.norm_last_layer,
            batch_norm=self.batch_norm,
            dtype=contract.contract(self.module).dtype,
        )

    def _crop_size(self) -> int:
        return self.views.global_size

    @property
    def held(self) -> tuple[str, int]:
        return "last_layer", round(self.freeze_last_layer * self.epoch_steps)

    def teacher_temperature_at(self, step: jax.Array) -> jax.Array:
        """The teacher's temperature by step."""
        warm = (self.warmup_teacher_temperature, self.teacher_temperature)
        return schedules.staircase(*warm, self.warmup_teacher_epochs, self.epoch_steps)(step)

    def momentum_at(self, step: jax.Array) -> jax.Array:
        """The teacher's momentum by step."""
        return schedules.cosine(self.momentum, 1.0, self.steps)(step)

    def learns_batch_norm(self) -> bool:
        features = jnp.zeros((1, self._dim()))
        both = (self._statistics(), contract.initial_statistics(self.head, features))
        return bool(jax.tree.leaves(both))

    def _dim(self) -> int:
        return contract.outputs(self.module)["cls"].shape[-1]

    def watch(self, workdir: Path) -> Callable[[int, Mapping[str, float]], dict]:
        """Watches for a collapse, with what the folder says of the steps before."""
        monitor: list[CollapseMonitor] = []

        def look(step: int, values: Mapping[str, float]) -> dict[str, str]:
            # Not sooner: what an earlier attempt logged after the newest checkpoint is gone only now.
            if not monitor:
                rows = (row.get("teacher_kl", 0.0) for row in read_metrics(workdir))
                monitor.append(
                    CollapseMonitor(self.student_temperature, highest=max(rows, default=0.0))
                )
            mode = monitor[0](step, values)
            return {"collapse": mode} if mode else {}

        return look

    def init(self, rng: jax.Array) -> Mapping[str, Any]:
        """Initialises the student, `{"backbone": ..., "head": ...}`."""
        keys = jax.random.split(rng)
        out, backbone = self._init_backbone(keys[0])
        head = self.head.init(keys[1], out["cls"])
        return {"backbone": backbone, "head": head["params"]}

    def init_extra(self, params: Mapping[str, Any]) -> dict[str, Any]:
        """The teacher, equal to the student, a centre of zeros, and running statistics."""
        features = jnp.zeros((1, self._dim()))
        statistics = {
            "backbone": self._statistics(),
            "head": contract.initial_statistics(self.head, features),
        }
        return {
            "teacher": params,
            "center": jnp.zeros(self.outputs, jnp.float32),
            "student_statistics": statistics,
            "teacher_statistics": statistics,
        }

    @property
    def _most(self) -> float:
        """The largest entropy there is, ln K."""
        return math.log(self.outputs)

    def project(
        self,
        params: Mapping[str, Any],
        statistics: Mapping[str, Any],
        views: Sequence[jax.Array],
        drop_keys_B: jax.Array | None = None,
        *,
        train: bool = True,
        noise: Mapping[str, jax.Array] | None = None,
    ) -> tuple[jax.Array, jax.Array, Mapping[str, Any]]:
        """(logits V x B x K, features V x B x D, new statistics) of V views [B, s, s, 3] in [0, 1].

        Views of one resolution go through the backbone together, and all through the head at once. `noise`
        are the streams of random numbers that a user's module may need.
        """
        count, batch = len(views), len(views[0])
        features: dict[int, jax.Array] = {}
        for size in dict.fromkeys(view.shape[1] for view in views):
            members = [i for i, view in enumerate(views) if view.shape[1] == size]
            images = jnp.concatenate([views[i] for i in members])
            images = normalize(images, self.backbone.normalization)
            keys = None
            if drop_keys_B is not None:
                fold = jax.vmap(jax.random.fold_in, (0, None))
                keys = jnp.concatenate([fold(drop_keys_B, i) for i in members])
            out, changed = contract.apply(
                self.module,
                {"params": params["backbone"], "batch_stats": statistics["backbone"]},
                images,
                drop_keys_B=keys,
                train=train,
                mutable=["batch_stats"],
                rngs=_folded(noise, images.shape[1]),
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
        views = draw_views(keys[:, 0], batch["image"], extent, self.views.crops())
        noise = self._noise(rng, batch) if train else None
        teacher, features, teacher_statistics = self.project(
            extra["teacher"],
            extra["teacher_statistics"],
            views[:GLOBAL_VIEWS],
            train=train,
            noise=_folded(noise, 0),
        )
        student, _, student_statistics = self.project(
            params,
            extra["student_statistics"],
            views,
            keys[:, 1] if train else None,
            train=train,
            noise=noise,
        )
        probabilities = teacher_probabilities(
            teacher, extra["center"], self.teacher_temperature_at(step)
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
        import optax  # here, see train/optim.py

        momentum = self.momentum_at(step)
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
            "teacher_temperature": self.teacher_temperature_at(step),
            "teacher_momentum": momentum,
        }
        kept = {k: statistics[k] for k in ("student_statistics", "teacher_statistics")}
        return {"teacher": teacher, "center": center, **kept}, logged

    def backbone_variables(
        self, params: Mapping[str, Any], extra: Mapping[str, Any]
    ) -> dict[str, Any]:
        """The teacher's."""
        return {
            "params": extra["teacher"]["backbone"],
            "batch_stats": extra["teacher_statistics"]["backbone"],
        }
