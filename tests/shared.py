"""Where the tests find the reference outputs, weights and real data that are not part of the project."""

import os
from pathlib import Path

import pytest

_ROOT = Path(__file__).resolve().parents[1]


def shared_path(relative: str) -> Path:
    """Returns `JAXSEG_SHARED`/`relative` (default `../shared`), or skips the calling test if absent."""
    path = Path(os.environ.get("JAXSEG_SHARED", _ROOT.parent / "shared")) / relative
    if not path.exists():
        pytest.skip(f"{path} is absent: set JAXSEG_SHARED to the folder that holds {relative}")
    return path
