"""Inference on images of any size: what it must equal for simple networks, and a loop for the blend."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxseg.evaluate.inference import multi_scale, sliding_window
from jaxseg.evaluate.windows import window_starts, window_weights

MIX = np.array([[1.0, -2.0], [0.5, 0.3], [-1.0, 2.0]], np.float32)


def _image(h, w, batch=1, seed=0):
    return np.random.default_rng(seed).uniform(size=(batch, h, w, 3)).astype(np.float32)


def _pointwise(image):
    """A network whose scores depend on each pixel alone."""
    return np.tanh(image @ MIX)


def _neighbours(image):
    """One that looks at the neighbours, the same to the left and to the right."""
    padded = np.pad(image, ((0, 0), (1, 1), (1, 1), (0, 0)))
    left, right = padded[:, 1:-1, :-2], padded[:, 1:-1, 2:]
    above, below = padded[:, :-2, 1:-1], padded[:, 2:, 1:-1]
    return (image + 2 * (left + right) - above + 0.5 * below) @ MIX


def _positional(image):
    """One whose scores depend on where a pixel lies in what it is given."""
    _, h, w, _ = image.shape
    place = np.arange(h)[:, None] / h + np.arange(w)[None, :] ** 2 / w
    return image[..., :2] * place[..., None] + place[..., None]


@pytest.mark.parametrize("size", [(37, 53), (16, 90), (20, 24), (17, 25)])
@pytest.mark.parametrize("blend", ["hann", "uniform"])
@pytest.mark.parametrize("step", [{}, {"overlap": 0.0}, {"overlap": 0.7}, {"stride": (5, 24)}])
def test_windows_do_not_show_in_a_pointwise_network(size, blend, step):
    image = _image(*size, batch=2)
    got = sliding_window(_pointwise, image, window=(16, 24), blend=blend, **step)
    assert got.dtype == np.float32
    np.testing.assert_allclose(got, _pointwise(image), atol=1e-6)


@pytest.mark.parametrize("size", [(10, 30), (40, 11), (3, 5)])
def test_images_smaller_than_the_window(size):
    image = _image(*size)
    seen = []

    def predict(windows):
        seen.append(windows)
        return _pointwise(windows)

    got = sliding_window(predict, image, window=(16, 24))
    np.testing.assert_allclose(got, _pointwise(image), atol=1e-6)
    if size == (3, 5):
        window = seen[0][0]
        np.testing.assert_array_equal(window[-1, -1], image[0, -1, -1])
        np.testing.assert_array_equal(window[:3, :5], image[0])


@pytest.mark.parametrize("blend", ["hann", "uniform"])
def test_blend_as_a_loop(blend):
    (h, w), (m, n), stride = (21, 30), (8, 12), (6, 5)
    image = _image(h, w)
    total, weights = np.zeros((h, w, 2)), np.zeros((h, w, 1))
    for y in [0, 6, 12, 13]:
        for x in [0, 5, 10, 15, 18]:
            scores = _positional(image[:, y : y + m, x : x + n])[0]
            for i in range(m):
                for j in range(n):
                    weight = 1.0
                    if blend == "hann":
                        weight = np.sin(np.pi * (i + 0.5) / m) * np.sin(np.pi * (j + 0.5) / n)
                    total[y + i, x + j] += weight**2 * scores[i, j]
                    weights[y + i, x + j] += weight**2
    got = sliding_window(_positional, image, window=(m, n), stride=stride, blend=blend)
    np.testing.assert_allclose(got[0], total / weights, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("length", "window", "stride"), [(21, 8, 6), (8, 8, 4), (9, 8, 8), (24, 8, 8)]
)
def test_windows_cover_the_axis_and_stay_inside(length, window, stride):
    starts = window_starts(length, window, stride)
    assert starts[0] == 0 and starts[-1] == length - window
    assert len(set(starts)) == len(starts) and np.diff(starts).max(initial=0) <= stride
    total = np.zeros(length)
    for start, weights in zip(starts, window_weights(starts, window, "hann"), strict=True):
        assert (weights > 0).all()
        total[start : start + window] += weights
    np.testing.assert_allclose(total, 1.0, atol=1e-6)


def test_seams_vanish_with_hann_windows():
    """Windows that disagree by a constant: the blend moves between them without a step."""

    def predict(windows):
        return np.full((*windows.shape[:3], 1), windows[0, 0, 0, 0])

    image = np.zeros((1, 8, 96, 3), np.float32)
    image[:, 0, 32:] = 1.0  # What the first pixel of the later windows says.
    options = dict(window=(8, 32), stride=(8, 16), batch=1)
    hann = sliding_window(predict, image, blend="hann", **options)[0, 4, :, 0]
    uniform = sliding_window(predict, image, blend="uniform", **options)[0, 4, :, 0]
    assert hann[0] == 0 and abs(hann[-1] - 1) < 1e-6
    assert np.abs(np.diff(uniform)).max() > 0.49
    assert np.abs(np.diff(hann)).max() < 0.15


@pytest.mark.parametrize("batch", [1, 3, 64])
def test_one_compiled_shape_whatever_the_image(batch):
    shapes = []

    @jax.jit
    def predict(windows):
        shapes.append(windows.shape)
        return jnp.tanh(windows @ MIX)

    for size in [(40, 33), (16, 16), (7, 90)]:
        image = _image(*size, batch=2)
        got = sliding_window(predict, image, window=(16, 16), batch=batch)
        np.testing.assert_allclose(got, _pointwise(image), atol=1e-6)
    assert shapes == [(batch, 16, 16, 3)]


def test_bytes_are_read_as_numbers_up_to_one():
    image = np.random.default_rng(0).integers(0, 256, (1, 20, 30, 3)).astype(np.uint8)
    expected = _pointwise(image.astype(np.float32) / 255)
    got = sliding_window(_pointwise, image, window=(16, 16))
    np.testing.assert_allclose(got, expected, atol=1e-6)
    got = multi_scale(_pointwise, image, scales=(1.0,), multiple=1)
    np.testing.assert_allclose(got, expected, atol=1e-6)


@pytest.mark.parametrize("network", [_pointwise, _neighbours])
def test_a_symmetric_network_is_not_changed_by_the_flip(network):
    image = _image(33, 21)
    got = multi_scale(network, image, scales=(1.0,), flip=True, multiple=1)
    np.testing.assert_allclose(got, network(image), atol=1e-5)


def test_the_flip_is_undone():
    image = _image(12, 15)
    got = multi_scale(_positional, image, scales=(1.0,), multiple=1)
    mirrored = _positional(image[:, :, ::-1])[:, :, ::-1]
    np.testing.assert_allclose(got, (_positional(image) + mirrored) / 2, rtol=1e-5)
    without = multi_scale(_positional, image, scales=(1.0,), multiple=1, flip=False)
    np.testing.assert_allclose(without, _positional(image), rtol=1e-5)


def test_scales_are_rounded_to_the_multiple_and_averaged():
    image, seen = _image(40, 56), []

    def predict(x):
        seen.append(x.shape[1:3])
        return np.full((*x.shape[:3], 2), x.shape[1], np.float32)

    got = multi_scale(predict, image, scales=(0.5, 0.1, 1.5), flip=False, multiple=16)
    assert seen == [(16, 32), (16, 16), (64, 80)]
    assert got.shape == (1, 40, 56, 2)
    np.testing.assert_allclose(got, (16 + 16 + 64) / 3, rtol=1e-5)


def test_shrinking_does_not_alias():
    """A checkerboard becomes grey at half the size, whatever its phase."""
    image = np.indices((32, 32)).sum(0)[None, :, :, None] % 2 * np.ones(3, np.float32)

    def predict(x):
        np.testing.assert_allclose(x[:, 4:-4, 4:-4], 0.5, atol=0.05)
        return x

    multi_scale(predict, image.astype(np.float32), scales=(0.5, 0.75), multiple=8)


def test_a_constant_predictor_gives_the_constant():
    def predict(x):
        return np.broadcast_to(np.float32([0.2, 0.7, 0.1]), (*x.shape[:3], 3))

    tiled = partial(sliding_window, predict, window=(16, 24))
    for run in (predict, tiled):
        for image in (_image(37, 45), _image(5, 7)):
            got = multi_scale(run, image, scales=(0.5, 1.25), multiple=4)
            assert got.shape == (*image.shape[:3], 3)
            np.testing.assert_allclose(got, predict(image), atol=1e-6)


def test_scales_over_windows_is_scales_over_whole_images():
    image = _image(37, 45, batch=2)
    tiled = partial(sliding_window, _pointwise, window=(16, 24))
    scales = dict(scales=(0.75, 1.5), multiple=1)
    got = multi_scale(tiled, image, **scales)
    np.testing.assert_allclose(got, multi_scale(_pointwise, image, **scales), atol=1e-6)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"overlap": 1.0}, r"\[0, 1\)"),
        ({"stride": (9, 4)}, r"\(9, 4\)"),
        ({"stride": (0, 4)}, r"\(0, 4\)"),
        ({"window": (0, 8)}, r"\(0, 8\)"),
        ({"blend": "cosine"}, "'cosine'"),
        ({"batch": 0}, "batch is 0"),
    ],
)
def test_options_out_of_range_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        sliding_window(_pointwise, _image(20, 20), **({"window": (8, 8)} | options))


def test_bad_scales_images_and_scores_are_named():
    image = _image(20, 20)
    for options in ({"scales": ()}, {"scales": (0.0,)}, {"multiple": 0}):
        with pytest.raises(ValueError, match="must be positive"):
            multi_scale(_pointwise, image, **options)
    with pytest.raises(ValueError, match="int64"):
        multi_scale(_pointwise, np.zeros((1, 4, 4, 3), np.int64))
    with pytest.raises(ValueError, match=r"\(20, 20, 3\)"):
        multi_scale(_pointwise, image[0])
    with pytest.raises(ValueError, match=r"\(1, 10, 10, 3\)"):
        multi_scale(lambda x: x[:, ::2, ::2], image, scales=(1.0,), multiple=1)
