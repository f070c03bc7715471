"""Pure functions on arrays: no parameters, no config, no state.

Its modules are imported when they are used.
"""

import importlib
from types import ModuleType

_MODULES = (
    "attention",
    "boundary",
    "conv",
    "crops",
    "geometry",
    "mask_augment",
    "pac",
    "pool",
    "resize",
)


def __getattr__(name: str) -> ModuleType:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return importlib.import_module(f"{__name__}.{name}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_MODULES})
