"""What the benchmarks measure time with."""

import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp


def best_seconds(function: Callable[..., Any], *arguments: Any, repeats: int) -> float:
    """The least time of `repeats` calls, after one that compiles."""
    jax.block_until_ready(function(*arguments))
    times = []
    for _ in range(repeats):
        begin = time.perf_counter()
        jax.block_until_ready(function(*arguments))
        times.append(time.perf_counter() - begin)
    return min(times)


def matmul_rate(dtype: Any, side: int, *, repeats: int) -> float:
    """The measured operations per second of a [side, side] matrix product."""
    x = jax.random.normal(jax.random.key(0), (side, side)).astype(dtype)
    return 2 * side**3 / best_seconds(jax.jit(jnp.matmul), x, x, repeats=repeats)
