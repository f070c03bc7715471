"""Colours of classes."""

import numpy as np

VOID_COLOR = (224, 224, 192)  # as in PASCAL VOC


def palette(count: int = 256) -> np.ndarray:
    """The colours of PASCAL VOC's masks, uint8 `count x 3`: bits of the id, spread over the channels."""
    ids = np.arange(count)
    colors = np.zeros((count, 3), np.uint8)
    for bit in range(8):
        for channel in range(3):
            colors[:, channel] |= ((ids >> (3 * bit + channel) & 1) << (7 - bit)).astype(np.uint8)
    return colors


def colorize(mask: np.ndarray) -> np.ndarray:
    """uint8 `H x W` of class ids to uint8 `H x W x 3`; 255 is void."""
    colors = palette()
    colors[255] = VOID_COLOR
    return colors[mask]


def overlay_classes(
    image: np.ndarray, mask: np.ndarray, *, clear: int | None, opacity: float = 0.55
) -> np.ndarray:
    """The uint8 image with the colours of its classes; void and the id `clear` are left as they are."""
    tinted = (1 - opacity) * image + opacity * colorize(mask)
    return np.where(((mask == clear) | (mask == 255))[..., None], image, tinted).astype(np.uint8)
