"""The PAC heads: parameter counts, shapes, the course network spelled out, guides, errors."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxseg.heads.pac import PacCourse, PacJointUpsample, shrink_bilinear
from jaxseg.ops.pac import pac_conv
from jaxseg.ops.resize import resize_bilinear


def inputs(h, w, factor, channels=384):
    features, image = jax.random.split(jax.random.key(0))
    return (
        jax.random.normal(features, (1, h, w, channels)),
        jax.random.uniform(image, (1, h * factor, w * factor, 3)),
    )


def count(head, *arrays):
    variables = jax.eval_shape(head.init, jax.random.key(0), *arrays)
    return sum(leaf.size for leaf in jax.tree.leaves(variables))


def test_parameter_counts():
    assert count(PacCourse(), *inputs(2, 3, 16)) == 7073
    assert count(PacCourse(), *inputs(2, 3, 8)) == 6925
    assert count(PacCourse(outputs=3), *inputs(2, 3, 16)) == 7073 + 2 * 37


def test_course_is_what_the_exercise_says():
    features, image = inputs(2, 3, 4, channels=20)
    head = PacCourse(outputs=2)
    variables = jax.jit(head.init)(jax.random.key(1), features, image)
    logits, aux = jax.jit(head.apply)(variables, features, image)
    p = variables["params"]
    x = jax.nn.leaky_relu(features @ p["reduce"]["kernel"][0, 0] + p["reduce"]["bias"], 0.01)
    for stage, size in (("stage0", (4, 6)), ("stage1", (8, 12))):
        x = x if stage == "stage0" else jax.nn.leaky_relu(x, 0.01)
        x = jnp.repeat(jnp.repeat(x, 2, axis=1), 2, axis=2)
        weights = p[stage]["kernel"], p[stage]["bias"]
        x = pac_conv(x, resize_bilinear(image, size), *weights, padding=1, form="patches")
    assert logits.shape == (1, 8, 12, 2) and logits.dtype == jnp.float32 and aux == {}
    np.testing.assert_allclose(logits, x, atol=1e-5)


def test_initial_weights_are_uniform_in_fan_in():
    features, image = inputs(1, 1, 16)
    params = jax.jit(PacCourse().init)(jax.random.key(0), features, image)["params"]
    for name, fan_in in (("reduce", 384), ("stage0", 16 * 9), ("stage1", 4 * 9)):
        bound = fan_in**-0.5
        kernel = np.abs(params[name]["kernel"])
        assert 0.9 * bound < kernel.max() <= bound
        assert np.abs(params[name]["bias"]).max() <= bound


@pytest.mark.parametrize("factor", (1, 2, 4, 8))
def test_shrink_is_bilinear_resize(factor):
    image = jax.random.uniform(jax.random.key(0), (2, 16, 24, 3))
    wanted = resize_bilinear(image, (16 // factor, 24 // factor))
    np.testing.assert_allclose(shrink_bilinear(image, factor), wanted, atol=1e-6)


def test_joint_upsampling_learns_everything():
    features, image = inputs(4, 6, 2, channels=10)
    head = PacJointUpsample(outputs=2, channels=4, guide_channels=3, guide_width=4)
    variables = jax.jit(head.init)(jax.random.key(0), features, image)

    @functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
    def run(variables):
        def loss(variables):
            logits, _ = head.apply(variables, features, image)
            return jnp.mean(logits**2), logits

        return jax.grad(loss, has_aux=True)(variables)

    gradients, logits = run(variables)
    assert logits.shape == (1, 8, 12, 2) and logits.dtype == jnp.float32
    for path, gradient in jax.tree_util.tree_leaves_with_path(gradients):
        # A bias of a guide's last convolution cancels in the difference of two guides.
        cancels = "guide" in str(path) and "_2" in str(path) and "bias" in str(path)
        assert cancels or np.abs(gradient).max() > 0, path
    assert "temperature0" in variables["params"]


@pytest.mark.parametrize("size", ((24, 32), (48, 64), (4, 4), (8, 12), (33, 33)))
def test_sizes_that_do_not_fit(size):
    features = jnp.ones((1, 4, 4, 8))
    with pytest.raises(ValueError, match="power of two"):
        PacCourse().init(jax.random.key(0), features, jnp.ones((1, *size, 3)))


def test_too_many_guide_channels():
    features, image = inputs(1, 1, 2, channels=4)
    with pytest.raises(ValueError, match="1 to 16"):
        PacJointUpsample(guide_channels=17).init(jax.random.key(0), features, image)
