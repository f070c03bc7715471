"""Images to masks on self-supervised features, in JAX.

Everything below is imported when it is used, so that `import jaxseg` costs nothing.
"""

import importlib
from typing import Any

__version__ = "0.2.0"

# Public name -> the module that has it; a module of this package has itself.
_WHERE = {
    "backbone": "backbones.backbone",
    "Backbone": "backbones.backbone",
    "Segmenter": "networks.segmenter",
    "Network": "networks.network",
    "Augmentation": "ops.mask_augment",
    "Reading": "data.reader",
    "Intervals": "train.loop",
    "Recipe": "train.optim",
    "restart_with_huge_pages": "huge_pages",
    **dict.fromkeys(("Run", "fit", "load"), "run"),
}
_MODULES = ("backbones", "data", "heads", "losses", "metrics", "networks", "ops", "tasks")

__all__ = sorted([*_WHERE, *_MODULES])


def __getattr__(name: str) -> Any:
    if name in _WHERE:
        value = getattr(importlib.import_module(f"{__name__}.{_WHERE[name]}"), name)
    elif name in _MODULES:
        value = importlib.import_module(f"{__name__}.{name}")
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
