"""Which way up is it? Rotation prediction (Gidaris, Singh, Komodakis, ICLR 2018)."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

from jaxseg.backbones import initial_statistics
from jaxseg.networks.segmenter import normalize
from jaxseg.ops.crops import View, center_crops, draw_views, example_keys

ROTATIONS = 4


@dataclasses.dataclass(frozen=True)
class RotationTask:
    """Trains a backbone and a linear layer to tell rotations by 0, 90, 180 and 270 degrees.

    All four rotations of a crop are in the same batch. Parameters are `{"backbone", "head"}`; the extra
    state holds the running statistics where the backbone has batch norm.

    Attributes:
      backbone: gives `cls` [B, D] of normalised images.
      view: how an image is cropped before it is turned.
      normalization: a key of `segmenter.NORMALIZATIONS`.
      statistics: running ones that the backbone starts from; empty for fresh ones.

    Batches are those of `DinoTask`.
    """

    backbone: nn.Module
    view: View
    normalization: str
    head: nn.Module = nn.Dense(ROTATIONS)
    statistics: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def init(self, rng: jax.Array) -> Mapping[str, Any]:
        """Initialises `{"backbone": ..., "head": ...}`."""
        keys = jax.random.split(rng)
        out, variables = self.backbone.init_with_output(keys[0], self._example())
        return {
            "backbone": variables["params"],
            "head": self.head.init(keys[1], out["cls"])["params"],
        }

    def init_extra(self, params: Mapping[str, Any]) -> dict[str, Any]:
        """The running statistics."""
        fresh = initial_statistics(self.backbone, self._example())
        return {"statistics": self.statistics or fresh}

    def _example(self) -> jax.Array:
        return jnp.zeros((1, self.view.size, self.view.size, 3))

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
        keys = example_keys(rng, batch["row"])
        extent = jnp.maximum(batch["extent"], 1)  # 0 in padding, where it would make NaN
        if train:
            (view,) = draw_views(keys[:, 0], batch["image"], extent, [self.view])
        else:
            view = center_crops(batch["image"], extent, (self.view.size, self.view.size))
        turned = jnp.concatenate([jnp.rot90(view, k, axes=(1, 2)) for k in range(ROTATIONS)])
        fold = jax.vmap(jax.random.fold_in, (0, None))
        drop_keys = jnp.concatenate([fold(keys[:, 1], k) for k in range(ROTATIONS)])
        out, changed = self.backbone.apply(
            {"params": params["backbone"], "batch_stats": extra["statistics"]},
            normalize(turned, self.normalization),
            drop_keys_B=drop_keys if train else None,
            train=train,
            mutable=["batch_stats"],
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
        """What `backbone.apply` takes, of the network to be judged."""
        return {"params": params["backbone"], "batch_stats": extra["statistics"]}
