"""t-SNE over snapshots: classes apart, layouts that can be compared, and what collapses."""

import numpy as np
import pytest

from jaxseg.evaluate import embedding
from jaxseg.evaluate.embedding import tsne


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


def test_errors():
    x, _ = clusters(n=10)
    for snapshots in ([], [x, x[:9]], [x[:3]]):
        with pytest.raises(ValueError, match=r"snapshots of \[.*\] images: need"):
            tsne(snapshots)
    with pytest.raises(ValueError, match="snapshot 1: 10 of 10 rows hold NaN"):
        tsne([x, x * np.nan])
