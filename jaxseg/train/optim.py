"""Optimiser and learning-rate schedule from a config."""

import jax
import ml_collections
import optax

OPTIMIZERS = ("adam", "adamw", "muon", "sgd")
SCHEDULES = ("constant", "cosine", "poly")


def make_schedule(config: ml_collections.ConfigDict, steps: int) -> optax.Schedule:
    """Learning rate by step: linear warm-up over `warmup` of the run, then `schedule`.

    Args:
      config: `lr` (peak), `schedule` (one of `SCHEDULES`), `warmup` (share of `steps`, 0 to 1).
      steps: length of the run; `cosine` and `poly` (power 0.9, Chen et al. 2017) end at 0 there.
    """
    warmup = round(config.warmup * steps)
    rest = max(1, steps - warmup)
    after = {
        "constant": lambda: optax.constant_schedule(config.lr),
        "cosine": lambda: optax.cosine_decay_schedule(config.lr, rest),
        "poly": lambda: optax.polynomial_schedule(config.lr, 0.0, power=0.9, transition_steps=rest),
    }[config.schedule]()
    if not warmup:
        return after
    return optax.join_schedules(
        [optax.linear_schedule(config.lr / warmup, config.lr, warmup - 1), after], [warmup]
    )


def make_optimizer(
    config: ml_collections.ConfigDict, schedule: optax.Schedule
) -> optax.GradientTransformation:
    """Optimiser: global-norm clipping (`clip_norm`, 0 = off), then `name` with weight decay.

    The decay is decoupled for adamw and muon and part of the gradient for sgd; adam has none. It
    touches tensors of two or more dimensions only (no biases, norms or scalars).
    """

    def decay_mask(params):
        return jax.tree.map(lambda x: x.ndim > 1, params)

    steps = [optax.clip_by_global_norm(config.clip_norm)] if config.clip_norm else []
    steps += {
        "adam": lambda: [optax.adam(schedule)],
        "adamw": lambda: [optax.adamw(schedule, weight_decay=config.weight_decay, mask=decay_mask)],
        "muon": lambda: [
            optax.contrib.muon(
                schedule,
                weight_decay=config.weight_decay,
                weight_decay_mask=decay_mask,
                # Updates as large as Adam's usually are, so that one learning rate serves both.
                consistent_rms=0.2,
                muon_weight_dimension_numbers=_matrices,
            )
        ],
        "sgd": lambda: [
            optax.add_decayed_weights(config.weight_decay, mask=decay_mask),
            optax.sgd(schedule, momentum=0.9),
        ],
    }[config.name]()
    return optax.chain(*steps)


def _matrices(params):
    """Which tensors Muon treats as matrices: the kernels, with all input axes as one.

    Embeddings, biases, scales and single-output kernels are left to AdamW.
    """

    def leaf(path, x):
        if path[-1].key != "kernel" or x.ndim < 2 or x.shape[-1] < 4:
            return None
        return optax.contrib.MuonDimensionNumbers(tuple(range(x.ndim - 1)), x.ndim - 1)

    return jax.tree_util.tree_map_with_path(leaf, params)
