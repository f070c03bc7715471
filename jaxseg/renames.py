"""Keys and values of configs that once had other names: the one table, for stored runs and for commands.

Old names were ambiguous: `linear`, `folder` and `shapes` were two things each.
"""

from collections.abc import Callable, Mapping
from typing import Any

Flat = Mapping[str, Any]

KEYS: dict[str, str] = {"eval.threshold": "threshold"}


def _several(flat: Flat) -> bool:
    return flat["task"] in ("multiclass", "query")


def _always(flat: Flat) -> bool:
    return True


# (key, old value, new value, when), in the order in which they are applied.
VALUES: tuple[tuple[str, Any, Any, Callable[[Flat], bool]], ...] = (
    ("task", "segmentation", "binary", _always),
    ("task", "attention", "query", _always),
    ("data.name", "folder", "class_masks", _several),
    ("data.name", "folder", "binary_masks", _always),
    ("data.name", "shapes", "scenes", _several),
    ("head.name", "linear", "linear_norm", lambda flat: flat["task"] == "multiclass"),
)


def renamed(flat: Flat) -> tuple[dict[str, Any], dict[str, tuple[Any, Any]]]:
    """A flattened config in today's names.

    Returns:
      (`{"a.b": value}`, what was renamed: `{key: (old, new)}` of keys, and of values by their key).
    """
    found = {KEYS.get(key, key): value for key, value in flat.items()}
    changed: dict[str, tuple[Any, Any]] = {k: (k, KEYS[k]) for k in flat if k in KEYS}
    for key, old, new, when in VALUES:
        if found.get(key) == old and when(found):
            found[key], changed[key] = new, (old, new)
    return found, changed
