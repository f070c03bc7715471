"""Whole DINO steps against a NumPy restatement with gradients by finite differences."""

import dataclasses
import functools
import math

import flax
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import erf

from jaxseg.assembly import make_settings
from jaxseg.backbones.backbone import backbone
from jaxseg.ops.crops import View, draw_views
from jaxseg.schema import read_config
from jaxseg.tasks import Dino, Facts
from jaxseg.tasks.dino import DinoViews
from jaxseg.train import loop

STEPS, BATCH, OUTPUTS, HELD = 4, 4, 7, 2
NONE = {"backbone": {}, "head": {}}  # no running statistics
# As `_task` asks for them.
VIEWS = (View(16, (0.4, 1.0)), View(16, (0.4, 1.0), solarize=0.2), View(8, (0.1, 0.4)))


class Pooled(nn.Module):
    """The smallest backbone: mean colour, then a linear layer."""

    @nn.compact
    def __call__(self, image, *, drop_keys_B=None, train=False):
        return {"cls": nn.Dense(5, name="embed")(image.mean((1, 2))), "patches": image}


def _task():
    views = DinoViews(
        global_size=16,
        local_size=8,
        local_scale=(0.1, 0.4),
        local_count=1,
        blur=(0.0, 0.0, 0.0),
        solarize=(0.0, 0.2, 0.0),
    )
    task = Dino(
        backbone(Pooled()),
        views,
        outputs=OUTPUTS,
        hidden=4,
        bottleneck=3,
        teacher_temperature=0.07,
        warmup_teacher_temperature=0.04,
        warmup_teacher_epochs=2,
        momentum=0.9,
        center_momentum=0.8,
        freeze_last_layer=1.0,
    )
    # Two steps an epoch.
    return task.with_facts(Facts((16, 12), examples=2 * BATCH), steps=STEPS, batch=BATCH)


def _optimizer(task):
    recipe = make_settings(read_config("dino")).recipe
    changes = dict(lr=0.02, lr_batch=0, warmup=0.25, final_lr=1e-3, clip_each=0.05)
    hold, steps = task.held
    assert steps == HELD
    return dataclasses.replace(recipe, **changes).optimizer(STEPS, hold=hold, hold_steps=steps)


def _params():
    """Large enough weights that gradients are far from rounding."""
    params = jax.device_get(_task().init(jax.random.key(0)))
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda x: rng.normal(0, 0.5, x.shape).astype(np.float32), params)


def _batches():
    rng = np.random.default_rng(1)
    for _ in range(STEPS):
        yield {
            "image": rng.integers(0, 256, (BATCH, 16, 12, 3), np.uint8),
            "extent": np.array([[16, 12], [9, 12], [16, 7], [16, 12]], np.int32),
            "row": np.arange(BATCH, dtype=np.int32),
            "valid": np.array([True, True, False, True]),
        }


@functools.cache
def _run(accumulate):
    task = _task()
    optimizer = _optimizer(task)
    step = jax.jit(loop.make_train_step(task, optimizer, seed=3, accumulate=accumulate))
    state = loop.make_state(task, _params(), optimizer)
    history = []
    for batch in _batches():
        state, scalars = step(state, {}, batch)
        history.append((jax.device_get(state), jax.device_get(scalars)))
    return history


# The restatement. Parameters are {path: float64 array}; nothing of jaxseg but the crops.


def _gelu(x):
    return x * 0.5 * (1 + erf(x / math.sqrt(2)))


def _network(p, image):
    x = image.mean((1, 2)) @ p["backbone/embed/kernel"] + p["backbone/embed/bias"]
    for i, name in enumerate(("mlp_0", "mlp_2", "mlp_4")):
        x = _gelu(x) if i else x
        x = x @ p[f"head/{name}/kernel"] + p[f"head/{name}/bias"]
    x = x / np.linalg.norm(x, axis=-1, keepdims=True)
    v = p["head/last_layer_v"]
    return x @ (v / np.linalg.norm(v, axis=0))


def _log_softmax(x):
    x = x - x.max(-1, keepdims=True)
    return x - np.log(np.exp(x).sum(-1, keepdims=True))


def _loss(p, teacher_logits, views, valid, center, tau):
    student = [_network(p, view) for view in views]
    total = []
    for i in range(2):
        q = np.exp(_log_softmax((teacher_logits[i] - center) / tau))
        total += [
            -(q * _log_softmax(student[v] / 0.1)).sum(-1) for v in range(len(views)) if v != i
        ]
    return np.mean(total, axis=0)[valid].mean()


