"""What is asked in training, and how answers are counted and joined."""

import jax
import jax.numpy as jnp
import numpy as np

from jaxseg.backbones.backbone import backbone
from jaxseg.heads import ClassAttention
from jaxseg.networks import Segmenter
from jaxseg.tasks import Query, query

NAMES = ("background", "cat", "dog", "car")


def _task(**changes):
    # No network is asked here but in the last test, which answers itself.
    return Query(Segmenter(backbone(variant="vit_micro8"), ClassAttention()), NAMES, **changes)


def test_half_of_the_questions_are_any_class_and_half_one_that_is_present():
    mask = np.zeros((2000, 2, 2), np.uint8)
    mask[:1000, 0, 0], mask[:1000, 1, 1] = 2, 255  # a dog, and void; then images of nothing
    draw = _task(questions=2).draw_inputs(jax.random.key(0), jnp.array(mask))
    asked = np.asarray(draw["query_B"])
    assert asked.shape == (2000, 2)
    shares = np.bincount(asked[:1000].ravel(), minlength=3) / 2000
    np.testing.assert_allclose(shares, [1 / 6, 1 / 2 + 1 / 6, 1 / 6], atol=0.03)
    np.testing.assert_allclose(np.bincount(asked[1000:].ravel()) / 2000, [1 / 3] * 3, atol=0.03)
    together = np.bincount(3 * asked[:1000, 0] + asked[:1000, 1], minlength=9).reshape(3, 3) / 1000
    np.testing.assert_allclose(together, np.outer(shares, shares), atol=0.04)  # independent


def test_classes_without_background_are_all_asked_for():
    assert query.queries(("sky", "road")) == (0, 1)
    assert query.queries(NAMES) == (1, 2, 3)


def test_the_loss_is_that_of_the_classes_asked_for():
    mask = jnp.array([[[1, 2], [255, 0]]], jnp.uint8)
    logits = jnp.array(np.random.default_rng(0).normal(size=(1, 2, 2, 2, 2)), jnp.float32)
    got = _task().image_losses(logits, {}, mask, query_B=jnp.array([[1, 2]]))
    dog, car = np.asarray(jax.nn.softmax(logits))[0]
    want = [dog[0, 0, 0], dog[0, 1, 1], dog[1, 1, 0], car[0, 0, 0], car[0, 1, 0], car[1, 1, 0]]
    np.testing.assert_allclose(got, [-np.log(want).mean()], rtol=1e-5)


def test_background_is_what_the_likeliest_class_leaves(monkeypatch):
    answers = np.array([[0.2, 0.9], [0.3, 0.6], [0.1, 0.95]])  # of three classes in two pixels
    task = _task()
    asked = jnp.array(answers).reshape(3, 1, 1, 2), jnp.zeros((3, 1, 1, 1))
    monkeypatch.setattr(Query, "ask", lambda *_: asked)
    logits, _ = task.logits({}, {})
    want = [[0.7, 0.2, 0.3, 0.1], [0.05, 0.9, 0.6, 0.95]]
    np.testing.assert_allclose(task.scores(logits)[0, 0], want, rtol=1e-5)
    np.testing.assert_array_equal(task.decide(logits)[0, 0], [0, 3])


def _iou(a, b):
    return (a & b).sum() / (a | b).sum() if (a | b).any() else 0.0


def test_answers_against_loops():
    rng = np.random.default_rng(3)
    mask = rng.integers(0, 3, (4, 5, 6))  # no car
    mask[3] = 0
    known = rng.random(mask.shape) < 0.8
    answers = rng.random((3, *mask.shape)) < 0.4
    asked, other, follows, pairs, course = 0.0, 0.0, 0, 0, []
    for i in range(4):
        both = either = 0
        for q in range(3):
            answer, truth = answers[q, i] & known[i], (mask[i] == q + 1) & known[i]
            both, either = both + (answer & truth).sum(), either + (answer | truth).sum()
            for r in range(3):
                rival = (mask[i] == r + 1) & known[i]
                if r != q and truth.any() and rival.any():
                    asked += _iou(answer, truth)
                    other += _iou(answer, rival)
                    follows += _iou(answer, truth) > _iou(answer, rival)
                    pairs += 1
        course.append(both / (either + 1))
    got = query.answer_counts(*map(jnp.array, (answers, mask, known)), values=(1, 2, 3))
    np.testing.assert_allclose(got["queries"], [asked, other, follows, pairs], rtol=1e-5)
    np.testing.assert_allclose(got["course_attention"], [sum(course), 4], rtol=1e-5)
