"""Images larger than memory: files read, and masks and scores written, a few rows at a time.

pyvips is used because Pillow decodes images whole (1.6 GB for 20,000 x 20,000) and refuses those
above 179 megapixels. Pillow's limit, a guard against decompression bombs, stays as it is: here an
image costs memory by its width, not by its pixels.
"""

import os
import struct
import tempfile
import zlib
from pathlib import Path

import numpy as np
import pyvips
from PIL import TiffImagePlugin

from jaxseg.data.image_files import DataError

LARGE = 64_000_000  # pixels from which `is_large`; well below Pillow's limit
FORMATS = "JPEG, PNG, TIFF, WebP, AVIF and GIF"

_BACKDROP = 128  # as in `read_image`
_FETCH = 64  # rows decoded at once: 256 take three times the memory and no less time
_WHOLE_BYTES = (
    3 * 2**29
)  # of pixels of a file that has to be decoded whole; 20,000 x 20,000 is less
_COLOURS = ("b-w", "grey16", "srgb", "rgb", "rgb16", "cmyk")
_EXTRA_SAMPLES = 338  # TIFF tag: for each band beyond the colours 1 or 2 for alpha, 0 for others

# Only loaders that libvips holds safe for files of unknown origin (no PDF, SVG, ImageMagick ...).
pyvips.block_untrusted_set(True)


def is_large(path: str | os.PathLike, pixels: int = LARGE) -> bool:
    """Whether a file is an image of at least so many pixels that `LargeImage` can read."""
    try:
        image = _open(path, "sequential")
    except DataError:
        return False
    return image.width * image.height >= pixels


