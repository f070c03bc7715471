import logging
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from jaxseg.data import (
    FORMATS,
    BinaryMasks,
    DataError,
    Reader,
    Reading,
    Scenes,
    Shapes,
    Some,
    as_splits,
    categories_of,
    check_function,
    example_of,
    fit,
    names_of,
    placement,
    sizes_of,
    working_size,
)
from jaxseg.options import options


class Sized:
    categories = ("object",)

    def __init__(self, *sizes):
        self._sizes = sizes

    def __len__(self):
        return len(self._sizes)

    def __getitem__(self, index):
        return example(*self._sizes[index])

    def sizes(self):
        return list(self._sizes)


def example(height, width):
    """A gradient whose left half is foreground."""
    image = np.zeros((height, width, 3), np.uint8)
    image[..., 0] = np.linspace(0, 255, width)
    image[..., 1] = np.linspace(0, 255, height)[:, None]
    mask = np.zeros((height, width), np.uint8)
    mask[:, : width // 2] = 1
    return {"image": image, "mask": mask, "category": 0, "name": "a"}


def test_one_native_size_is_cropped_at_the_top_left():
    source = Sized((480, 854), (480, 854))
    assert working_size(source, (0, 0)) == (480, 848)
    whole, fitted = source[0], fit(source[0], (480, 848))
    np.testing.assert_array_equal(fitted["image"], whole["image"][:480, :848])
    np.testing.assert_array_equal(fitted["mask"], whole["mask"][:480, :848])
    assert fitted["name"] == "a" and fitted["category"] == 0
    assert working_size(source, (0, 0), 14) == (476, 854)
    assert working_size(source, (0, 0), 112) == (448, 784)
    np.testing.assert_array_equal(
        fit(source[0], (448, 784), multiple=112)["image"], whole["image"][:448, :784]
    )


class Bare:
    """What a user may have at least: images of three sizes, and masks; nothing is named."""

    shapes = ((70, 50), (40, 60), (64, 64))

    def __init__(self, **changes):
        self.changes = changes

    def __len__(self):
        return len(self.shapes)

    def __getitem__(self, index):
        if not 0 <= index < len(self):
            raise IndexError(index)
        whole = example(*self.shapes[index])
        return {"image": whole["image"], "mask": whole["mask"] > 0, **self.changes}


def test_a_source_without_any_optional_attribute():
    source = Bare()
    assert names_of(source) is None and categories_of(source) == ("object",)
    assert sizes_of(source) == sizes_of(Some(source, 3)) == list(Bare.shapes)
    assert sizes_of(Some(source, 2)) == [(70, 50), (64, 64)]
    assert working_size(source, (0, 0)) == (80, 64)
    found = example_of(source, np.int64(2))
    assert found["category"] == 0 and found["name"] == "2" and found["mask"].dtype == np.uint8
    assert example_of(Some(source, 2), 1)["name"] == "2"
    reader = Reader(source, (80, 64), reading=Reading(), batch=2, multiple=16)
    batches = list(reader.eval_batches())
    assert [b["image"].shape for b in batches] == [(2, 80, 64, 3)] * 2
    assert batches[0]["extent"].tolist() == [[80, 57], [43, 64]]
    assert set(np.unique(batches[0]["mask"])) == {0, 1, 255}
    assert batches[1]["category"].tolist() == [0, 0]
    check_function(source)


def test_sizes_that_are_not_of_all_examples():
    class Short(Sized):
        def sizes(self):
            return [(8, 8)]

    with pytest.raises(DataError, match=r"sizes\(\) gives 1 sizes of 2 examples"):
        working_size(Short((8, 8), (9, 9)), (0, 0))


@pytest.mark.parametrize(
    "changes, message",
    [
        (
            {"image": np.zeros((4, 4, 3), np.float32)},
            "example 1: its image is float32 of shape .4, 4",
        ),
        (
            {"image": np.zeros((4, 4), np.uint8)},
            r"is uint8 of shape .4, 4.; allowed is uint8 \[H, W, 3",
        ),
        ({"image": np.zeros((4, 4, 4), np.uint8)}, "of shape .4, 4, 4.; allowed"),
        ({"name": "cat"}, None),
        (
            {"name": "cat", "mask": np.zeros((3, 3), np.uint8)},
            r"example 1 \(cat\): its mask is uint8 of shape \(3, 3\); allowed .*0 to 255.*\(40, 60\)",
        ),
        (
            {"mask": np.full((40, 60), 256)},
            "mask is int64 of shape .* with values 256 to 256; allowed",
        ),
        ({"mask": np.full((40, 60), -1, np.int8)}, "mask is int8 of shape .* with values -1 to -1"),
        ({"mask": np.zeros((40, 60), np.float32)}, "mask is float32 of shape .40, 60.; allowed"),
        ({"mask": np.full((40, 60), 255, np.int32)}, None),
    ],
)
def test_examples_are_checked(changes, message):
    source = Bare(**changes)
    if message is None:
        assert example_of(source, 1)["mask"].dtype == np.uint8
        return
    for read in (lambda: example_of(source, 1), lambda: Some(source, 3)[1]):
        with pytest.raises(DataError, match=message) as error:
            read()
        assert "\n" not in str(error.value)


def test_an_example_must_be_a_dict_with_an_image():
    with pytest.raises(DataError, match="example 0 is tuple: allowed is a dict with image"):
        example_of([(1, 2)], 0)
    with pytest.raises(DataError, match=r"example 0 is \['mask'\]: allowed is a dict with image"):
        example_of([{"mask": 1}], 0)


def test_a_source_must_be_a_function_of_its_index():
    class Random(Bare):
        buffer = np.zeros((8, 8, 3), np.uint8)

        def __getitem__(self, index):
            self.buffer += 1
            return {"image": self.buffer}

    with pytest.raises(
        DataError, match="differs in image: a source must be a function of its index"
    ):
        check_function(Random())
    check_function(Bare(score=np.nan))
    check_function([])


def test_splits_of_what_a_user_has():
    one, two = Bare(), Bare()
    assert as_splits(one).split("train") is one
    assert as_splits(one, two).split("val") is two
    both = as_splits({"train": one, "dev": two})
    assert both.split("dev") is two
    for splits, known in ((as_splits(one), "train"), (both, "train, dev"), (as_splits({}), "none")):
        with pytest.raises(DataError, match=f"no split 'test'; those there are: {known}$"):
            splits.split("test")
    drawn = Shapes(size=(32, 32))
    assert as_splits(drawn) is drawn and as_splits(drawn).split("test").part == "test"
    with_other = as_splits(drawn, one)
    assert with_other.split("val") is one and with_other.split("test").part == "test"
    with pytest.raises(DataError, match="unknown split 'tset' of shapes"):
        with_other.split("tset")
    for wrong in ("camvid", 3, None):
        with pytest.raises(DataError, match="allowed are a source"):
            as_splits(wrong)


def test_one_option_has_one_default_in_all_formats():
    found = {}
    for cls in FORMATS.values():
        for name, option in options(cls).items():
            where = cls.section if name not in cls.shared else ""
            assert found.setdefault((where, name), option.default) == option.default
            assert option.help and option.open and not option.free


def test_importing_formats_imports_nothing_large():
    script = """
import sys
import jaxseg.data
assert "numpy" not in sys.modules
from jaxseg.data import FORMATS, BinaryMasks, names_of
large = "tensorflow_datasets grain matplotlib sklearn tqdm pyvips jax absl".split()
assert not {*large} & set(sys.modules), {*large} & set(sys.modules)
assert set(jaxseg.data.__all__) <= set(dir(jaxseg.data))
from jaxseg.data import *
try:
    jaxseg.data.nothing
except AttributeError as error:
    assert "no attribute 'nothing'" in str(error)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    "sizes, expected",
    [
        (((960, 1280), (768, 1024)), (368, 480)),  # 4:3, to 360x480
        (((960, 1280), (1280, 960)), (480, 480)),
        (((100, 80), (50, 80)), (112, 80)),  # smaller than 480: kept
        (((1, 1), (3000, 5000)), (288, 480)),
    ],
)
def test_differing_sizes_get_one_that_holds_all(sizes, expected, caplog):
    with caplog.at_level(logging.INFO):
        assert working_size(Sized(*sizes), (0, 0)) == expected
    assert f"all are fitted into {expected[0]}x{expected[1]}" in caplog.text
    assert caplog.text.count("fitted") == 1
    for size in sizes:
        assert fit(example(*size), expected)["image"].shape == (*expected, 3)


def test_explicit_size():
    assert working_size(Sized((9, 9)), (64, 32)) == (64, 32)
    for wrong in ((64, 30), (0, 32), (-16, 16), (16,)):
        with pytest.raises(DataError, match=r"allowed are \(0, 0\) and .* multiples of 16"):
            working_size(Sized((9, 9)), wrong)
    with pytest.raises(DataError, match="empty"):
        working_size(Sized(), (0, 0))


@pytest.mark.parametrize("size", [(100, 50), (50, 100), (7, 3), (1, 1), (2, 900), (64, 100)])
def test_letterbox(size):
    whole = example(*size)
    fitted = fit(whole, (64, 96))
    assert fitted["image"].shape == (64, 96, 3) and fitted["image"].dtype == np.uint8
    assert fitted["mask"].shape == (64, 96) and fitted["mask"].dtype == np.uint8
    (h, w), crop = placement(size, (64, 96))
    inside = np.zeros((64, 96), bool)
    inside[:h, :w] = True
    assert crop == (size == (64, 100))
    assert h == 64 or w == 96
    np.testing.assert_array_equal(fitted["mask"] == 255, ~inside)
    if not crop:
        assert abs(h / size[0] - w / size[1]) <= max(1 / size[0], 1 / size[1])
        colour = fitted["image"][:h, :w].mean((0, 1))
        outside = fitted["image"][~inside].reshape(-1, 3).astype(float)
        assert np.abs(outside - colour).max(initial=0) <= 0.5


def test_letterbox_keeps_mask_and_image_together():
    """Enlarged by 3, a pixel becomes a 3x3 block in the mask, and its centre in the image."""
    whole = example(8, 12)
    fitted = fit(whole, (32, 48), multiple=1)
    shrunk = fitted["mask"][2::4, 2::4]
    np.testing.assert_array_equal(shrunk, whole["mask"])
    whole = example(320, 480)
    small = fit(whole, (32, 48))
    averaged = whole["image"].reshape(32, 10, 48, 10, 3).mean((1, 3))
    assert np.abs(small["image"] - averaged).max() < 6  # antialiased: about the block's mean


def test_noise_is_averaged_when_shrunk():
    noise = np.random.default_rng(0).integers(0, 256, (640, 640, 3), np.uint8)
    small = fit({"image": noise}, (64, 64))
    assert "mask" not in small
    assert small["image"].std() < 12  # nearest or plain bilinear keep 40 and more


def test_a_format_gives_its_other_splits(tmp_path):
    for split in ("train", "test"):
        for kind in ("dog", "cat") if split == "train" else ("dog",):
            for name in ("images", "annotations"):
                (tmp_path / split / kind / name).mkdir(parents=True)
                Image.new("L", (20, 18)).save(tmp_path / split / kind / name / "a.png")
    source = BinaryMasks(tmp_path, "test", categories=("dog",))
    assert source[0]["name"] == "dog/a"
    assert working_size(source, (0, 0)) == (16, 16)
    # By the categories that were asked for, not by those that were found.
    everything = BinaryMasks(str(tmp_path), "test")
    assert everything.categories == ("dog",)
    assert everything.split("train").categories == ("cat", "dog")
    assert source.split("train").categories == ("dog",)
    with pytest.raises(DataError, match="has no split 'val': it has test, train"):
        source.split("val")


def test_drawn_sources_have_a_size():
    source = Shapes(seed=1, size=(32, 48), length=3)
    assert len(source) == 3
    assert working_size(source, (0, 0)) == (32, 48)
    assert fit(source[0], (32, 48))["mask"].shape == (32, 48)


def test_a_part_of_a_source_knows_its_classes():
    scenes = Scenes(length=4)
    part = Some(scenes, 2)
    assert names_of(part) == names_of(scenes) == Scenes.names and len(part) == 2
    assert names_of(Some(Shapes(length=4), 2)) is None
    assert categories_of(part) == ("all",)
