"""Tasks that predict masks, made from objects: what binding finds and refuses, and their small parts."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxseg import losses
from jaxseg.data import DataError
from jaxseg.options import OptionError
from jaxseg.tasks import Binary, Multiclass, Query
from jaxseg.tasks.binary import coarse_labels

NAMES = ("background", "cat", "dog")
VOID = 255


class Points(nn.Module):
    """The smallest network: each pixel's logits follow from its colour."""

    outputs: int = 1

    @nn.compact
    def __call__(self, image):
        return nn.Dense(self.outputs, name="point")(image)


class Drawn:
    """A source in memory; mask values are those below `values`, and void."""

    def __init__(self, *, values=2, count=4, size=(8, 12), names=None, categories=None):
        rng = np.random.default_rng(0)
        self.masks = rng.integers(0, values, (count, *size)).astype(np.uint8)
        self.masks[:, 0] = VOID
        self.images = rng.integers(0, 256, (count, *size, 3), np.uint8)
        if names:
            self.names = names
        if categories:
            self.categories = categories

    def __len__(self):
        return len(self.images)

    def __getitem__(self, i):
        return {"image": self.images[i], "mask": self.masks[i]}


def _bind(task, source, **options):
    return task.bind(source, **(dict(steps=5, batch=2) | options))


def test_binding_tells_a_task_its_data():
    source = Drawn(values=3, names=NAMES, categories=("day", "night"))
    task = Multiclass(Points(3), NAMES, class_weights="inverse_log")
    bound = _bind(task, source)
    assert (bound.size, bound.facts.examples, bound.outputs) == ((8, 12), 4, 3)
    assert bound.facts.names == NAMES and bound.facts.categories == ("day", "night")
    shares = np.bincount(source.masks[source.masks != VOID]) / (source.masks != VOID).sum()
    np.testing.assert_allclose(bound.facts.class_weights, 1 / np.log(1.02 + shares), rtol=1e-5)
    assert task.facts is None  # it is as it was
    assert _bind(task, source, size=(4, 4)).size == (4, 4)
    found = _bind(Binary(Points()), Drawn(categories=("fish", "crab")))
    assert found.categories == ("fish", "crab") and found.names == ("background", "foreground")


@pytest.mark.parametrize(
    ("make", "source", "message"),
    [
        (
            lambda: Binary(Points(2)),
            Drawn(),
            r"Points gives logits \(1, 8, 12, 2\) .*: \(1, 8, 12, 1\)",
        ),
        (
            lambda: Multiclass(Points(2), NAMES),
            Drawn(values=3),
            "allowed for the classes background, c",
        ),
        (lambda: Binary(Points()), Drawn(names=NAMES), "background, cat, dog; Binary takes two"),
        (
            lambda: Multiclass(Points(3), NAMES),
            Drawn(values=3, names=("background", "dog", "cat")),
            "names is background, cat, dog; the data have background, dog, cat",
        ),
        (lambda: Query(Points(2), NAMES), Drawn(values=3), "Points has no head that takes query_B"),
        (
            lambda: Multiclass(Points(2), "ab"),
            Drawn(),
            "names is 'ab'; allowed: the names of the mask's",
        ),
        (lambda: Binary(Points(), losses="bec"), Drawn(), "losses has 'bec'; allowed: bce, dice"),
        (
            lambda: Binary(Points(), losses=lambda logits, labels, valid: logits),
            Drawn(),
            "which gives an array of .2, 8, 12. for 2 images",
        ),
    ],
)
def test_what_does_not_fit_is_named(make, source, message):
    with pytest.raises(OptionError, match=message):
        _bind(make(), source)


def test_sizes_are_multiples_of_the_networks():
    class Coarse(Points):
        multiple = 8

    assert _bind(Binary(Coarse()), Drawn(size=(17, 30))).size == (16, 24)
    with pytest.raises(DataError, match="positive multiples of 8"):
        _bind(Binary(Coarse()), Drawn(), size=(8, 12))


def test_other_data_are_scored_with_their_own_sizes_and_the_same_classes():
    task = _bind(Multiclass(Points(3), NAMES), Drawn(values=3, names=NAMES))
    other = task.for_source(Drawn(values=3, names=NAMES, size=(6, 6)), size=(0, 0))
    assert (other.size, other.facts.size) == ((6, 6), (8, 12))
    with pytest.raises(OptionError, match="the run was trained for background, cat, dog"):
        task.for_source(Drawn(names=("sky", "road")), size=(0, 0))


