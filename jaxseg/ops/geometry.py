"""The fields of an example and what geometry does to each: the one table, for host and device.

Used by `data.source.fit`, by the cached flips and the batches of `data`, by `mask_augment` and by
`crops`. A pixel (row, column) covers [row, row + 1] x [column, column + 1].
"""

import dataclasses
from typing import Any

import numpy as np

VOID = 255


@dataclasses.dataclass(frozen=True)
class Field:
    """One field of an example.

    Attributes:
      dtype: of its array; empty for any.
      geometry: what moving, scaling, flipping and cropping the image does to it.
        "bilinear": it is resampled smoothly; axes 0 and 1 are those of the image.
        "nearest": it is resampled to the nearest pixel; its axes are those of the image.
        "boxes": N x 4, rows x0, y0, x1, y1 in pixels, which are moved, and clipped to what is seen;
          rows without an area, also those of which nothing is seen, are 0.
        "": nothing.
      padding: its value beyond the image (`fit` alone gives an image's canvas its mean colour) and in
        rows that fill up a batch.
    """

    dtype: str = ""
    geometry: str = ""
    padding: int = 0


FIELDS = {
    "image": Field("uint8", "bilinear"),
    "mask": Field("uint8", "nearest", VOID),
    # Below 2**24, since the device resamples in float32.
    "instances": Field("int32", "nearest"),
    "boxes": Field("float32", "boxes"),
    "category": Field("int32"),
}
MOST = {"uint8": 2**8 - 1, "int32": 2**24 - 1}  # of whole numbers that are resampled to the nearest
_OTHER = Field()


def field(name: str) -> Field:
    """The field `name`; those that the table does not have know no geometry."""
    return FIELDS.get(name, _OTHER)


def move_boxes(
    boxes_Nx4: Any,
    scale: tuple[Any, Any],
    shift: tuple[Any, Any],
    size: tuple[int, int],
    xp: Any = np,
) -> Any:
    """Boxes where (y, x) becomes `scale` * (y, x) + `shift`, clipped to (height, width) `size`.

    Args:
      boxes_Nx4: float32 rows x0, y0, x1, y1.
      scale: (y, x); negative for a flip.
      shift: (y, x).
      size: of what is seen.
      xp: numpy or jax.numpy, whichever the boxes are of.

    Returns:
      float32 N x 4, rows without an area 0.
    """
    sides = []
    for axis in (1, 0):  # x, y
        ends = boxes_Nx4[:, 1 - axis :: 2] * scale[axis] + shift[axis]
        sides.append(xp.clip(xp.sort(ends, axis=1), 0, size[axis]))
    (x0, x1), (y0, y1) = (side.T for side in sides)
    moved = xp.stack([x0, y0, x1, y1], axis=1).astype(np.float32)
    return xp.where(((x1 > x0) & (y1 > y0))[:, None], moved, np.float32(0))


def flip(name: str, value: Any, size: tuple[int, int], xp: Any = np) -> Any:
    """The field `name` of an example whose image, of (height, width) `size`, is mirrored left to right."""
    geometry = field(name).geometry
    if geometry in ("bilinear", "nearest"):
        return value[:, ::-1]
    if geometry == "boxes":
        return move_boxes(value, (1.0, -1.0), (0.0, float(size[1])), size, xp)
    return value
