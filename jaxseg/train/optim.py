"""Optimiser and learning-rate schedule from a config."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import ml_collections
import optax

from jaxseg.train.schedules import cosine

OPTIMIZERS = ("adam", "adamw", "muon", "sgd")
SCHEDULES = ("constant", "cosine", "poly")


def make_schedule(
    config: ml_collections.ConfigDict, steps: int, *, batch: int = 0
) -> optax.Schedule:
    """Learning rate by step: linear warm-up over `warmup` of the run, then `schedule`.

    Args:
      config: `lr` (peak), `schedule` (one of `SCHEDULES`), `warmup` (share of `steps`, 0 to 1),
        `final_lr` (where `cosine` and `poly` end; poly has power 0.9, Chen et al. 2017), `lr_batch`
        (if not 0, `lr` is for a batch of so many, and grows with the batch).
      steps: length of the run.
      batch: size of the global batch.
    """
    peak = config.lr * batch / config.lr_batch if config.lr_batch else config.lr
    warmup = round(config.warmup * steps)
    rest = max(1, steps - warmup)
    after = {
        "constant": lambda: optax.constant_schedule(peak),
        "cosine": lambda: cosine(peak, config.final_lr, rest),
        "poly": lambda: optax.polynomial_schedule(
            peak, config.final_lr, power=0.9, transition_steps=rest
        ),
    }[config.schedule]()
    if not warmup:
        return after
    return optax.join_schedules(
        [optax.linear_schedule(peak / warmup, peak, warmup - 1), after], [warmup]
    )


def make_optimizer(
    config: ml_collections.ConfigDict,
    schedule: optax.Schedule,
    *,
    steps: int = 1,
    hold: str = "",
    hold_steps: int = 0,
    layers: Sequence[Sequence[str]] = (),
) -> optax.GradientTransformation:
    """Optimiser: clipping of the gradient, then `name` with weight decay.

    Args:
      config: `clip_norm` bounds the norm of the whole gradient, `clip_each` that of each tensor's (0
        = off). `weight_decay` goes to `weight_decay_end` along a cosine (negative: it stays). It is
        decoupled for adamw and muon and part of the gradient for sgd; adam has none. It touches
        tensors of two or more dimensions only (no biases, norms or scalars).
      schedule: learning rate by step.
      steps: length of the run, for the decay.
      hold, hold_steps: tensors whose name begins with `hold` rest for the first steps: no gradient,
        no decay, and no change of the moments (zero gradients would shrink those).
      layers: names of the backbone's parameters by layer, from the input on. The i-th of L layers
        has a learning rate lower by `layer_decay` ** (L - i) (Bao et al., BEiT, 2022).
    """
    parts = [optax.clip_by_global_norm(config.clip_norm)] if config.clip_norm else []
    parts += [clip_each(config.clip_each)] if config.clip_each else []

    def direction(first_step: int) -> optax.GradientTransformation:
        return _direction(config, steps, first_step)

    if hold and hold_steps:
        parts.append(
            optax.partition(
                {"held": _hold(direction(hold_steps), hold_steps), "free": direction(0)},
                lambda params: jax.tree_util.tree_map_with_path(
                    lambda path, _: "held" if path[-1].key.startswith(hold) else "free", params
                ),
            )
        )
    else:
        parts.append(direction(0))
    if layers and config.layer_decay != 1.0:
        parts.append(_scale_layers(layers, config.layer_decay))
    return optax.chain(*parts, optax.scale_by_learning_rate(schedule))


def _scale_layers(layers: Sequence[Sequence[str]], decay: float) -> optax.GradientTransformation:
    rates = {name: decay ** (len(layers) - i) for i, names in enumerate(layers) for name in names}

    def leaf(path, update):
        inside = path[0].key == "backbone" and len(path) > 1
        return update * rates.get(path[1].key, 1.0) if inside else update

    return optax.stateless(lambda updates, params: jax.tree_util.tree_map_with_path(leaf, updates))


def _direction(config, steps: int, first_step: int) -> optax.GradientTransformation:
    """The step before the learning rate; its own count begins at `first_step` of the run."""
    end = config.weight_decay if config.weight_decay_end < 0 else config.weight_decay_end
    by_step = cosine(config.weight_decay, end, steps)
    decay = scheduled_decay(lambda count: by_step(count + first_step))
    return {
        "adam": lambda: optax.scale_by_adam(),
        "adamw": lambda: optax.chain(optax.scale_by_adam(), decay),
        "muon": lambda: optax.chain(_muon(), decay),
        "sgd": lambda: optax.chain(decay, optax.trace(decay=0.9)),
    }[config.name]()


def _muon() -> optax.GradientTransformation:
    """Muon for matrices and Adam for the rest (Jordan et al. 2024), without learning rate and decay."""
    muon = optax.contrib.muon(
        1.0,
        # Updates as large as Adam's usually are, so that one learning rate serves both.
        consistent_rms=0.2,
        muon_weight_dimension_numbers=_matrices,
    )
    return optax.chain(muon, optax.scale(-1.0))


def _matrices(params):
    """Which tensors Muon treats as matrices: the kernels, with all input axes as one.

    Embeddings, biases, scales and single-output kernels are left to AdamW.
    """

    def leaf(path, x):
        if path[-1].key != "kernel" or x.ndim < 2 or x.shape[-1] < 4:
            return None
        return optax.contrib.MuonDimensionNumbers(tuple(range(x.ndim - 1)), x.ndim - 1)

    return jax.tree_util.tree_map_with_path(leaf, params)


def clip_each(limit: float) -> optax.GradientTransformation:
    """Scales every tensor's gradient g by min(1, limit / (|g| + 1e-6)), as DINO clips."""

    def update(grads, state, params=None):
        def leaf(g):
            return g * jnp.minimum(1.0, limit / (jnp.linalg.norm(g.reshape(-1)) + 1e-6))

        return jax.tree.map(leaf, grads), state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)


def scheduled_decay(decay: optax.Schedule) -> optax.GradientTransformation:
    """Adds decay(count) * parameter to tensors of two or more dimensions."""

    def init(params):
        return optax.ScaleByScheduleState(jnp.zeros((), jnp.int32))

    def update(updates, state, params):
        rate = decay(state.count)
        updates = jax.tree.map(lambda u, p: u + rate * p if p.ndim > 1 else u, updates, params)
        return updates, optax.ScaleByScheduleState(state.count + 1)

    return optax.GradientTransformation(init, update)


def _hold(inner: optax.GradientTransformation, steps: int) -> optax.GradientTransformation:
    """`inner`, asleep for the first `steps`: updates are zero and its state stays as it was."""

    def init(params):
        return optax.ScaleByScheduleState(jnp.zeros((), jnp.int32)), inner.init(params)

    def update(grads, state, params=None):
        held, old = state
        updates, new = inner.update(grads, old, params)
        awake = held.count >= steps
        updates = jax.tree.map(lambda u: jnp.where(awake, u, jnp.zeros_like(u)), updates)
        new = jax.tree.map(lambda a, b: jnp.where(awake, a, b), new, old)
        return updates, (optax.ScaleByScheduleState(held.count + 1), new)

    return optax.GradientTransformation(init, update)
