"""What identifies parameters."""

import hashlib
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np


def params_digest(params: Mapping[str, Any]) -> str:
    """sha256 over the bytes of all tensors in the order of their paths; empty without any."""
    if not jax.tree.leaves(params):
        return ""
    digest = hashlib.sha256()
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        digest.update(jax.tree_util.keystr(path).encode() + np.ascontiguousarray(leaf).tobytes())
    return digest.hexdigest()
