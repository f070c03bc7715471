"""Image files become uint8 RGB, binary masks {0, 1, 255}, whatever form they are stored in."""

import contextlib
import math
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO

import numpy as np
from PIL import ExifTags, Image

from jaxseg.ops.geometry import VOID

SUFFIXES = (
    *(".jpg", ".jpeg", ".png", ".bmp", ".gif", ".tif", ".tiff", ".webp", ".jp2", ".jfif"),
    *(".ppm", ".pgm", ".pbm", ".avif"),
)
_BACKDROP = 128  # what shows through transparent pixels: about the mean that networks subtract

_TRANSPOSES = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


class DataError(ValueError):
    """Input data that cannot be used: says in which file, what was found and what is allowed."""


def is_image(path: Path) -> bool:
    """Whether the name is that of a visible image file (`.DS_Store` and `._a.jpg` are not)."""
    return path.suffix.lower() in SUFFIXES and not path.name.startswith(".") and path.is_file()


def read_image(
    path: str | os.PathLike,
    stream: IO[bytes] | None = None,
    *,
    at_least: tuple[int, int] | None = None,
) -> np.ndarray:
    """Reads a picture as uint8 HxWx3 RGB, upright (EXIF orientation applied).

    From the file, or from a `stream` of its bytes; then `path` is its name in messages.

    Grey is repeated, 16-bit is scaled to 8-bit, CMYK and palettes are converted, and transparent
    pixels are laid over mid-grey. Of several frames the first is read.

    With `at_least` = (height, width) a JPEG may come out at 1/2, 1/4 or 1/8 of its size, the smallest
    that is no smaller than what fits into it, which saves time: half, for a photo of twice the size.

    Raises:
      DataError: if the file is missing, truncated, no image, or of float pixels.
    """
    return decode(path, to_rgb, stream, at_least)


def image_size(path: str | os.PathLike) -> tuple[int, int]:
    """Returns (height, width) as `read_image` would, from the header alone.

    Raises:
      DataError: if the file is missing or has no image header.
    """
    with opened(path) as image:
        width, height = image.size
        return (width, height) if _orientation(image) in (5, 6, 7, 8) else (height, width)


def read_mask(
    path: str | os.PathLike, *, values: str = "auto", threshold: int | None = None
) -> np.ndarray:
    """Reads a binary mask as uint8 HxW of 0 (background), 1 (foreground) and 255 (void).

    The values are those of the first channel, or the index of a palette image.

    Args:
      path: a lossless image, e.g. PNG.
      values: what they mean. "0/255": 255 is foreground. "0/1": class ids, 255 is void. "auto"
        decides for each file: ids if a 1 occurs, else 0/255. So a file of only 0 and 255 has
        foreground and no void, and one of only 255 is all foreground; where ids come with void,
        and some files hold no 1, say "0/1".
      threshold: if given, foreground is every value >= threshold (soft or JPEG masks) instead.

    Raises:
      DataError: if the file is unreadable or holds other values.
    """
    raw = decode(path, lambda image: to_values(image, path))
    return binary_mask(raw, path, values=values, threshold=threshold)


def binary_mask(
    raw: np.ndarray, path: str | os.PathLike, *, values: str = "auto", threshold: int | None = None
) -> np.ndarray:
    """Makes the mask that `read_mask` describes of stored integers; `path` is for messages."""
    if values not in ("auto", "0/255", "0/1"):
        raise DataError(f"mask values {values!r}: allowed are 'auto', '0/255', '0/1'")
    if threshold is not None:
        return (raw >= threshold).astype(np.uint8)
    found = np.unique(raw)
    if values == "auto":
        values = "0/1" if 1 in found else "0/255"
    allowed = (0, 1, VOID) if values == "0/1" else (0, 255)
    if not np.isin(found, allowed).all():
        raise DataError(_unexpected(path, found))
    mask = raw.astype(np.uint8)
    return mask if values == "0/1" else mask // 255


def read_pair(image_path: Path, mask_path: Path, **mask_options) -> tuple[np.ndarray, np.ndarray]:
    """Reads an image and its mask (see `read_image`, `read_mask`), of the same size.

    Raises:
      DataError: also if the sizes differ.
    """
    image, mask = read_image(image_path), read_mask(mask_path, **mask_options)
    check_sizes(image_path, image.shape[:2], mask_path, mask.shape)
    return image, mask


def check_sizes(
    image_path: Path, image_size: tuple[int, int], mask_path: Path, mask_size: tuple[int, int]
) -> None:
    """Raises a `DataError` that names both files if the (height, width) pairs differ."""
    if tuple(image_size) != tuple(mask_size):
        (h, w), (mask_h, mask_w) = image_size, mask_size
        raise DataError(
            f"{mask_path} is {mask_w}x{mask_h} but its image {image_path} is {w}x{h} "
            "(width x height): a mask must have its image's size"
        )


def write_mask(path: str | os.PathLike, mask: np.ndarray) -> None:
    """Writes a bool or {0, 1} HxW mask as a grey 0/255 PNG, whole or not at all."""
    write_image(path, (np.asarray(mask) != 0).astype(np.uint8) * 255)


