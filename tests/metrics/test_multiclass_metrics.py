"""Multi-class metrics against counting pixel by pixel, masks one by one, and scikit-learn."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.spatial import cKDTree
from sklearn import metrics as sklearn_metrics

from jaxseg.metrics import binary as metrics
from jaxseg.metrics import multiclass as mc
from jaxseg.ops.boundary import boundary_width

VOID = 255


def _case(classes, *, seed=0, shape=(3, 40, 56), block=8):
    """Blocks of classes, a prediction that is right at most places, 255 where void."""
    rng = np.random.default_rng(seed)
    batch, height, width = shape
    coarse = rng.integers(0, classes, (batch, height // block, width // block))
    labels = np.kron(coarse, np.ones((1, block, block), int)).astype(np.uint8)
    prediction = np.where(
        np.kron(rng.random(coarse.shape) < 0.6, np.ones((1, block, block))) > 0,
        np.roll(labels, 2, axis=2),
        rng.integers(0, classes, shape),
    )
    valid = rng.random(shape) < 0.97
    valid[:, :6, :9] = False
    return prediction, np.where(valid, labels, VOID).astype(np.uint8), valid


def _on_device(function, case, classes, **options):
    jitted = jax.jit(functools.partial(function, classes=classes, **options))
    return jax.device_get(jitted(*map(jnp.array, case)))


@pytest.mark.parametrize("classes", [2, 11, 150])
def test_confusion_equals_scikit_learn(classes):
    case = prediction, labels, valid = _case(classes)
    got = _on_device(mc.confusion, case, classes)
    assert got.dtype == np.int32
    for p, t, v, table in zip(prediction, labels, valid, got, strict=True):
        want = sklearn_metrics.confusion_matrix(t[v], p[v], labels=range(classes))
        np.testing.assert_array_equal(table, want)


def test_ids_outside_the_classes_count_nowhere():
    prediction, labels = np.array([[[0, 1, 7, -1]]]), np.array([[[0, VOID, 1, 1]]])
    table = _on_device(mc.confusion, (prediction, labels, np.ones((1, 1, 4), bool)), 2)
    np.testing.assert_array_equal(table[0], [[1, 0], [0, 0]])


def test_nothing_valid_counts_nothing():
    prediction, labels, _ = _case(4)
    nothing = np.zeros(labels.shape, bool)
    counts = _on_device(mc.image_counts, (prediction, labels, nothing), 4, background=0)
    for value in counts.values():
        np.testing.assert_array_equal(value, 0)


@pytest.mark.parametrize("classes", [5])
def test_boundary_counts_equal_those_of_each_class_as_a_binary_mask(classes):
    case = prediction, labels, valid = _case(classes, seed=1)
    got = _on_device(mc.boundary_counts, case, classes)
    for c in range(classes):
        binary = metrics.image_counts(*map(jnp.array, (prediction == c, labels == c, valid)))
        np.testing.assert_array_equal(got[:, c], binary["boundary"])


def _contour(mask):
    padded, inner = np.pad(mask, 1), mask.copy()
    for dy in range(3):
        for dx in range(3):
            inner &= padded[dy : dy + mask.shape[0], dx : dx + mask.shape[1]]
    return np.argwhere(mask & ~inner)


def _near(points, others, radius):
    if not len(points) or not len(others):
        return 0
    return int((cKDTree(others).query(points, p=np.inf)[0] <= radius).sum())


@pytest.mark.parametrize("classes", [3, 70])
def test_contour_counts_equal_distances_between_points(classes):
    shape = (1, 180, 240)
    case = prediction, labels, valid = _case(classes, seed=2, shape=shape, block=20)
    got = _on_device(mc.contour_counts, case, classes)
    radius = boundary_width(180, 240, ratio=0.0075)
    assert radius == 2
    for c in range(classes):
        p, t = (_contour((ids[0] == c) & valid[0]) for ids in (prediction, labels))
        want = [_near(p, t, radius), len(p), _near(t, p, radius), len(t)]
        np.testing.assert_array_equal(got[0, c], want)


def test_void_around_an_image_changes_no_count():
    case = _case(4, seed=3)
    height, width = case[0].shape[1:]
    alone = _on_device(mc.image_counts, case, 4, background=0)
    padded = [np.pad(ids, ((0, 0), (0, 30), (0, 17)), constant_values=VOID) for ids in case[:2]]
    valid = np.pad(case[2], ((0, 0), (0, 30), (0, 17)))
    widths = mc.boundary_widths(height, width)
    within = _on_device(mc.image_counts, (*padded, valid), 4, background=0, widths=widths)
    for name, value in alone.items():
        np.testing.assert_array_equal(within[name], value)


def test_summary_equals_scikit_learn():
    classes = 6
    prediction, labels, valid = _case(classes, seed=4)
    names = list("abcdef")
    counts = _on_device(mc.image_counts, (prediction, labels, valid), classes)
    sums = metrics.add(None, {k: v.sum(0) for k, v in counts.items()})
    got = mc.summarize(sums, names, background=2)
    t, p = labels[valid], prediction[valid]
    iou = sklearn_metrics.jaccard_score(t, p, average=None)
    share = np.bincount(t, minlength=classes) / len(t)
    near = functools.partial(pytest.approx, rel=1e-12)
    assert got["miou"] == near(iou.mean())
    assert got["miou_without_background"] == near(np.delete(iou, 2).mean())
    assert got["fwiou"] == near((share * iou).sum())
    assert got["pixel_accuracy"] == near(sklearn_metrics.accuracy_score(t, p))
    assert got["mean_accuracy"] == near(sklearn_metrics.balanced_accuracy_score(t, p))
    for name in ("precision", "recall", "f1"):
        score = getattr(sklearn_metrics, f"{name}_score")
        assert got[name] == near(score(t, p, average="macro"))
        want = score(t, p, average=None)
        np.testing.assert_allclose([got["per_class"][n][name] for n in names], want)
    assert got["per_class"]["c"]["iou"] == near(iou[2])
    assert got["per_class"]["c"]["pixels"] == (t == 2).sum()
    assert got["confusion"] == sklearn_metrics.confusion_matrix(t, p).tolist()
    boundary = counts["boundary"].sum(0)
    assert got["boundary_iou"] == near((boundary[:, 0] / boundary[:, 1]).mean())
    assert 0 < got["boundary_f"] < 1 and got["absent"] == []
    assert json.loads(json.dumps(got)) == got


def test_absent_classes_are_excluded_and_named():
    # "seen" is right at 3 of 4 pixels, "missed" is never predicted, "invented" only predicted.
    table = np.zeros((4, 4), int)
    table[0, 0], table[0, 2], table[1, 0] = 3, 1, 1
    names = ["seen", "missed", "invented", "absent"]
    got = mc.summarize({"confusion": table}, names, background=None)
    assert got["absent"] == ["absent"] and "miou_without_background" not in got
    assert got["miou"] == (3 / 5 + 0 + 0) / 3
    assert got["mean_accuracy"] == (3 / 4 + 0) / 2
    assert got["precision"] == (3 / 4 + 0) / 2
    assert got["fwiou"] == (4 / 5) * (3 / 5)
    assert got["per_class"]["absent"]["iou"] is None
    assert got["per_class"]["absent"]["pixels"] == 0
    assert "boundary_iou" not in got


def test_a_summary_of_nothing_has_no_scores():
    sums = {
        "confusion": np.zeros((2, 2)),
        "boundary": np.zeros((2, 2)),
        "contour": np.zeros((2, 4)),
    }
    got = mc.summarize(sums, ["a", "b"], background=0)
    for key in ("miou", "pixel_accuracy", "fwiou", "f1", "boundary_iou", "boundary_f"):
        assert got[key] is None
    assert got["absent"] == ["a", "b"]


def test_perfect_prediction_scores_one():
    _, labels, valid = _case(5, seed=3)
    counts = _on_device(mc.image_counts, (labels, labels, valid), 5, background=0)
    sums = metrics.add(None, {k: v.sum(0) for k, v in counts.items()})
    got = mc.summarize(sums, list("abcde"), background=0)
    keys = ("miou", "miou_without_background", "pixel_accuracy", "mean_accuracy", "fwiou")
    for key in (*keys, "boundary_iou", "boundary_f", "precision", "recall", "f1"):
        assert got[key] == pytest.approx(1.0)


def test_a_class_list_of_another_length_is_an_error():
    with pytest.raises(ValueError, match=r"\(3, 3\) for 2 classes"):
        mc.summarize({"confusion": np.zeros((3, 3))}, ["a", "b"], background=None)


def test_course_multiclass_miou():
    classes = 4
    prediction, labels, valid = _case(classes, seed=6)
    prediction[2], labels[2] = 0, 0  # nothing but background: the image does not count
    prediction[1][prediction[1] == 3], labels[1][labels[1] == 3] = 0, 0  # a class less
    values = []
    for p, t, v in zip(prediction[:2], labels[:2], valid[:2], strict=True):
        ious = []
        for c in range(1, classes):
            union = ((p == c) | (t == c)) & v
            if union.any():
                ious.append(((p == c) & (t == c) & v).sum() / (union.sum() + 1))
        values.append(np.mean(ious))
    counts = _on_device(mc.image_counts, (prediction, labels, valid), classes, background=0)
    sums = {k: v.sum(0) for k, v in counts.items()}
    np.testing.assert_array_equal(counts["course_multiclass"][:, 1], [1, 1, 0])
    got = mc.summarize(sums, list("abcd"), background=0)
    assert got["course_multiclass_miou"] == pytest.approx(np.mean(values), rel=1e-6)


def test_course_attention_miou():
    hit, union = jnp.array([[3, 0, 5], [1, 1, 0]]), jnp.array([[4, 2, 9], [1, 2, 0]])
    sums = np.asarray(mc.course_attention(hit, union)).sum(0)
    got = mc.summarize(
        {"confusion": np.zeros((1, 1)), "course_attention": sums}, ["a"], background=None
    )
    assert got["course_attention_miou"] == pytest.approx((8 / 16 + 2 / 4) / 2)
