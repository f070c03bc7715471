"""Schedules by their formulas, decay masks, and which tensors Muon takes."""

import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxseg.train.optim import Recipe
from jaxseg.train.schedules import staircase
from jaxseg.train.state import merge_params, split_params
from jaxseg.train.updates import clip_each

# The learning rate of `lr` in every step.
CONSTANT = dict(schedule="constant", warmup=0.0)


def test_cosine_with_warmup_follows_the_formula():
    schedule = Recipe(lr=2.0, schedule="cosine", warmup=0.1).learning_rate(100)
    for step in range(100):
        if step < 10:
            want = 2.0 * (step + 1) / 10
        else:
            want = 2.0 * 0.5 * (1 + np.cos(np.pi * (step - 10) / 90))
        assert float(schedule(step)) == pytest.approx(want, rel=1e-5, abs=1e-7)


def test_poly_and_constant():
    poly = Recipe(lr=1.0, schedule="poly", warmup=0.0).learning_rate(10)
    assert [float(poly(s)) for s in (0, 5, 10)] == pytest.approx([1.0, 0.5**0.9, 0.0])
    constant = Recipe(lr=0.3, schedule="constant", warmup=0.0).learning_rate(10)
    assert float(constant(0)) == float(constant(9)) == pytest.approx(0.3)


@pytest.mark.parametrize("name", ["adamw", "muon", "sgd"])
def test_weight_decay_spares_vectors(name):
    params = {"layer": {"kernel": jnp.ones((8, 8)), "bias": jnp.ones(8)}}
    optimizer = Recipe(name, 0.5, weight_decay=0.1, clip_norm=0.0, **CONSTANT).optimizer(1)
    zeros = {"layer": {"kernel": jnp.zeros((8, 8)), "bias": jnp.zeros(8)}}
    updates, _ = optimizer.update(zeros, optimizer.init(params), params)
    np.testing.assert_allclose(updates["layer"]["kernel"], -0.05, rtol=1e-5)
    np.testing.assert_array_equal(updates["layer"]["bias"], 0.0)


def test_clipping_bounds_the_global_norm():
    params = {"w": jnp.zeros((3, 3))}
    optimizer = Recipe("sgd", 1.0, weight_decay=0.0, clip_norm=1.0, **CONSTANT).optimizer(1)
    updates, _ = optimizer.update({"w": jnp.full((3, 3), 50.0)}, optimizer.init(params), params)
    assert float(jnp.linalg.norm(updates["w"])) == pytest.approx(1.0, rel=1e-5)


def test_muon_orthogonalises_kernels_and_leaves_the_rest_to_adam():
    rng = np.random.default_rng(0)
    params = {"conv": {"kernel": jnp.zeros((3, 3, 2, 8)), "bias": jnp.zeros(8)}}
    grads = {
        "conv": {
            "kernel": jnp.asarray(rng.normal(size=(3, 3, 2, 8)), jnp.float32),
            "bias": jnp.asarray(rng.normal(size=8), jnp.float32),
        }
    }
    optimizer = Recipe("muon", 1.0, weight_decay=0.0, clip_norm=0.0, **CONSTANT).optimizer(1)
    updates, _ = optimizer.update(grads, optimizer.init(params), params)
    matrix = np.asarray(updates["conv"]["kernel"]).reshape(18, 8)
    singular = np.linalg.svd(matrix, compute_uv=False)
    raw = np.linalg.svd(np.asarray(grads["conv"]["kernel"]).reshape(18, 8), compute_uv=False)
    assert singular.max() / singular.min() < 2 < raw.max() / raw.min()
    # Adam's first step is the sign of the gradient, times one number.
    signs = np.asarray(updates["conv"]["bias"]) / -np.sign(grads["conv"]["bias"])
    np.testing.assert_allclose(signs, signs[0], rtol=1e-3)
    assert signs[0] > 0


def test_split_and_merge_are_inverse():
    params = {"backbone": {"a": 1, "blocks_1": {"w": 2}, "blocks_10": {"w": 3}}, "head": {"w": 4}}
    trained, frozen = split_params(params, ("backbone/blocks_1", "head"))
    assert frozen == {"backbone": {"blocks_1": {"w": 2}}, "head": {"w": 4}}
    assert trained == {"backbone": {"a": 1, "blocks_10": {"w": 3}}}
    assert merge_params(trained, frozen) == params


