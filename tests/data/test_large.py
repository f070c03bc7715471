"""Images by rows against Pillow, the whole at once."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from jaxseg.data import large
from jaxseg.data.image_files import DataError, read_image
from jaxseg.data.large import LargeImage, NpyWriter, Overview, PngWriter, is_large

RNG = np.random.default_rng(0)
HEIGHT, WIDTH = 150, 83


def pixels(*channels, dtype=np.uint8):
    return RNG.integers(0, np.iinfo(dtype).max + 1, (HEIGHT, WIDTH, *channels), dtype=dtype)


def smooth():
    """Colours that JPEG keeps nearly, however it is decoded."""
    at = np.stack(np.meshgrid(np.arange(WIDTH), np.arange(HEIGHT)), -1)
    return np.dstack([at, at.sum(-1)]).astype(np.uint8)


def by_rows(path, step=37):
    image = LargeImage(path)
    height = image.size[0]
    parts = [image.rows(i, min(i + step, height)) for i in range(0, height, step)]
    got = np.concatenate(parts)
    assert got.shape == (*image.size, 3) and got.dtype == np.uint8
    return got


STORED = {
    "rgb.png": (pixels(3), {}),
    "grey.png": (pixels(), {}),
    "rgba.png": (pixels(4), {}),
    "grey_alpha.png": (pixels(2), {}),
    "deep.png": (pixels(dtype=np.uint16), {}),
    "deep.tif": (pixels(dtype=np.uint16), {}),
    "bits.png": (pixels() > 99, {}),
    "plain.tif": (pixels(3), {}),
    "packed.tif": (pixels(3), {"compression": "tiff_lzw"}),
    "rgba.tif": (pixels(4), {}),
    "big.tif": (pixels(4), {"big_tiff": True}),
    "lossless.webp": (pixels(3), {"lossless": True}),
}


@pytest.mark.parametrize("name", STORED)
def test_rows_are_those_of_the_whole_image(tmp_path, name):
    stored, options = STORED[name]
    Image.fromarray(stored).save(tmp_path / name, **options)
    np.testing.assert_array_equal(by_rows(tmp_path / name), read_image(tmp_path / name))


def test_a_palette(tmp_path):
    image = Image.fromarray(pixels() % 5, mode="P")
    image.putpalette([10, 20, 30, 40, 50, 60, 70, 80, 90, 1, 2, 3, 4, 5, 6])
    for name, options in (("a.png", {}), ("b.png", {"transparency": 2}), ("c.gif", {})):
        image.save(tmp_path / name, **options)
        np.testing.assert_array_equal(by_rows(tmp_path / name), read_image(tmp_path / name))


@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"mode": "CMYK"}, {"mode": "L"}])
def test_jpeg(tmp_path, options):
    image = Image.fromarray(smooth()).convert(options.pop("mode", "RGB"))
    image.save(tmp_path / "a.jpg", quality=95, **options)
    whole = read_image(tmp_path / "a.jpg")
    assert np.abs(by_rows(tmp_path / "a.jpg").astype(int) - whole).max() <= 3


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("suffix", [".png", ".jpg", ".tif"])
def test_turned_images_are_read_upright(tmp_path, orientation, suffix):
    path = tmp_path / f"a{suffix}"
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(smooth()).save(path, exif=exif, **({"quality": 95} if suffix == ".jpg" else {}))
    whole = read_image(path)
    assert whole.shape[:2] == ((HEIGHT, WIDTH) if orientation < 5 else (WIDTH, HEIGHT))
    assert np.abs(by_rows(path).astype(int) - whole).max() <= 3


def test_a_fourth_band_that_is_no_opacity(tmp_path):
    """RGB and infrared, as satellites see: the infrared is dropped."""
    stored = pixels(4)
    Image.frombytes("RGBX", (WIDTH, HEIGHT), stored.tobytes()).save(tmp_path / "a.tif")
    np.testing.assert_array_equal(by_rows(tmp_path / "a.tif"), stored[..., :3])


def test_rows_may_be_skipped_but_not_had_again(tmp_path):
    Image.fromarray(smooth()).save(tmp_path / "a.png")
    image = LargeImage(tmp_path / "a.png")
    np.testing.assert_array_equal(image.rows(90, 91), smooth()[90:91])
    assert image.rows(91, 91).shape == (0, WIDTH, 3)
    for start, stop in ((0, 2), (100, 151), (120, 110)):
        with pytest.raises(ValueError, match="top to bottom"):
            image.rows(start, stop)


def bad_file(folder, kind):
    path = folder / f"a.{'tif' if kind == 'float' else 'png'}"
    if kind == "text":
        path.write_text("no image")
    elif kind == "float":
        Image.fromarray(pixels().astype(np.float32)).save(path)
    elif kind == "truncated":
        Image.fromarray(pixels(3)).save(path)
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    return path


@pytest.mark.parametrize(
    ("kind", "says"),
    [
        ("absent", "no such file"),
        ("text", "cannot be read by rows.*JPEG, PNG"),
        ("float", "float.*8 or 16 bits"),
        ("truncated", "cannot be read by rows"),
    ],
)
def test_bad_files_are_named(tmp_path, kind, says):
    path = bad_file(tmp_path, kind)
    with pytest.raises(DataError, match=says) as error:
        by_rows(path)
    assert str(path) in str(error.value) and "\n" not in str(error.value)


def test_a_truncated_jpeg(tmp_path):
    path = tmp_path / "a.jpg"
    Image.fromarray(pixels(3)).save(path)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(DataError, match="cannot be read by rows"):
        by_rows(path)


def test_what_has_to_be_decoded_whole_is_refused_if_large(tmp_path, monkeypatch):
    Image.fromarray(smooth()).save(tmp_path / "a.jpg", progressive=True)
    by_rows(tmp_path / "a.jpg")
    monkeypatch.setattr(large, "_WHOLE_BYTES", 1000)
    with pytest.raises(DataError, match="interlaced"):
        LargeImage(tmp_path / "a.jpg")


def test_large_is_by_pixels(tmp_path):
    Image.fromarray(smooth()).save(tmp_path / "a.png")
    assert is_large(tmp_path / "a.png", HEIGHT * WIDTH)
    assert not is_large(tmp_path / "a.png", HEIGHT * WIDTH + 1)
    assert not is_large(tmp_path / "none.png", 1)
    (tmp_path / "b.png").write_text("no image")
    assert not is_large(tmp_path / "b.png", 1)


def test_a_file_that_changed_is_read_anew(tmp_path):
    for value in (1, 2):
        Image.fromarray(np.full((20, 30), value, np.uint8)).save(tmp_path / "a.png")
        assert (by_rows(tmp_path / "a.png") == value).all()


@pytest.mark.parametrize("kind", ["grey", "palette", "colour"])
def test_written_rows_are_read_by_pillow(tmp_path, kind):
    stored = pixels(3) if kind == "colour" else pixels() % 7
    palette = RNG.integers(0, 256, (7, 3), dtype=np.uint8)
    options = {"palette": {"palette": palette}, "colour": {"colour": True}, "grey": {}}[kind]
    with PngWriter(tmp_path / "a.png", (HEIGHT, WIDTH), **options) as png:
        for start in (0, 1, 60):
            png.write(stored[start : {0: 1, 1: 60, 60: HEIGHT}[start]])
    assert [p.name for p in tmp_path.iterdir()] == ["a.png"]
    assert (tmp_path / "a.png").stat().st_mode & 0o777 == 0o644
    with Image.open(tmp_path / "a.png") as image:
        np.testing.assert_array_equal(np.asarray(image), stored)
        if kind == "palette":
            assert image.getpalette()[:21] == palette.ravel().tolist()


@pytest.mark.parametrize("fault", ["raise", "short", "long", "narrow", "dtype"])
def test_nothing_is_left_half_written(tmp_path, fault):
    (tmp_path / "a.png").write_text("what was there")
    rows = {"short": 9, "long": 11}.get(fault, 10), 4 if fault == "narrow" else 5
    with (
        pytest.raises(RuntimeError if fault == "raise" else ValueError),
        PngWriter(tmp_path / "a.png", (10, 5)) as png,
    ):
        png.write(np.zeros(rows, np.float32 if fault == "dtype" else np.uint8))
        if fault == "raise":
            raise RuntimeError
    assert [p.name for p in tmp_path.iterdir()] == ["a.png"]
    assert (tmp_path / "a.png").read_text() == "what was there"


def test_written_scores_are_read_by_numpy(tmp_path):
    stored = RNG.uniform(size=(HEIGHT, WIDTH, 3)).astype(np.float16)
    with NpyWriter(tmp_path / "a.npy", stored.shape, np.float16) as scores:
        scores.write(stored[:70])
        scores.write(stored[70:])
    assert np.load(tmp_path / "a.npy").dtype == np.float16
    np.testing.assert_array_equal(np.load(tmp_path / "a.npy"), stored)
    with pytest.raises(ValueError, match="1 rows of 2"):
        with NpyWriter(tmp_path / "b.npy", (2, 3), np.float32) as scores:
            scores.write(np.zeros((1, 3), np.float32))
    assert [p.name for p in tmp_path.iterdir()] == ["a.npy"]


@pytest.mark.parametrize("step", [1, 7, 64, 150])
def test_an_overview_takes_every_nth_pixel(step):
    stored = pixels(3)
    overview = Overview((HEIGHT, WIDTH), longest=50)
    for start in range(0, HEIGHT, step):
        rows = stored[start : start + step]
        assert overview.add(rows) is rows
    np.testing.assert_array_equal(overview.image(), stored[::3, ::3])


BOUNDED = """
import sys
import numpy as np
from jaxseg.data.large import LargeImage, PngWriter
from jaxseg.evaluate.tiles import predict_tiles

