"""Which way up is it? Rotation prediction (Gidaris, Singh, Komodakis, ICLR 2018)."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxseg.backbones import contract
from jaxseg.backbones.backbone import Backbone
from jaxseg.nn.normalize import normalize
from jaxseg.ops.crops import View, center_crops, draw_views, example_keys
from jaxseg.options import option, options
from jaxseg.tasks.base import Facts, Parts, by_bind
from jaxseg.tasks.pretext import Look, PretextTask

ROTATIONS = 4


@dataclasses.dataclass(frozen=True)
class RotationViews(Look):
    """How an image is cropped before it is turned."""

    size: int = option(224, low=8, high=4096)
    scale: tuple[float, float] = option((0.4, 1.0), "share of the image's area", length=2)

    def __post_init__(self):
        self.check_scales()

    def crop(self) -> View:
        """The crop."""
        return View(self.size, tuple(self.scale), **self.shared())


@dataclasses.dataclass(frozen=True, eq=False)
class Rotation(PretextTask):
    """Trains a backbone and a linear layer to tell rotations by 0, 90, 180 and 270 degrees.

    All four rotations of a crop are in the same batch. The extra state holds the running statistics where
    the backbone has batch norm.
    """

    backbone: Backbone
    views: RotationViews = RotationViews()
    facts: Facts | None = by_bind(None)
    steps: int = by_bind(0)
    batch: int = by_bind(0)

    @classmethod
    def sections(cls) -> dict[str, Any]:
        return {"views": options(RotationViews)}

    @classmethod
    def from_options(cls, parts: Parts, *, views: Mapping[str, Any]) -> "Rotation":
        return cls(parts.backbone(), RotationViews(**views))

    @property
    def head(self) -> nn.Module:
        """From features to one logit a rotation."""
        return nn.Dense(ROTATIONS)

    def _crop_size(self) -> int:
        return self.views.size

    def learns_batch_norm(self) -> bool:
        return bool(jax.tree.leaves(self._statistics()))

    def init(self, rng: jax.Array) -> Mapping[str, Any]:
        """Initialises `{"backbone": ..., "head": ...}`."""
        keys = jax.random.split(rng)
        out, backbone = self._init_backbone(keys[0])
        return {"backbone": backbone, "head": self.head.init(keys[1], out["cls"])["params"]}

    def init_extra(self, params: Mapping[str, Any]) -> dict[str, Any]:
        """The running statistics."""
        return {"statistics": self._statistics()}

    def loss(
        self,
        params: Mapping[str, Any],
        extra: Mapping[str, Any],
        batch: Mapping[str, jax.Array],
        rng: jax.Array,
        step: jax.Array,
        *,
        train: bool = True,
    ) -> tuple[jax.Array, dict[str, Any]]:
        """Mean 4-way cross-entropy over the rotations and the valid examples.

        In evaluation the crop is the central square, and batch norm uses its running statistics.
        """
        import optax  # here, see train/optim.py

        keys = example_keys(rng, batch["row"])
        extent = jnp.maximum(batch["extent"], 1)  # 0 in padding, where it would make NaN
        if train:
            (view,) = draw_views(keys[:, 0], batch["image"], extent, [self.views.crop()])
        else:
            view = center_crops(batch["image"], extent, (self.views.size, self.views.size))
        turned = jnp.concatenate([jnp.rot90(view, k, axes=(1, 2)) for k in range(ROTATIONS)])
        fold = jax.vmap(jax.random.fold_in, (0, None))
        drop_keys = jnp.concatenate([fold(keys[:, 1], k) for k in range(ROTATIONS)])
        out, changed = contract.apply(
            self.module,
            {"params": params["backbone"], "batch_stats": extra["statistics"]},
            normalize(turned, self.backbone.normalization),
            drop_keys_B=drop_keys if train else None,
            train=train,
            mutable=["batch_stats"],
            rngs=self._noise(rng, batch) if train else None,
        )
        logits = self.head.apply({"params": params["head"]}, out["cls"])
        logits = logits.reshape(ROTATIONS, -1, ROTATIONS)
        truth = jnp.arange(ROTATIONS)[:, None]
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, truth).mean(0)
        right = (logits.argmax(-1) == truth).mean(0)
        weight = batch["valid"] / jnp.maximum(batch["valid"].sum(), 1)
        statistics = {
            "scores": {"rotation_accuracy": (right * weight).sum()},
            "statistics": changed.get("batch_stats", extra["statistics"]),
        }
        return (losses * weight).sum(), jax.lax.stop_gradient(statistics)

    def update_extra(
        self, extra: Mapping[str, Any], statistics: Mapping[str, Any], params, step
    ) -> tuple[dict[str, Any], dict[str, jax.Array]]:
        """Keeps the new running statistics; logs the accuracy."""
        return {"statistics": statistics["statistics"]}, statistics["scores"]

    def backbone_variables(
        self, params: Mapping[str, Any], extra: Mapping[str, Any]
    ) -> dict[str, Any]:
        """The network's."""
        return {"params": params["backbone"], "batch_stats": extra["statistics"]}
