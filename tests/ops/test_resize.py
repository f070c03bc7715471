import jax
import jax.numpy as jnp
import numpy as np
import pytest
from shared import shared_path

from jaxseg.ops import resize

# The row 1 4 2 8 5 7 resized by torch.nn.functional.interpolate (2.13).
_ROW = [1.0, 4.0, 2.0, 8.0, 5.0, 7.0]
_TORCH = [
    ("bicubic", False, [2.6875, 5.09375, 5.71875]),
    ("bicubic", False, [1.75, 1.92578125, 7.8828125, 6.44140625]),
    ("bicubic", True, [2.2008368969, 4.9580154419, 6.4184103012]),
    ("bicubic", True, [2.0825228691, 3.1822354794, 6.5635533333, 6.2135930061]),
    ("bilinear", False, [2.5, 5.0, 6.0]),
    ("bilinear", False, [1.75, 2.5, 7.25, 6.5]),
    ("bilinear", True, [2.4285714626, 4.875, 6.2857146263]),
    ("bilinear", True, [2.125, 3.3333334923, 6.3333330154, 6.25]),
    (
        "bicubic",
        False,
        [0.6946606636, 1.9989209175, 3.8077106476, 3.0801787376, 1.8892521858, 5.09375]
        + [8.0766324997, 6.4250564575, 5.0010581017, 6.2477698326, 7.2035589218],
    ),
    (
        "bicubic",
        True,
        [0.7519457364, 1.8429017067, 3.7986214161, 3.1433596611, 1.9301745892, 5.0625]
        + [8.0450792313, 6.315176964, 5.0501704216, 6.3845052719, 7.1653690338],
    ),
]


@pytest.mark.parametrize(("kind", "antialias", "expected"), _TORCH)
@pytest.mark.parametrize("axis", [1, 2])
def test_row_as_torch(kind, antialias, expected, axis):
    x = np.array(_ROW, np.float32).reshape([6 if a == axis else 1 for a in range(4)])
    shape = (len(expected), 1) if axis == 1 else (1, len(expected))
    function = getattr(resize, f"resize_{kind}")
    got = function(jnp.asarray(x), shape, antialias=antialias)
    np.testing.assert_allclose(np.ravel(got), expected, atol=2e-6)


def test_bicubic_with_explicit_scale_as_torch():
    x = jnp.asarray(_ROW, jnp.float32).reshape(1, 1, 6, 1)
    got = resize.resize_bicubic(x, (1, 4), scale=(1.0, 6 / 4.1))
    expected = [1.6853518486, 2.0508639812, 8.0661354065, 6.0725746155]  # scale_factor=4.1/6
    np.testing.assert_allclose(np.ravel(got), expected, atol=2e-6)


def _slow_bilinear(x, shape):
    """The definition, one output pixel at a time."""
    b, h, w, c = x.shape
    out = np.zeros((b, *shape, c))
    for i in range(shape[0]):
        for j in range(shape[1]):
            y = min(max((i + 0.5) * h / shape[0] - 0.5, 0), h - 1)
            z = min(max((j + 0.5) * w / shape[1] - 0.5, 0), w - 1)
            y0, z0 = int(y), int(z)
            y1, z1 = min(y0 + 1, h - 1), min(z0 + 1, w - 1)
            top = x[:, y0, z0] * (1 - z + z0) + x[:, y0, z1] * (z - z0)
            bottom = x[:, y1, z0] * (1 - z + z0) + x[:, y1, z1] * (z - z0)
            out[:, i, j] = top * (1 - y + y0) + bottom * (y - y0)
    return out


@pytest.mark.parametrize(
    ("before", "after"),
    [((3, 5), (12, 20)), ((7, 4), (5, 9)), ((1, 1), (3, 2)), ((6, 9), (2, 3)), ((4, 4), (4, 4))],
)
def test_bilinear_and_its_gradient_match_the_definition(before, after):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(2, *before, 3)).astype(np.float32)
    g = rng.normal(size=(2, *after, 3)).astype(np.float32)
    got, vjp = jax.vjp(lambda x: resize.resize_bilinear(x, after), x)
    np.testing.assert_allclose(got, _slow_bilinear(x, after), atol=1e-5)
    # The map is linear, so its adjoint A^T satisfies <A e_k, g> = (A^T g)_k for unit inputs e_k.
    units = np.eye(before[0] * before[1]).reshape(-1, *before, 1)
    columns = _slow_bilinear(units, after)
    expected = np.einsum("khwu,bhwc->bkc", columns, g).reshape(x.shape)
    np.testing.assert_allclose(vjp(jnp.asarray(g))[0], expected, atol=1e-5)


def test_bilinear_takes_vmap_and_bfloat16():
    x = jnp.arange(24, dtype=jnp.bfloat16).reshape(2, 1, 3, 4, 1)
    got = jax.vmap(lambda x: resize.resize_bilinear(x, (6, 8)))(x)
    assert got.dtype == jnp.bfloat16
    want = resize.resize_bilinear(x[1], (6, 8))
    np.testing.assert_array_equal(np.asarray(got[1], np.float32), np.asarray(want, np.float32))


@pytest.mark.parametrize("antialias", [False, True])
@pytest.mark.parametrize("kind", ["bicubic", "bilinear"])
def test_constant_stays_constant(kind, antialias):
    x = jnp.full((1, 11, 6, 2), 3.5)
    for shape in [(4, 13), (1, 1), (33, 6)]:
        got = getattr(resize, f"resize_{kind}")(x, shape, antialias=antialias)
        np.testing.assert_allclose(got, np.full((1, *shape, 2), 3.5), rtol=1e-6)


def test_nearest_repeats_pixels():
    x = jnp.arange(12, dtype=jnp.int32).reshape(1, 2, 3, 2)
    expected = np.repeat(np.repeat(x, 3, axis=1), 3, axis=2)
    np.testing.assert_array_equal(resize.resize_nearest(x, 3), expected)
    with pytest.raises(ValueError, match="factor is 0"):
        resize.resize_nearest(x, 0)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: resize.resize_bilinear(jnp.zeros((4, 4, 1)), (8, 8)), r"\[B, H, W, C\]"),
        (lambda: resize.resize_bilinear(jnp.zeros((1, 4, 4, 1), jnp.uint8), (8, 8)), "uint8"),
        (lambda: resize.resize_bicubic(jnp.zeros((1, 4, 4, 1)), (0, 8)), "at least 1"),
        (lambda: resize.interpolate_position_embedding(jnp.zeros((1, 8, 2)), (2, 2)), "square"),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_position_embedding_matches_reference():
    golden = np.load(shared_path("golden/dino_vit_tiny_random.npz"))
    native = jnp.asarray(golden["posembed_224x224"])
    sizes = [key.removeprefix("posembed_") for key in golden if key.startswith("posembed_")]
    assert len(sizes) == 6
    for size in sizes:
        h, w = (int(n) // 16 for n in size.split("x"))
        got = resize.interpolate_position_embedding(native, (h, w))
        np.testing.assert_allclose(got, golden[f"posembed_{size}"], atol=1e-5, err_msg=size)


def test_position_embedding_of_the_native_grid_is_untouched_and_of_another_shape_is_not():
    pos = jax.random.normal(jax.random.key(0), (1, 1 + 16, 3))
    np.testing.assert_array_equal(resize.interpolate_position_embedding(pos, (4, 4)), pos)
    other = resize.interpolate_position_embedding(pos, (2, 8))
    assert other.shape == pos.shape
    np.testing.assert_array_equal(other[:, 0], pos[:, 0])
