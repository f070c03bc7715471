import warnings

import numpy as np
import pytest
from PIL import Image

from jaxseg.data import image_files
from jaxseg.data.image_files import (
    DataError,
    image_size,
    read_image,
    read_mask,
    write_image,
    write_mask,
)

RAMP = np.arange(12, dtype=np.uint8).reshape(3, 4) * 20  # 3 high, 4 wide


def saved(tmp_path, image, name="a.png", **options):
    image = Image.fromarray(image) if isinstance(image, np.ndarray) else image
    image.save(tmp_path / name, **options)
    return tmp_path / name


def as_rgb(grey):
    return np.stack([grey] * 3, axis=-1)


@pytest.mark.parametrize("name", ["a.png", "a.PNG", "a.bmp", "a.tif", "a.webp", "a.pgm"])
def test_grey_becomes_rgb(tmp_path, name):
    path = saved(tmp_path, RAMP, name, lossless=True)
    np.testing.assert_array_equal(read_image(path), as_rgb(RAMP))
    assert read_image(path).dtype == np.uint8
    assert image_size(path) == (3, 4)


def test_transparent_pixels_lie_over_mid_grey(tmp_path):
    alpha = np.array([[0, 255]], np.uint8)
    expected = [[[128] * 3, [200] * 3]]
    grey = saved(tmp_path, np.dstack([np.full((1, 2), 200, np.uint8), alpha]), "la.png")
    rgba = saved(tmp_path, np.dstack([np.full((1, 2, 3), 200, np.uint8), alpha]), "rgba.png")
    assert Image.open(grey).mode == "LA"
    np.testing.assert_array_equal(read_image(grey), expected)
    np.testing.assert_array_equal(read_image(rgba), expected)


def palette_image(transparency=None):
    image = Image.fromarray(np.array([[0, 1, 2]], np.uint8)).convert("P")
    image.putdata([0, 1, 2])
    image.putpalette([10, 20, 30, 40, 50, 60, 70, 80, 90])
    return image


def test_palette(tmp_path):
    colours = [[[10, 20, 30], [40, 50, 60], [70, 80, 90]]]
    np.testing.assert_array_equal(read_image(saved(tmp_path, palette_image())), colours)
    path = saved(tmp_path, palette_image(), "t.png", transparency=1)
    np.testing.assert_array_equal(read_image(path), [[[10, 20, 30], [128] * 3, [70, 80, 90]]])


def test_one_bit(tmp_path):
    path = saved(tmp_path, Image.fromarray(np.array([[0, 255]], np.uint8)).convert("1"))
    np.testing.assert_array_equal(read_image(path), [[[0] * 3, [255] * 3]])
    np.testing.assert_array_equal(read_mask(path), [[0, 1]])


