"""Sums of losses: how they are given, and functions of one's own among them, against loops over images."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxseg import losses
from jaxseg.losses.weighted import weighted, weighted_sum
from jaxseg.options import OptionError


def squares(logits, labels, valid):
    """A value for each image."""
    return (valid * (logits - labels) ** 2).sum((1, 2)) / valid.sum((1, 2))


def one_number(logits, labels, valid):
    """The same of all images together."""
    return (valid * (logits - labels) ** 2).sum() / valid.sum()


class Steep:
    """A function with a state."""

    def __call__(self, logits, labels, valid):
        return jnp.where(valid, jnp.abs(logits - labels), 0).max((1, 2))


STEEP = Steep()
KNOWN = {"bce": losses.BINARY["bce"], "dice": losses.BINARY["dice"]}


def _case():
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 2, (3, 4, 5))
    valid = rng.random((3, 4, 5)) < 0.6
    # As in a mask: void is 255.
    return rng.normal(size=(3, 4, 5)).astype(np.float32), np.where(valid, labels, 255), valid


@pytest.mark.parametrize(
    ("given", "weights"),
    [
        ("bce", {"bce": 1}),
        (squares, {squares: 1}),
        (["bce", squares], {"bce": 1, squares: 1}),
        (("dice", "bce"), {"dice": 1, "bce": 1}),
        ([("bce", 2), (squares, 0.5)], {"bce": 2, squares: 0.5}),
        ({"bce": 2, "dice": 0}, {"bce": 2, "dice": 0}),
        ({squares: 0.5, "bce": np.float32(2)}, {squares: 0.5, "bce": 2}),
        ({"edges": squares}, {squares: 1}),
        ({"edges": (squares, 0.5), "steep": STEEP}, {squares: 0.5, STEEP: 1}),
        ({"edges": ("bce", 3)}, {"bce": 3}),
        (["bce", "bce", ("bce", 2)], {"bce": 4}),
    ],
)
def test_how_they_may_be_given(given, weights):
    assert weighted(given, KNOWN) == weights


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("focal", "losses has 'focal'; allowed: bce, dice, and functions of"),
        ({"focal": 0.0}, "losses has 'focal'"),
        (None, "losses is a NoneType; allowed: a name, a function, or several"),
        (3, "losses is a int"),
        ({"bce": -1}, "losses gives bce the weight -1; allowed: 0 or more"),
        ({squares: float("nan")}, "losses gives squares the weight nan"),
        ({"bce": float("inf")}, "losses gives bce the weight inf"),
        ({"bce": "2"}, "losses gives bce the weight '2'"),
        ({"bce": True}, "losses gives bce the weight True"),
        ({"bce": np.ones(2)}, "losses gives bce the weight array"),
        ({"bce": 0.0}, "allowed: at least one of a weight above 0"),
        ([], "allowed: at least one"),
        (lambda logits, labels: logits, "allowed: functions of \\(logits, labels, valid\\)"),
    ],
)
def test_what_is_refused(given, message):
    with pytest.raises(OptionError, match=message):
        weighted(given, KNOWN)


def test_functions_and_names_add_up():
    logits, labels, valid = _case()
    weights = {"bce": 2.0, "dice": 0.0, squares: 0.5, one_number: 3.0, STEEP: 0.25}
    got = jax.jit(functools.partial(weighted_sum, KNOWN, weights))(logits, labels, valid)
    assert got.shape == (3,) and got.dtype == jnp.float32
    for i in range(3):
        x, y = logits[i][valid[i]], labels[i][valid[i]]
        bce = -np.log(1 / (1 + np.exp(-np.where(y == 1, x, -x)))).mean()
        distance = np.abs(x - y)
        want = 2 * bce + (0.5 + 3) * (distance**2).mean() + 0.25 * distance.max()
        np.testing.assert_allclose(got[i], want, rtol=1e-5)


@pytest.mark.parametrize("loss", [squares, one_number, STEEP])
def test_an_image_without_a_valid_pixel_counts_nothing(loss):
    logits, labels, valid = _case()
    labels[1], valid[1] = 255, False

    def total(logits):
        values = weighted_sum(KNOWN, {loss: 1.0}, logits, labels, valid)
        return values.sum(), values

    gradient, values = jax.grad(total, has_aux=True)(logits)
    assert values[1] == 0 and np.isfinite(values).all() and (values[::2] > 0).all()
    np.testing.assert_array_equal(gradient[1], 0.0)
    assert np.isfinite(gradient).all() and np.any(gradient[0])


def test_labels_of_several_classes_are_shown_without_void():
    """A label of 255 would be no class; `logits` have one axis more."""
    _, labels, valid = _case()
    logits = np.random.default_rng(1).normal(size=(3, 4, 5, 2)).astype(np.float32)

    def hits(logits, labels, valid):
        chosen = jnp.take_along_axis(jax.nn.log_softmax(logits), labels[..., None], -1)[..., 0]
        return -jnp.where(valid, chosen, 0).sum((1, 2)) / valid.sum((1, 2))

    got = weighted_sum(losses.MULTICLASS, {hits: 1.0}, logits, labels, valid)
    want = losses.MULTICLASS["cross_entropy"](logits, labels, valid)
    np.testing.assert_allclose(got, want, rtol=1e-5)


@pytest.mark.parametrize(
    "wrong", [lambda x, *_: x, lambda x, *_: x.sum(0), lambda x, *_: x[:2, 0, 0]]
)
def test_a_function_of_another_shape_is_named(wrong):
    wrong.__name__ = "mine"
    with pytest.raises(
        OptionError, match="losses has mine, which gives an array of .* for 3 images"
    ):
        weighted_sum(KNOWN, {wrong: 1.0}, *_case())


def test_unknown_names_are_errors():
    with pytest.raises(ValueError, match=r"unknown losses \['ce'\]; allowed are \['bce', 'dice'\]"):
        weighted_sum(KNOWN, {"ce": 1.0}, *_case())


@pytest.mark.parametrize("name", ["dice", "focal"])
def test_of_two_losses_of_one_name_the_shape_tells(name):
    logits, labels, valid = _case()
    both = getattr(losses, name)
    np.testing.assert_array_equal(
        both(logits, labels, valid), losses.BINARY[name](logits, labels, valid)
    )
    several = np.stack([logits, -logits], -1)
    np.testing.assert_array_equal(
        both(several, labels, valid), losses.MULTICLASS[name](several, labels, valid)
    )
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        losses.nothing  # noqa: B018
