"""Colours of classes, and of what a prediction found, missed or added, over images."""

import numpy as np

VOID_COLOR = (224, 224, 192)  # as in PASCAL VOC
# Colour-blind safe: orange where foreground was missed, blue where background was taken.
MISSED, ADDED, FOUND = (230, 159, 0), (0, 114, 178), (0, 200, 120)


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


def overlay(image: np.ndarray, prediction: np.ndarray, *, opacity: float = 0.5) -> np.ndarray:
    """The uint8 image with the predicted foreground tinted and outlined."""
    tinted = image.astype(np.float32)
    tinted[prediction] = (1 - opacity) * tinted[prediction] + opacity * np.array(FOUND)
    inside = np.pad(prediction, 1, mode="edge")
    core = inside[:-2, 1:-1] & inside[2:, 1:-1] & inside[1:-1, :-2] & inside[1:-1, 2:]
    tinted[prediction & ~core] = 255
    return tinted.astype(np.uint8)


def error_picture(image: np.ndarray, mask: np.ndarray, prediction: np.ndarray) -> np.ndarray:
    """Darkened uint8 image with missed foreground in orange and wrong foreground in blue."""
    picture = (image * 0.35).astype(np.uint8)
    picture[(mask == 1) & ~prediction] = MISSED
    picture[(mask == 0) & prediction] = ADDED
    return picture
