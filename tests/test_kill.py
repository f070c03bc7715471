"""Twenty SIGKILLs (`JAXSEG_KILLS`) at random moments leave a run bit-identical to one left alone."""

import os
import random
import signal
import subprocess
import sys
import time

import pytest
from tiny import DINO_OVERRIDES, ROOT, losses, tiny_arguments

COMMANDS = {
    "segmentation": [
        "--config=configs/pac_objseg.py",
        *tiny_arguments(
            head__name="guided",
            data__limit=8,
            train__steps=400,
            train__checkpoint_every=10,
            augment__flip=0.5,
            optim__average=0.9,
        ),
    ],
    "dino": [
        "--config=configs/dino.py",
        *tiny_arguments(DINO_OVERRIDES, train__steps=400, train__checkpoint_every=10),
    ],
}
KILLS = int(os.environ.get("JAXSEG_KILLS", "20"))  # every start takes seconds: CI has fewer


def _start(workdir, command):
    return subprocess.Popen(
        [sys.executable, "main.py", f"--workdir={workdir}", *command],
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
    )


def _state(workdir, task):
    """(everything of the last checkpoint that evaluation or a resumed run reads, its step)."""
    import jax

    from jaxseg import pretrain, run

    if task == "dino":
        restored = pretrain.restore(workdir, {})
        return jax.device_get(restored.state), restored.step
    restored = run.restore(workdir, {})
    return restored.host(restored.params), restored.step


@pytest.mark.slow
@pytest.mark.parametrize("task", list(COMMANDS))
def test_twenty_kills_change_nothing(tmp_path, task):
    command = COMMANDS[task]
    reference = _start(tmp_path / "reference", command)
    begin = time.monotonic()
    while not (tmp_path / "reference/metrics.jsonl").exists() and reference.poll() is None:
        time.sleep(0.05)
    start_up = time.monotonic() - begin
    assert reference.wait(timeout=600) == 0, reference.stderr.read().decode()
    whole = time.monotonic() - begin

    # At most a twentieth of the way at a time, so that there is something left to kill.
    latest = start_up + (whole - start_up) / KILLS
    dice = random.Random(0)
    for _ in range(KILLS):
        process = _start(tmp_path / "killed", command)
        try:
            process.wait(timeout=dice.uniform(0.4 * start_up, latest))
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            process.wait()
        else:
            pytest.fail(f"ended by itself, code {process.returncode}: {process.stderr.read()}")
    last = _start(tmp_path / "killed", command)
    assert last.wait(timeout=600) == 0, last.stderr.read().decode()

    same = (tmp_path / "reference/eval.json", tmp_path / "killed/eval.json")
    assert same[0].read_bytes() == same[1].read_bytes()
    assert losses(tmp_path / "reference") == losses(tmp_path / "killed")
    (expected, step), (found, other) = (_state(tmp_path / n, task) for n in ("reference", "killed"))
    assert step == other == 400
    import jax

    for a, b in zip(jax.tree.leaves(expected), jax.tree.leaves(found), strict=True):
        assert a.tobytes() == b.tobytes()
