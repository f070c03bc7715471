"""The count of operations that the benchmarks divide by."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest

from jaxseg.backbones import vit
from jaxseg.train import speed
from jaxseg.train.speed import compiled, product_flops


class _Network(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Conv(16, (3, 3), strides=2, padding="VALID", use_bias=False)(x))
        x = nn.Conv(16, (3, 3), feature_group_count=4, padding="VALID", use_bias=False)(x)
        return nn.Dense(7, use_bias=False)(x)


def test_products_are_what_xla_counts_without_loops():
    x = jnp.ones((2, 33, 17, 8))
    network = _Network()
    variables = network.init(jax.random.key(0), x)
    counted = jax.jit(network.apply).lower(variables, x).compile().cost_analysis()["flops"]
    assert product_flops(jax.jit(network.apply), variables, x) == pytest.approx(counted, rel=0.02)


def test_loops_count_as_often_as_they_run():
    a, b = jnp.ones((5, 4, 6)), jnp.ones((6, 3))
    looped = product_flops(jax.jit(lambda a, b: jax.lax.map(lambda x: x @ b, a)), a, b)
    assert looped == product_flops(lambda a, b: a @ b, a, b) == 2 * 5 * 4 * 6 * 3
    either = jax.lax.platform_dependent
    both = product_flops(lambda a, b: either(a, b, cpu=jnp.matmul, default=jnp.matmul), a, b)
    assert both == looped


@pytest.mark.parametrize("backend", ["cpu", "gpu"])
def test_the_rate_counts_the_products_that_are_timed(monkeypatch, backend):
    monkeypatch.setattr(jax, "default_backend", lambda: backend)
    monkeypatch.setattr(speed, "best_seconds", lambda f, x, repeats: product_flops(f, x))
    assert speed.matmul_rate("float32", 64) == 1


def test_fused_attention_counts_as_its_products(monkeypatch):
    # Tracing does not need the library, only its version.
    monkeypatch.setattr(
        "jax._src.cudnn.fused_attention_stablehlo.check_cudnn_version", lambda: 91000
    )
    q = jnp.ones((2, 3, 128, 64), jnp.bfloat16)

    def gradient(attend):
        return jax.grad(lambda q, k, v: attend(q, k, v).astype(jnp.float32).sum(), (0, 1, 2))

    one = 2 * q.size * 128
    for attend in (vit._attend, vit._attend_fused):
        assert product_flops(attend, q, q, q) == 2 * one
        assert product_flops(gradient(attend), q, q, q) == 6 * one


def test_compiled_functions_come_with_their_arguments():
    a, b = jnp.ones((2, 3)), jnp.arange(3.0)
    calls = compiled({"product": (jnp.matmul, a, b), "sum": (jnp.sum, b)})
    results = {name: function(*arguments) for name, (function, *arguments) in calls.items()}
    assert results["product"].tolist() == [3, 3] and results["sum"] == 3