def write_image(
    path: str | os.PathLike, image: np.ndarray, *, palette: np.ndarray | None = None
) -> None:
    """Writes a uint8 HxW or HxWx3 array in the format of the suffix, whole or not at all.

    With a `palette`, uint8 256x3, an HxW array is stored as it is and shown in these colours.
    """
    path = Path(path)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=".", suffix=path.suffix)
    try:
        picture = Image.fromarray(np.asarray(image))
        if palette is not None:
            picture.putpalette(palette.tobytes())
        with os.fdopen(handle, "wb") as file:
            picture.save(file, format=Image.registered_extensions()[path.suffix.lower()])
        os.chmod(temporary, 0o644)  # mkstemp's files are for the owner only
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def decode(path, convert, stream=None, at_least=None) -> np.ndarray:
    """Opens, turns upright and converts; whatever goes wrong on the way names the file."""
    with opened(path, stream) as image:
        orientation = _orientation(image)
        if at_least is not None:
            height, width = at_least[::-1] if orientation in (5, 6, 7, 8) else at_least
            scale = min(height / image.height, width / image.width)
            # Only JPEG's decoder can leave out frequencies; for others this does nothing.
            image.draft(None, (math.ceil(image.width * scale), math.ceil(image.height * scale)))
        turn = _TRANSPOSES.get(orientation)
        return convert(image if turn is None else image.transpose(turn))


@contextlib.contextmanager
def opened(path: str | os.PathLike, stream: IO[bytes] | None = None) -> Iterator[Image.Image]:
    """Opens an image so that all errors, also of decoding in the block, are `DataError`s.

    `path` is the file, or the name in messages of what the `stream` holds.
    """
    try:
        # A stream: of a name, Pillow 13 maps raw TIFFs to memory, and garbles those to be turned.
        with stream or open(path, "rb") as file, Image.open(file) as image:
            yield image
    except DataError:
        raise
    except FileNotFoundError as error:
        raise DataError(f"{path}: no such file") from error
    except Image.UnidentifiedImageError as error:
        raise DataError(f"{path}: not an image, or of an unknown format") from error
    except Exception as error:
        raise DataError(f"{path}: cannot be read as an image ({error})") from error


def _orientation(image: Image.Image) -> int:
    if image.format == "TIFF":  # Pillow itself turns TIFF upright
        return 1
    # PNG's getexif would decode the pixels in search of a late chunk, so only an early one counts.
    if image.format == "PNG" and not {"exif", "xmp"} & image.info.keys():
        return 1
    return image.getexif().get(ExifTags.Base.Orientation, 1)


def to_rgb(image: Image.Image) -> np.ndarray:
    """Decodes what `opened` gave, as `read_image` says, but as it is stored (maybe not upright)."""
    if image.mode == "F":
        raise ValueError("float pixels have no known range; allowed are 8-bit and 16-bit")
    if image.mode.startswith("I"):
        grey = ((_sixteen_bit(image).astype(np.uint32) + 128) // 257).astype(np.uint8)
        return np.repeat(grey[..., None], 3, axis=-1)
    if image.has_transparency_data:
        backdrop = Image.new("RGBA", image.size, (_BACKDROP,) * 3 + (255,))
        image = Image.alpha_composite(backdrop, image.convert("RGBA"))
    return np.array(image.convert("RGB"))


def to_values(image: Image.Image, path) -> np.ndarray:
    """Decodes the numbers that a mask stores: HxW of the first channel, or palette indices."""
    if image.mode.startswith("I"):
        raw = _sixteen_bit(image)
        return raw // 257 if 65535 in raw and not np.any(raw % 257) else raw
    raw = np.asarray(image)
    if raw.ndim == 3:
        colour = len(image.getbands()) >= 3
        if colour and not raw[..., 0].any() and raw[..., 1:3].any():
            raise DataError(
                f"{path}: the first channel is empty and others are not: masks are read from the "
                "first channel, so save this one as a single-channel PNG"
            )
        raw = raw[..., 0]
    return raw


def _sixteen_bit(image: Image.Image) -> np.ndarray:
    raw = np.asarray(image)
    if raw.min() < 0 or raw.max() > 65535:
        raise ValueError(f"pixels from {raw.min()} to {raw.max()}; allowed are 8-bit and 16-bit")
    return raw.astype(np.uint16)


def _unexpected(path, found: np.ndarray) -> str:
    shown = ", ".join(str(v) for v in found[:8]) + (", ..." if len(found) > 8 else "")
    advice = ""
    if Path(path).suffix.lower() in (".jpg", ".jpeg", ".jfif"):
        advice = "; JPEG does not keep a mask's values: save it as PNG, or set data.mask_threshold"
    elif len(found) > 8:
        advice = "; for a soft mask set data.mask_threshold"
    return (
        f"{path}: mask values {shown} ({len(found)} different); allowed are 0/255 (background/"
        f"foreground), or class ids 0 and 1 with 255 as void{advice}"
    )
