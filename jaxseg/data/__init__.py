"""Where images and masks come from and how they reach the device."""

from jaxseg.data.formats.binary_masks import Folder, list_images
from jaxseg.data.image_files import (
    DataError,
    image_size,
    read_image,
    read_mask,
    write_image,
    write_mask,
)
from jaxseg.data.loader import eval_batches, example_index, share, train_batches
from jaxseg.data.source import Source, create, fit, placement, working_size

__all__ = [
    "DataError",
    "Folder",
    "Source",
    "create",
    "eval_batches",
    "example_index",
    "fit",
    "image_size",
    "list_images",
    "placement",
    "read_image",
    "read_mask",
    "share",
    "train_batches",
    "working_size",
    "write_image",
    "write_mask",
]
