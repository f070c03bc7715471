"""Windows against the whole image at once: the same numbers, whatever the sizes."""

import jax
import numpy as np
import pytest

from jaxseg.evaluate.tiles import default_overlap, predict_tiles
from jaxseg.evaluate.windows import plan

RNG = np.random.default_rng(0)
KERNELS = [RNG.normal(size=(3, 3, 3, 6)) * 0.4, RNG.normal(size=(3, 3, 6, 4)) * 0.3]


@jax.jit
def convolutions(images):
    """Two 3x3 convolutions with zeros around the image: they see two pixels far."""
    x = images.astype(np.float32) / 255
    for kernel in KERNELS:
        x = jax.lax.conv_general_dilated(
            x, kernel.astype(np.float32), (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )
        x = jax.numpy.tanh(x)
    return x


def pointwise(images):
    return np.stack([images.sum(-1) / 765, images[..., 0] / 255.0], -1).astype(np.float32)


def picture(height, width):
    return RNG.integers(0, 256, (height, width, 3), dtype=np.uint8)


def reader(image):
    """Gives rows, and sees to it that each is asked for once, in order."""
    asked = [0]

    def read(start, stop):
        assert start == asked[0] <= stop <= len(image)
        asked[0] = stop
        return image[start:stop]

    return read


def tiled(image, network, **options):
    strips = predict_tiles(reader(image), image.shape[:2], network, **options)
    return np.concatenate(list(strips))


@pytest.mark.parametrize(
    ("length", "window", "overlap", "margin", "multiple"),
    [
        (310, 64, 16, 2, 1),
        (200, 64, 16, 8, 1),
        (65, 64, 32, 0, 1),
        (64, 64, 0, 0, 1),
        (10, 64, 16, 4, 16),
        (333, 64, 48, 3, 16),
        (1000, 64, 63, 0, 1),
        (20000, 512, 128, 24, 16),
    ],
)
def test_windows_cover_an_axis(length, window, overlap, margin, multiple):
    spans, size = plan(length, window, overlap=overlap, margin=margin, multiple=multiple)
    covered = -(-length // multiple) * multiple
    assert size == min(window, covered)
    total = np.zeros(covered)
    for span in spans:
        assert span.start % multiple == 0 and 0 <= span.start <= covered - size
        assert span.weights.min() >= 0
        counted = span.first + np.flatnonzero(span.weights)
        # What counts keeps its distance from the window's ends, except at the image's.
        assert counted[0] >= span.start + margin * (span.start > 0)
        assert counted[-1] < span.start + size - margin * (span.start + size < covered)
        total[span.first : span.stop] += span.weights
    np.testing.assert_allclose(total, 1, atol=1e-6)
    gaps = np.diff([span.start for span in spans])
    assert (gaps <= window - overlap).all()
    fewest = 1 + max(0, -(-(covered - window) // (window - overlap)))
    assert len(spans) == fewest


@pytest.mark.parametrize(
    "options",
    [
        {"window": 60, "overlap": 16, "multiple": 16},
        {"window": 64, "overlap": 10, "multiple": 16},
        {"window": 64, "overlap": 64},
        {"window": 64, "overlap": 16, "margin": 9},
        {"window": 64, "overlap": 16, "margin": -1},
        {"window": 0, "overlap": 0},
    ],
)
def test_numbers_that_do_not_fit(options):
    with pytest.raises(ValueError, match="window"):
        plan(200, options.pop("window"), **options)


@pytest.mark.parametrize("size", [(200, 310), (64, 64), (65, 64), (40, 310), (31, 17), (1, 1)])
@pytest.mark.parametrize(("overlap", "margin"), [(16, 2), (4, 2), (40, 5)])
def test_convolutions_see_no_window(size, overlap, margin):
    image = picture(*size)
    got = tiled(image, convolutions, window=(64, 64), overlap=overlap, margin=margin, batch=3)
    whole = np.asarray(convolutions(image[None]))[0]
    assert got.shape == whole.shape and got.dtype == np.float32
    np.testing.assert_allclose(got, whole, atol=1e-5)


def test_a_margin_that_is_too_small_shows():
    image = picture(200, 310)
    got = tiled(image, convolutions, window=(64, 64), overlap=16, margin=0)
    assert np.abs(got - np.asarray(convolutions(image[None]))[0]).max() > 1e-5


@pytest.mark.parametrize(("window", "multiple"), [((64, 64), 1), ((32, 96), 16), ((512, 512), 16)])
def test_a_pointwise_network_sees_no_window(window, multiple):
    image = picture(203, 157)
    got = tiled(image, pointwise, window=window, overlap=16, multiple=multiple, batch=4)
    np.testing.assert_allclose(got, pointwise(image), atol=1e-6)


def test_a_network_with_a_stride_sees_the_grid_of_the_whole_image():
    def blocks(images):  # each pixel gets the mean of its 16 x 16 block
        b, h, w, _ = images.shape
        means = images.reshape(b, h // 16, 16, w // 16, 16, 3).mean((2, 4))
        return means.repeat(16, 1).repeat(16, 2) / 255

    image = picture(203, 157)
    padded = np.pad(image, ((0, 5), (0, 3), (0, 0)), mode="edge")
    got = tiled(image, blocks, window=(64, 64), overlap=16, multiple=16)
    np.testing.assert_allclose(got, blocks(padded[None])[0, :203, :157], atol=1e-6)


def test_blending_has_no_jump_where_windows_disagree():
    """Each window says another constant: the result goes from one to the other in small steps."""
    said = iter(np.linspace(0, 1, 1000))

    def constant(images):
        return np.stack([np.full((*image.shape[:2], 1), next(said)) for image in images])

    got = tiled(picture(60, 200), constant, window=(64, 64), overlap=32)[..., 0]
    assert got.max() > got.min()
    assert np.abs(np.diff(got, axis=1)).max() < 2 * np.pi / 2 / 32 * 1e-3


def test_what_is_kept_of_a_block():
    image = picture(100, 90)
    options = {"window": (64, 64), "overlap": 16, "margin": 2}
    whole = np.asarray(convolutions(image[None]))[0]
    got = tiled(image, convolutions, **options, finish=lambda p: p.argmax(-1).astype(np.uint8))
    assert got.dtype == np.uint8 and got.shape == (100, 90)
    first, second = np.sort(whole, axis=-1)[..., -1:-3:-1].transpose(2, 0, 1)
    clear = first - second > 1e-4
    np.testing.assert_array_equal(got[clear], whole.argmax(-1)[clear])


def test_batches_have_one_shape():
    shapes = set()

    def network(images):
        shapes.add(images.shape)
        return pointwise(images)

    tiled(picture(203, 157), network, window=(64, 64), overlap=16, batch=5)
    assert shapes == {(5, 64, 64, 3)}


@pytest.mark.parametrize(("window", "stride"), [((512, 480), 16), ((64, 64), 16), ((32, 16), 16)])
def test_the_default_overlap_fits(window, stride):
    overlap, margin = default_overlap(window, stride)
    for side in window:
        plan(1000, side, overlap=overlap, margin=margin, multiple=stride)
    assert (overlap > 0) == (min(window) > stride)
