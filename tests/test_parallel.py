"""One device, eight devices, FSDP, and two processes of four give the same run."""

import json
import os
import socket
import subprocess
import sys

import numpy as np
import pytest
from tiny import DINO_OVERRIDES, ROOT, losses, run_main, tiny_arguments

CONFIG = "--config=configs/pac_objseg.py"
SETTINGS = dict(
    head__name="guided",
    data__limit=10,
    train__batch=8,
    train__steps=12,
    # Not adamw, which makes whole steps of gradients that are zero but for rounding; see below.
    optim__name="sgd",
    optim__lr=0.01,
    augment__flip=0.5,
    augment__brightness=0.2,
    eval__batch=6,  # the last batch is short, and no multiple of eight
    train__checkpoint_every=0,  # of eight devices one costs as much as ten steps
)


def _devices(count):
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={count}"
    return {"XLA_FLAGS": flags.strip()}


def _one_process(workdir, devices, **changes):
    environment = _devices(devices)
    arguments = tiny_arguments(**(SETTINGS | changes))
    done = run_main(CONFIG, f"--workdir={workdir}", *arguments, environment=environment)
    assert done.returncode == 0, done.stderr
    return losses(workdir), json.loads((workdir / "eval.json").read_text())


def _two_processes(workdir, config=CONFIG, settings=None):
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    settings = tiny_arguments(**SETTINGS) if settings is None else settings
    arguments = [f"--workdir={workdir}", "--distributed", *settings]
    processes = []
    for rank in range(2):
        environment = _devices(4) | {"JAX_CPU_COLLECTIVES_IMPLEMENTATION": "gloo"}
        join = [f"--coordinator=localhost:{port}", "--processes=2", f"--process={rank}"]
        process = subprocess.Popen(
            [sys.executable, "main.py", config, *arguments, *join],
            cwd=ROOT,
            env=os.environ | environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        processes.append(process)
    outputs = [process.communicate(timeout=300) for process in processes]
    for process, (_, errors) in zip(processes, outputs, strict=True):
        assert process.returncode == 0, errors
    return losses(workdir), json.loads((workdir / "eval.json").read_text())


def _assert_same(a, b):
    np.testing.assert_allclose(a[0], b[0], atol=1e-5)
    assert a[1].keys() == b[1].keys()
    for key, value in a[1].items():
        if isinstance(value, float):
            assert b[1][key] == pytest.approx(value, abs=1e-5), key


@pytest.fixture(scope="module")
def one_device(tmp_path_factory):
    return _one_process(tmp_path_factory.mktemp("one") / "w", 1)


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["replicated", "fsdp"])
def test_eight_devices_equal_one(one_device, tmp_path, layout):
    _assert_same(one_device, _one_process(tmp_path / "w", 8, sharding__params=layout))


@pytest.mark.slow
def test_two_processes_equal_one(one_device, tmp_path):
    _assert_same(one_device, _two_processes(tmp_path / "w"))


@pytest.mark.slow
def test_a_batch_smaller_than_the_devices(tmp_path):
    changes = dict(train__batch=3, train__steps=4, head__name="linear")
    one = _one_process(tmp_path / "one", 1, **changes)
    eight = _one_process(tmp_path / "eight", 8, **changes)
    _assert_same(one, eight)


DINO_CONFIG = "--config=configs/dino.py"
# The paper's recipe but for the sizes; ten images, so that the last rows of a batch are a new epoch.
# The teacher is fast and the learning rate high, so that both networks move far in twenty steps.
DINO_SETTINGS = tiny_arguments(
    DINO_OVERRIDES,
    data__limit=10,
    views__global_size=16,
    views__local_size=8,
    train__steps=20,
    train__checkpoint_every=0,
    optim__lr=0.005,
    dino__momentum=0.9,
)


def _teacher(workdir):
    """(loss by step; centre, teacher and student after the last)."""
    import jax

    from jaxseg import run

    state = run.restore(workdir, {}).state
    return losses(workdir), jax.tree.map(
        np.asarray, (state.extra["center"], state.extra["teacher"], state.params)
    )


def _leaves(tree):
    import jax

    return jax.tree.leaves(tree)


def _assert_same_teacher(a, b):
    """Losses and centre to 1e-5; of teacher and student all but one element in ten thousand.

    Where a gradient is zero but for rounding, Adam makes steps of it as long as of any other: for the keys'
    bias, which the softmax of attention cancels, always (it is left out), elsewhere rarely.
    """
    import jax

    np.testing.assert_allclose(a[0], b[0], atol=1e-5)
    np.testing.assert_allclose(a[1][0], b[1][0], atol=1e-5)
    apart = []
    both = zip(*(jax.tree_util.tree_leaves_with_path(x[1][1:]) for x in (a, b)), strict=True)
    for (path, x), (_, y) in both:
        if jax.tree_util.keystr(path).endswith("['qkv']['bias']"):
            x, y = (np.delete(z.reshape(3, -1), 1, axis=0) for z in (x, y))
        apart.append(np.abs(x - y).ravel())
    apart = np.concatenate(apart)
    assert np.mean(apart > 1e-5) < 1e-4 and apart.max() < 2e-4


def _pretrain(workdir, devices, *changes):
    environment = _devices(devices)
    arguments = [f"--workdir={workdir}", *DINO_SETTINGS, *changes]
    done = run_main(DINO_CONFIG, *arguments, environment=environment)
    assert done.returncode == 0, done.stderr
    return _teacher(workdir)


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory):
    return _pretrain(tmp_path_factory.mktemp("dino") / "w", 1)


@pytest.mark.slow
@pytest.mark.parametrize(
    "devices, changes",
    [(8, []), (8, ["--config.sharding.params=fsdp"]), (1, ["--config.train.accumulate=4"])],
    ids=["eight devices", "eight devices, fsdp", "four parts"],
)
def test_pretraining_is_the_same(pretrained, tmp_path, devices, changes):
    _assert_same_teacher(pretrained, _pretrain(tmp_path / "w", devices, *changes))


@pytest.mark.slow
def test_teacher_and_student_move(pretrained):
    """What the others compare is not what the run began with."""
    from jaxseg import run, schema

    config = schema.read_config("dino")
    schema.override(config, dict(x.removeprefix("--config.").split("=") for x in DINO_SETTINGS))
    begun, _ = run.make_plan(config).task.parameters(config.seed)
    center, teacher, student = pretrained[1]
    assert np.abs(center).max() > 3e-4
    for tree in (teacher, student):
        moved = [np.abs(x - y).max() for x, y in zip(_leaves(tree), _leaves(begun), strict=True)]
        assert max(moved) > 3e-4


@pytest.mark.slow
def test_batch_norm_in_the_head_on_eight_devices(tmp_path):
    norm = "--config.dino.batch_norm=True"
    one, eight = (_pretrain(tmp_path / str(n), n, norm, "--config.train.steps=6") for n in (1, 8))
    # Norms of one image each would change a loss by tenths; rounding grows to some 1e-5.
    np.testing.assert_allclose(one[0], eight[0], atol=1e-3)


@pytest.mark.slow
def test_pretraining_in_two_processes_is_the_same(pretrained, tmp_path):
    _two_processes(tmp_path / "w", DINO_CONFIG, DINO_SETTINGS)
    _assert_same_teacher(pretrained, _teacher(tmp_path / "w"))
