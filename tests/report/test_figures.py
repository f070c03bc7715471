"""Confusion by counting, and figures that leave nothing behind."""

import matplotlib.pyplot as plt
import numpy as np
import pytest
from PIL import Image

from jaxseg.report import figures


def test_confusion_by_counting():
    rng = np.random.default_rng(0)
    labels, predictions = rng.integers(3, size=60), rng.integers(4, size=60)
    share = figures.confusion(labels, predictions, classes=4)
    for row in range(3):
        for column in range(4):
            chosen = [p for label, p in zip(labels, predictions, strict=True) if label == row]
            assert share[row, column] == pytest.approx(chosen.count(column) / len(chosen))
    assert (share[3] == 0).all()  # A class that no image has.


def test_confusion_errors():
    with pytest.raises(ValueError, match="need two"):
        figures.confusion([0, 1], [0], classes=2)
    with pytest.raises(ValueError, match="need two"):
        figures.confusion([], [], classes=2)
    with pytest.raises(ValueError, match="must be in 0 to 1"):
        figures.confusion([0, 2], [0, 1], classes=2)


@pytest.mark.parametrize("classes", [3, 40])
def test_confusion_picture(classes, tmp_path):
    labels = np.arange(80) % classes
    names = [f"class {i}" for i in range(classes)]
    figures.plot_confusion(labels, labels, names, tmp_path / "deep" / "c.png")
    assert np.asarray(Image.open(tmp_path / "deep" / "c.png").convert("RGB")).std() > 10
    assert plt.get_fignums() == []  # No figure is kept by pyplot.


def test_a_failed_save_leaves_the_old_picture_alone(tmp_path):
    path = tmp_path / "a.png"
    figures.plot_lines({"x": (np.arange(3), np.arange(3))}, path)
    before = path.read_bytes()

    class Broken(type(figures.make_grid(1, 1)[0])):
        def savefig(self, *args, **kwargs):
            raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        figures.save(Broken(), path)
    assert path.read_bytes() == before and [p.name for p in tmp_path.iterdir()] == ["a.png"]


def test_names_that_matplotlib_would_take_for_something_else(tmp_path):
    names = ("_other", "$5_$10", "a_very_long_name_of_a_class_with_its_end")
    assert [figures.written(name) for name in names] == [
        " _other",
        r"\$5_\$10",
        "a_very_long_nam…_its_end",
    ]
    figures.plot_confusion([0, 1, 2], [0, 1, 2], names, tmp_path / "c.png")
    figure, axes = figures.make_grid(1, 1)
    handles = [axes[0, 0].scatter([], [], label=figures.written(name)) for name in names]
    assert len(axes[0, 0].legend(handles=handles).get_texts()) == 3


def test_one_panorama_does_not_shape_the_cells():
    shapes = [(1500, 12), (30, 40), (30, 40), (12, 1500), (60, 80)]
    assert figures.common_aspect([np.zeros(shape) for shape in shapes]) == 0.75
    assert figures.common_aspect([np.zeros((1500, 12))]) == 3


@pytest.mark.parametrize("count", [1, 10, 20, 57])
def test_colours_of_classes_differ(count):
    assert len(np.unique(figures.class_colors(count), axis=0)) == count
