"""Attention against loops over queries and positions, with masks, and its gradients."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxseg.ops.attention import additive, scaled_dot_product

B, Q, N, D, E, A = 2, 3, 7, 5, 4, 6


def _arrays(seed=0):
    rng = np.random.default_rng(seed)
    shapes = [(B, Q, D), (B, N, D), (B, N, E)]
    return tuple(rng.normal(size=s).astype(np.float32) for s in shapes)


def _additive_weights():
    rng = np.random.default_rng(9)
    shapes = {"w_query_DxA": (D, A), "w_key_CxA": (D, A), "v_A": (A,)}
    return {name: rng.normal(size=s).astype(np.float32) for name, s in shapes.items()}


FORMS = {"dot": scaled_dot_product, "additive": partial(additive, **_additive_weights())}


def _loop(form, query, key, value, mask=None, scale=None):
    """One weight after the other, in float64."""
    w = _additive_weights()
    out, weights = np.zeros((B, Q, E)), np.zeros((B, Q, N))
    for b in range(B):
        for i in range(Q):
            open_to = [n for n in range(N) if mask is None or mask[b, n]]
            for n in open_to:
                q, k = query[b, i].astype(float), key[b, n].astype(float)
                if form == "dot":
                    score = sum(q * k) * (1 / np.sqrt(D) if scale is None else scale)
                else:
                    score = sum(w["v_A"] * np.tanh(q @ w["w_query_DxA"] + k @ w["w_key_CxA"]))
                weights[b, i, n] = np.exp(score)
            if open_to:
                weights[b, i] /= weights[b, i].sum()
            for n in open_to:
                out[b, i] += weights[b, i, n] * value[b, n]
    return out, weights


def _mask():
    mask = np.random.default_rng(3).uniform(size=(B, N)) < 0.6
    assert mask.any(1).all() and not mask.all(1).any()
    return mask


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("masked", [False, True])
def test_as_a_loop(form, masked):
    arrays, mask = _arrays(), _mask() if masked else None
    expected = _loop(form, *arrays, mask=mask)
    for got, want in zip(FORMS[form](*arrays, mask_BxN=mask), expected, strict=True):
        assert got.dtype == jnp.float32
        np.testing.assert_allclose(got, want, atol=2e-6)


def test_scale_replaces_the_root_of_the_channels():
    expected = _loop("dot", *_arrays(), scale=0.1)
    got = scaled_dot_product(*_arrays(), scale=0.1)
    np.testing.assert_allclose(got[0], expected[0], atol=1e-6)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("masked", [False, True])
def test_weights_sum_to_one(form, masked):
    _, weights = FORMS[form](*_arrays(), mask_BxN=_mask() if masked else None)
    np.testing.assert_allclose(weights.sum(-1), 1.0, atol=1e-6)
    assert (np.asarray(weights) >= 0).all()


def test_scores_of_any_size_are_finite():
    query, key, value = _arrays()
    for mask in (None, _mask()):
        out, weights = scaled_dot_product(1e4 * query, 1e4 * key, value, mask_BxN=mask)
        assert np.isfinite(out).all()
        np.testing.assert_allclose(weights.sum(-1), 1.0, atol=1e-6)


@pytest.mark.parametrize("form", FORMS)
def test_masked_positions_count_nowhere(form):
    query, key, value = _arrays()
    mask = _mask()
    out, weights = FORMS[form](query, key, value, mask_BxN=mask)
    np.testing.assert_array_equal(np.asarray(weights)[~np.repeat(mask[:, None], Q, 1)], 0.0)
    key[~mask], value[~mask] = np.nan, np.inf
    spoiled, _ = FORMS[form](query, key, value, mask_BxN=mask)
    np.testing.assert_array_equal(spoiled, out)


@pytest.mark.parametrize("form", FORMS)
def test_nothing_to_attend_to_gives_zeros(form):
    mask = _mask()
    mask[1] = False

    def total(*arrays):
        out, weights = FORMS[form](*arrays, mask_BxN=mask)
        return out.sum(), (out, weights)

    grads, (out, weights) = jax.grad(total, argnums=(0, 1, 2), has_aux=True)(*_arrays())
    np.testing.assert_array_equal(out[1], 0.0)
    np.testing.assert_array_equal(weights[1], 0.0)
    for grad in grads:
        assert np.isfinite(grad).all()
        np.testing.assert_array_equal(grad[1], 0.0)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("masked", [False, True])
def test_gradients_by_finite_differences(form, masked):
    mask = _mask() if masked else None
    if masked:
        mask[0] = np.arange(N) == 2  # The only position: a weight of 1 that nothing can change.
    arrays, rng = _arrays(), np.random.default_rng(5)
    g_out, g_weights = rng.normal(size=(B, Q, E)), rng.normal(size=(B, Q, N))

    def loss(*arrays):
        out, weights = FORMS[form](*arrays, mask_BxN=mask)
        return (out * g_out).sum() + (weights * g_weights).sum()

    def slow(*arrays):
        out, weights = _loop(form, *arrays, mask=mask)
        return (out * g_out).sum() + (weights * g_weights).sum()

    grads = jax.jit(jax.grad(loss, argnums=(0, 1, 2)))(*arrays)
    for i, grad in enumerate(grads):
        direction = rng.normal(size=arrays[i].shape)
        step = [a.astype(float) for a in arrays], [a.astype(float) for a in arrays]
        step[0][i] += 1e-5 * direction
        step[1][i] -= 1e-5 * direction
        expected = (slow(*step[0]) - slow(*step[1])) / 2e-5
        np.testing.assert_allclose((grad * direction).sum(), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("form", FORMS)
def test_the_order_of_positions_and_queries_does_not_matter(form):
    query, key, value = _arrays()
    rng = np.random.default_rng(4)
    positions, queries, mask = rng.permutation(N), rng.permutation(Q), _mask()
    out, weights = FORMS[form](query, key, value, mask_BxN=mask)
    got, got_weights = FORMS[form](
        query[:, queries], key[:, positions], value[:, positions], mask_BxN=mask[:, positions]
    )
    np.testing.assert_allclose(got, out[:, queries], atol=1e-6)
    np.testing.assert_allclose(got_weights, weights[:, queries][:, :, positions], atol=1e-6)


def test_keys_and_queries_may_be_projected_beforehand():
    query, key, value = _arrays()
    w = _additive_weights()
    expected, _ = additive(query, key, value, **w)
    got, _ = additive(query @ w["w_query_DxA"], key @ w["w_key_CxA"], value, v_A=w["v_A"])
    np.testing.assert_allclose(got, expected, atol=1e-6)


def test_half_precision_is_attended_in_float32():
    half = [jnp.asarray(a, jnp.bfloat16) for a in _arrays()]
    got = scaled_dot_product(*half)
    expected = scaled_dot_product(*[a.astype(jnp.float32) for a in half])
    np.testing.assert_array_equal(got[0], expected[0])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"query": (B, D)}, "query"),
        ({"value": (B, N + 1, E)}, "value"),
        ({"key": (B, N, D + 1)}, "5 channels .* 6"),
        ({"mask": (B, N + 1)}, "mask"),
    ],
)
def test_shapes_that_do_not_fit_are_named(change, message):
    shapes = {"query": (B, Q, D), "key": (B, N, D), "value": (B, N, E), "mask": (B, N)} | change
    mask = jnp.ones(shapes.pop("mask"), bool)
    with pytest.raises(ValueError, match=message):
        scaled_dot_product(*(jnp.zeros(s) for s in shapes.values()), mask_BxN=mask)
    with pytest.raises(ValueError, match="boolean"):
        scaled_dot_product(*_arrays(), mask_BxN=jnp.ones((B, N)))
