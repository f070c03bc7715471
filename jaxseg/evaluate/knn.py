"""Weighted k-nearest-neighbour classification on frozen features, as DINO evaluates it."""

from collections.abc import Sequence

import numpy as np

from jaxseg.evaluate.neighbors import search
from jaxseg.evaluate.rank import check_features, check_labels


def knn_predict(
    train_NxD: np.ndarray,
    train_labels_N: np.ndarray,
    test_MxD: np.ndarray,
    *,
    k: int | Sequence[int] = 20,
    temperature: float = 0.07,
    classes: int,
) -> dict[int, np.ndarray]:
    """Classifies by the k training features of highest cosine similarity s.

    Each votes for its class with weight exp(s / temperature) (Wu et al., CVPR 2018; Caron et al.,
    ICCV 2021).

    Args:
      train_NxD, test_MxD: features.
      train_labels_N: int, 0 to `classes` - 1.
      k: one or several; one search serves them all.
      temperature: positive.
      classes: number of classes.

    Returns:
      {k: int [M], the predicted classes}; of equal votes the lowest class.

    Raises:
      ValueError: a k is not in 1 to N, or arrays do not fit or are not finite.
    """
    train = check_features(train_NxD, "train features")
    test = check_features(test_MxD, "test features")
    labels = check_labels(train_labels_N, len(train), classes=classes, what="train labels")
    ks = sorted({k} if isinstance(k, int | np.integer) else set(k))
    if not ks or not 1 <= ks[0] <= ks[-1] <= len(train):
        raise ValueError(f"k is {k}: allowed are 1 to {len(train)}, the number of train features")
    if not temperature > 0:
        raise ValueError(f"temperature is {temperature}: it must be positive")
    squared, rows = search(train, test, k=ks[-1])
    # s = 1 - squared / 2. The constant is left out, and the nearest has weight 1: whatever the
    # temperature, nothing overflows and some vote counts.
    weight = np.exp((squared[:, :1] - squared).astype(np.float64) / (2 * temperature))
    cell = np.arange(len(test))[:, None] * classes + labels[rows]

    def vote(k: int) -> np.ndarray:
        size = len(test) * classes
        votes = np.bincount(cell[:, :k].ravel(), weight[:, :k].ravel(), minlength=size)
        return votes.reshape(len(test), classes).argmax(axis=1)

    return {int(k): vote(k) for k in ks}


def knn_accuracy(
    train_NxD: np.ndarray,
    train_labels_N: np.ndarray,
    test_MxD: np.ndarray,
    test_labels_M: np.ndarray,
    *,
    k: int | Sequence[int] = 20,
    temperature: float = 0.07,
    classes: int,
) -> dict[int, float]:
    """{k: share of the test features that `knn_predict` classifies rightly}; same arguments and errors."""
    test_labels = check_labels(test_labels_M, len(test_MxD), classes=classes, what="test labels")
    options = dict(k=k, temperature=temperature, classes=classes)
    predictions = knn_predict(train_NxD, train_labels_N, test_MxD, **options)
    return {k: float((p == test_labels).mean()) for k, p in predictions.items()}


def confusion(labels: np.ndarray, predictions: np.ndarray, *, classes: int) -> np.ndarray:
    """Float [classes, classes]: share of the class of each row that was predicted as each column."""
    labels, predictions = np.asarray(labels), np.asarray(predictions)
    if labels.shape != predictions.shape or labels.ndim != 1 or not len(labels):
        raise ValueError(f"{labels.shape} labels and {predictions.shape} predictions: need two [N]")
    if min(labels.min(), predictions.min()) < 0 or max(labels.max(), predictions.max()) >= classes:
        raise ValueError(f"labels and predictions must be in 0 to {classes - 1}")
    counts = np.bincount(labels * classes + predictions, minlength=classes**2)
    counts = counts.reshape(classes, classes)
    return counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
