"""k-NN against DINO's rule in slow, obvious float64 loops."""

import math

import numpy as np
import pytest

from jaxseg.evaluate import neighbors
from jaxseg.evaluate.knn import confusion, knn_accuracy, knn_predict


def slow_predict(train, labels, test, k, temperature, classes):
    predicted = []
    for query in test.astype(np.float64):
        pairs = []
        for row, label in zip(train.astype(np.float64), labels, strict=True):
            length = math.sqrt(row @ row) * math.sqrt(query @ query)
            pairs.append((row @ query / length, label))
        pairs.sort(key=lambda pair: -pair[0])
        votes = [0.0] * classes
        for similarity, label in pairs[:k]:
            votes[label] += math.exp(similarity / temperature)
        predicted.append(votes.index(max(votes)))
    return np.array(predicted)


def data(seed=0, n=90, m=35, d=7, classes=4, spread=1.0):
    rng = np.random.default_rng(seed)
    centres = rng.normal(size=(classes, d))

    def draw(count):
        labels = rng.integers(classes, size=count)
        x = centres[labels] + spread * rng.normal(size=(count, d))
        return (x * rng.uniform(0.5, 3, (count, 1))).astype(np.float32), labels

    return *draw(n), *draw(m)


@pytest.mark.parametrize("temperature", [0.07, 1.0])
def test_votes_as_in_slow_loops(temperature):
    train, labels, test, test_labels = data()
    ks = (1, 5, 20, 90)
    options = dict(temperature=temperature, classes=4)
    predicted = knn_predict(train, labels, test, k=ks, **options)
    accuracy = knn_accuracy(train, labels, test, test_labels, k=ks, **options)
    assert tuple(predicted) == tuple(accuracy) == ks
    for k in ks:
        expected = slow_predict(train, labels, test, k, temperature, 4)
        np.testing.assert_array_equal(predicted[k], expected)
        assert accuracy[k] == (expected == test_labels).mean()
    assert len({predicted[k].tobytes() for k in ks}) > 1  # The ks are told apart at all.


def test_weights_count_and_not_only_numbers():
    """One very near neighbour outvotes two far ones of another class."""
    train = np.array([[1, 0.01], [0.6, 0.8], [0.6, 0.8]], np.float32)
    test = np.array([[1, 0]], np.float32)
    assert knn_predict(train, [0, 1, 1], test, k=3, classes=2)[3] == 0
    assert knn_predict(train, [0, 1, 1], test, k=3, temperature=100.0, classes=2)[3] == 1


def test_pieces_do_not_change_the_result(monkeypatch):
    train, labels, test, _ = data()
    whole = knn_predict(train, labels, test, classes=4)[20]
    monkeypatch.setattr(neighbors, "_PIECE", 8 * len(train))  # 8 queries at a time, 3 in the last
    np.testing.assert_array_equal(knn_predict(train, labels, test, classes=4)[20], whole)


def test_features_that_are_nearly_alike_keep_their_order():
    """An untrained LayerScale network's features differ by 1e-4, so similarities by 1e-9."""
    train, labels, test, _ = data(d=64)
    constant = np.random.default_rng(1).normal(size=64)
    train, test = ((constant + 1e-4 * x).astype(np.float32) for x in (train, test))
    predicted = knn_predict(train, labels, test, k=5, classes=4)[5]
    assert (predicted == slow_predict(train, labels, test, 5, 0.07, 4)).mean() >= 0.97


def test_tiny_temperature_is_the_nearest_neighbour():
    train, labels, test, _ = data()
    options = dict(classes=4)
    coldest = knn_predict(train, labels, test, k=20, temperature=1e-6, **options)[20]
    np.testing.assert_array_equal(coldest, knn_predict(train, labels, test, k=1, **options)[1])


def test_collapsed_and_half_precision_features():
    labels = np.array([1, 0, 1, 1])
    zeros = np.zeros((4, 3), np.float16)
    assert knn_accuracy(zeros, labels, zeros, labels, k=4, classes=2) == {4: 0.75}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(k=91), "k is 91: allowed are 1 to 90"),
        (dict(k=(5, 0)), "allowed are 1 to 90"),
        (dict(k=()), "k is"),
        (dict(temperature=0.0), "temperature is 0.0"),
        (dict(classes=3), "train labels are in 0 to 3: allowed are 0 to 2"),
        (dict(train_labels_N=np.zeros(89, int)), "need 90 integers"),
        (dict(train_labels_N=np.zeros(90)), "type float64"),
        (dict(test_MxD=np.zeros((3, 6))), "bank has 7 dimensions, the queries 6"),
        (dict(test_MxD=np.zeros((0, 7))), r"test features have shape \(0, 7\)"),
        (dict(train_NxD=np.zeros(90)), r"train features have shape \(90,\)"),
        (dict(train_NxD=np.array([["a"]] * 90)), "need real numbers"),
        (dict(test_MxD=np.array([[1.0] * 7, [np.nan] * 7])), "test features: 1 of 2 rows.*row 1"),
    ],
)
def test_errors(change, message):
    train, labels, test, _ = data()
    arguments = dict(train_NxD=train, train_labels_N=labels, test_MxD=test, classes=4) | change
    with pytest.raises(ValueError, match=message):
        knn_predict(**arguments)


def test_test_labels_must_fit():
    train, labels, test, test_labels = data()
    with pytest.raises(ValueError, match="test labels have shape .* need 35 integers"):
        knn_accuracy(train, labels, test, test_labels[:-1], classes=4)


def test_confusion_by_counting():
    rng = np.random.default_rng(0)
    labels, predictions = rng.integers(3, size=60), rng.integers(4, size=60)
    share = confusion(labels, predictions, classes=4)
    for row in range(3):
        for column in range(4):
            chosen = [p for label, p in zip(labels, predictions, strict=True) if label == row]
            assert share[row, column] == pytest.approx(chosen.count(column) / len(chosen))
    assert (share[3] == 0).all()  # A class that no image has.


def test_confusion_errors():
    with pytest.raises(ValueError, match="need two"):
        confusion([0, 1], [0], classes=2)
    with pytest.raises(ValueError, match="need two"):
        confusion([], [], classes=2)
    with pytest.raises(ValueError, match="must be in 0 to 1"):
        confusion([0, 2], [0, 1], classes=2)
