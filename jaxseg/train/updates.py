"""What is done to gradients and updates on their way, beside what Optax has."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import optax


def scale_layers(layers: Sequence[Sequence[str]], decay: float) -> optax.GradientTransformation:
    """Scales the updates of the i-th of L layers, paths of parameters, by decay ** (L - i)."""
    rates = {path: decay ** (len(layers) - i) for i, paths in enumerate(layers) for path in paths}

    def leaf(path, update):
        names = [key.key for key in path]
        starts = ("/".join(names[:n]) for n in range(1, len(names) + 1))
        return update * next((rates[start] for start in starts if start in rates), 1.0)

    return optax.stateless(lambda updates, params: jax.tree_util.tree_map_with_path(leaf, updates))


def muon() -> optax.GradientTransformation:
    """Muon for matrices and Adam for the rest (Jordan et al. 2024), without learning rate and decay."""
    direction = optax.contrib.muon(
        1.0,
        # Updates as large as Adam's usually are, so that one learning rate serves both.
        consistent_rms=0.2,
        muon_weight_dimension_numbers=_matrices,
    )
    return optax.chain(direction, optax.scale(-1.0))


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


def hold(inner: optax.GradientTransformation, steps: int) -> optax.GradientTransformation:
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
