"""Attention of queries over positions, with the weights returned.

For `B` examples, `Q` queries and `N` positions; several heads are several examples. Scores, softmax and
sums are in float32. A mask says which positions may be attended to (True): the others get a weight
of exactly 0 and never reach the result, whatever is stored there; where no position is left, weights
and results are 0.
"""

import jax
import jax.numpy as jnp

_HIGHEST = jax.lax.Precision.HIGHEST


def scaled_dot_product(
    query_BxQxD: jax.Array,
    key_BxNxD: jax.Array,
    value_BxNxE: jax.Array,
    *,
    scale: float | None = None,
    mask_BxN: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Attention by `softmax(scale q k^T) v` (Vaswani et al., NeurIPS 2017, eq. 1).

    Args:
      query_BxQxD: float.
      key_BxNxD: float.
      value_BxNxE: float.
      scale: 1 / sqrt(D) if None.
      mask_BxN: bool, the positions that may be attended to; all of them if None.

    Returns:
      (results `B x Q x E`, weights `B x Q x N`), float32.

    Raises:
      ValueError: the shapes do not fit together.
    """
    _check(query_BxQxD, key_BxNxD, value_BxNxE, mask_BxN)
    if query_BxQxD.shape[-1] != key_BxNxD.shape[-1]:
        raise ValueError(
            f"queries of {query_BxQxD.shape[-1]} channels cannot be compared with keys of "
            f"{key_BxNxD.shape[-1]}"
        )
    scale = query_BxQxD.shape[-1] ** -0.5 if scale is None else scale
    query, key = (x.astype(jnp.float32) for x in (query_BxQxD, _visible(key_BxNxD, mask_BxN)))
    scores = jnp.einsum("bqd,bnd->bqn", query * scale, key, precision=_HIGHEST)
    return _attend(scores, value_BxNxE, mask_BxN)


def additive(
    query_BxQxD: jax.Array,
    key_BxNxC: jax.Array,
    value_BxNxE: jax.Array,
    *,
    v_A: jax.Array,
    w_query_DxA: jax.Array | None = None,
    w_key_CxA: jax.Array | None = None,
    mask_BxN: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Attention by `softmax(v^T tanh(q W_q + k W_k))` (Bahdanau et al., ICLR 2015, A.1.2).

    Holds `B x Q x N x A` values at once: for few queries.

    Args:
      query_BxQxD: float.
      key_BxNxC: float.
      value_BxNxE: float.
      v_A: float.
      w_query_DxA: None where the queries are projected already.
      w_key_CxA: None where the keys are projected already.
      mask_BxN: bool, the positions that may be attended to; all of them if None.

    Returns:
      (results `B x Q x E`, weights `B x Q x N`), float32.

    Raises:
      ValueError: the shapes do not fit together.
    """
    _check(query_BxQxD, key_BxNxC, value_BxNxE, mask_BxN)
    query = _project(query_BxQxD, w_query_DxA)
    key = _project(_visible(key_BxNxC, mask_BxN), w_key_CxA)
    if not query.shape[-1] == key.shape[-1] == v_A.shape[-1]:
        raise ValueError(
            f"projected queries of {query.shape[-1]}, keys of {key.shape[-1]} and v of "
            f"{v_A.shape[-1]} channels: all three must be equal"
        )
    hidden = jnp.tanh(query[:, :, None] + key[:, None])
    scores = jnp.einsum("bqna,a->bqn", hidden, v_A.astype(jnp.float32), precision=_HIGHEST)
    return _attend(scores, value_BxNxE, mask_BxN)


def _check(query, key, value, mask) -> None:
    shapes = ", ".join(str(tuple(x.shape)) for x in (query, key, value))
    fits = all(x.ndim == 3 for x in (query, key, value))
    if not fits or query.shape[0] != key.shape[0] or key.shape[:2] != value.shape[:2]:
        raise ValueError(f"expected query [B, Q, D], key [B, N, D], value [B, N, E], got {shapes}")
    if mask is not None and (mask.shape != key.shape[:2] or mask.dtype != jnp.bool_):
        raise ValueError(
            f"expected a boolean mask of shape {tuple(key.shape[:2])}, "
            f"got {mask.dtype} of shape {tuple(mask.shape)}"
        )


def _project(x: jax.Array, w: jax.Array | None) -> jax.Array:
    x = x.astype(jnp.float32)
    return x if w is None else jnp.matmul(x, w.astype(jnp.float32), precision=_HIGHEST)


def _visible(x_BxNxC: jax.Array, mask_BxN: jax.Array | None) -> jax.Array:
    # Before any product: 0 times what is not finite would be NaN, forwards and backwards.
    return x_BxNxC if mask_BxN is None else jnp.where(mask_BxN[..., None], x_BxNxC, 0)


def _attend(
    scores_BxQxN: jax.Array, value_BxNxE: jax.Array, mask_BxN: jax.Array | None
) -> tuple[jax.Array, jax.Array]:
    if mask_BxN is None:
        weights = jax.nn.softmax(scores_BxQxN, axis=-1)
    else:
        mask = mask_BxN[:, None]
        lowest = jnp.finfo(jnp.float32).min
        top = jnp.where(mask, scores_BxQxN, lowest).max(axis=-1, keepdims=True)
        shifted = jnp.where(mask, scores_BxQxN - jax.lax.stop_gradient(top), 0)
        weights = jnp.where(mask, jnp.exp(shifted), 0)
        total = weights.sum(axis=-1, keepdims=True)
        weights = weights / jnp.where(total > 0, total, 1)
    value = _visible(value_BxNxE, mask_BxN).astype(jnp.float32)
    return jnp.einsum("bqn,bne->bqe", weights, value, precision=_HIGHEST), weights
