"""Where images and masks come from and how they reach the device.

Everything is imported when it is used, so that `import jaxseg.data` costs nothing.
"""

import importlib
from typing import Any

# Public name -> the module that has it.
_WHERE = {
    **dict.fromkeys(("Kinds", "Scenes", "Shapes"), "drawn.shapes"),
    "Format": "format",
    "FORMATS": "formats",
    "BinaryMasks": "formats.binary_masks",
    "list_images": "formats.binary_masks",
    "ClassMasks": "formats.class_masks",
    "Coco": "formats.coco",
    "Images": "formats.images",
    "Tfds": "formats.tfds_records",
    **dict.fromkeys(
        ("DataError", "image_size", "read_image", "read_mask", "write_image", "write_mask"),
        "image_files",
    ),
    **dict.fromkeys(("Reader", "Reading"), "reader"),
    **dict.fromkeys(
        (
            *("Some", "Source", "as_splits", "categories_of", "check_function", "example_of"),
            *("fit", "names_of", "placement", "sizes_of", "spread", "working_size"),
        ),
        "source",
    ),
    **dict.fromkeys(("eval_batches", "example_index", "share", "train_batches"), "loader"),
}

__all__ = sorted(_WHERE)


def __getattr__(name: str) -> Any:
    # A class that is not above may be a format.
    where = _WHERE.get(name, "formats" if name[:1].isupper() else "")
    found = vars(importlib.import_module(f"{__name__}.{where}")) if where else {}
    if name not in found:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = found[name]
    return found[name]


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
