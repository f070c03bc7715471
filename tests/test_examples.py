"""The examples, as users run them: started, killed, started again, and used in a new process."""

import os
import random
import runpy
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from tiny import ROOT, losses

import jaxseg
from jaxseg.train.writers import read_metrics

SCRIPT = ROOT / "examples" / "own_parts.py"
STEPS = 600


def _start(workdir, *options):
    # The package that is tested, from wherever it comes.
    path = os.pathsep.join(
        [str(Path(jaxseg.__file__).parents[1]), os.environ.get("PYTHONPATH", "")]
    )
    return subprocess.Popen(
        [sys.executable, str(SCRIPT), f"--workdir={workdir}", *options],
        cwd=workdir.parent,
        env=os.environ | {"PYTHONPATH": path},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def _ended(process):
    out, err = process.communicate(timeout=600)
    assert process.returncode == 0, err
    return out.splitlines()[-1]


def _logged(workdir):
    """The last step that was logged."""
    return max((row["step"] for row in read_metrics(workdir)), default=-1)


def _state(workdir, monkeypatch):
    """What was saved last, read with the objects of the script."""
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), f"--workdir={workdir}", "--predict"])
    task = runpy.run_path(str(SCRIPT))["task"]
    run = jaxseg.load(workdir, task=task)
    return run.host(run.state)


def test_examples_are_short():
    assert len(SCRIPT.read_text().splitlines()) <= 60


@pytest.mark.slow
def test_own_parts_survive_a_kill_at_a_random_moment(tmp_path, monkeypatch):
    steps = f"--steps={STEPS}"
    reference, killed = tmp_path / "reference", tmp_path / "killed"
    said = _ended(_start(reference, steps))
    assert said.startswith(f"mIoU after {STEPS} steps: ")

    for _ in range(5):
        process = _start(killed, steps)
        moment = random.randrange(STEPS * 3 // 4)
        while _logged(killed) < moment and process.poll() is None:
            time.sleep(0.01)
        time.sleep(random.uniform(0, 0.1))
        process.send_signal(signal.SIGKILL)
        if process.wait() == -signal.SIGKILL:
            break
        shutil.rmtree(killed)  # it was faster
    else:
        pytest.fail("it always ended first")
    assert not (killed / "eval.json").exists()
    assert _ended(_start(killed, steps)) == said

    assert (killed / "eval.json").read_bytes() == (reference / "eval.json").read_bytes()
    assert losses(killed) == losses(reference)
    expected, found = (_state(workdir, monkeypatch) for workdir in (reference, killed))
    for a, b in zip(*map(jax.tree.leaves, (expected, found)), strict=True):
        np.testing.assert_array_equal(a, b)

    share = float(_ended(_start(killed, "--predict")).split("%")[0])
    assert 80 < share <= 100
    process = _start(reference, "--steps=100")
    assert f"run.steps: {STEPS} there, 100 now" in process.communicate(timeout=600)[1]
