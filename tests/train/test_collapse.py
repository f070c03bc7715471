"""Broken pretraining runs are named, and a healthy one raises nothing."""

import jax
import numpy as np
import pytest

from jaxseg.assembly import make_settings, make_task
from jaxseg.backbones.vit import Variant
from jaxseg.data import Shapes
from jaxseg.schema import read_config
from jaxseg.tasks import Facts
from jaxseg.train import loop
from jaxseg.train.collapse import MESSAGES, CollapseMonitor

STEPS, BATCH, EPOCH = 200, 16, 40
VARIANT = Variant("tiny", 8, 64, 3, 2, grid=4)

BROKEN = {
    "centre": {"dino.center_momentum": 1.0},
    "sharpening": {"dino.teacher_temperature": 1.0, "dino.warmup_teacher_temperature": 1.0},
    "learning rate": {"optim.lr": 0.1},
    "shared": {"dino.momentum": 0.0},
}


@pytest.fixture(scope="module")
def images():
    source = Shapes("", "train", size=(64, 64), length=EPOCH * BATCH // 4)
    return np.stack([source[i]["image"][::2, ::2] for i in range(len(source))])


def _run(images, changes, monitor):
    """`STEPS` steps of a small run; the last layer is let go after `EPOCH`."""
    config = read_config("dino:small")
    settings = {
        "views.local_count": 1,
        "dino.hidden": 64,
        "dino.outputs": 128,
        "dino.bottleneck": 32,
        "optim.lr": 1e-3,
        "optim.lr_batch": 0,
        "train.batch": BATCH,
    }
    config.update_from_flattened_dict(settings | changes)
    facts = Facts((32, 32), examples=EPOCH * BATCH)
    task = make_task(config, (), variant=VARIANT)
    task = task.with_facts(facts, steps=5 * STEPS, batch=BATCH)
    hold, hold_steps = task.held
    recipe = make_settings(config).recipe
    optimizer = recipe.optimizer(5 * STEPS, batch=BATCH, hold=hold, hold_steps=hold_steps)
    state = loop.make_state(task, jax.jit(task.init)(jax.random.key(0)), optimizer)
    step_fn = jax.jit(loop.make_train_step(task, optimizer, seed=0), donate_argnums=0)
    losses = []
    for step in range(1, STEPS + 1):
        rows = np.arange(BATCH, dtype=np.int32)
        batch = {
            "image": images[(rows + step * BATCH) % len(images)],
            "extent": np.full((BATCH, 2), 32, np.int32),
            "row": rows,
            "valid": np.ones(BATCH, bool),
        }
        state, scalars = step_fn(state, {}, batch)
        if step == 1 or step % 10 == 0:
            values = {k: float(v) for k, v in scalars.items()}
            losses.append(values["loss"])
            monitor(step, values)
    return losses


@pytest.mark.slow
@pytest.mark.parametrize("mode", list(BROKEN))
def test_broken_runs_are_named(images, mode, caplog):
    monitor = CollapseMonitor(student_temperature=0.1)
    _run(images, BROKEN[mode], monitor)
    assert monitor.found[0] == mode
    assert MESSAGES[mode] in caplog.text and "COLLAPSE" in caplog.text


@pytest.mark.slow
def test_a_healthy_run_raises_nothing(images):
    monitor = CollapseMonitor(student_temperature=0.1)
    _run(images, {}, monitor)
    assert monitor.found == []


HEALTHY = {
    "teacher_temperature": 0.04,
    "center_norm": 1.0,
    "teacher_distance": 0.05,
    "teacher_momentum": 0.996,
    "update_ratio": 1e-3,
    "teacher_kl": 0.1,
    "teacher_entropy": 0.6,
    "loss": 5.0,
}


def _feed(rows):
    monitor = CollapseMonitor(student_temperature=0.1)
    for step, changes in rows:
        monitor(step, HEALTHY | changes)
    return monitor.found


def test_the_dip_of_an_unfrozen_last_layer_is_no_collapse():
    """After an epoch of 1,251 steps the last layer is let go: outputs come close for some steps."""
    dip = {"teacher_kl": 1e-3, "loss": 9.18}
    rows = [(1200, {}), (1251, dip), (1260, dip), (1280, dip), (1300, {}), (1400, {})]
    assert _feed(rows) == []
    assert _feed([*rows, (1450, dip), (1500, dip)]) == ["uniform"]


def test_a_run_that_goes_on_remembers_how_far_its_outputs_were_apart():
    monitor = CollapseMonitor(student_temperature=0.1, highest=0.1)
    for step in (2000, 2050):
        monitor(step, HEALTHY | {"teacher_kl": 5e-3})
    assert monitor.found == ["uniform"]


@pytest.mark.parametrize("entropy, mode", [(0.999, "uniform"), (0.01, "constant")])
def test_outputs_that_become_equal(entropy, mode):
    fallen = {"teacher_kl": 1e-4, "teacher_entropy": entropy}
    assert _feed([(100, {}), (150, fallen), (170, fallen)]) == []  # a dip
    assert _feed([(100, {}), (150, fallen), (170, {}), (200, fallen)]) == []  # it came back
    assert _feed([(100, {}), (150, fallen), (200, fallen), (250, fallen)]) == [mode]


def test_outputs_that_never_came_apart():
    equal = {"teacher_kl": 1e-5, "teacher_entropy": 0.9999}
    assert _feed([(step, equal) for step in range(0, 900, 50)]) == []
    assert _feed([(step, equal) for step in range(0, 1100, 50)]) == ["uniform"]


def test_a_student_that_runs_away_is_named_whatever_its_outputs():
    away = {"teacher_distance": 1.2}
    assert _feed([(step, away) for step in range(10, 60, 10)]) == ["learning rate"]
    back = [(step, {} if step == 30 else away) for step in range(10, 60, 10)]
    assert _feed(back) == []


def test_a_slow_teacher_may_be_far_behind():
    """At 0.9995 it averages over 2,000 steps, at 0.996 over 250."""
    slow = {"teacher_distance": 1.5, "teacher_momentum": 0.9995}
    assert _feed([(step, slow) for step in range(3000, 3100, 10)]) == []
    far = slow | {"teacher_distance": 10.0}
    assert _feed([(step, far) for step in range(3000, 3100, 10)]) == ["learning rate"]
    # Early on it has had no time to fall behind.
    assert _feed([(step, slow) for step in range(100, 200, 10)]) == ["learning rate"]
