import logging

import numpy as np
import pytest
from PIL import Image

from jaxseg import data
from jaxseg.data import DataError, fit, placement, sources, working_size


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


def test_a_source_without_sizes_has_one():
    class Alike(Sized):
        sizes = property()

    assert not hasattr(Alike(), "sizes")
    assert working_size(Alike((70, 50), (1, 1)), (0, 0)) == (64, 48)


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


def test_create(tmp_path):
    with pytest.raises(DataError, match="'mnist': allowed are shapes, .*, coco, images, tfds"):
        data.create("mnist", "train")
    for split in ("train", "test"):
        for name in ("images", "annotations"):
            (tmp_path / split / "dog" / name).mkdir(parents=True)
            Image.new("L", (20, 18)).save(tmp_path / split / "dog" / name / "a.png")
    source = data.create("folder", "test", root=str(tmp_path), categories=("dog",))
    assert source[0]["name"] == "dog/a"
    assert working_size(source, (0, 0)) == (16, 16)


def test_create_shapes():
    source = data.create("shapes", "train", seed=1, size=(32, 48), length=3)
    assert len(source) == 3
    assert working_size(source, (0, 0)) == (32, 48)
    assert fit(source[0], (32, 48))["mask"].shape == (32, 48)
    with pytest.raises(ValueError, match="dragon"):
        data.create("shapes", "train", categories=["dragon"])


def test_a_part_of_a_source_knows_its_classes():
    scenes = data.create("scenes", "train", length=4)
    part = sources.Some(scenes, 2)
    assert part.mask_names == scenes.mask_names and len(part) == 2
    assert not hasattr(sources.Some(data.create("shapes", "train", length=4), 2), "mask_names")
