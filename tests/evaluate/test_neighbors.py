"""Nearest neighbours against brute force in float64."""

import numpy as np
import pytest

from jaxseg.evaluate import neighbors
from jaxseg.evaluate.neighbors import nearest, neighbor_agreement


def brute_force(features, query, metric, excluded):
    x = features.astype(np.float64)
    if metric == "cosine":
        x = x / np.linalg.norm(x, axis=1, keepdims=True)
    distances = [(((row - x[query]) ** 2).sum(), i) for i, row in enumerate(x)]
    return [i for _, i in sorted(distances) if i not in excluded]


@pytest.fixture
def features():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(60, 6)) * rng.uniform(0.2, 4, (60, 1)) + 50 * (rng.random(6) > 0.5)
    return x.astype(np.float32)


@pytest.mark.parametrize("metric", ["cosine", "l2"])
def test_as_by_brute_force(features, metric, monkeypatch):
    monkeypatch.setattr(neighbors, "_PIECE", 7 * len(features))
    found = nearest(features, range(60), k=4, metric=metric)
    assert found.shape == (60, 4)
    for query in range(60):
        assert found[query].tolist() == brute_force(features, query, metric, {query})[:4]


def test_metrics_differ():
    features = np.array([[1, 0], [5, 0], [1, 1]], np.float32)
    assert nearest(features, [0], k=1, metric="cosine").tolist() == [[1]]
    assert nearest(features, [0], k=1, metric="l2").tolist() == [[2]]


def test_a_copy_of_the_query_is_a_neighbour_but_the_query_is_not(features):
    features[17] = features[3]
    assert nearest(features, [3, 17], k=2)[:, 0].tolist() == [17, 3]


def test_groups_are_passed_over(features):
    groups = np.arange(60) // 4
    found = nearest(features, [0, 5, 59], k=56, metric="l2", groups=groups)
    for query, rows in zip([0, 5, 59], found, strict=True):
        same = set(np.flatnonzero(groups == groups[query]))
        assert rows.tolist() == brute_force(features, query, "l2", same)
    with pytest.raises(ValueError, match="k is 57: allowed are 1 to 56"):
        nearest(features, [0], k=57, groups=groups)


def test_agreement_is_counted_by_hand():
    labels = np.array([0, 0, 1, 1, 1])
    rows = np.array([[1, 2], [3, 4], [0, 1]])
    assert neighbor_agreement(rows, [0, 2, 4], labels) == pytest.approx((1 + 2 + 0) / 6)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(queries=[0], k=60), "k is 60: allowed are 1 to 59"),
        (dict(queries=[0], k=0), "k is 0"),
        (dict(queries=[60]), "rows are in 60 to 60: there are only 0 to 59"),
        (dict(queries=[-1]), "there are only 0 to 59"),
        (dict(queries=[]), "queries have shape"),
        (dict(queries=[0], metric="manhattan"), "'manhattan': allowed are cosine, l2"),
        (dict(queries=[0], groups=np.zeros(5, int)), "need 60 integers"),
    ],
)
def test_errors(features, options, message):
    with pytest.raises(ValueError, match=message):
        nearest(features, **options)


def test_errors_of_agreement():
    with pytest.raises(ValueError, match=r"neighbours of shape \(1, 2\) for 2 queries"):
        neighbor_agreement(np.array([[0, 1]]), [0, 1], np.array([0, 1]))
    with pytest.raises(ValueError, match="there are only 0 to 1"):
        neighbor_agreement(np.array([[0, 2]]), [0], np.array([0, 1]))
