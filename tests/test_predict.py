"""Names of outputs and sizes at which images are segmented."""

import time
from pathlib import Path

import pytest

from jaxseg import tasks
from jaxseg.networks import UNet
from jaxseg.predict import _masks, output_names
from jaxseg.predictor import working_shape
from jaxseg.schema import ConfigError


def test_names_are_stems_and_clashes_are_told_apart():
    paths = [Path(p) for p in ("a/x.jpg", "b/x.jpg", "c/y.png", "c/y.jpg", "d/z.png")]
    assert output_names(paths) == ["a_x", "b_x", "c_y_png", "c_y_jpg", "z"]
    awkward = [Path(p) for p in ("a/b/x.png", "c/b/x.png", "x.png")]
    assert len(set(output_names(awkward))) == 3
    taken = [Path(p) for p in ("o/a_x_jpg_1.jpg", "p/a/x.jpg", "q/a/x.jpg")]
    assert len(set(output_names(taken))) == 3


def test_names_of_many_images_take_no_time():
    begin = time.process_time()
    names = output_names([Path(f"{i % 90}/{i // 2}.jpg") for i in range(20_000)])
    assert len(set(names)) == 20_000 and time.process_time() - begin < 10


def test_classes_whose_files_would_be_one_are_named():
    task = tasks.Multiclass(UNet(outputs=4), ("background", "a b", "a/b", "c"))
    assert _masks(task, ("a b", "c")) == {"a_b_mask.png": 1, "c_mask.png": 3}
    assert _masks(task, ()) == {"classes.png": None}
    assert _masks(tasks.Binary(UNet()), ()) == {"mask.png": 1}
    with pytest.raises(ConfigError, match="'a b' and 'a/b', whose files would have one name"):
        _masks(task, ("a b", "a/b"))


@pytest.mark.parametrize("size", [(1, 1), (3000, 5000), (480, 854), (10, 4000), (4000, 10)])
def test_working_shape_is_a_multiple_with_about_the_trained_area(size):
    height, width = working_shape(*size, trained=(480, 848), stride=16)
    assert height % 16 == width % 16 == 0
    assert 0.6 < height * width / (480 * 848) < 1.6
    assert 1 / 5 < height / width < 5


def test_the_trained_shape_is_kept():
    assert working_shape(480, 854, trained=(480, 848), stride=16) == (480, 848)
    assert working_shape(1080, 1920, trained=(480, 848), stride=16) == (480, 848)


def test_few_shapes_are_compiled():
    shapes = {
        working_shape(h, w, trained=(480, 848), stride=16)
        for h in range(200, 1000, 40)
        for w in range(200, 1000, 40)
    }
    assert len(shapes) <= 12
