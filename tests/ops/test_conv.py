"""The convolution of small maps against XLA's own, and against a loop."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxseg.ops.conv import conv_general_dilated

DIMENSIONS = ("NHWC", "HWIO", "NHWC")


@pytest.mark.parametrize(
    "side, kernel, stride, dilation, pad",
    [
        ((1, 1), 3, 1, 1, 1),
        ((2, 2), 3, 1, 1, 1),
        ((4, 4), 3, 2, 1, 1),
        ((7, 5), 3, 2, 1, 1),
        ((4, 3), 3, 1, 2, 2),
        ((5, 4), 7, 2, 1, 3),
        ((9, 11), 3, 1, 1, 1),
        ((9, 11), 1, 2, 1, 0),
        ((8, 6), 1, 1, 1, 0),
    ],
)
def test_equals_xla(side, kernel, stride, dilation, pad):
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.standard_normal((2, *side, 3)), jnp.float32)
    w = jnp.asarray(rng.standard_normal((kernel, kernel, 3, 5)), jnp.float32)
    arguments = (stride, stride), ((pad, pad), (pad, pad))
    options = dict(rhs_dilation=(dilation, dilation), dimension_numbers=DIMENSIONS)

    def results(convolve):
        out, pull = jax.vjp(lambda x, w: convolve(x, w, *arguments, **options), x, w)
        return out, *pull(jnp.cos(jnp.arange(out.size, dtype=jnp.float32)).reshape(out.shape))

    with jax.default_matmul_precision("highest"):
        for ours, theirs in zip(
            results(conv_general_dilated), results(jax.lax.conv_general_dilated), strict=True
        ):
            np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-5)


def test_a_loop_agrees():
    rng = np.random.default_rng(1)
    x, w = rng.standard_normal((1, 4, 3, 2)), rng.standard_normal((3, 3, 2, 4))
    ours = conv_general_dilated(
        jnp.asarray(x), jnp.asarray(w), (2, 1), ((1, 1), (1, 1)), dimension_numbers=DIMENSIONS
    )
    padded = np.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
    assert ours.shape == (1, 2, 3, 4)
    for i in range(2):
        for j in range(3):
            expected = np.einsum("hwc,hwco->o", padded[0, 2 * i : 2 * i + 3, j : j + 3], w)
            np.testing.assert_allclose(ours[0, i, j], expected, rtol=1e-5, atol=1e-5)
