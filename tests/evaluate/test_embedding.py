"""t-SNE over snapshots: classes apart, layouts that can be compared, and what collapses."""

import numpy as np
import pytest
from PIL import Image

from jaxseg.evaluate import embedding
from jaxseg.evaluate.embedding import plot_tsne, tsne


def clusters(n=90, d=12, classes=3, spread=0.15, seed=0):
    rng = np.random.default_rng(seed)
    labels = np.arange(n) % classes
    return np.eye(d)[labels] + spread * rng.normal(size=(n, d)), labels


def test_classes_apart_and_places_kept():
    x, labels = clusters(n=400, classes=8)
    rng = np.random.default_rng(1)
    first, second = tsne([x, x + 0.02 * rng.normal(size=x.shape)])
    for layout in (first, second):
        assert layout.shape == (400, 2)
        distance = np.linalg.norm(layout[:, None] - layout, axis=-1)
        np.fill_diagonal(distance, np.inf)
        assert (labels[distance.argmin(axis=1)] == labels).mean() > 0.95

    def places(layout):
        centred = layout - layout.mean(axis=0)
        return np.stack([centred[labels == c].mean(axis=0) for c in range(8)])

    # Each cluster lies about where it lay: moved by less than a third of what the layout spans.
    moved = np.linalg.norm(places(first) - places(second), axis=1)
    assert moved.max() < np.linalg.norm(places(first), axis=1).mean() / 3


def test_turning_undoes_a_rotation_and_a_reflection():
    layout = np.random.default_rng(0).normal(size=(30, 2))
    turn = np.array([[0.6, 0.8], [0.8, -0.6]])  # determinant -1
    back = embedding._turn(layout @ turn + [3, 4], layout + [7, 8])
    np.testing.assert_allclose(back, layout - layout.mean(axis=0), atol=1e-12)


def test_is_deterministic():
    x, _ = clusters(n=40)
    np.testing.assert_array_equal(tsne([x])[0], tsne([x])[0])


@pytest.mark.parametrize("features", [np.ones((20, 5)), np.zeros((4, 1)), np.eye(6)[:, :1]])
def test_collapsed_and_tiny_features_have_a_layout(features):
    assert np.isfinite(tsne([features])[0]).all()


def test_errors(tmp_path):
    x, labels = clusters(n=10)
    for snapshots in ([], [x, x[:9]], [x[:3]]):
        with pytest.raises(ValueError, match=r"snapshots of \[.*\] images: need"):
            tsne(snapshots)
        with pytest.raises(ValueError, match=r"snapshots of \[.*\] images: need"):
            plot_tsne([("a", s, None) for s in snapshots], (), tmp_path / "a.png")
    with pytest.raises(ValueError, match="snapshot 1: 10 of 10 rows hold NaN"):
        tsne([x, x * np.nan])
    with pytest.raises(ValueError, match="labels differ"):
        plot_tsne([("a", x, labels), ("b", x, labels[::-1])], "xyz", tmp_path / "a.png")
    with pytest.raises(ValueError, match="labels are in 0 to 2: allowed are 0 to 1"):
        plot_tsne([("a", x, labels)], "xy", tmp_path / "a.png")
    assert not list(tmp_path.iterdir())


def test_panels_and_points_are_picked_evenly(tmp_path, monkeypatch):
    """The layout itself is left out, so that only the picking is tested."""
    x, labels = clusters()
    seen = []

    def record(arrays, *, seed):
        seen.append(arrays)
        return [a[:, :2] for a in arrays]

    monkeypatch.setattr(embedding, "tsne", record)
    snapshots = [(f"epoch {i}", x + i, labels) for i in range(11)]
    shown = plot_tsne(snapshots, ("a", "b", "c"), tmp_path / "t.png", points=30)
    assert shown == [f"epoch {i}" for i in (0, 2, 4, 6, 8, 10)]
    (arrays,) = seen
    assert all(a.shape == (30, 12) for a in arrays)
    for index, array in enumerate(arrays):  # The same images in every panel.
        np.testing.assert_allclose(array - 2 * index, arrays[0])
    assert len(np.unique(arrays[0], axis=0)) == 30
    colors = np.asarray(Image.open(tmp_path / "t.png").convert("RGB")).reshape(-1, 3)
    for blue_orange_green in ([31, 119, 180], [255, 127, 14], [44, 160, 44]):
        assert (colors == blue_orange_green).all(axis=1).any()


def test_picture_without_labels_and_with_many_classes(tmp_path, monkeypatch):
    monkeypatch.setattr(embedding, "tsne", lambda arrays, seed: [a[:, :2] for a in arrays])
    x, _ = clusters()
    assert plot_tsne([("all", x, None)], (), tmp_path / "plain.png") == ["all"]
    names = [str(i) for i in range(90)]
    plot_tsne([("all", x, np.arange(90))], names, tmp_path / "many.png")
    assert np.asarray(Image.open(tmp_path / "many.png")).std() > 5
