"""The guided decoder: shapes, what it depends on, gradients, and its resampling against slow forms."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxseg.heads.guided import GuidedDecoder, depth_to_space, double, space_to_depth


def _inputs(h, w, factor, channels=24, batch=2, dtype=jnp.float32):
    rng = np.random.default_rng(0)
    features = rng.normal(size=(batch, h, w, channels)).astype(np.float32)
    image = rng.uniform(size=(batch, h * factor, w * factor, 3)).astype(np.float32)
    return jnp.asarray(features, dtype), jnp.asarray(image)


def _small(**options):
    return GuidedDecoder(**{"width": 8, "dilations": (1, 2), "guide_widths": (4, 6), **options})


@partial(jax.jit, static_argnums=0)
def _apply(head, params, features, image):
    return head.apply(params, features, image)


@partial(jax.jit, static_argnums=0)
def _start(head, features, image):
    return head.init(jax.random.key(1), features, image)


def _init(head, features, image):
    """Parameters moved off their start, where the decoder's correction is zero."""
    params = _start(head, features, image)
    rng = np.random.default_rng(2)
    return jax.tree.map(lambda x: x + 0.1 * rng.normal(size=x.shape).astype(x.dtype), params)


@pytest.mark.parametrize(("h", "w", "factor"), [(3, 5, 16), (4, 3, 8), (1, 2, 4)])
def test_logits_have_the_images_size(h, w, factor):
    head = _small(outputs=3)
    features, image = _inputs(h, w, factor)
    logits, aux = jax.eval_shape(
        lambda f, i: head.init_with_output(jax.random.key(0), f, i)[0], features, image
    )
    assert logits.shape == (2, h * factor, w * factor, 3)
    assert logits.dtype == jnp.float32
    assert aux["context"].shape == (2, h, w, 3)


def test_parameters_serve_every_image_size():
    head = _small()
    params = _init(head, *_inputs(3, 4, 8))
    logits, _ = _apply(head, params, *_inputs(5, 2, 8))
    assert logits.shape == (2, 40, 16, 1)
    assert np.isfinite(logits).all()


def test_fewer_than_a_million_parameters():
    features, image = _inputs(2, 2, 16, channels=384, batch=1)
    params = jax.eval_shape(GuidedDecoder().init, jax.random.key(0), features, image)
    assert sum(x.size for x in jax.tree.leaves(params)) < 1_000_000


def test_sizes_that_do_not_fit_are_named():
    features, _ = _inputs(3, 4, 8)
    with pytest.raises(ValueError, match="24x33"):
        _small().init(jax.random.key(0), features, jnp.zeros((2, 24, 33, 3)))


def test_starts_as_the_bilinear_upsampling_of_the_context():
    features, image = _inputs(3, 4, 8)
    head = _small()
    params = _start(head, features, image)
    logits, aux = _apply(head, params, features, image)
    np.testing.assert_allclose(logits, double(double(double(aux["context"]))), atol=1e-5)
    other, _ = _apply(head, params, features, 1.0 - image)
    np.testing.assert_array_equal(other, logits)


def test_the_image_changes_the_logits_only_nearby():
    head = _small()
    features, image = _inputs(4, 6, 8)
    params = _init(head, features, image)
    before, _ = _apply(head, params, features, image)
    after, _ = _apply(head, params, features, image.at[:, 8, 8].set(0.0))
    change = np.abs(after - before).max((0, 3))
    assert change[8, 8] > 1e-5
    assert change[:, 40:].max() < 1e-6


def test_gradients_are_finite_and_reach_every_parameter():
    head = _small(dropout=0.2)
    features, image = _inputs(3, 4, 8)
    params = _init(head, features, image)

    def loss(params, features):
        logits, _ = head.apply(
            params, features, image, train=True, rngs={"dropout": jax.random.key(3)}
        )
        return (logits**2).mean()

    grads = jax.jit(jax.grad(loss, argnums=(0, 1)))(params, features)
    assert all(np.isfinite(g).all() for g in jax.tree.leaves(grads))
    assert all(np.abs(g).max() > 0 for g in jax.tree.leaves(grads))


def test_flat_features_give_finite_logits():
    head = _small()
    features, image = _inputs(3, 4, 8)
    params = _init(head, features, image)

    def total(features):
        return head.apply(params, features, image)[0].sum()

    value, grad = jax.jit(jax.value_and_grad(total))(jnp.ones_like(features))
    assert np.isfinite(value) and np.isfinite(grad).all()


def test_half_precision_features_are_read_in_float32():
    head = _small()
    features, image = _inputs(3, 4, 8)
    params = _init(head, features, image)
    half = features.astype(jnp.bfloat16)
    got, _ = _apply(head, params, half, image)
    expected, _ = _apply(head, params, half.astype(jnp.float32), image)
    assert got.dtype == jnp.float32
    np.testing.assert_array_equal(got, expected)


def test_dropout_needs_training():
    head = _small(dropout=0.5)
    features, image = _inputs(3, 4, 8)
    params = _init(head, features, image)

    @partial(jax.jit, static_argnames="train")
    def run(seed, train):
        rngs = {"dropout": jax.random.key(seed)}
        return head.apply(params, features, image, train=train, rngs=rngs)[0]

    np.testing.assert_array_equal(run(0, False), run(1, False))
    assert np.abs(run(0, True) - run(1, True)).max() > 1e-4


def test_double_is_bilinear_resizing():
    x = np.random.default_rng(0).normal(size=(2, 3, 5, 4)).astype(np.float32)
    # With half-pixel centres, upsampling has no antialiasing to differ in; borders repeat.
    np.testing.assert_allclose(
        double(jnp.asarray(x)), jax.image.resize(x, (2, 6, 10, 4), "bilinear"), atol=1e-6
    )


def test_space_to_depth_keeps_blocks_together():
    x = np.arange(2 * 4 * 6 * 3).reshape(2, 4, 6, 3)
    deep = np.asarray(space_to_depth(jnp.asarray(x)))
    for i in range(2):
        for j in range(3):
            block = x[:, 2 * i : 2 * i + 2, 2 * j : 2 * j + 2].reshape(2, -1)
            np.testing.assert_array_equal(deep[:, i, j], block)
    np.testing.assert_array_equal(depth_to_space(jnp.asarray(deep)), x)
