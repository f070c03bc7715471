"""One table says what geometry does to a field: boxes and instances go the four ways that images go."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxseg.data import DataError, eval_batches, example_of, fit
from jaxseg.data.cache import PreparedSource
from jaxseg.ops.crops import View, draw_fields, draw_view
from jaxseg.ops.geometry import move_boxes
from jaxseg.ops.mask_augment import Augmentation

OBJECTS = 5


def boxes_of(instances):
    """float32 [OBJECTS, 4]: the box of each instance by its pixels, 0 where there are none."""
    boxes = np.zeros((OBJECTS, 4), np.float32)
    for i in range(OBJECTS):
        rows, columns = np.nonzero(np.asarray(instances) == i + 1)
        if len(rows):
            boxes[i] = columns.min(), rows.min(), columns.max() + 1, rows.max() + 1
    return boxes


def make(height=90, width=130, seed=0):
    """Rectangles (of which what is seen has the clipped box); the last row of boxes is padding."""
    rng = np.random.default_rng(seed)
    instances = np.zeros((height, width), np.int32)
    cell = width // (OBJECTS - 1)
    for i in range(OBJECTS - 1):
        top, bottom = rng.integers(2, height // 2 - 8), rng.integers(height // 2 + 8, height - 2)
        left, right = rng.integers(1, cell // 2 - 4), rng.integers(cell // 2 + 4, cell - 1)
        instances[top:bottom, i * cell + left : i * cell + right] = i + 1
    image = rng.integers(0, 256, (height, width, 3), np.uint8)
    image[..., 0] = 40 * instances
    return {
        "image": image,
        "mask": (instances > 0).astype(np.uint8),
        "instances": instances,
        "boxes": boxes_of(instances),
        "category": 0,
        "name": "a",
    }


def assert_together(found):
    """The boxes are those of the instances to within a pixel, and the instances lie in the mask."""
    instances, boxes = np.asarray(found["instances"]), np.asarray(found["boxes"])
    assert instances.dtype == np.int32 and boxes.dtype == np.float32
    expected = boxes_of(instances)
    thin = np.minimum(boxes[:, 2] - boxes[:, 0], boxes[:, 3] - boxes[:, 1]) < 1
    seen = expected.any(1)
    assert seen.any() and thin[~seen].all() and not boxes[-1].any()
    assert np.abs(boxes - expected)[seen].max() <= 1
    np.testing.assert_array_equal(instances > 0, np.asarray(found["mask"]) == 1)


@pytest.mark.parametrize("size", [(80, 128), (48, 64), (160, 96), (300, 400)])
def test_fit(size):
    """By crop, shrunk and enlarged."""
    found = fit(make(), size)
    assert_together(found)
    assert found["instances"].shape == size
    outside = np.ones(size, bool)
    outside[: found["extent"][0], : found["extent"][1]] = False
    assert not found["instances"][outside].any() and (found["mask"][outside] == 255).all()


def test_cached_flip():
    prepared = PreparedSource([make()], (48, 64), multiple=16, memory=0)
    found, mirrored = prepared.read(0), prepared.read(0, flipped=True)
    assert_together(mirrored)
    for field in ("image", "mask", "instances"):
        np.testing.assert_array_equal(mirrored[field], found[field][:, ::-1])
    expected = found["boxes"][:-1, [2, 1, 0, 3]] * [-1, 1, -1, 1] + [64, 0, 64, 0]
    np.testing.assert_allclose(mirrored["boxes"][:-1], expected, rtol=1e-6)
    assert mirrored["name"] == "a" and (mirrored["extent"] == found["extent"]).all()


def batch_of(n):
    examples = [fit(make(seed=i), (80, 128)) for i in range(n)]
    fields = ("image", "mask", "instances", "boxes", "extent")
    batch = {k: jnp.stack([example[k] for example in examples]) for k in fields}
    return batch | {"image": batch["image"].astype(jnp.float32) / 255}


@pytest.mark.parametrize("scale", [(1.0, 1.0), (1.0, 2.5), (0.4, 1.0)])
def test_affine_warp_on_the_device(scale):
    batch, change = batch_of(8), Augmentation(flip=0.5, scale=scale, brightness=0.3)
    found = jax.jit(change.examples)(jax.random.key(1), batch)
    for i in range(8):
        assert_together({k: v[i] for k, v in found.items()})
    np.testing.assert_array_equal(found["extent"], batch["extent"])
    image, mask = change(jax.random.key(1), batch["image"], batch["mask"])
    np.testing.assert_array_equal(mask, found["mask"])
    # Another program, so that the coordinates may differ in their last digit.
    np.testing.assert_allclose(image, found["image"], atol=1e-3)


@pytest.mark.parametrize("scale", [(0.3, 0.6), (0.8, 1.0)])
def test_crops(scale):
    batch, view = batch_of(8), View(48, scale, jitter=0.0, gray=0.0)
    keys = jax.random.split(jax.random.key(2), 8)
    draw = jax.jit(jax.vmap(lambda key, fields: draw_fields(key, fields, fields["extent"], view)))
    found = draw(keys, batch)
    assert found["instances"].shape == (8, 48, 48)
    for i in range(8):
        assert_together({k: v[i] for k, v in found.items()})
        image = draw_view(keys[i], batch["image"][i], batch["extent"][i], view)
        np.testing.assert_allclose(found["image"][i], image, atol=1e-5)
    # The red channel says which instance a pixel is of, but for its border.
    numbers = np.asarray(found["image"][..., 0]) * 255 / 40
    assert np.mean(np.abs(numbers - found["instances"]) < 0.5) > 0.9


def test_batches_are_padded_by_the_table():
    (batch,) = eval_batches([make(), make(seed=1)], batch=3, size=(80, 128))
    assert batch["boxes"].dtype == np.float32 and batch["boxes"].shape == (3, OBJECTS, 4)
    assert batch["instances"].dtype == np.int32 and batch["boxes"][0].any()
    assert not batch["boxes"][2].any() and not batch["instances"][2].any()
    assert (batch["mask"][2] == 255).all()


def test_examples_of_one_batch_have_the_same_fields():
    short = make() | {"boxes": np.zeros((2, 4), np.float32), "name": "b"}
    with pytest.raises(
        DataError,
        match=r"boxes of example b is of shape \(2, 4\), and of shape \(5, 4\) in example a: .*rows of 0",
    ):
        list(eval_batches([make(), short], batch=2, size=(80, 128)))
    bare = {"image": make()["image"], "name": "b"}
    with pytest.raises(DataError, match="mask of example b is missing, and of shape"):
        list(eval_batches([make(), bare], batch=2, size=(80, 128)))


@pytest.mark.parametrize(
    "changes, message",
    [
        (
            {"instances": np.zeros((90, 130), np.float32)},
            "its instances is float32 .*0 to 16777215",
        ),
        ({"instances": np.full((90, 130), 2**24)}, "with values 16777216 to 16777216; allowed"),
        (
            {"boxes": np.zeros((3, 5))},
            r"its boxes is float64 of shape \(3, 5\); allowed .* \[N, 4\]",
        ),
        ({"boxes": np.full((3, 4), np.nan)}, "allowed are finite numbers"),
    ],
)
def test_instances_and_boxes_are_checked(changes, message):
    with pytest.raises(DataError, match=message):
        example_of([make() | changes], 0)


def test_they_become_the_dtypes_of_the_table():
    whole = make()
    given = {"instances": whole["instances"].astype(np.uint16), "boxes": whole["boxes"].tolist()}
    found = example_of([whole | given], 0)
    assert found["instances"].dtype == np.int32 and found["boxes"].dtype == np.float32


def test_boxes_that_are_not_seen_become_padding():
    boxes = np.array([[2, 3, 6, 9], [20, 0, 30, 9], [0, 0, 0, 0], [4, 4, 4, 8]], np.float32)
    for xp in (np, jnp):
        found = move_boxes(xp.asarray(boxes), (2.0, -1.0), (1.0, 8.0), (12, 10), xp)
        np.testing.assert_array_equal(found, [[2, 7, 6, 12], *np.zeros((3, 4))])
