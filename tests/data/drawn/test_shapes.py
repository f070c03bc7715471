import hashlib
import math
import pickle
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from jaxseg.data import DataError
from jaxseg.data.drawn import draw, forms, shapes
from jaxseg.data.drawn.shapes import Shapes

HERE = Path(__file__).resolve().parent


def _digest(source, indices):
    parts = (source[i][key].tobytes() for i in indices for key in ("image", "mask"))
    return hashlib.sha256(b"".join(parts)).hexdigest()


def _stack(split, n):
    examples = [Shapes(part=split)[i] for i in range(n)]
    images = np.stack([e["image"] for e in examples])
    return images, np.stack([e["mask"] for e in examples]).astype(bool)


@pytest.fixture(scope="module")
def train():
    return _stack("train", 200)


@pytest.fixture(scope="module")
def test():
    return _stack("test", 50)


def _iou(guess, mask):
    return np.count_nonzero(guess & mask) / np.count_nonzero(guess | mask)


def _bayes_iou(code, mask, test_code, test_mask):
    """Learn P(fish | code), threshold it where training IoU is best, score on the test part."""
    bins = int(max(code.max(), test_code.max())) + 1
    fish = np.bincount(code.ravel(), mask.ravel(), bins)
    chance = fish / (np.bincount(code.ravel(), minlength=bins) + 1.0)
    score, test_score = chance[code], chance[test_code]
    best = max(np.linspace(0.02, 0.8, 40), key=lambda t: _iou(score > t, mask))
    return _iou(test_score > best, test_mask)


# The interface


def test_an_example():
    source = Shapes(part="val")
    example = source[3]
    assert source.categories == ("fish",) and len(source) == 200
    assert example["image"].shape == (128, 128, 3) and example["image"].dtype == np.uint8
    assert example["mask"].shape == (128, 128) and example["mask"].dtype == np.uint8
    assert example["category"] == 0 and example["name"] == "val-00003"
    assert len({source[i]["name"] for i in range(20)}) == 20


def test_lengths_and_ends():
    assert [len(Shapes(part=s)) for s in ("train", "val", "test")] == [2000, 200, 300]
    source = Shapes(part="train", length=3, categories=("fish",))
    assert len(list(source)) == 3
    np.testing.assert_array_equal(source[-1]["image"], source[2]["image"])
    with pytest.raises(IndexError, match="example 3 of 3"):
        source[3]


def test_the_other_splits_of_a_source():
    source = Shapes(size=(48, 32), length=3, seed=4)
    other = source.split("val")
    assert len(other) == 200 and len(other.split("train")) == 3
    np.testing.assert_array_equal(
        other[1]["image"], Shapes("", "val", (48, 32), seed=4)[1]["image"]
    )


def test_sizes_need_no_drawing(monkeypatch):
    monkeypatch.setattr(Shapes, "_draw", lambda *_: pytest.fail("drawn"))
    assert Shapes(part="val").sizes() == [(128, 128)] * 200
    assert Shapes(size=(64, 48), length=2).sizes() == [(64, 48)] * 2


