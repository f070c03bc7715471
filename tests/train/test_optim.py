"""Schedules by their formulas, decay masks, and which tensors Muon takes."""

import jax.numpy as jnp
import numpy as np
import optax
import pytest

from configs.common import get_segmentation_config
from jaxseg.train import optim
from jaxseg.train.state import merge_params, split_params


def _config(**changes):
    config = get_segmentation_config().optim
    config.update(changes)
    return config


def test_cosine_with_warmup_follows_the_formula():
    schedule = optim.make_schedule(_config(lr=2.0, schedule="cosine", warmup=0.1), 100)
    for step in range(100):
        if step < 10:
            want = 2.0 * (step + 1) / 10
        else:
            want = 2.0 * 0.5 * (1 + np.cos(np.pi * (step - 10) / 90))
        assert float(schedule(step)) == pytest.approx(want, rel=1e-5, abs=1e-7)


def test_poly_and_constant():
    poly = optim.make_schedule(_config(lr=1.0, schedule="poly", warmup=0.0), 10)
    assert [float(poly(s)) for s in (0, 5, 10)] == pytest.approx([1.0, 0.5**0.9, 0.0])
    constant = optim.make_schedule(_config(lr=0.3, schedule="constant", warmup=0.0), 10)
    assert float(constant(0)) == float(constant(9)) == pytest.approx(0.3)


@pytest.mark.parametrize("name", ["adamw", "muon", "sgd"])
def test_weight_decay_spares_vectors(name):
    params = {"layer": {"kernel": jnp.ones((8, 8)), "bias": jnp.ones(8)}}
    config = _config(name=name, weight_decay=0.1, clip_norm=0.0)
    optimizer = optim.make_optimizer(config, optax.constant_schedule(0.5))
    zeros = {"layer": {"kernel": jnp.zeros((8, 8)), "bias": jnp.zeros(8)}}
    updates, _ = optimizer.update(zeros, optimizer.init(params), params)
    np.testing.assert_allclose(updates["layer"]["kernel"], -0.05, rtol=1e-5)
    np.testing.assert_array_equal(updates["layer"]["bias"], 0.0)


def test_clipping_bounds_the_global_norm():
    params = {"w": jnp.zeros((3, 3))}
    config = _config(name="sgd", weight_decay=0.0, clip_norm=1.0)
    optimizer = optim.make_optimizer(config, optax.constant_schedule(1.0))
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
    config = _config(name="muon", weight_decay=0.0, clip_norm=0.0)
    optimizer = optim.make_optimizer(config, optax.constant_schedule(1.0))
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
