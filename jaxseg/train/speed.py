"""How fast something runs, how much work it is, and what the device could do."""

import math
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
from jax.extend import core

# Products in cuDNN's attention, less those that the backward pass repeats to save memory.
_FUSED_ATTENTION = {"dot_product_attention_fwd_wrapper": 2, "dot_product_attention_bwd_wrapper": 4}


def best_seconds(function: Callable[..., Any], *arguments: Any, repeats: int) -> float:
    """The least time of `repeats` calls, after one that compiles."""
    jax.block_until_ready(function(*arguments))
    times = []
    for _ in range(repeats):
        begin = time.perf_counter()
        jax.block_until_ready(function(*arguments))
        times.append(time.perf_counter() - begin)
    return min(times)


def compiled(calls: Mapping[str, tuple[Any, ...]]) -> dict[str, tuple[Any, ...]]:
    """Compiles {name: (function, *arguments)}, all at once: XLA takes a minute for a large step."""
    lowered = {
        name: jax.jit(function).lower(*arguments) for name, (function, *arguments) in calls.items()
    }
    with ThreadPoolExecutor() as pool:
        done = dict(
            zip(lowered, pool.map(lambda one: one.compile(), lowered.values()), strict=True)
        )
    return {name: (done[name], *arguments) for name, (_, *arguments) in calls.items()}


def matmul_rate(dtype: Any, side: int = 0, *, repeats: int = 3) -> float:
    """The measured operations per second of a [side, side] matrix product on one device.

    Side 0 stands for 2048 on a CPU, else 8192. On an accelerator eight products follow each other in one
    call, whose start would otherwise count: it takes a third as long as a product on a large GPU.
    """
    cpu = jax.default_backend() == "cpu"
    side, count = side or (2048 if cpu else 8192), 1 if cpu else 8
    x = jax.random.normal(jax.random.key(0), (side, side)).astype(dtype)

    def products(x):
        return jax.lax.fori_loop(0, count, lambda _, y: x @ y * side**-0.5, x)

    function = jax.jit(lambda x: x @ x) if cpu else jax.jit(products)
    return count * 2 * side**3 / best_seconds(function, x, repeats=repeats)


def product_flops(function: Callable[..., Any], *arguments: Any) -> float:
    """The operations of a call's matrix products and convolutions, a multiplication and an addition each.

    XLA's own count (`compiled.cost_analysis()`) takes the body of a loop once, however often it runs.
    """
    return _flops(jax.make_jaxpr(function)(*arguments).jaxpr)


def _flops(jaxpr: core.Jaxpr) -> float:
    total = 0.0
    for equation in jaxpr.eqns:
        name, params = equation.primitive.name, equation.params
        if name == "dot_general":
            (contracted, _), _ = params["dimension_numbers"]
            left, result = equation.invars[0].aval.shape, equation.outvars[0].aval.shape
            total += 2.0 * math.prod(result) * math.prod(left[axis] for axis in contracted)
        elif name == "conv_general_dilated":
            kernel, result = equation.invars[1].aval.shape, equation.outvars[0].aval.shape
            each = math.prod(kernel) / kernel[params["dimension_numbers"].rhs_spec[0]]
            total += 2.0 * math.prod(result) * each / params["batch_group_count"]
        elif name in _FUSED_ATTENTION:
            queries, keys = (v.aval.shape for v in equation.invars[:2])  # [B, N, heads, d]
            total += 2.0 * _FUSED_ATTENTION[name] * math.prod(queries) * keys[1]
        else:
            inner = [_flops(j) for j in core.jaxprs_in_params(params)]
            # One branch of a condition runs, also where the platform decides which.
            once = max(inner, default=0.0) if name == "cond" else sum(inner)
            total += once * (params["length"] if name == "scan" else 1)
    return total