@pytest.mark.parametrize("size", [(64, 64), (128, 224), (96, 50), (160, 112)])
def test_any_size(size):
    example = Shapes(part="train", size=size)[1]
    assert example["image"].shape == (*size, 3) and example["mask"].shape == size


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(part="tset"), "unknown split 'tset' of shapes; allowed: train, val, test"),
        (
            dict(part="val", categories=("fish", "dog")),
            "unknown category 'dog' of shapes; allowed: fish",
        ),
        (dict(part="val", size=(16, 128)), r"size of shapes is \(16, 128\); allowed"),
        (dict(part="val", length=-1), "length -1, seed 0 of shapes; allowed"),
        (
            dict(root="photos"),
            "data.root is 'photos', but these data draw their own images .shapes.",
        ),
        (dict(part="val", seed=-5), "length 200, seed -5 of shapes; allowed"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(DataError, match=message):
        Shapes(**arguments)


# What is drawn follows from (seed, split, index) alone


def test_same_in_any_order_twice_and_pickled():
    first, second = Shapes(part="test"), Shapes(part="test")
    backwards = {i: second[i] for i in (4, 2, 0)}
    copy = pickle.loads(pickle.dumps(second))
    for i, example in backwards.items():
        for other in (first[i], second[i], copy[i]):
            np.testing.assert_array_equal(example["image"], other["image"])
            np.testing.assert_array_equal(example["mask"], other["mask"])


def test_a_caller_may_write_into_an_example():
    source = Shapes(part="val")
    clean = source[0]["image"].copy()
    source[0]["image"][:] = 0
    np.testing.assert_array_equal(source[0]["image"], clean)


def test_threads_agree():
    source = Shapes(part="val")
    with ThreadPoolExecutor(4) as pool:
        drawn = list(pool.map(lambda i: source[i % 8]["image"], range(32)))
    for i, image in enumerate(drawn):
        np.testing.assert_array_equal(image, Shapes(part="val")[i % 8]["image"])


def test_memory_is_bounded(monkeypatch):
    monkeypatch.setattr(shapes, "MEMORY", 4 * 128 * 128 * 3)
    source = Shapes(part="val")
    for i in range(6):
        source[i]
    assert len(source._kept) == 3


def test_another_process_draws_the_same():
    code = (
        f"import sys; sys.path[:0] = {[str(HERE), str(HERE.parents[1])]!r};"
        "from test_shapes import Shapes, _digest; print(_digest(Shapes(part='train'), (0, 7, 1999)))"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == _digest(Shapes(part="train"), (0, 7, 1999))


def test_random_numbers_are_pinned():
    dice = forms.Dice(0, 1, 2)
    bits = np.random.PCG64(np.random.SeedSequence((0, 1, 2))).random_raw(512)
    assert dice.uniform() == (int(bits[-1]) >> 11) / 2**53
    assert forms.Dice(7).many(1)[0] == pytest.approx(0.6250954, abs=1e-7)


def test_splits_and_seeds_differ():
    sources = [Shapes(part=s, seed=k) for s in ("train", "val", "test") for k in (0, 1)]
    digests = {_digest(source, [i]) for source in sources for i in range(5)}
    assert len(digests) == 30


# The masks


def _recorded(monkeypatch, key, size):
    """Draw a scene; also return what was painted, from back to front: (shape, pose, fish?)."""
    items, fish_shapes = [], set()
    paint, fish = draw.Canvas.paint, forms.fish

    def recording_paint(canvas, dice, shape, skin, pose, number, keep):
        pixels = paint(canvas, dice, shape, skin, pose, number, keep)
        if pixels:
            items.append((shape, pose, id(shape) in fish_shapes))
        return pixels

    def recording_fish(dice):
        shape = fish(dice)
        fish_shapes.add(id(shape))
        items_alive.append(shape)
        return shape

    items_alive = []  # so that no id is used twice
    monkeypatch.setattr(draw.Canvas, "paint", recording_paint)
    monkeypatch.setattr(forms, "fish", recording_fish)
    _, kinds = shapes.draw_scene(forms.Dice(*key), size)
    monkeypatch.undo()
    return kinds == 1 + shapes.KINDS.index("fish"), items


def _inside(shape, pose, px, py):
    """Whether the point (in units) is in the item, in double precision, one point at a time."""
    z = complex(px - pose.centre[0], py - pose.centre[1]) / pose.scale
    z *= complex(math.cos(pose.angle), -math.sin(pose.angle))
    y = (-z.imag if pose.flip else z.imag) + pose.bend * (z.real**2 - 0.3)
    parts = shape.distance(np.array([[z.real]]), np.array([[y]]))
    return min(part.item() for part in parts if part is not None)


@pytest.mark.parametrize("key", [(0, 0, 1), (0, 2, 5), (3, 1, 8)])
def test_mask_is_the_frontmost_item_at_each_pixel(monkeypatch, key):
    size = (96, 160)
    mask, items = _recorded(monkeypatch, key, size)
    unit = min(size) / 128
    rng = np.random.default_rng(0)
    for row, column in zip(rng.integers(0, 96, 300), rng.integers(0, 160, 300), strict=True):
        expected, close = 0, False
        for shape, pose, is_fish in reversed(items):
            distance = _inside(shape, pose, (column + 0.5) / unit, (row + 0.5) / unit)
            close |= abs(distance) < 1e-4
            if distance <= 0:
                expected = int(is_fish)
                break
        assert close or mask[row, column] == expected


def test_masks_do_not_depend_on_resolution():
    scores = [
        _iou(
            Shapes(part="val", size=(256, 256))[i]["mask"][::2, ::2] > 0,
            Shapes(part="val")[i]["mask"] > 0,
        )
        for i in range(12)
        if Shapes(part="val")[i]["mask"].any()
    ]
    assert np.median(scores) > 0.95


def test_masks_are_binary_and_fish_are_of_useful_size(train):
    _, masks = train
    assert set(np.unique(Shapes(part="train")[0]["mask"])) == {0, 1}
    area = masks.mean((1, 2))
    assert 0.02 < np.mean(area == 0) < 0.16
    assert 0.05 < np.percentile(area[area > 0], 5) and np.percentile(area, 95) < 0.25


@pytest.mark.parametrize("form", [*dict.fromkeys(forms.DISTRACTORS), forms.fish])
def test_no_form_exceeds_its_reach(form):
    angle = np.linspace(0, 2 * np.pi, 721)
    for seed in range(40):
        shape = form(forms.Dice(seed))
        for bend in (-0.2, 0.0, 0.2):
            for radius in (shape.reach, shape.reach + 0.3):
                x, y = radius * np.cos(angle), radius * np.sin(angle)
                parts = shape.distance(x[None], (y + bend * (x * x - 0.3))[None])
                assert min(part.min() for part in parts if part is not None) > 0


# How hard it is


def _colours(images):
    return (images // 16).astype(np.int64) @ np.array([256, 16, 1])


def _local_contrast(images):
    """Mean and spread of the grey value over 8x8 blocks, quantised to 16 x 16 bins."""
    grey = images.mean(-1)
    blocks = grey.reshape(len(grey), 16, 8, 16, 8)
    mean = blocks.mean((2, 4)).astype(np.int64) // 16
    spread = np.minimum(blocks.std((2, 4)) / 4, 15).astype(np.int64)
    return (mean * 16 + spread).repeat(8, 1).repeat(8, 2)


@pytest.mark.parametrize("code", [_colours, _local_contrast])
def test_fish_cannot_be_told_by_colour_or_texture(train, test, code):
    assert _bayes_iou(code(train[0]), train[1], code(test[0]), test[1]) < 0.35


def test_fish_cannot_be_told_by_position(train, test):
    place = np.arange(128) // 8
    code = np.broadcast_to(place[:, None] * 16 + place, train[1].shape)
    assert _bayes_iou(code, train[1], code[:50], test[1]) < 0.35


def test_detail_is_below_a_patch(train):
    masks = train[1]
    share = masks.reshape(len(masks), 8, 16, 8, 16).mean((2, 4))
    for threshold in (0.0, 0.5):
        coarse = (share > threshold).repeat(16, 1).repeat(16, 2)
        assert _iou(coarse, masks) < 0.75


def test_drawing_is_fast():
    source = Shapes(part="test", seed=9)
    source[0]
    times = []
    for i in range(1, 21):
        start = time.process_time()
        source[i]
        times.append(time.process_time() - start)
    assert np.median(times) < 0.05


def test_scenes_are_the_same_images_with_every_kind():
    for index in range(5):
        fish = shapes.Shapes(part="val")[index]
        scene = shapes.Scenes(part="val")[index]
        np.testing.assert_array_equal(scene["image"], fish["image"])
        number = shapes.Scenes.names.index("fish")
        np.testing.assert_array_equal(scene["mask"] == number, fish["mask"] == 1)
        # Something else is there as well, and no value has no name.
        others = set(np.unique(scene["mask"])) - {0, number}
        assert others and max(others) < len(shapes.Scenes.names)


def test_every_kind_occurs_in_scenes():
    source = shapes.Scenes(part="val", size=(64, 64))
    found = set().union(*(np.unique(source[i]["mask"]) for i in range(60)))
    assert found == set(range(len(source.names)))


def test_a_shoal_is_of_one_kind_and_all_kinds_are_equally_frequent(monkeypatch):
    drawn = []

    def recorded(name, form):
        def draw(dice):
            drawn.append(name)
            return form(dice)

        return draw

    for kind in shapes.KINDS:
        monkeypatch.setattr(forms, kind, recorded(kind, getattr(forms, kind)))
    source = shapes.Kinds(length=2 * len(shapes.KINDS))
    counts = np.zeros(len(shapes.KINDS), int)
    for i in range(len(source)):
        drawn.clear()
        example = source[i]
        kind = shapes.KINDS[example["category"]]
        counts[example["category"]] += 1
        assert set(drawn) == {kind} and len(drawn) >= 5
        assert example["name"].startswith(f"{kind}/")
        assert 0.05 < example["mask"].mean() < 0.98
    assert (counts == 2).all()
