"""Reads the backbone out of the workdir of one of our own runs."""

import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from jaxseg.models import backbones


def read(workdir: Path) -> tuple[dict[str, Any], backbones.AnyVariant]:
    """Reads backbone parameters, those last saved: of a teacher or moving average where there is one.

    Returns:
      (nested dict of NumPy arrays in the layout of `ViT`, its variant).

    Raises:
      ValueError: the folder is not a workdir, holds no checkpoint, or the checkpoint is damaged.
    """
    description = workdir / "model.json"
    if not description.exists():
        raise ValueError(f"{workdir} is no workdir of a run: model.json is missing")
    variant = backbones.from_json(json.loads(description.read_text())["variant"])
    folders = [workdir / "frozen"] if (workdir / "frozen").exists() else _steps(workdir)
    if not folders:
        raise ValueError(f"{workdir} holds no checkpoint yet")
    try:
        with ocp.StandardCheckpointer() as checkpointer:
            tree = checkpointer.restore(folders[-1].absolute())["tree"]
    except Exception as error:  # Orbax and TensorStore raise many kinds here.
        raise ValueError(f"{folders[-1]} cannot be read: {error}") from error
    if "backbone" in tree:  # a frozen copy, which is parameters alone
        params = tree
    elif "teacher" in (tree.get("extra") or {}):
        params = tree["extra"]["teacher"]
    else:
        params = tree.get("average") or tree["params"]
    return jax.tree.map(np.asarray, params["backbone"]), variant


def _steps(workdir: Path) -> list[Path]:
    steps = [p for p in (workdir / "checkpoints").glob("*") if p.name.isdigit()]
    return [p / "default" for p in sorted(steps, key=lambda p: int(p.name))]
