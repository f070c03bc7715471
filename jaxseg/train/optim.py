"""Optimiser and learning-rate schedule.

Optax is imported where it is used, here and in whatever else the command needs for its help: it takes a
tenth of the time that JAX and Flax take.
"""

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING

import jax

from jaxseg.options import option
from jaxseg.train.schedules import cosine

if TYPE_CHECKING:
    import optax

OPTIMIZERS = ("adam", "adamw", "muon", "sgd")
SCHEDULES = ("constant", "cosine", "poly")
MUCH = 1e3


@dataclasses.dataclass(frozen=True)
class Recipe:
    """How parameters are updated: clipping of the gradient, the step of `name`, weight decay, the rate.

    The learning rate warms up linearly over the share `warmup` of the run and then follows `schedule`
    from `lr` to `final_lr`; poly has power 0.9 (Chen et al. 2017). Weight decay is decoupled for adamw
    and muon and part of the gradient for sgd; adam has none. It touches tensors of two or more
    dimensions only (no biases, norms or scalars). The i-th of L layers has a rate lower by
    `layer_decay` ** (L - i) (Bao et al., BEiT, 2022).
    """

    name: str = option("adamw", choices=OPTIMIZERS)
    lr: float = option(1e-3, "peak of the learning rate", low=0, high=MUCH)
    lr_batch: int = option(
        0, "if set, lr is for a batch of so many, and grows with the batch", low=0, high=2**20
    )
    schedule: str = option("cosine", choices=SCHEDULES)
    warmup: float = option(0.05, "share of the run", low=0, high=1)
    final_lr: float = option(0.0, low=0, high=MUCH)
    weight_decay: float = option(0.01, low=0, high=MUCH)
    weight_decay_end: float = option(
        -1.0, "reached along a cosine; negative = it stays", low=-1, high=MUCH
    )
    clip_norm: float = option(1.0, "of the whole gradient; 0 = off", low=0, high=1e9)
    clip_each: float = option(0.0, "of each tensor's gradient; 0 = off", low=0, high=1e9)
    average: float = option(
        0.0,
        "decay of the parameters' moving average, which is then evaluated",
        low=0,
        high=0.999999,
    )
    layer_decay: float = option(
        1.0, "of the learning rate, for each layer farther from the head", low=0.01, high=1
    )

    def learning_rate(self, steps: int, *, batch: int = 0) -> "optax.Schedule":
        """Learning rate by step of a run of `steps` on global batches of `batch`."""
        import optax

        peak = self.lr * batch / self.lr_batch if self.lr_batch else self.lr
        warmup = round(self.warmup * steps)
        rest = max(1, steps - warmup)
        after = {
            "constant": lambda: optax.constant_schedule(peak),
            "cosine": lambda: cosine(peak, self.final_lr, rest),
            "poly": lambda: optax.polynomial_schedule(
                peak, self.final_lr, power=0.9, transition_steps=rest
            ),
        }[self.schedule]()
        if not warmup:
            return after
        return optax.join_schedules(
            [optax.linear_schedule(peak / warmup, peak, warmup - 1), after], [warmup]
        )

    def optimizer(
        self,
        steps: int,
        *,
        batch: int = 0,
        hold: str = "",
        hold_steps: int = 0,
        layers: Sequence[Sequence[str]] = (),
    ) -> "optax.GradientTransformation":
        """The optimiser of a run of `steps`.

        Args:
          steps, batch: see `learning_rate`.
          hold, hold_steps: tensors whose name begins with `hold` rest for the first steps: no
            gradient, no decay, and no change of the moments (zero gradients would shrink those).
          layers: paths of parameters by layer, from the input on.
        """
        import optax

        from jaxseg.train import updates

        parts = [optax.clip_by_global_norm(self.clip_norm)] if self.clip_norm else []
        parts += [updates.clip_each(self.clip_each)] if self.clip_each else []
        if hold and hold_steps:
            parts.append(
                optax.partition(
                    {
                        "held": updates.hold(self._direction(steps, hold_steps), hold_steps),
                        "free": self._direction(steps, 0),
                    },
                    lambda params: jax.tree_util.tree_map_with_path(
                        lambda path, _: "held" if path[-1].key.startswith(hold) else "free", params
                    ),
                )
            )
        else:
            parts.append(self._direction(steps, 0))
        if layers and self.layer_decay != 1.0:
            parts.append(updates.scale_layers(layers, self.layer_decay))
        rate = self.learning_rate(steps, batch=batch)
        return optax.chain(*parts, optax.scale_by_learning_rate(rate))

    def _direction(self, steps: int, first_step: int) -> "optax.GradientTransformation":
        """The step before the learning rate; its own count begins at `first_step` of the run."""
        import optax

        from jaxseg.train import updates

        end = self.weight_decay if self.weight_decay_end < 0 else self.weight_decay_end
        by_step = cosine(self.weight_decay, end, steps)
        decay = updates.scheduled_decay(lambda count: by_step(count + first_step))
        return {
            "adam": lambda: optax.scale_by_adam(),
            "adamw": lambda: optax.chain(optax.scale_by_adam(), decay),
            "muon": lambda: optax.chain(updates.muon(), decay),
            "sgd": lambda: optax.chain(decay, optax.trace(decay=0.9)),
        }[self.name]()
