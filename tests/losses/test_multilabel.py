"""Multi-label losses against the binary losses, one channel at a time."""

import functools

import jax
import numpy as np
import pytest

from jaxseg.losses import multiclass, multilabel, segmentation

BINARY = {name: getattr(segmentation, name) for name in ("bce", "dice", "focal", "jaccard")}
BINARY["lovasz_hinge"] = multiclass.lovasz_hinge


def _case(seed=0, shape=(2, 4, 5, 3)):
    rng = np.random.default_rng(seed)
    logits = 2 * rng.normal(size=shape).astype(np.float32)
    valid = rng.random(shape) < 0.7
    valid[0, ..., 1] = False  # a channel without a valid pixel is in no mean
    return logits, (rng.random(shape) < 0.4).astype(np.float32), valid


@functools.cache
def _loss(name):
    return jax.jit(multilabel.MULTILABEL[name])


@pytest.mark.parametrize("name", multilabel.MULTILABEL)
def test_equals_the_binary_loss_of_each_channel(name):
    case = logits, labels, valid = _case()
    binary = jax.jit(BINARY[name])
    values = np.array([binary(*(a[..., c] for a in case)) for c in range(3)])
    counted = valid.any((1, 2)).T
    want = [values[counted[:, i], i].mean() for i in range(2)]
    np.testing.assert_allclose(_loss(name)(*case), want, rtol=1e-5)


def test_cross_entropy_equals_its_formula():
    logits, labels, valid = _case(seed=1)
    p = 1 / (1 + np.exp(-logits.astype(np.float64)))
    value = -np.where(labels > 0, np.log(p), np.log(1 - p))
    channels = [[value[i, ..., c][valid[i, ..., c]] for c in range(3)] for i in range(2)]
    want = [np.mean([c.mean() for c in image if len(c)]) for image in channels]
    np.testing.assert_allclose(_loss("bce")(logits, labels, valid), want, rtol=1e-5)


@pytest.mark.parametrize("name", multilabel.MULTILABEL)
def test_void_and_all_void(name):
    logits, labels, valid = _case(seed=2)
    valid[1] = False
    poisoned = np.where(valid, logits, np.nan)

    def total(x):
        return multilabel.MULTILABEL[name](x, labels, valid).sum()

    value_and_grad = jax.jit(jax.value_and_grad(total))
    value, gradient = value_and_grad(poisoned)
    np.testing.assert_array_equal(value, value_and_grad(logits)[0])
    assert np.isfinite(gradient).all() and np.abs(gradient[0]).max() > 0
    np.testing.assert_array_equal(gradient[~valid], 0.0)
    np.testing.assert_array_equal(_loss(name)(poisoned, labels, valid)[1], 0.0)


def test_one_mask_serves_all_channels():
    logits, labels, valid = _case(seed=3)
    mask = valid[..., 0]
    spread = np.broadcast_to(mask[..., None], logits.shape)
    np.testing.assert_array_equal(
        _loss("dice")(logits, labels, mask), _loss("dice")(logits, labels, spread)
    )


def test_options_reach_the_binary_loss():
    case = _case(seed=4)
    assert not np.allclose(_loss("dice")(*case, smooth=0.1), _loss("dice")(*case))


def test_multilabel_loss_weighs_its_terms():
    case = _case(seed=5)
    weights = {"bce": 2.0, "lovasz_hinge": 0.5, "dice": 0.0}
    got = jax.jit(functools.partial(multilabel.multilabel_loss, weights=weights))(*case)
    want = 2 * _loss("bce")(*case) + 0.5 * _loss("lovasz_hinge")(*case)
    np.testing.assert_allclose(got, want, rtol=1e-6)


def test_unknown_losses_and_wrong_shapes_are_errors():
    logits, labels, valid = _case()
    with pytest.raises(ValueError, match=r"unknown losses \['ce'\]"):
        multilabel.multilabel_loss(logits, labels, valid, weights={"ce": 1.0})
    with pytest.raises(ValueError, match="need labels of that shape"):
        multilabel.bce(logits, labels[..., :2], valid)
