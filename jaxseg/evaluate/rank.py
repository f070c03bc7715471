"""Arrays of features: what is checked of all of them, and how many dimensions they use."""

import numpy as np


def check_features(features_NxD: np.ndarray, what: str = "features") -> np.ndarray:
    """Returns the features as float32 [N, D].

    Raises:
      ValueError: they are not [N, D], empty, not numbers, or not finite.
    """
    features = np.asarray(features_NxD)
    if features.ndim != 2 or not features.size:
        raise ValueError(f"{what} have shape {features.shape}: need [N, D], neither of them 0")
    if features.dtype.kind not in "fiub" and features.dtype.name != "bfloat16":
        raise ValueError(f"{what} are of type {features.dtype}: need real numbers")
    features = features.astype(np.float32, copy=False)
    bad = np.flatnonzero(~np.isfinite(features).all(axis=1))
    if len(bad):
        raise ValueError(
            f"{what}: {len(bad)} of {len(features)} rows hold NaN or infinity, first row {bad[0]}"
        )
    return features


def check_labels(
    labels_N: np.ndarray, count: int, *, classes: int | None = None, what: str = "labels"
) -> np.ndarray:
    """Returns the labels as int64 [N].

    Raises:
      ValueError: they are not `count` integers in 0 to `classes` - 1.
    """
    labels = np.asarray(labels_N)
    if labels.shape != (count,) or labels.dtype.kind not in "iu":
        raise ValueError(
            f"{what} have shape {labels.shape} and type {labels.dtype}: need {count} integers, one "
            "for each row of the features"
        )
    if labels.min() < 0 or (classes is not None and labels.max() >= classes):
        most = "" if classes is None else f" to {classes - 1}"
        raise ValueError(f"{what} are in {labels.min()} to {labels.max()}: allowed are 0{most}")
    return labels.astype(np.int64)


def normalize(features_NxD: np.ndarray) -> np.ndarray:
    """Features of length 1; those of length 0 stay as they are."""
    length = np.linalg.norm(features_NxD, axis=1, keepdims=True)
    return features_NxD / np.maximum(length, 1e-12)


def rankme(features_NxD: np.ndarray, *, eps: float = 1e-7) -> float:
    """RankMe (Garrido et al., ICML 2023): exp of the entropy of the normalised singular values.

    Between 1 (all features on one line through 0) and min(N, D). It depends on N where N is not far
    above D, so compare it at equal N only. 0 if all features are 0.

    Raises:
      ValueError: see `check_features`.
    """
    values = singular_values(check_features(features_NxD))
    if not values[0]:
        return 0.0
    p = values / values.sum() + eps
    return float(np.exp(-(p * np.log(p)).sum()))


def embedding_std(features_NxD: np.ndarray) -> float:
    """Spread of the features on the sphere: 0 is complete collapse, 1 evenly in all directions.

    The mean over dimensions of the standard deviation of the L2-normalised features, times sqrt(D).

    Raises:
      ValueError: see `check_features`.
    """
    features = normalize(check_features(features_NxD).astype(np.float64))
    return float(features.std(axis=0).mean() * np.sqrt(features.shape[1]))


def singular_values(features_NxD: np.ndarray) -> np.ndarray:
    """Float64 [min(N, D)] in falling order, exact to about 1e-8 of the largest.

    By the smaller Gram matrix, many times as fast as the decomposition of the features.
    """
    x = features_NxD.astype(np.float64)
    gram = x.T @ x if x.shape[0] > x.shape[1] else x @ x.T
    return np.sqrt(np.linalg.eigvalsh(gram)[::-1].clip(min=0))