def test_a_loss_is_the_mean_of_the_valid_images():
    source = Drawn()
    task = _bind(Binary(Points(), losses={"bce": 1.0, "dice": 2.0}), source)
    params = task.init(jax.random.key(0))
    batch = {
        "image": jnp.asarray(source.images),
        "mask": jnp.asarray(source.masks),
        "row": jnp.arange(4),
        "valid": jnp.array([True, False, True, False]),
    }
    loss, statistics = task.loss(params, None, batch, jax.random.key(1), jnp.int32(0))
    assert statistics == {} and task.init_extra(params) is None
    kernel, bias = (np.asarray(params["point"][name]) for name in ("kernel", "bias"))
    p = 1 / (1 + np.exp(-(source.images / 255 @ kernel + bias)[..., 0]))
    want = []
    for i in (0, 2):
        known = source.masks[i] != VOID
        q, y = p[i][known], source.masks[i][known]
        bce = -np.log(np.where(y == 1, q, 1 - q)).mean()
        want.append(bce + 2 * (1 - (2 * (q * y).sum() + 1) / (q.sum() + y.sum() + 1)))
    assert float(loss) == pytest.approx(np.mean(want), rel=1e-5)


def test_tokens_are_foreground_where_any_pixel_is():
    mask = np.random.default_rng(1).choice(
        [0, 0, 0, 0, 1, VOID], (3, 6, 8), p=[0.22] * 4 + [0.06, 0.06]
    )
    mask[0, :2, :2], mask[1, :2, :2], mask[2, :2, :2] = VOID, [[VOID, 1], [VOID, VOID]], 0
    foreground, valid = coarse_labels(jnp.asarray(mask), 2)
    assert foreground.shape == valid.shape == (3, 3, 4)
    for b, i, j in np.ndindex(3, 3, 4):
        cell = mask[b, 2 * i : 2 * i + 2, 2 * j : 2 * j + 2]
        assert foreground[b, i, j] == (1 in cell)
        assert valid[b, i, j] == (set(cell.ravel().tolist()) != {VOID})


def test_a_coarse_head_is_trained_on_its_tokens():
    rng = np.random.default_rng(2)
    task = Binary(Points())
    mask = jnp.asarray(rng.choice([0, 1, VOID], (2, 4, 4)).astype(np.uint8))
    coarse = jnp.asarray(rng.normal(size=(2, 2, 2, 1)), jnp.float32)
    logits = jnp.zeros((2, 4, 4, 1))
    found = task.image_losses(logits, {"coarse": coarse}, mask)
    want = losses.BINARY["bce"](coarse[..., 0], *coarse_labels(mask, 2))
    np.testing.assert_allclose(found, want, rtol=1e-6)
    assert not np.allclose(found, task.image_losses(logits, {}, mask))


def test_auxiliary_logits_count_by_their_weight():
    rng = np.random.default_rng(3)
    task = Multiclass(Points(3), NAMES, auxiliary=0.25)
    mask = jnp.asarray(rng.choice([0, 1, 2, VOID], (2, 4, 4)).astype(np.uint8))
    one, other = (jnp.asarray(rng.normal(size=(2, 4, 4, 3)), jnp.float32) for _ in range(2))
    found = task.image_losses(one, {"auxiliary": other}, mask)
    want = task.image_losses(one, {}, mask) + 0.25 * task.image_losses(other, {}, mask)
    np.testing.assert_allclose(found, want, rtol=1e-6)


@pytest.mark.parametrize("threshold", [0.3, 0.5])
def test_decisions_at_the_threshold(threshold):
    task = Binary(Points(), threshold=threshold)
    chances = jnp.array([0.1, 0.29, 0.31, 0.49, 0.51, 0.9])
    logits = task.from_scores(chances)[:, None]
    np.testing.assert_allclose(task.scores(logits)[:, 0], chances, rtol=1e-5)
    np.testing.assert_array_equal(task.decide(logits), chances >= threshold)
    np.testing.assert_array_equal(task.mask_of(np.asarray(chances)[:, None]), chances >= threshold)
    assert task.decide(jnp.zeros((1, 1))) == 1  # a tie is foreground
    both = task.probabilities_of(np.asarray(chances)[:, None])
    np.testing.assert_allclose(both, np.stack([1 - chances, chances], -1), rtol=1e-6)


def test_classes_are_told_by_name():
    task = Multiclass(Points(3), NAMES)
    assert task.values_of(["dog", "background"]) == {"dog": 2, "background": 0}
    assert task.background == 0 and Multiclass(Points(2), ("sky", "road")).background is None
    with pytest.raises(
        OptionError, match="--classes has 'cow'; .* knows the classes background, cat"
    ):
        task.values_of(["cow"])
    with pytest.raises(OptionError, match="one class without a name"):
        Binary(Points()).values_of(["cat"])
    scores = np.array([[[0.2, 0.5, 0.3], [0.4, 0.35, 0.25]]])
    np.testing.assert_array_equal(task.mask_of(scores), [[1, 0]])
    np.testing.assert_array_equal(task.mask_of_value(scores, 1), [[1, 0]])
