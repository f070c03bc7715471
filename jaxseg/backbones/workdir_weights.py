"""Reads the backbone out of the workdir of one of our own runs."""

import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxseg import backbones
from jaxseg.checksums import first_line, verified
from jaxseg.quiet import Quiet

log = logging.getLogger(__name__)


def read(workdir: Path) -> tuple[dict[str, Any], dict[str, Any], Any]:
    """Reads backbone parameters, those last saved: of a teacher or moving average where there is one.

    A damaged checkpoint is passed over for the one before, with a warning.

    Returns:
      (nested dict of NumPy arrays in the layout of `ViT` or `ResNet`, the running statistics of its
      batch norm or {}, its variant).

    Raises:
      ValueError: the folder is not a workdir, holds no checkpoint, or none that is whole.
    """
    description = workdir / "model.json"
    if not description.exists():
        raise ValueError(
            f"{workdir} is no workdir of a run: model.json is missing; allowed is also a file, .pth or "
            ".safetensors, in such a folder"
        )
    shape = json.loads(description.read_text())["variant"]
    if shape is None:
        raise ValueError(
            f"the backbone in {workdir} is none of ours: take it from the run, jaxseg.load(workdir, "
            "task=...).backbone()"
        )
    variant = backbones.from_json(shape)
    frozen, steps = workdir / "frozen", _steps(workdir)
    if not frozen.exists() and not steps:
        raise ValueError(f"{workdir} holds no checkpoint yet")
    saved = _newest(steps) if steps else {}
    kept = _restore(frozen) if frozen.exists() else {}
    extra = saved.get("extra") or {}
    trained = extra.get("teacher") or saved.get("average") or saved.get("params") or {}
    # A backbone may be frozen as a whole, or its first layers.
    params = trained.get("backbone", {}) | kept.get("backbone", {})
    return _arrays(params), _arrays(_statistics(extra)), variant


def _statistics(extra: dict[str, Any]) -> dict[str, Any]:
    """Those of the backbone that is read, in the extra state of whatever task it was."""
    if "statistics" in extra:  # rotation has no others
        return extra["statistics"]
    found = extra.get("teacher_statistics") or extra.get("batch_stats") or {}
    return found.get("backbone") or {}


def _arrays(tree: Any) -> Any:
    return jax.tree.map(np.asarray, tree)


def _newest(folders: Sequence[Path]) -> dict[str, Any]:
    *before, last = folders
    try:
        return _restore(last)
    except ValueError as error:
        if not before:
            raise
        log.warning("%s: trying the one before", error)
        return _newest(before)


def _restore(folder: Path) -> dict[str, Any]:
    with Quiet():
        import orbax.checkpoint as ocp

    try:
        with Quiet(), ocp.StandardCheckpointer() as checkpointer:
            return verified(folder, checkpointer.restore(folder.absolute()))
    except Exception as error:  # Orbax and TensorStore raise many kinds here.
        raise ValueError(f"{folder} cannot be read ({first_line(error)})") from error


def _steps(workdir: Path) -> list[Path]:
    steps = [p for p in (workdir / "checkpoints").glob("*") if p.name.isdigit()]
    return [p / "default" for p in sorted(steps, key=lambda p: int(p.name))]