@pytest.mark.parametrize(
    "at_least, size",
    [((300, 400), (300, 400)), ((299, 399), (300, 400)), ((200, 200), (150, 200))]
    + [((100, 400), (150, 200)), ((75, 100), (75, 100)), ((9, 9), (38, 50))],
)
@pytest.mark.parametrize("turned", [False, True])
def test_large_jpegs_are_decoded_no_larger_than_needed(tmp_path, at_least, size, turned):
    ramp = np.linspace(0, 255, 400)[None, :, None] * np.linspace(0.2, 1, 300)[:, None, None]
    full = np.repeat(ramp, 3, -1)
    exif = Image.Exif()
    exif[0x0112] = 6 if turned else 1
    path = saved(tmp_path, full.astype(np.uint8), "a.jpg", quality=95, exif=exif)
    found = read_image(path, at_least=at_least[::-1] if turned else at_least)
    found = np.rot90(found) if turned else found
    assert found.shape == (*size, 3)
    factor = round(400 / size[1])
    cells = full[: 300 // factor * factor].reshape(300 // factor, factor, size[1], factor, 3)
    assert np.abs(found[: len(cells)] - cells.mean((1, 3))).max() < 4
    png = saved(tmp_path, full.astype(np.uint8), "a.png")
    assert read_image(png, at_least=at_least).shape == full.shape


@pytest.mark.parametrize("name", ["a.png", "a.tif"])
def test_sixteen_bit_grey_is_scaled_not_clipped(tmp_path, name):
    deep = np.array([[0, 257, 300, 32896, 65535]], np.uint16)
    expected = np.round(deep / 65535 * 255).astype(np.uint8)
    np.testing.assert_array_equal(read_image(saved(tmp_path, deep, name)), as_rgb(expected))


def test_sixteen_bit_rgb_png(tmp_path):
    """Pillow writes no such file, so the chunks are put together here."""
    import struct
    import zlib

    deep = np.array([[[0, 32896, 65535], [257, 514, 771]]], ">u2")

    def chunk(kind, data):
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    path = tmp_path / "deep.png"
    path.write_bytes(
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", struct.pack(">IIBBBBB", 2, 1, 16, 2, 0, 0, 0))
        + chunk(b"IDAT", zlib.compress(b"\0" + deep.tobytes()))
        + chunk(b"IEND", b"")
    )
    np.testing.assert_array_equal(read_image(path), [[[0, 128, 255], [1, 2, 3]]])


def test_cmyk_jpeg(tmp_path):
    red = Image.new("RGB", (16, 16), (250, 10, 10)).convert("CMYK")
    path = saved(tmp_path, red, "a.jpg", quality=100)
    assert Image.open(path).mode == "CMYK"
    np.testing.assert_allclose(read_image(path).mean((0, 1)), (250, 10, 10), atol=4)


UPRIGHT = {  # orientation: how the stored array is turned upright
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.swapaxes(0, 1),
    6: lambda a: np.rot90(a, -1),
    7: lambda a: a[::-1, ::-1].swapaxes(0, 1),
    8: lambda a: np.rot90(a, 1),
    9: lambda a: a,
}


@pytest.mark.parametrize("orientation", UPRIGHT)
@pytest.mark.parametrize("suffix", [".png", ".tif", ".jpg", ".webp"])
def test_orientation(tmp_path, orientation, suffix):
    if suffix == ".tif":
        orientation = min(orientation, 8)  # Pillow refuses to write a wrong one
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored = np.kron(RAMP, np.ones((16, 16), np.uint8))  # blocks, so that JPEG keeps them
    path = saved(tmp_path, stored, "a" + suffix, exif=exif, lossless=True)
    expected = UPRIGHT[orientation](stored)
    assert image_size(path) == expected.shape
    np.testing.assert_allclose(read_image(path)[..., 0].astype(int), expected, atol=2)
    if suffix != ".jpg":
        np.testing.assert_array_equal(read_mask(path, threshold=100), expected >= 100)


def test_size_needs_the_header_only(tmp_path):
    path = saved(tmp_path, np.zeros((300, 500, 3), np.uint8), "a.jpg")
    path.write_bytes(path.read_bytes()[:700])
    assert image_size(path) == (300, 500)
    with pytest.raises(DataError, match=r"a\.jpg.*truncated"):
        read_image(path)


@pytest.mark.parametrize("shape", [(1, 1), (3000, 5000)])
def test_smallest_and_large(tmp_path, shape):
    path = saved(tmp_path, np.full((*shape, 3), 77, np.uint8), "a.jpg", quality=95)
    assert read_image(path).shape == (*shape, 3)
    assert abs(int(read_image(path)[0, 0, 0]) - 77) <= 1


@pytest.mark.parametrize("name", ["a.jpg", "a.png", "a.bmp", "a.webp", "a.gif", "a.tif"])
@pytest.mark.parametrize("kept", [0, 3, 0.1, 0.5, 0.9])
def test_truncated_files_are_named(tmp_path, name, kept):
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    path = saved(tmp_path, noise, name)
    whole = path.read_bytes()
    path.write_bytes(whole[: kept if isinstance(kept, int) else int(len(whole) * kept)])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(DataError) as caught:
            read_image(path)
    assert str(caught.value).count(str(path)) == 1


def test_no_image_and_no_file(tmp_path):
    (tmp_path / "text.png").write_text("not a picture")
    with pytest.raises(DataError, match=r"text\.png: .*not an image"):
        read_image(tmp_path / "text.png")
    with pytest.raises(DataError, match=r"none\.png: no such file"):
        image_size(tmp_path / "none.png")
    with pytest.raises(DataError, match="cannot be read"):
        read_image(tmp_path)


def test_float_and_deep_integer_pixels_are_refused(tmp_path):
    path = saved(tmp_path, np.ones((2, 2), np.float32), "f.tif")
    with pytest.raises(DataError, match=r"f\.tif.*float pixels.*8-bit and 16-bit"):
        read_image(path)
    path = saved(tmp_path, np.full((2, 2), 1 << 20, np.int32), "i.tif")
    with pytest.raises(DataError, match=r"i\.tif.*1048576.*16-bit"):
        read_image(path)


@pytest.mark.parametrize(
    "values, expected",
    [
        ([0, 255], [0, 1]),
        ([255, 255], [1, 1]),
        ([0, 0], [0, 0]),
        ([0, 1], [0, 1]),
        ([1, 1], [1, 1]),
        ([0, 1, 255], [0, 1, 255]),
        ([1, 255], [1, 255]),
    ],
)
def test_what_mask_values_mean(tmp_path, values, expected):
    path = saved(tmp_path, np.array([values], np.uint8))
    mask = read_mask(path)
    assert mask.dtype == np.uint8
    np.testing.assert_array_equal(mask, [expected])


def test_mask_values_stated(tmp_path):
    path = saved(tmp_path, np.array([[0, 255]], np.uint8))
    np.testing.assert_array_equal(read_mask(path, values="0/1"), [[0, 255]])
    np.testing.assert_array_equal(read_mask(path, values="0/255"), [[0, 1]])
    path = saved(tmp_path, np.array([[0, 1]], np.uint8))
    with pytest.raises(DataError, match=r"a\.png: mask values 0, 1 "):
        read_mask(path, values="0/255")
    with pytest.raises(DataError, match="'auto', '0/255', '0/1'"):
        read_mask(path, values="ids")


def test_masks_in_other_forms(tmp_path):
    ids = np.array([[0, 1, 0]], np.uint8)
    indexed = palette_image()
    indexed.putdata([0, 1, 0])
    for name, image in {
        "rgb.png": as_rgb(ids * 255),
        "red.png": np.dstack([ids * 255, ids * 0, ids * 0]),
        "rgba.png": np.dstack([as_rgb(ids * 255), ids * 0 + 255]),
        "la.png": np.dstack([ids * 255, ids * 0 + 255]),
        "deep.png": ids.astype(np.uint16) * 65535,
        "deep_ids.png": ids.astype(np.uint16),
        "palette.png": indexed,
        "mask.tif": ids,
    }.items():
        np.testing.assert_array_equal(read_mask(saved(tmp_path, image, name)), ids, err_msg=name)


def test_unusable_masks_are_explained(tmp_path):
    path = saved(tmp_path, np.arange(256, dtype=np.uint8).reshape(16, 16))
    with pytest.raises(DataError, match=r"a\.png.*0, 1, 2.*\(256 diff.*0/255.*ids 0 and 1.*thresh"):
        read_mask(path)
    np.testing.assert_array_equal(read_mask(path, threshold=128)[:8], 0)
    np.testing.assert_array_equal(read_mask(path, threshold=128)[8:], 1)
    path = saved(tmp_path, np.array([[0, 1, 2, 11]], np.uint8))
    with pytest.raises(DataError, match="mask values 0, 1, 2, 11 "):
        read_mask(path)
    disc = (np.hypot(*np.mgrid[-20:20, -20:20]) < 11).astype(np.uint8) * 255
    path = saved(tmp_path, disc, "m.jpg")
    with pytest.raises(DataError, match=r"m\.jpg.*JPEG does not keep.*PNG.*threshold"):
        read_mask(path)
    green = np.zeros((2, 2, 3), np.uint8)
    green[0, 0, 1] = 255
    with pytest.raises(DataError, match=r"g\.png: the first channel is empty"):
        read_mask(saved(tmp_path, green, "g.png"))


def test_pairs_must_have_one_size(tmp_path):
    image = saved(tmp_path, np.zeros((4, 6, 3), np.uint8), "i.png")
    mask = saved(tmp_path, np.zeros((4, 5), np.uint8), "m.png")
    with pytest.raises(DataError, match=r"m\.png is 5x4 but its image .*i\.png is 6x4"):
        image_files.read_pair(image, mask)


def test_written_masks_read_back(tmp_path):
    mask = np.random.default_rng(0).random((7, 9)) < 0.5
    write_mask(tmp_path / "m.png", mask)
    assert set(np.unique(np.asarray(Image.open(tmp_path / "m.png")))) == {0, 255}
    np.testing.assert_array_equal(read_mask(tmp_path / "m.png"), mask)
    assert [p.name for p in tmp_path.iterdir()] == ["m.png"]


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    path = tmp_path / "a.png"
    write_image(path, as_rgb(RAMP))

    def full(self, file, **_):
        file.write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Image.Image, "save", full)
    with pytest.raises(OSError, match="No space"):
        write_image(path, as_rgb(RAMP) + 1)
    np.testing.assert_array_equal(read_image(path), as_rgb(RAMP))
    assert [p.name for p in tmp_path.iterdir()] == ["a.png"]