class LargeImage:
    """A picture read from top to bottom, as uint8 RGB and upright, like `read_image`.

    Takes memory for some rows. A file whose EXIF orientation turns it is first decoded to a
    temporary file (of height x width x 3 bytes; in TMPDIR). JPEG, PNG, TIFF, WebP, AVIF and GIF are
    read, 8 and 16 bits deep.

    Attributes:
      size: (height, width), upright.

    Raises:
      DataError: if the file is missing, no image, of pixels without a known range or colour, or
        interlaced (progressive) and of more than 1.5 GiB, so that it cannot be read by rows.
    """

    def __init__(self, path: str | os.PathLike):
        self._path = path
        image = _open(path, "sequential")
        _check(path, image)
        # A mirrored row is still a row; anything else needs rows in another order.
        if _field(image, "orientation", 1) > 2:
            image = _open(path, "random")
        self._alpha = _has_alpha(path, image)
        self._cmyk = image.interpretation == "cmyk"
        self._image = image.autorot()
        self._region = pyvips.Region.new(self._image)
        self._next = 0
        self.size = (self._image.height, self._image.width)

    def rows(self, start: int, stop: int) -> np.ndarray:
        """Rows `start` to `stop` (not included), uint8 `(stop - start) x W x 3`.

        Calls go from top to bottom: no row before the last call's `stop` can be had again.

        Raises:
          DataError: if the file is truncated or damaged.
        """
        if not self._next <= start <= stop <= self.size[0]:
            raise ValueError(
                f"rows {start} to {stop} of {self._path}: allowed are {self._next} to "
                f"{self.size[0]}, from top to bottom"
            )
        self._next = stop
        out = np.empty((stop - start, self.size[1], 3), np.uint8)
        for top in range(start, stop, _FETCH):
            bottom = min(top + _FETCH, stop)
            out[top - start : bottom - start] = self._to_rgb(self._fetch(top, bottom))
        return out

    def _fetch(self, start: int, stop: int) -> np.ndarray:
        try:
            pixels = self._region.fetch(0, start, self.size[1], stop - start)
        except pyvips.Error as error:
            raise _error(self._path, error) from error
        dtype = np.uint8 if self._image.format == "uchar" else np.uint16
        return np.frombuffer(pixels, dtype).reshape(stop - start, self.size[1], -1)

    def _to_rgb(self, raw: np.ndarray) -> np.ndarray:
        """What `images.to_rgb` makes of an image; 16-bit colours may differ by one."""
        if raw.dtype == np.uint16:
            raw = ((raw.astype(np.uint32) + 128) // 257).astype(np.uint8)
        if self._cmyk:
            ink, white = 255 - raw[..., :3].astype(np.uint16), 255 - raw[..., 3:4].astype(np.uint16)
            return ((ink * white + 127) // 255).astype(np.uint8)
        colour = raw[..., : 3 if raw.shape[-1] >= 3 else 1]
        if self._alpha:
            alpha = raw[..., -1:].astype(np.uint32)
            mixed = colour * alpha + _BACKDROP * (255 - alpha)
            colour = ((mixed + 127) // 255).astype(np.uint8)
        return np.broadcast_to(colour, (*raw.shape[:2], 3))


class _RowWriter:
    """A file of an image's rows that appears under its name, whole, when a `with` block ends.

    Nothing is left if the block ends with an error, or before all rows are written.
    """

    def __init__(self, path: str | os.PathLike, shape: tuple[int, ...], dtype: np.dtype):
        self._path, self._shape, self._dtype, self._row = Path(path), shape, np.dtype(dtype), 0

    def write(self, rows: np.ndarray) -> None:
        """Adds rows, `r x W` (or `r x W x C`), below those written before.

        Raises:
          ValueError: they are of another shape or dtype, or more than the image has.
        """
        if rows.dtype != self._dtype or rows.shape[1:] != self._shape[1:]:
            raise ValueError(
                f"{self._path}: rows are {rows.dtype} of {rows.shape[1:]}, not {self._dtype} of "
                f"{self._shape[1:]}"
            )
        self._row += len(rows)
        if self._row > self._shape[0]:
            raise ValueError(f"{self._path}: more than the image's {self._shape[0]} rows")
        self._add(rows)

    def __enter__(self):
        folder, suffix = self._path.parent, self._path.suffix
        handle, self._temporary = tempfile.mkstemp(dir=folder, prefix=".", suffix=suffix)
        self._file = os.fdopen(handle, "wb")
        self._begin()
        return self

    def __exit__(self, kind, value, traceback) -> None:
        try:
            if kind is None:
                if self._row != self._shape[0]:
                    raise ValueError(f"{self._path}: {self._row} rows of {self._shape[0]}")
                self._end()
                self._file.close()
                os.chmod(self._temporary, 0o644)  # mkstemp's files are for the owner only
                os.replace(self._temporary, self._path)
        finally:
            self._file.close()
            Path(self._temporary).unlink(missing_ok=True)  # there is none after `os.replace`


class PngWriter(_RowWriter):
    """Writes an 8-bit PNG some rows at a time, whole or not at all.

        with PngWriter(path, (height, width)) as png:
            png.write(rows)

    Args:
      path: of the file; an existing one is replaced.
      size: (height, width).
      palette: uint8 `n x 3` colours, n <= 256, for rows of indices; None for grey rows.
      colour: whether rows are RGB, `r x W x 3`.
    """

    def __init__(
        self,
        path: str | os.PathLike,
        size: tuple[int, int],
        *,
        palette: np.ndarray | None = None,
        colour: bool = False,
    ):
        super().__init__(path, (*size, 3) if colour else size, np.uint8)
        self._palette = None if palette is None else np.asarray(palette, np.uint8)
        self._kind = 2 if colour else 0 if palette is None else 3
        self._zlib = zlib.compressobj(1)  # as small as level 6 for masks' long runs, and faster

    def _begin(self) -> None:
        height, width = self._shape[:2]
        self._file.write(b"\x89PNG\r\n\x1a\n")
        self._chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, self._kind, 0, 0, 0))
        if self._palette is not None:
            self._chunk(b"PLTE", self._palette.tobytes())

    def _add(self, rows: np.ndarray) -> None:
        # Each row begins with the number of its filter: 0, none.
        lines = np.zeros((len(rows), 1 + int(np.prod(self._shape[1:]))), np.uint8)
        lines[:, 1:] = rows.reshape(len(rows), lines.shape[1] - 1)
        if data := self._zlib.compress(lines):
            self._chunk(b"IDAT", data)

    def _end(self) -> None:
        self._chunk(b"IDAT", self._zlib.flush())
        self._chunk(b"IEND", b"")

    def _chunk(self, name: bytes, data: bytes) -> None:
        crc = zlib.crc32(data, zlib.crc32(name))
        self._file.write(struct.pack(">I", len(data)) + name + data + struct.pack(">I", crc))


class NpyWriter(_RowWriter):
    """Writes an array as `np.save` does, some rows at a time, whole or not at all.

    Not through a memory map, whose written pages would count as this process's memory.

    Args:
      path: of the file; an existing one is replaced.
      shape: of the array, `H x W x C` for instance.
      dtype: of the array and of the rows.
    """

    def _begin(self) -> None:
        header = {"descr": np.lib.format.dtype_to_descr(self._dtype), "fortran_order": False}
        np.lib.format.write_array_header_2_0(self._file, {**header, "shape": self._shape})

    def _add(self, rows: np.ndarray) -> None:
        self._file.write(np.ascontiguousarray(rows))

    def _end(self) -> None:
        """The rows are all there is."""


class Overview:
    """A small copy of an image that passes by in rows.

    Args:
      size: (height, width) of the image.
      longest: neither side of the copy is longer.
    """

    def __init__(self, size: tuple[int, int], longest: int = 2048):
        self.every = -(-max(size) // longest)
        self._row, self._kept = 0, []

    def add(self, rows: np.ndarray) -> np.ndarray:
        """Takes every n-th pixel of every n-th row of the next rows, and returns them all."""
        self._kept.append(rows[-self._row % self.every :: self.every, :: self.every].copy())
        self._row += len(rows)
        return rows

    def image(self) -> np.ndarray:
        """The copy, of what was added so far."""
        return np.concatenate(self._kept)


def _open(path: str | os.PathLike, access: str) -> pyvips.Image:
    if not Path(path).is_file():
        raise DataError(f"{path}: no such file")
    try:
        return pyvips.Image.new_from_file(
            os.fspath(path), access=access, fail_on="truncated", revalidate=True
        )
    except pyvips.Error as error:
        raise _error(path, error) from error


def _check(path: str | os.PathLike, image: pyvips.Image) -> None:
    """Raises a `DataError` for what cannot be read by rows as RGB."""
    if image.interpretation not in _COLOURS or image.format not in ("uchar", "ushort"):
        raise DataError(
            f"{path}: {image.bands} bands of {image.format} as {image.interpretation}; allowed are "
            "grey, RGB and CMYK of 8 or 16 bits"
        )
    needed = image.width * image.height * image.bands * (1 if image.format == "uchar" else 2)
    if _field(image, "interlaced", 0) and needed > _WHOLE_BYTES:
        raise DataError(
            f"{path}: interlaced (progressive), so that its {needed / 2**30:.1f} GiB would have to "
            "be decoded at once: save it without interlacing"
        )


def _has_alpha(path: str | os.PathLike, image: pyvips.Image) -> bool:
    """Whether the last band is opacity; in TIFF a fourth band may be e.g. infrared."""
    if image.interpretation == "cmyk" or not image.hasalpha():
        return False
    if not str(_field(image, "vips-loader", "")).startswith("tiff"):
        return True
    with open(path, "rb") as file:
        header = file.read(8)
        header += file.read(8) if 43 in header[2:4] else b""  # BigTIFF's is longer
        directory = TiffImagePlugin.ImageFileDirectory_v2(header)
        file.seek(directory.next)
        directory.load(file)
    return any(kind in (1, 2) for kind in directory.get(_EXTRA_SAMPLES, ()))


def _field(image: pyvips.Image, name: str, default):
    return image.get(name) if image.get_typeof(name) else default


def _error(path: str | os.PathLike, error: pyvips.Error) -> DataError:
    lines = str(error.detail or error).strip().splitlines()
    reason = lines[-1].strip() if lines else "unknown error"
    return DataError(f"{path}: cannot be read by rows ({reason}); allowed are {FORMATS}")
