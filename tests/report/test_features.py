"""Pictures of what a backbone has learnt: what must be seen in them, and what is refused."""

import matplotlib.pyplot as plt
import numpy as np
import pytest
from PIL import Image

from jaxseg.evaluate import embedding
from jaxseg.report import figures
from jaxseg.report.features import (
    plot_attention,
    plot_confusion,
    plot_neighbors,
    plot_pca,
    plot_spectrum,
    plot_tsne,
)


def clusters(n=90, d=12, classes=3, spread=0.15, seed=0):
    rng = np.random.default_rng(seed)
    labels = np.arange(n) % classes
    return np.eye(d)[labels] + spread * rng.normal(size=(n, d)), labels


@pytest.mark.parametrize("classes", [3, 40])
def test_confusion_picture(classes, tmp_path):
    labels = np.arange(80) % classes
    names = [f"class {i}" for i in range(classes)]
    plot_confusion(labels, labels, names, tmp_path / "deep" / "c.png")
    assert np.asarray(Image.open(tmp_path / "deep" / "c.png").convert("RGB")).std() > 10
    assert plt.get_fignums() == []  # No figure is kept by pyplot.


def test_spectrum_picture(tmp_path):
    x = np.random.default_rng(0).normal(size=(50, 8))
    plot_spectrum({"good": x, "collapsed": x[:1].repeat(50, 0)}, tmp_path / "s.png")
    assert np.asarray(Image.open(tmp_path / "s.png").convert("RGB")).std() > 5


def test_spectrum_errors(tmp_path):
    bad = np.ones((4, 3))
    bad[2, 1] = np.nan
    with pytest.raises(ValueError, match="teacher: 1 of 4 rows"):
        plot_spectrum({"student": np.ones((4, 3)), "teacher": bad}, tmp_path / "a.png")
    with pytest.raises(ValueError, match="no features"):
        plot_spectrum({}, tmp_path / "a.png")
    assert not list(tmp_path.iterdir())


def _pixels(path, color):
    rgb = [int(color[i : i + 2], 16) for i in (1, 3, 5)]
    return int((np.asarray(Image.open(path).convert("RGB")) == rgb).all(axis=-1).sum())


def test_picture_frames_by_class(tmp_path):
    images = [np.full((8 + i, 10, 3), 40 * i, np.uint8) for i in range(4)]
    labels = np.array([0, 0, 1, 1])
    rows = np.array([[1, 2], [0, 3]])
    both, right, plain = (tmp_path / "new" / f"{name}.png" for name in ("both", "right", "plain"))
    plot_neighbors(images, [0, 1], rows, both, labels=labels, names=("cat", "dog"))
    plot_neighbors(images, [0], [[1]], right, labels=labels)
    plot_neighbors(images, [0, 1], rows, plain)
    assert _pixels(both, figures.RIGHT) > 100 and _pixels(both, figures.WRONG) > 100
    assert _pixels(right, figures.RIGHT) > 100 and not _pixels(right, figures.WRONG)
    assert not _pixels(plain, figures.RIGHT) and not _pixels(plain, figures.WRONG)
    assert sorted(p.name for p in both.parent.iterdir()) == ["both.png", "plain.png", "right.png"]
    with pytest.raises(ValueError, match="for 3 queries"):
        plot_neighbors(images, [0, 1, 2], rows, both)


def test_tsne_panels_and_points_are_picked_evenly(tmp_path, monkeypatch):
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


def test_tsne_picture_without_labels_and_with_many_classes(tmp_path, monkeypatch):
    monkeypatch.setattr(embedding, "tsne", lambda arrays, seed: [a[:, :2] for a in arrays])
    x, _ = clusters()
    assert plot_tsne([("all", x, None)], (), tmp_path / "plain.png") == ["all"]
    names = [str(i) for i in range(90)]
    plot_tsne([("all", x, np.arange(90))], names, tmp_path / "many.png")
    assert np.asarray(Image.open(tmp_path / "many.png")).std() > 5


def test_tsne_errors(tmp_path):
    x, labels = clusters(n=10)
    for snapshots in ([], [x, x[:9]], [x[:3]]):
        with pytest.raises(ValueError, match=r"snapshots of \[.*\] images: need"):
            plot_tsne([("a", s, None) for s in snapshots], (), tmp_path / "a.png")
    with pytest.raises(ValueError, match="labels differ"):
        plot_tsne([("a", x, labels), ("b", x, labels[::-1])], "xyz", tmp_path / "a.png")
    with pytest.raises(ValueError, match="labels are in 0 to 2: allowed are 0 to 1"):
        plot_tsne([("a", x, labels)], "xy", tmp_path / "a.png")
    assert not list(tmp_path.iterdir())


def test_pca_picture(tmp_path):
    """Left half and right half of the tokens differ: so do the halves of the PCA picture."""
    tokens = np.random.default_rng(0).normal(size=(5, 4, 4, 6)) * 0.05
    tokens[:, :, 2:] += 1
    images = [np.full((16, 16, 3), 128, np.uint8)] * 5
    plot_pca(images, tokens, tmp_path / "pca.png", columns=2)
    picture = np.asarray(Image.open(tmp_path / "pca.png").convert("RGB"))
    assert picture.std() > 20


def test_pca_errors(tmp_path):
    with pytest.raises(ValueError, match="3 images for the tokens of 2"):
        plot_pca([None] * 3, np.zeros((2, 2, 2, 3)), tmp_path / "a.png")


def test_attention_picture_with_and_without_masks(tmp_path):
    rng = np.random.default_rng(0)
    images = rng.integers(0, 255, (2, 12, 16, 3), np.uint8)
    maps = rng.random((2, 3, 3, 4))
    masks = np.zeros((2, 12, 16), np.uint8)
    masks[0, 2:7, 3:9] = 1
    plot_attention(images, maps, masks, tmp_path / "with.png")
    plot_attention(images, maps, None, tmp_path / "without.png")
    pink = {}
    for name in ("with", "without"):
        picture = np.asarray(Image.open(tmp_path / f"{name}.png").convert("RGB")).astype(int)
        assert picture.std() > 10
        pink[name] = (np.abs(picture - [255, 64, 255]).sum(axis=-1) < 20).sum()
    assert pink["with"] > 20 and not pink["without"]


def test_attention_errors(tmp_path):
    maps, mask = np.ones((1, 2, 3, 3)), np.ones((6, 6), np.uint8)
    with pytest.raises(ValueError, match="1 images, 1 attention maps and 2 masks"):
        plot_attention([np.zeros((6, 6, 3), np.uint8)], maps, [mask, mask], tmp_path / "a.png")
