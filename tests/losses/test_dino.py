"""The loss and the centre against the reference's outputs, and against loops in NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from shared import shared_path

from jaxseg.backbones.backbone import backbone
from jaxseg.losses.dino import dino_loss, teacher_probabilities
from jaxseg.tasks import Dino, Facts
from jaxseg.train.schedules import staircase

VIEWS, BATCH = 6, 4


def _loss(student, teacher, center, temperature):
    student = student.reshape(VIEWS, BATCH, -1)
    probabilities = teacher_probabilities(teacher.reshape(2, BATCH, -1), center, temperature)
    return dino_loss(student, probabilities, temperature=0.1).mean()


@pytest.mark.parametrize("call", range(5))
def test_reference(call):
    golden = np.load(shared_path("golden/dino_loss.npz"))
    values = {k.removesuffix(f"_{call}"): golden[k] for k in golden if k.endswith(f"_{call}")}
    # Warm-up 0.04 -> 0.07 over 3 epochs.
    temperature = staircase(0.04, 0.07, 3, steps_per_epoch=1)(int(values["epoch"]))
    center = values["center_before"][0]
    arguments = (jnp.asarray(values["student"]), values["teacher"], center, temperature)
    loss, gradient = jax.value_and_grad(_loss)(*arguments)
    np.testing.assert_allclose(loss, values["loss"], rtol=1e-5)
    np.testing.assert_allclose(gradient, values["grad_student"], atol=1e-5)


def test_reference_centre_over_all_calls():
    """What the task makes of the centre, call after call, beginning with its own zeros."""
    golden = np.load(shared_path("golden/dino_loss.npz"))
    outputs = golden["center_after_0"].shape[-1]
    task = Dino(backbone(variant="vit_micro16"), outputs=outputs)
    task = task.with_facts(Facts((32, 32), examples=8), steps=5, batch=4)
    params = {"w": jnp.ones(3)}
    extra = {"teacher": params, "center": jnp.asarray(golden["center_before_0"][0])}
    for call in range(5):
        np.testing.assert_allclose(extra["center"], golden[f"center_before_{call}"][0], atol=1e-5)
        statistics = {
            "logits": golden[f"teacher_{call}"].mean(0),
            "probabilities": np.full(outputs, 1 / outputs),
            "direction": np.zeros(3),
            "scores": {"teacher_entropy": 0.0},
            "student_statistics": {},
            "teacher_statistics": {},
        }
        extra, _ = task.update_extra(extra, statistics, params, jnp.asarray(call))
        np.testing.assert_allclose(extra["center"], golden[f"center_after_{call}"][0], atol=1e-5)


def _slow_loss(student, teacher, center, t_student, t_teacher):
    """The definition, pair by pair."""

    def log_softmax(x):
        return x - x.max() - np.log(np.exp(x - x.max()).sum())

    values = np.zeros(student.shape[1])
    for b in range(student.shape[1]):
        pairs = [(i, v) for i in range(2) for v in range(len(student)) if i != v]
        for i, v in pairs:
            q = np.exp(log_softmax((teacher[i, b] - center) / t_teacher))
            values[b] -= (q * log_softmax(student[v, b] / t_student)).sum() / len(pairs)
    return values


@pytest.mark.parametrize("views", [2, 3, 5])
def test_definition(views):
    rng = np.random.default_rng(views)
    student, teacher = rng.normal(size=(views, 3, 7)), rng.normal(size=(2, 3, 7))
    center = rng.normal(size=7)
    probabilities = teacher_probabilities(jnp.asarray(teacher), jnp.asarray(center), 0.3)
    found = dino_loss(jnp.asarray(student), probabilities, temperature=0.2)
    np.testing.assert_allclose(found, _slow_loss(student, teacher, center, 0.2, 0.3), rtol=1e-4)


def test_the_teacher_gets_no_gradient():
    def loss(teacher):
        probabilities = teacher_probabilities(teacher, jnp.zeros(5), 0.1)
        return dino_loss(jnp.ones((2, 3, 5)), probabilities, temperature=0.1).sum()

    gradient = jax.grad(loss)(jnp.arange(30.0).reshape(2, 3, 5))
    np.testing.assert_array_equal(gradient, 0.0)