def test_dinos_schedules():
    recipe = Recipe(lr=5e-4, lr_batch=256, schedule="cosine", warmup=0.1, final_lr=1e-6)
    schedule = recipe.learning_rate(200, batch=1024)
    assert float(schedule(19)) == pytest.approx(2e-3)  # the peak, four times 5e-4
    assert float(schedule(0)) == pytest.approx(1e-4)
    middle = 1e-6 + 0.5 * (2e-3 - 1e-6) * (1 + np.cos(np.pi * 90 / 180))
    assert float(schedule(110)) == pytest.approx(middle, rel=1e-4)
    assert float(schedule(200)) == pytest.approx(1e-6, rel=1e-3)


def test_teacher_temperature_warms_up_epoch_by_epoch():
    # The reference: concatenate(linspace(warmup, end, epochs), ones * end), one value an epoch.
    for epochs in (1, 3):
        values = staircase(0.04, 0.07, epochs, steps_per_epoch=2.5)
        want = np.concatenate([np.linspace(0.04, 0.07, epochs), np.full(9, 0.07)])
        for step in range(12):
            assert float(values(step)) == pytest.approx(want[int(step / 2.5)])


def test_weight_decay_follows_its_cosine():
    params = {"w": jnp.ones((2, 2))}
    decay = dict(weight_decay=0.04, weight_decay_end=0.4)
    optimizer = Recipe("adamw", 1.0, **decay, clip_norm=0.0, **CONSTANT).optimizer(10)
    state = optimizer.init(params)
    for step in range(11):
        updates, state = optimizer.update({"w": jnp.zeros((2, 2))}, state, params)
        expected = 0.4 + 0.5 * (0.04 - 0.4) * (1 + np.cos(np.pi * step / 10))
        np.testing.assert_allclose(updates["w"], -expected, rtol=1e-5)


def test_each_tensor_is_clipped_by_itself():
    grads = {"a": jnp.full((4,), 3.0), "b": jnp.full((4,), 0.1)}
    clipped, _ = clip_each(3.0).update(grads, optax.EmptyState())
    np.testing.assert_allclose(clipped["a"], 1.5, rtol=1e-5)
    np.testing.assert_array_equal(clipped["b"], grads["b"])


@pytest.mark.parametrize("name", ["adamw", "muon", "sgd"])
def test_what_is_held_ends_as_if_it_had_begun_later(name):
    """A held tensor's steps are those of a run that starts when it is let go."""
    rng = np.random.default_rng(0)
    grads = [{"last": g} for g in rng.normal(size=(6, 5, 4)).astype(np.float32)]
    recipe = Recipe(name, 0.1, weight_decay=0.1, clip_norm=0.0, **CONSTANT)

    def run(optimizer, params, grads):
        state = optimizer.init(params)
        for g in grads:
            updates, state = optimizer.update(g, state, params)
            params = optax.apply_updates(params, updates)
        return params

    params = {"last": jnp.ones((5, 4))}
    held = recipe.optimizer(6, hold="last", hold_steps=4)
    found = run(held, params, grads)
    expected = run(recipe.optimizer(6), params, grads[4:])
    np.testing.assert_allclose(found["last"], expected["last"], rtol=1e-6)
    np.testing.assert_array_equal(run(held, params, grads[:4])["last"], params["last"])


def test_lower_layers_learn_more_slowly():
    """BEiT's rule: the rate of layer i of L is lower by decay ** (L - i); heads have the full one."""
    names = [("embed",), ("blocks_0",), ("blocks_1",)]
    params = {
        "backbone": {**{n: {"bias": jnp.ones(3)} for (n,) in names}, "norm": {"bias": jnp.ones(3)}},
        "head": {"blocks_0": {"bias": jnp.ones(3)}},
    }
    layers = [tuple(f"backbone/{n}" for n in layer) for layer in names]
    recipe = Recipe("sgd", 1.0, layer_decay=0.5, clip_norm=0.0, weight_decay=0.0, **CONSTANT)
    optimizer = recipe.optimizer(1, layers=layers)
    updates, _ = optimizer.update(params, optimizer.init(params), params)
    got = {k: float(v["bias"][0]) for k, v in updates["backbone"].items()}
    assert got == pytest.approx({"embed": -0.125, "blocks_0": -0.25, "blocks_1": -0.5, "norm": -1})
    assert float(updates["head"]["blocks_0"]["bias"][0]) == -1.0
