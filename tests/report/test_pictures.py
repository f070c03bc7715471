"""Which images are shown, and what must be seen of them."""

import matplotlib.pyplot as plt
import numpy as np
import pytest
from PIL import Image

from jaxseg.report import pictures
from jaxseg.report.palette import ADDED, MISSED, palette


def has_color(path, color) -> bool:
    pixels = np.asarray(Image.open(path).convert("RGB")).reshape(-1, 3)
    return bool((pixels == np.asarray(color)).all(axis=1).any())


def example(classes=2):
    """The prediction calls a row of class 1 background, and a row of background class 1."""
    mask = np.zeros((8, 10), np.uint8)
    mask[2:6] = classes - 1
    prediction = np.roll(mask, 1, axis=0)
    return dict(image=np.full((8, 10, 3), 200, np.uint8), mask=mask, prediction=prediction)


def test_best_median_and_worst_are_picked_once():
    scores = [(i, i / 10) for i in range(10)] + [(10, -1.0)]
    picked = pictures.pick_examples(scores)
    assert [index for _, index, _ in picked] == [9, 8, 5, 4, 1, 0]
    assert [label for label, *_ in picked] == ["best"] * 2 + ["median"] * 2 + ["worst"] * 2
    assert pictures.pick_examples([(3, 0.5)]) == [("best", 3, 0.5)]
    assert pictures.pick_examples([(3, -1.0)]) == [("best", 3, -1.0)]  # There are no others.


def test_examples_show_errors_of_an_object(tmp_path):
    pictures.plot_examples([("best", example())], tmp_path / "deep" / "e.png")
    assert has_color(tmp_path / "deep" / "e.png", MISSED)
    assert has_color(tmp_path / "deep" / "e.png", ADDED)
    assert plt.get_fignums() == []  # No figure is kept by pyplot.


def test_examples_show_classes(tmp_path):
    names = ("background", "cat", "dog")
    pictures.plot_examples([("best", example(3))], tmp_path / "e.png", names=names)
    assert has_color(tmp_path / "e.png", palette()[2]) and has_color(tmp_path / "e.png", MISSED)
    assert not has_color(tmp_path / "e.png", ADDED)


def test_queries_comparison_and_bars(tmp_path):
    shown = example(3) | dict(answers=np.zeros((1, 8, 10)), attention=np.eye(4)[None], name="$a_1")
    shown["masks"] = {"one": shown["mask"], "two": shown["prediction"]}
    names = ("background", "cat", "dog")
    pictures.plot_queries([("best", shown)], tmp_path / "queries.png", names=names, asked=[2])
    pictures.plot_comparison([(0.25, shown)], tmp_path / "comparison.png", names=names)
    pictures.plot_bars({"cat": 0.5, "_dog": None}, tmp_path / "bars.png", label="IoU")
    bars = {"one": {"cat": 0.5, "dog": None}, "two": {"cat": 0.25, "dog": 1.0}}
    pictures.plot_method_bars(bars, tmp_path / "methods.png")
    assert has_color(tmp_path / "comparison.png", palette()[2])
    for path in tmp_path.iterdir():
        assert np.asarray(Image.open(path).convert("L")).std() > 5


@pytest.mark.parametrize("classes", [3, 30])
def test_confusion(classes, tmp_path):
    counts = np.eye(classes, dtype=int) * 7
    counts[-1] = 0  # a class that no image has
    pictures.plot_confusion(counts, [f"${i}" for i in range(classes)], tmp_path / "c.png")
    assert np.asarray(Image.open(tmp_path / "c.png").convert("L")).std() > 5


def test_curves(tmp_path):
    path = tmp_path / "curves.png"
    assert not pictures.plot_curves([dict(step=1, val_miou=0.5)], path) and not path.exists()
    rows = [dict(step=i, loss=1.0 / i) for i in range(1, 9)]
    assert pictures.plot_curves(rows, path)
    one = Image.open(path).size
    assert pictures.plot_curves([row | dict(val_miou=0.5, val_loss=1.0) for row in rows], path)
    two = Image.open(path).size
    signs = [row | dict(val_knn=0.5, feature_spread=0.2) for row in rows]
    assert pictures.plot_curves(signs, path)
    three = Image.open(path).size
    assert one[0] < two[0] < three[0] and one[1] == two[1] == three[1]  # A panel more each.
    assert not has_color(path, (213, 94, 0))
    signs[3]["collapse"] = "centre"
    assert pictures.plot_curves(signs, path)
    assert has_color(path, (213, 94, 0))
