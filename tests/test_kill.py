"""Twenty SIGKILLs (`JAXSEG_KILLS`) at random moments leave a run bit-identical to one left alone."""

import json
import os
import random
import signal
import subprocess
import sys
import time

import pytest
from tiny import DINO_OVERRIDES, ROOT, losses, tiny_arguments

STEPS = 60
# A checkpoint costs as much as twenty of these steps, and a start as much as seven checkpoints.
LENGTH = dict(train__steps=STEPS, train__checkpoint_every=4)
COMMANDS = {
    "segmentation": [
        "--config=configs/pac_objseg.py",
        *tiny_arguments(
            head__name="guided",
            data__limit=8,
            augment__flip=0.5,
            optim__average=0.9,
            **LENGTH,
        ),
    ],
    "dino": [
        "--config=configs/dino.py",
        *tiny_arguments(
            DINO_OVERRIDES,
            views__global_size=16,
            views__local_size=8,
            views__local_count=1,
            train__batch=4,
            **LENGTH,
        ),
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


def _times(workdir):
    """When each step was logged that a run has made so far."""
    log = workdir / "metrics.jsonl"
    lines = log.read_text().splitlines(keepends=True) if log.exists() else []
    return [json.loads(line)["time"] for line in lines if line.endswith("\n")]


def _state(workdir):
    """(everything of the last checkpoint, the optimiser's state too, and what is restored; its step)."""
    import jax
    import orbax.checkpoint as ocp

    from jaxseg import run

    restored = run.restore(workdir, {})
    with ocp.StandardCheckpointer() as checkpointer:
        saved = checkpointer.restore(workdir / f"checkpoints/{restored.step}/default")["tree"]
    assert jax.tree.leaves(saved["opt_state"])
    return jax.device_get((saved, restored.variables)), restored.step


@pytest.mark.slow
@pytest.mark.parametrize("task", list(COMMANDS))
def test_twenty_kills_change_nothing(tmp_path, task):
    command, killed = COMMANDS[task], tmp_path / "killed"
    reference = _start(tmp_path / "reference", command)
    assert reference.wait(timeout=600) == 0, reference.stderr.read().decode()
    times = _times(tmp_path / "reference")
    assert len(times) == STEPS

    # At most a twentieth of the way at a time, so that there is something left to kill: by the clock,
    # or, where the machine has become faster, by the log.
    share, start_up = (times[-1] - times[0]) / KILLS, 0.0
    dice = random.Random(0)
    for number in range(KILLS):
        process, begin = _start(killed, command), time.monotonic()
        most = STEPS * (number + 1) / (KILLS + 1)
        while not start_up and process.poll() is None:
            # Of this start, not of the reference's, which has compiled everything. It ends in training.
            if _times(killed):
                start_up = time.monotonic() - begin
            time.sleep(0.01)
        moment = begin + dice.uniform((0.7 if number else 1.0) * start_up, start_up + share)
        while time.monotonic() < moment and len(_times(killed)) < most and process.poll() is None:
            time.sleep(0.01)
        if process.poll() is not None:
            pytest.fail(f"ended by itself, code {process.returncode}: {process.stderr.read()}")
        process.send_signal(signal.SIGKILL)
        process.wait()
    last = _start(killed, command)
    assert last.wait(timeout=600) == 0, last.stderr.read().decode()

    same = (tmp_path / "reference/eval.json", killed / "eval.json")
    assert same[0].read_bytes() == same[1].read_bytes()
    assert losses(tmp_path / "reference") == losses(killed)
    (expected, step), (found, other) = (_state(tmp_path / n) for n in ("reference", "killed"))
    assert step == other == STEPS
    import jax

    for a, b in zip(jax.tree.leaves(expected), jax.tree.leaves(found), strict=True):
        assert a.tobytes() == b.tobytes()
