"""A run of seconds: the real config with few, small images."""

import json
import os
import subprocess
import sys
from pathlib import Path

from jaxseg.schema import read_config

ROOT = Path(__file__).resolve().parents[1]

OVERRIDES = {
    "data.size": (32, 32),
    "data.limit": 6,
    "backbone.weights": "",
    "backbone.layers": (-1,),
    "optim.name": "adamw",  # muon unrolls its iterations for each shape, which takes long to compile
    "head.name": "linear",
    # For tests of heads with convolutions: the PAC heads take half a minute to trace.
    "head.guided.width": 8,
    "head.guided.guide_widths": (4,),
    "head.guided.dropout": 0.0,
    "augment.flip": 0.0,
    "train.eval_every": 0,
    "train.steps": 6,
    "train.batch": 4,
    "train.log_every": 1,
    "train.checkpoint_every": 2,
    "eval.batch": 4,
    "eval.report": False,
}


def tiny_config(**changes):
    """The default config with `OVERRIDES` and then `changes` (`data__limit=3` is data.limit)."""
    config = read_config("pac_objseg")
    changes = {k.replace("__", "."): v for k, v in changes.items()}
    config.update_from_flattened_dict(OVERRIDES | changes)
    return config


# The same for pretraining: `configs/dino.py` with the smallest crops of the drawn images.
DINO_OVERRIDES = {
    "data.size": (32, 32),
    "data.limit": 12,
    "backbone.variant": "vit_micro8",
    "views.global_size": 32,
    "views.local_size": 16,
    "views.local_count": 2,
    "dino.outputs": 64,
    "dino.hidden": 32,
    "dino.bottleneck": 16,
    "eval.split": "test",
    "eval.limit": 8,
    "eval.batch": 6,
    "train.eval_every": 0,
    "train.steps": 6,
    "train.batch": 8,
    "train.log_every": 1,
    "train.checkpoint_every": 2,
}


def run_main(
    *arguments: str, environment=None, timeout: float = 300
) -> subprocess.CompletedProcess:
    """Runs `main.py` as a user does, in a process of its own."""
    return subprocess.run(
        [sys.executable, "main.py", *arguments],
        cwd=ROOT,
        env=os.environ | (environment or {}),
        capture_output=True,
        text=True,
        timeout=timeout,
    )


def tiny_arguments(overrides=OVERRIDES, **changes) -> list[str]:
    """The overrides, and then `changes`, as command-line arguments."""
    changes = {k.replace("__", "."): v for k, v in changes.items()}
    return [f"--config.{key}={value}" for key, value in (overrides | changes).items()]


def losses(workdir: Path) -> list[float]:
    """The logged training losses, by step."""
    rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [row["loss"] for row in rows if "loss" in row]