folder, side, classes = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
ramp = np.add.outer(np.arange(500), np.arange(side)).astype(np.uint8)
with PngWriter(folder + "/in.png", (side, side)) as png:
    for start in range(0, side, 500):
        png.write(ramp[: side - start])

def peak():
    # Not `ru_maxrss`, which begins with that of the process that started this one.
    lines = open("/proc/self/status").read().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith("VmHWM"))

before = peak()
image = LargeImage(folder + "/in.png")
keys = np.linspace(0, 1, classes, dtype=np.float32)
network = lambda x: 1 - np.abs(x[..., :1] / np.float32(255) - keys)
strips = predict_tiles(
    image.rows, image.size, network, window=(256, 256), overlap=32, margin=4,
    finish=lambda p: p.argmax(-1).astype(np.uint8),
)
with PngWriter(folder + "/out.png", image.size) as png:
    for strip in strips:
        png.write(strip)
print(peak() - before)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's /proc")
def test_memory_is_bounded(tmp_path):
    """16 megapixels are 48 MB and their probabilities 320 MB; from file to file takes less."""
    root = Path(__file__).resolve().parents[2]
    command = [sys.executable, "-c", BOUNDED, str(tmp_path), "4000", "5"]
    done = subprocess.run(command, cwd=root, check=True, capture_output=True, text=True)
    assert float(done.stdout) < 40
    with Image.open(tmp_path / "in.png") as shown, Image.open(tmp_path / "out.png") as mask:
        box = (200, 3000, 800, 3600)
        grey, got = np.asarray(shown.crop(box)), np.asarray(mask.crop(box))
    keys = np.linspace(0, 255, 5)
    np.testing.assert_array_equal(got, np.abs(grey[..., None] - keys).argmin(-1))