def _gradient(f, p):
    result = {}
    for key, x in p.items():
        result[key] = np.zeros_like(x)
        for index in np.ndindex(x.shape):
            values = []
            for sign in (1, -1):
                moved = {**p, key: x.copy()}
                moved[key][index] += sign * 1e-5
                values.append(f(moved))
            result[key][index] = (values[0] - values[1]) / 2e-5
    return result


def _half_cosine(start, end, step, steps):
    return end + 0.5 * (start - end) * (1 + math.cos(math.pi * step / steps))


@functools.cache
def _restated():
    flat = flax.traverse_util.flatten_dict(_params(), sep="/")
    p = {k: v.astype(np.float64) for k, v in flat.items()}
    teacher, center = {k: v.copy() for k, v in p.items()}, np.zeros(OUTPUTS)
    moments = {k: (np.zeros_like(v), np.zeros_like(v), 0) for k, v in p.items()}
    mean, std = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])
    draw = jax.jit(functools.partial(draw_views, views=VIEWS))
    history = []
    for step, batch in enumerate(_batches()):
        rng = jax.random.fold_in(jax.random.key(3), step)
        keys = [jax.random.split(jax.random.fold_in(rng, row))[0] for row in batch["row"]]
        views = draw(jnp.stack(keys), batch["image"], batch["extent"])
        views = [(np.asarray(v, np.float64) - mean) / std for v in views]
        tau = 0.04 if step < 2 else 0.07
        logits = [_network(teacher, v) for v in views[:2]]
        valid = batch["valid"]
        f = lambda p: _loss(p, logits, views, valid, center, tau)  # noqa: B023, E731
        loss, gradient = f(p), _gradient(f, p)
        lr = 0.02 if step == 0 else _half_cosine(0.02, 1e-3, step - 1, STEPS - 1)
        decay = _half_cosine(0.04, 0.4, step, STEPS)
        for key, g in gradient.items():
            g = g * min(1.0, 0.05 / (np.linalg.norm(g) + 1e-6))
            if "last_layer" in key and step < HELD:
                continue
            m, v, count = moments[key]
            m, v, count = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g * g, count + 1
            moments[key] = m, v, count
            update = m / (1 - 0.9**count) / (np.sqrt(v / (1 - 0.999**count)) + 1e-8)
            p[key] = p[key] - lr * (update + (decay * p[key] if p[key].ndim > 1 else 0.0))
        momentum = _half_cosine(0.9, 1.0, step, STEPS)
        teacher = {k: momentum * teacher[k] + (1 - momentum) * p[k] for k in p}
        center = 0.8 * center + 0.2 * np.concatenate([x[valid] for x in logits]).mean(0)
        history.append((loss, {k: v.copy() for k, v in p.items()}, teacher, center))
    return history


@pytest.mark.parametrize("accumulate", [1, 2, 4])
def test_steps_against_numpy(accumulate):
    for (state, scalars), (loss, p, teacher, center) in zip(
        _run(accumulate), _restated(), strict=True
    ):
        assert float(scalars["loss"]) == pytest.approx(loss, abs=1e-5)
        np.testing.assert_allclose(state.extra["center"], center, atol=1e-5)
        for found, expected in ((state.params, p), (state.extra["teacher"], teacher)):
            found = flax.traverse_util.flatten_dict(found, sep="/")
            for key, value in found.items():
                np.testing.assert_allclose(value, expected[key], atol=2e-4, err_msg=key)


def test_the_last_layer_and_its_moments_rest_at_first():
    before = _params()["head"]["last_layer_v"]
    for step, (state, _) in enumerate(_run(1)):
        leaves = jax.tree_util.tree_leaves_with_path(state.opt_state)
        moments = [x for path, x in leaves if "last_layer_v" in jax.tree_util.keystr(path)]
        assert len(moments) == 2  # Adam's mean and variance
        still = np.array_equal(state.params["head"]["last_layer_v"], before)
        assert still == all(not np.any(m) for m in moments) == (step < HELD)
        before = before if still else None


def test_parts_of_a_batch_change_nothing():
    whole, parts = _run(1), _run(4)
    for (a, _), (b, _) in zip(whole, parts, strict=True):
        for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
            np.testing.assert_allclose(x, y, atol=1e-5)


def test_views_of_one_size_go_through_together():
    task, params = _task(), _params()
    views = [
        jax.random.uniform(jax.random.key(i), (3, v.size, v.size, 3)) for i, v in enumerate(VIEWS)
    ]
    logits, features, _ = task.project(params, NONE, views)
    assert logits.shape == (3, 3, OUTPUTS) and features.shape == (3, 3, 5)
    for i, view in enumerate(views):
        alone, _, _ = task.project(params, NONE, [view])
        np.testing.assert_allclose(alone[0], logits[i], atol=1e-6)
