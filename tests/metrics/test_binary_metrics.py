"""Metrics against pixel-by-pixel counting in Python, and boundaries against repeated erosion."""

import jax.numpy as jnp
import numpy as np

from jaxseg.metrics import binary as metrics
from jaxseg.ops import boundary


def _counted(prediction, mask, valid):
    table = np.zeros((2, 2), int)
    for p, t, v in zip(prediction.flat, mask.flat, valid.flat, strict=True):
        if v:
            table[int(t), int(p)] += 1
    return table


def _random_case(seed=0, n=4, shape=(23, 31)):
    rng = np.random.default_rng(seed)
    return (rng.random((n, *shape)) < p for p in (0.4, 0.5, 0.8))


def test_confusion_equals_counting():
    prediction, mask, valid = _random_case()
    got = metrics.image_counts(*map(jnp.array, (prediction, mask, valid)))["confusion"]
    for i in range(len(mask)):
        np.testing.assert_array_equal(got[i], _counted(prediction[i], mask[i], valid[i]))


def _eroded_once(mask):
    padded = np.pad(mask, 1)
    out = np.ones_like(mask)
    for dy in range(3):
        for dx in range(3):
            out &= padded[dy : dy + mask.shape[0], dx : dx + mask.shape[1]]
    return out


def test_boundary_equals_repeated_erosion():
    rng = np.random.default_rng(3)
    coarse = rng.random((5, 7)) < 0.6
    mask = np.kron(coarse, np.ones((8, 8))) > 0
    width = 3
    inner = mask
    for _ in range(width):
        inner = _eroded_once(inner)
    got = boundary.mask_boundary(jnp.array(mask)[None], width)[0]
    np.testing.assert_array_equal(got, mask & ~inner)


def test_boundary_width_is_two_percent_of_the_diagonal():
    assert boundary.boundary_width(480, 854) == 20
    assert boundary.boundary_width(1, 1) == 1


def test_scores_of_a_known_table():
    # 50 true negatives, 10 false positives, 20 false negatives, 20 true positives.
    result = metrics.scores(np.array([[50, 10], [20, 20]]))
    assert result["accuracy"] == 0.7
    assert result["foreground_iou"] == 20 / 50
    assert np.isclose(result["iou"], (20 / 50 + 50 / 80) / 2)
    assert np.isclose(result["precision"], (50 / 70 + 20 / 30) / 2)
    assert np.isclose(result["recall"], (50 / 60 + 20 / 40) / 2)


def test_absent_classes_are_left_out():
    result = metrics.scores(np.array([[9, 0], [0, 0]]))
    assert result["iou"] == 1.0 and result["foreground_iou"] is None
    assert metrics.scores(np.zeros((2, 2)))["accuracy"] is None


def test_summary_pools_counts_and_splits_categories():
    prediction, mask, valid = _random_case(seed=5, n=2)
    counts = metrics.image_counts(*map(jnp.array, (prediction, mask, valid)))
    sums = metrics.add(
        None, {**counts, "loss": np.array([[1.0, 2.0], [3.0, 1.0]]), "images": [1, 1]}
    )
    result = metrics.summarize(sums, ["a", "b"])
    pooled = sum(_counted(prediction[i], mask[i], valid[i]) for i in range(2))
    assert result["iou"] == metrics.scores(pooled)["iou"]
    assert (
        result["categories"]["b"]["iou"]
        == metrics.scores(np.asarray(counts["confusion"][1]))["iou"]
    )
    assert result["loss"] == 4 / 3 and result["images"] == 2


def test_sums_do_not_overflow():
    big = {"confusion": np.full((1, 2, 2), 2**31 - 1, np.int32)}
    total = metrics.add(metrics.add(None, big), big)
    assert total["confusion"].max() == 2 * (2**31 - 1)
