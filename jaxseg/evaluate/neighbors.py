"""Nearest neighbours among features: the search, and the share of the same class."""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from jaxseg.evaluate.rank import check_features, check_labels, normalize

METRICS = ("cosine", "l2")
_PIECE = 2**25  # similarities in memory at a time


@functools.partial(jax.jit, static_argnames="k")
def _closest(bank_NxD, groups_N, queries_QxD, groups_Q, *, k: int) -> tuple[jax.Array, jax.Array]:
    products = jnp.matmul(queries_QxD, bank_NxD.T, precision=jax.lax.Precision.HIGHEST)
    squares_N, squares_Q = ((x * x).sum(axis=1) for x in (bank_NxD, queries_QxD))
    closeness = 2 * products - squares_N - squares_Q[:, None]
    if groups_N is not None:
        closeness = jnp.where(groups_Q[:, None] == groups_N, -jnp.inf, closeness)
    closeness, rows = jax.lax.top_k(closeness, k)
    return jnp.maximum(-closeness, 0), rows


def search(
    bank_NxD: np.ndarray,
    queries_QxD: np.ndarray,
    *,
    k: int,
    metric: str = "cosine",
    bank_groups: np.ndarray | None = None,
    query_groups: np.ndarray | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """The k rows of a bank nearest to each query, exact, in bounded memory, on the default device.

    Args:
      bank_NxD, queries_QxD: features.
      k: at most N.
      metric: "l2", or "cosine", which is l2 between L2-normalised features.
      bank_groups, query_groups: int [N] and [Q]; rows of the query's own group are passed over.

    Returns:
      (squared distances d2 [Q, k] float32, rising; rows [Q, k] int32). Cosine similarity is
      1 - d2 / 2: features of a collapsed or untrained network may be so alike that float32 cannot
      tell their similarities from 1, while their distances still hold every digit.

    Raises:
      ValueError: unknown metric, k out of range, or features that do not fit or are not finite.
    """
    if metric not in METRICS:
        raise ValueError(f"metric is {metric!r}: allowed are {', '.join(METRICS)}")
    bank, queries = check_features(bank_NxD, "bank"), check_features(queries_QxD, "queries")
    if bank.shape[1] != queries.shape[1]:
        raise ValueError(f"bank has {bank.shape[1]} dimensions, the queries {queries.shape[1]}")
    most = len(bank) - _largest_group(bank_groups, query_groups)
    if not 1 <= k <= most:
        raise ValueError(f"k is {k}: allowed are 1 to {most}, the rows there are to choose from")
    if metric == "cosine":
        bank, queries = normalize(bank), normalize(queries)
    # Around their mean the squares, whose differences the distances are, lose the fewest digits.
    mean = bank.mean(axis=0, dtype=np.float64).astype(np.float32)
    bank, queries = jnp.asarray(bank - mean), queries - mean
    groups = None if bank_groups is None else jnp.asarray(bank_groups)
    piece = min(len(queries), max(1, _PIECE // len(bank)))
    parts = []
    for start in range(0, len(queries), piece):
        # All pieces have one size, so that one program serves them.
        rows = np.arange(start, start + piece).clip(max=len(queries) - 1)
        own = None if groups is None else query_groups[rows]
        parts.append(jax.device_get(_closest(bank, groups, queries[rows], own, k=k)))
    distances, rows = (np.concatenate(part)[: len(queries)] for part in zip(*parts, strict=True))
    return distances, rows


def _largest_group(bank_groups, query_groups) -> int:
    if bank_groups is None:
        return 0
    values, counts = np.unique(bank_groups, return_counts=True)
    return int(counts[np.isin(values, query_groups)].max(initial=0))


def nearest(
    features_NxD: np.ndarray,
    queries: Sequence[int],
    *,
    k: int = 5,
    metric: str = "cosine",
    groups: np.ndarray | None = None,
) -> np.ndarray:
    """The k nearest rows to each query, nearest first, the query itself passed over.

    Args:
      features_NxD: features.
      queries: rows of it, [Q].
      k: neighbours of each.
      metric: "cosine" or "l2".
      groups: int [N], where more than the query itself shall be passed over: all rows of its group,
        such as the other crops of one image or the other frames of one film.

    Returns:
      int [Q, k], rows of the features.

    Raises:
      ValueError: a query is no row, lengths differ; see `search`.
    """
    features = check_features(features_NxD)
    queries = _check_rows(queries, len(features))
    groups = check_labels(np.arange(len(features)) if groups is None else groups, len(features))
    options = dict(k=k, metric=metric, bank_groups=groups, query_groups=groups[queries])
    return search(features, features[queries], **options)[1].astype(np.int64)


def neighbor_agreement(neighbors_QxK: np.ndarray, queries: Sequence[int], labels_N) -> float:
    """The share of neighbours that have their query's label: 0 to 1.

    Raises:
      ValueError: a query or a neighbour is no row, or lengths differ.
    """
    labels = check_labels(labels_N, len(labels_N))
    queries = _check_rows(queries, len(labels))
    neighbors = np.asarray(neighbors_QxK)
    _check_rows(neighbors.ravel(), len(labels))
    if neighbors.ndim != 2 or len(neighbors) != len(queries):
        raise ValueError(f"neighbours of shape {neighbors.shape} for {len(queries)} queries")
    return float((labels[neighbors] == labels[queries][:, None]).mean())


def _check_rows(rows: Sequence[int], count: int) -> np.ndarray:
    rows = np.asarray(rows)
    if rows.ndim != 1 or not len(rows) or rows.dtype.kind not in "iu":
        raise ValueError(f"queries have shape {rows.shape} and type {rows.dtype}: need row numbers")
    if rows.min() < 0 or rows.max() >= count:
        raise ValueError(
            f"rows are in {rows.min()} to {rows.max()}: there are only 0 to {count - 1}"
        )
    return rows
