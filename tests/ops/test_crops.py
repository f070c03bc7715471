"""DINO's crops against Pillow, SciPy, colorsys and torchvision's algorithms restated in NumPy.

Pillow rounds to 8 bits after every step, so tolerances against it are in levels of 1 / 255.
"""

import colorsys
import functools
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image, ImageEnhance, ImageFilter, ImageOps
from scipy import ndimage, stats

from jaxseg.ops import crops as ops
from jaxseg.ops.crops import View, draw_view, draw_views

LEVEL = 1 / 255
PLAIN = {"flip": 0.0, "jitter": 0.0, "gray": 0.0}
WHOLE = {"scale": (1.0, 1.0), "ratio": (1.0, 1.0), **PLAIN}  # on square images


def _noise(height=24, width=28, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def _smooth(height=24, width=28):
    noise = np.random.default_rng(1).random((height, width, 3))
    blurred = ndimage.gaussian_filter(noise, (2, 2, 0))
    return (255 * np.clip(6 * blurred - 2.5, 0, 1)).astype(np.uint8)


def _float(image):
    return image.astype(np.float32) / 255


def _assert_near(got, pillow, levels):
    want = np.asarray(pillow, np.float32) / 255
    np.testing.assert_allclose(got, want, atol=levels * LEVEL + 1e-5, rtol=0)


# The single operations.


@pytest.mark.parametrize("image", [_noise(), _smooth()], ids=["noise", "smooth"])
@pytest.mark.parametrize("factor", [0.0, 0.4, 1.0, 1.4, 2.0])
def test_enhancements_are_those_of_pillow(image, factor):
    x, pillow = _float(image), Image.fromarray(image)
    # Pillow cuts off the blend's fraction (1 level) and rounds grey and its mean (half a level).
    rounding = 1 + 0.5 * abs(1 - factor)
    for ours, theirs in (
        (ops.adjust_brightness, ImageEnhance.Brightness),
        (ops.adjust_contrast, ImageEnhance.Contrast),
        (ops.adjust_saturation, ImageEnhance.Color),
    ):
        _assert_near(ours(x, factor), theirs(pillow).enhance(factor), rounding)


def test_factor_one_changes_nothing():
    x = _float(_noise())
    for adjust in (ops.adjust_brightness, ops.adjust_contrast, ops.adjust_saturation):
        np.testing.assert_array_equal(adjust(x, 1.0), x)


def test_gray_and_solarize_are_those_of_pillow():
    image = _noise()
    gray = ops.to_gray(_float(image))
    _assert_near(gray[..., 0], Image.fromarray(image).convert("L"), 0.5)
    np.testing.assert_array_equal(gray, np.repeat(gray[..., :1], 3, axis=-1))
    _assert_near(ops.solarize(_float(image)), ImageOps.solarize(Image.fromarray(image), 128), 0)


def _shift_hue(x, shift):
    def pixel(rgb):
        hue, saturation, value = colorsys.rgb_to_hsv(*rgb.astype(float))
        return colorsys.hsv_to_rgb((hue + shift) % 1.0, saturation, value)

    return np.apply_along_axis(pixel, -1, x)


@pytest.mark.parametrize("shift", [-0.5, -0.1, 0.0, 0.03, 0.3, 0.5])
def test_hue_is_shifted_in_hsv(shift):
    corners = np.array(list(itertools.product((0, 128, 255), repeat=3)), np.uint8)
    image = np.concatenate([_noise().reshape(-1, 3), corners])[None]
    got = np.asarray(ops.adjust_hue(_float(image), shift))
    np.testing.assert_allclose(got, _shift_hue(_float(image), shift), atol=2e-6)

    # torchvision on Pillow images: 8 bits of hue are steps of 6 levels at full saturation, so
    # single pixels are off by up to 14 levels; on average it was 0.4 to 1.6 levels.
    hue, *rest = Image.fromarray(image).convert("HSV").split()
    moved = (np.asarray(hue, int) + int(shift * 255)) % 256
    theirs = Image.merge("HSV", [Image.fromarray(moved.astype(np.uint8)), *rest]).convert("RGB")
    error = np.abs(got * 255 - np.asarray(theirs, float))
    assert error.mean() < 2 and error.max() < 18


@pytest.mark.parametrize("sigma", [0.1, 0.7, 2.0])
def test_blur_is_gaussian(sigma):
    image = _smooth()
    x = _float(image)
    got = np.asarray(ops.gaussian_blur(x, sigma))
    exact = functools.partial(ndimage.gaussian_filter, x.astype(float), mode="nearest", axes=(0, 1))
    np.testing.assert_allclose(got, exact(sigma, radius=8), atol=1e-6)
    np.testing.assert_allclose(got, exact(sigma, radius=30), atol=3e-5)  # what the cut costs
    # Pillow runs box filters three times and repeats the border before each: up to 2.1 levels off
    # inside, 19 at the border, 1.3 on average.
    error = np.abs(got * 255 - Image.fromarray(image).filter(ImageFilter.GaussianBlur(sigma)))
    assert error[6:-6, 6:-6].max() < 3 and error.mean() < 2


def test_blur_by_nothing_changes_nothing():
    x = _float(_noise())
    np.testing.assert_array_equal(ops.gaussian_blur(x, 0.0), x)


_crop = jax.jit(ops.resized_crop, static_argnums=2)


@pytest.mark.parametrize("size", [13, 31])
@pytest.mark.parametrize("box", [(0, 0, 24, 28), (3, 5, 20, 13), (10, 9, 5, 19), (7, 2, 1, 2)])
def test_crop_and_resize_are_those_of_pillow(box, size):
    top, left, height, width = box
    x = 0.3 + 0.4 * _float(_noise())  # such that nothing overshoots and is clipped
    edges = (left, top, left + width, top + height)
    want = [
        Image.fromarray(x[..., c]).crop(edges).resize((size, size), Image.Resampling.BICUBIC)
        for c in range(3)
    ]
    want = np.stack([np.asarray(channel) for channel in want], axis=-1)
    assert 0.1 < want.min() and want.max() < 0.9
    np.testing.assert_allclose(_crop(x, jnp.array(box), size), want, atol=3e-6)


@pytest.mark.parametrize("box", [(0, 0, 24, 24), (3, 5, 20, 13), (10, 10, 7, 9)])
def test_crop_clips_as_pillow_does_on_the_way(box):
    top, left, height, width = box
    image = _noise()
    edges = (left, top, left + width, top + height)
    want = Image.fromarray(image).crop(edges).resize((31, 31), Image.Resampling.BICUBIC)
    _assert_near(_crop(_float(image), jnp.array(box), 31), want, 1.25)  # rounds after both passes


@pytest.mark.parametrize(
    "extent, share, edges",
    [
        ((24, 28), 1.0, (2, 0, 26, 24)),
        ((24, 28), 0.875, (3, 1, 24, 22)),
        ((20, 9), 1.0, (0, 5, 9, 14)),
    ],
)
def test_the_centre_is_what_pillow_cuts_out(extent, share, edges):
    x = 0.3 + 0.4 * _float(_noise())
    canvas = np.ones((24, 28, 3), np.float32)  # what is not image would show
    canvas[: extent[0], : extent[1]] = x[: extent[0], : extent[1]]
    got = ops.center_crops(canvas[None], jnp.array([extent]), (12, 12), share=share)[0]
    for c in range(3):
        image = Image.fromarray(canvas[..., c]).crop(edges)
        want = image.resize((12, 12), Image.Resampling.BICUBIC)
        np.testing.assert_allclose(got[..., c], want, atol=3e-6)


# The boxes.


def _torchvision_box(rng, height, width, scale, ratio):
    for _ in range(10):
        area = height * width * rng.uniform(*scale)
        aspect = math.exp(rng.uniform(math.log(ratio[0]), math.log(ratio[1])))
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            return rng.integers(0, height - h + 1), rng.integers(0, width - w + 1), h, w
    w, h = width, height
    if width / height < ratio[0]:
        h = round(width / ratio[0])
    elif width / height > ratio[1]:
        w = round(height * ratio[1])
    return (height - h) // 2, (width - w) // 2, h, w


@functools.partial(jax.jit, static_argnums=(1, 2))
def _boxes(extent, scale, ratio):
    keys = jax.random.split(jax.random.key(0), 4000)
    return jax.vmap(lambda key: ops.crop_box(key, extent, scale, ratio))(keys)


@pytest.mark.parametrize("extent", [(60, 80), (90, 31), (12, 300)])
@pytest.mark.parametrize("scale", [(0.4, 1.0), (0.05, 0.4)])
def test_boxes_are_drawn_as_torchvision_draws_them(extent, scale):
    height, width = extent
    ratio = (3 / 4, 4 / 3)
    ours = np.asarray(_boxes(jnp.array(extent), scale, ratio))
    rng = np.random.default_rng(0)
    theirs = np.array([_torchvision_box(rng, *extent, scale, ratio) for _ in range(4000)])
    for top, left, h, w in (ours.T, theirs.T):
        assert (h > 0).all() and (w > 0).all() and (top >= 0).all() and (left >= 0).all()
        assert (top + h <= height).all() and (left + w <= width).all()
    for describe in (
        lambda top, left, h, w: h * w,
        lambda top, left, h, w: w / h,
        lambda top, left, h, w: top,
        lambda top, left, h, w: left,
        lambda top, left, h, w: top + h / 2,
    ):
        a, b = describe(*ours.T), describe(*theirs.T)
        # 0.0517 is the distance exceeded by chance once in 20,000 draws of 4000 and 4000.
        assert stats.ks_2samp(a, b, method="asymp").statistic < 0.0517


@pytest.mark.parametrize(
    "extent, scale, ratio, want",
    [
        ((20, 200), (0.4, 1.0), (3 / 4, 4 / 3), (0, 86, 20, 27)),
        ((200, 20), (0.4, 1.0), (3 / 4, 4 / 3), (86, 0, 27, 20)),
        ((100, 100), (1.0, 1.0), (0.8, 1.25), (0, 0, 100, 100)),
        ((1, 1), (0.05, 0.4), (3 / 4, 4 / 3), (0, 0, 1, 1)),
    ],
    ids=["wide", "tall", "within", "pixel"],
)
def test_central_box_where_no_draw_fits(extent, scale, ratio, want):
    boxes = np.asarray(_boxes(jnp.array(extent), scale, ratio))
    np.testing.assert_array_equal(boxes, np.broadcast_to(want, boxes.shape))


# The order of the jitter.


def test_jitter_reaches_all_orders_alike():
    """Every result must be that of one of the 24 orders, each as often as chance has it."""
    draws = 960
    # Large changes of a glaring image: without clipping many orders give the same.
    view = View(8, (1.0, 1.0), brightness=0.9, contrast=0.9, saturation=0.9, hue=0.4)
    x = _float(_noise(8, 8, seed=2))
    numbers = np.full((draws, 6), 0.9, np.float32)  # order and place are drawn, the rest is given
    numbers[:, :2] = np.random.default_rng(0).random((draws, 2))
    jitter = jax.jit(jax.vmap(lambda n: ops._jitter(jnp.swapaxes(x, 1, 2), n, view)))
    got = np.swapaxes(jitter(numbers), 2, 3)

    factor, shift = 0.1 + 0.9 * 1.8, -0.4 + 0.9 * 0.8

    def blend(x, target):
        return np.clip(factor * x + (1 - factor) * target, 0, 1)

    gray = np.array([0.299, 0.587, 0.114])
    operations = (
        lambda x: blend(x, 0.0),
        lambda x: blend(x, (x @ gray).mean()),
        lambda x: blend(x, (x @ gray)[..., None]),
        lambda x: _shift_hue(x, shift),
    )
    orders = itertools.permutations(operations)
    want = np.stack([functools.reduce(lambda x, change: change(x), o, x) for o in orders])
    distance = np.abs(got[:, None] - want).max((2, 3, 4))
    assert (np.sort(np.abs(want[:, None] - want).max((2, 3, 4)))[:, 1] > 0.01).all()
    assert (distance.min(1) < 1e-5).all()
    counts = np.bincount(distance.argmin(1), minlength=24)
    assert stats.chisquare(counts).pvalue > 1e-4


# The whole draw.

VIEWS = (
    View(9, (0.05, 0.4), blur=0.5),
    View(20, (0.4, 1.0), blur=1.0, solarize=0.2),
    View(9, (0.05, 0.4), blur=0.5),
)
_draw_all = jax.jit(functools.partial(draw_views, views=VIEWS))


def _batch(n=6, side=32):
    images = np.stack([_noise(side, side, seed) for seed in range(n)])
    extents = np.stack([np.linspace(12, side, n), np.linspace(side, 9, n)], axis=1).astype(np.int32)
    return jax.random.split(jax.random.key(7), n), images, extents


def test_a_crop_depends_on_its_example_alone():
    keys, images, extents = _batch()
    whole = _draw_all(keys, images, extents)
    draw_alone = jax.jit(functools.partial(draw_view, view=VIEWS[0]))
    assert [crop.shape for crop in whole] == [(6, v.size, v.size, 3) for v in VIEWS]
    assert all(crop.dtype == jnp.float32 for crop in whole)
    order = np.array([4, 1, 0, 5, 3, 2])
    for one, other in zip(
        _draw_all(keys[order], images[order], extents[order]), whole, strict=True
    ):
        np.testing.assert_allclose(one, other[order], atol=1e-5)
    for place in (0, 2):  # equal views, different draws
        key = jax.random.fold_in(keys[3], place)
        alone = draw_alone(key, _float(images[3]), extents[3])
        np.testing.assert_allclose(whole[place][3], alone, atol=1e-5)
    assert np.abs(whole[0] - whole[2]).max() > 0.1


def test_what_is_not_image_is_never_seen():
    keys, images, extents = _batch()
    rows, columns = np.arange(32)[:, None], np.arange(32)
    h, w = extents[:, 0, None, None], extents[:, 1, None, None]
    beyond = (rows >= h) | (columns >= w)
    assert beyond.any()
    drawn = []
    for loud in (0, 255):
        canvas = np.where(beyond[..., None], np.uint8(loud), images)
        drawn.append(_draw_all(keys, canvas, extents))
    for dark, bright in zip(*drawn, strict=True):
        np.testing.assert_array_equal(dark, bright)


def test_values_stay_in_range():
    for crops in _draw_all(*_batch()):
        assert crops.min() >= 0 and crops.max() <= 1


def _draw_noise(*changes, n=1):
    """Crops [n, 16, 16, 3] per dict of options, and the square image they are all of, resized."""
    image = _noise(24, 24)
    keys = jax.random.split(jax.random.key(0), n)
    draw = functools.partial(draw_views, views=[View(16, **(WHOLE | c)) for c in changes])
    crops = jax.jit(draw)(keys, jnp.tile(image, (n, 1, 1, 1)), jnp.full((n, 2), 24))
    plain = ops.resized_crop(_float(image), jnp.array([0, 0, 24, 24]), 16)
    return [np.asarray(x) for x in (*crops, plain)]


def test_certain_outcomes():
    still = {"brightness": 0.0, "contrast": 0.0, "saturation": 0.0, "hue": 0.0}
    expected = (
        ({}, lambda x: x),
        ({"flip": 1.0}, lambda x: x[:, ::-1]),
        ({"gray": 1.0}, ops.to_gray),
        ({"blur": 1.0, "blur_sigma": (1.5, 1.5)}, lambda x: ops.gaussian_blur(x, 1.5)),
        ({"solarize": 1.0}, ops.solarize),
        ({"jitter": 1.0, **still}, lambda x: x),
    )
    *drawn, plain = _draw_noise(*(change for change, _ in expected))
    for crops, (_, apply) in zip(drawn, expected, strict=True):
        np.testing.assert_allclose(crops[0], apply(plain), atol=1e-5)


def test_flip_and_gray_happen_as_often_as_they_should():
    crops, plain = _draw_noise({"flip": 0.5, "gray": 0.2}, n=400)
    gray = np.ptp(crops, axis=-1).max((1, 2)) < 1e-5
    mirrored = ops.to_gray(plain)[:, ::-1]
    flipped = np.abs(jax.vmap(ops.to_gray)(crops) - mirrored).max((1, 2, 3)) < 1e-4
    for happened, probability in ((flipped, 0.5), (gray, 0.2)):
        assert stats.binomtest(int(happened.sum()), 400, probability).pvalue > 1e-4
    table = [[(gray & flipped).sum(), (gray & ~flipped).sum()]]
    table += [[(~gray & flipped).sum(), (~gray & ~flipped).sum()]]
    assert stats.fisher_exact(table).pvalue > 1e-4


def test_only_hue_jitter_leaves_value_and_chroma():
    only = {"jitter": 1.0, "brightness": 0.0, "contrast": 0.0, "saturation": 0.0, "hue": 0.5}
    crops, plain = _draw_noise(only, n=8)
    np.testing.assert_allclose(
        crops.max(-1), np.broadcast_to(plain.max(-1), (8, 16, 16)), atol=1e-5
    )
    np.testing.assert_allclose(np.ptp(crops, -1)[0], np.ptp(plain, -1), atol=1e-5)
    assert np.abs(crops - plain).max() > 0.1


def test_what_cannot_happen_is_not_computed():
    def program(**options):
        view = View(16, **(WHOLE | options))
        draw = functools.partial(draw_view, view=view)
        return str(jax.make_jaxpr(draw)(jax.random.key(0), _noise(24, 24), jnp.array([24, 24])))

    assert program().count("dot_general") == 2
    assert program(blur=0.5).count("dot_general") == 4
    assert "reduce_max" not in program(jitter=0.8, hue=0.0)
    assert "reduce_max" in program(jitter=0.8)


@pytest.mark.parametrize(
    "bad",
    [
        {"size": 0},
        {"size": 9.5},
        {"scale": (0.0, 1.0)},
        {"scale": (0.5, 1.5)},
        {"ratio": (2.0, 1.0)},
        {"ratio": (1.0, math.inf)},
        {"blur": 1.5},
        {"flip": -0.1},
        {"contrast": -0.1},
        {"hue": 0.6},
        {"blur_sigma": (0.0, 1.0)},
    ],
    ids=lambda bad: next(iter(bad)),
)
def test_a_view_out_of_range_is_refused(bad):
    with pytest.raises(ValueError, match=f"^{next(iter(bad))} of a view is"):
        View(**({"size": 9, "scale": (0.1, 1.0)} | bad))


@pytest.mark.parametrize(
    "image, message",
    [
        (np.zeros((9, 9, 3), np.int32), "int32: allowed are uint8 and floating point"),
        (np.zeros((9, 9, 4), np.uint8), r"\(9, 9, 4\): allowed is \[H, W, 3\]"),
    ],
)
def test_other_images_are_refused(image, message):
    with pytest.raises(ValueError, match=message):
        draw_view(jax.random.key(0), image, jnp.array([9, 9]), VIEWS[0])
