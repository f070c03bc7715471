"""Scores, as sums that merge by addition and are divided once at the end.

Its modules are imported when they are used.
"""

import importlib
from types import ModuleType

_MODULES = ("binary", "multiclass")


def __getattr__(name: str) -> ModuleType:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return importlib.import_module(f"{__name__}.{name}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_MODULES})
