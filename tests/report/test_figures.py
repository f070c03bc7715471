"""Names, colours and cells that all pictures share, and a save that leaves nothing behind."""

import numpy as np
import pytest

from jaxseg.report import features, figures


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
    features.plot_confusion([0, 1, 2], [0, 1, 2], names, tmp_path / "c.png")
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
