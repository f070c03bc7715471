"""The linear probe against scikit-learn's logistic regression."""

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression

from jaxseg.evaluate.probe import linear_probe, probe_predict


def data(n=600, m=400, d=20, classes=5, seed=0):
    """Overlapping classes: the best linear classifier makes mistakes."""
    rng = np.random.default_rng(seed)
    centres = 0.8 * rng.normal(size=(classes, d))
    scale, shift = rng.uniform(0.01, 50, d), rng.normal(size=d) * 20

    def draw(count):
        labels = rng.integers(classes, size=count)
        return ((centres[labels] + rng.normal(size=(count, d))) * scale + shift), labels

    return *draw(n), *draw(m)


@pytest.mark.parametrize("l2", [1e-1, 1e-3])
def test_agrees_with_scikit_learn(l2):
    train, labels, test, test_labels = data()
    mean, std = train.mean(axis=0), train.std(axis=0)
    oracle = LogisticRegression(C=1 / (len(train) * l2), max_iter=2000, tol=1e-8)
    expected = oracle.fit((train - mean) / std, labels).predict((test - mean) / std)
    predicted = probe_predict(train, labels, test, classes=5, l2=l2)
    assert (predicted == expected).mean() >= 0.995
    accuracy = linear_probe(train, labels, test, test_labels, classes=5, l2=l2)
    assert accuracy == (predicted == test_labels).mean()
    assert 0.5 < accuracy < 0.99
    assert accuracy == pytest.approx((expected == test_labels).mean(), abs=0.005)


def test_chooses_l2_near_the_best():
    """300 examples, 3 of 60 dimensions tell anything: without a penalty the others are learnt too."""
    rng = np.random.default_rng(0)
    labels, test_labels = rng.integers(3, size=300), rng.integers(3, size=2000)
    train, test = (
        rng.normal(size=(len(y), 60)) + 1.5 * np.eye(3, 60)[y] for y in (labels, test_labels)
    )
    scores = {
        l2: linear_probe(train, labels, test, test_labels, classes=3, l2=l2)
        for l2 in (1.0, 1e-1, 1e-4, 0.0)
    }
    chosen = linear_probe(train, labels, test, test_labels, classes=3)
    assert max(scores.values()) > scores[0.0] + 0.04
    assert chosen >= max(scores.values()) - 0.03


def test_is_deterministic_and_blind_to_the_scale_of_features():
    train, labels, test, _ = data()
    first = probe_predict(train, labels, test, classes=5)
    np.testing.assert_array_equal(first, probe_predict(train, labels, test, classes=5))
    other = probe_predict(train * 64 + 3, labels, test * 64 + 3, classes=5)
    assert (first == other).mean() > 0.99


def test_collapsed_features_give_the_most_frequent_class():
    labels = np.array([0] * 100 + [1] * 300 + [2] * 200)
    constant = np.tile(np.float32([0.1, 1e6, -3e-7, 0] * 5), (600, 1))
    assert (probe_predict(constant, labels, constant, classes=5) == 1).all()


def test_tiny_sets_and_absent_classes():
    train = np.array([[-1.0], [1.0], [1.1]])
    predicted = probe_predict(train, np.array([0, 5, 5]), train, classes=7)
    np.testing.assert_array_equal(predicted, [0, 5, 5])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(epochs=0), "epochs 0"),
        (dict(l2=-1.0), "l2 -1.0"),
        (dict(classes=4), "train labels are in 0 to 4"),
        (dict(test_MxD=np.zeros((3, 4))), "train features have 20 dimensions, the test features 4"),
        (dict(train_NxD=np.full((600, 20), np.inf)), "train features: 600 of 600 rows"),
    ],
)
def test_errors(change, message):
    train, labels, test, _ = data()
    arguments = dict(train_NxD=train, train_labels_N=labels, test_MxD=test, classes=5) | change
    with pytest.raises(ValueError, match=message):
        probe_predict(**arguments)
