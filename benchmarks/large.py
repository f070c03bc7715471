"""Predicts a 20,000 x 20,000 image by tiles: time, memory, and what is left to see of the tiles.

    python benchmarks/large.py [--size=20000] [--format=png] [--workdir=W]

Draws a mosaic of the data set `shapes`, strip by strip, into a file of a temporary folder; then, in
a process of its own, reads it, predicts it and writes a palette PNG of the classes. The network is
convolutional, with 21 outputs and random weights; with `--workdir`, that of a trained run, which
sees windows of the size it was trained at.

Two numbers tell of the tiles. `seam`: the largest difference between the probabilities and those of
single windows centred where tiles meet, but for the margin at their border. It is zero, but for
rounding, where the margin covers the network's receptive field; a transformer's does not end, so
there it is how much the context changes its mind. `steps`: how much neighbouring pixels differ
where tiles meet, over how much they differ everywhere; 1 if the tiles cannot be seen.
"""

import argparse
import functools
import multiprocessing
import platform
import resource
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
import pyvips
from PIL import Image

import jaxseg
from jaxseg.data import Shapes
from jaxseg.data.large import LargeImage, PngWriter
from jaxseg.evaluate.tiles import default_overlap, predict_tiles
from jaxseg.evaluate.windows import plan
from jaxseg.ops.resize import resize_bilinear

CLASSES, CELL, PICTURES = 21, 400, 24
PALETTE = np.random.default_rng(3).integers(0, 256, (CLASSES, 3), dtype=np.uint8)
GIB = 2**30


def draw(path: Path, size: int) -> None:
    """Writes a mosaic of drawn pictures, turned and lit at random."""
    source, rng = Shapes(part="train", size=(CELL, CELL)), np.random.default_rng(0)
    pictures = [source[i]["image"] for i in range(PICTURES)]

    def cell() -> np.ndarray:
        picture = np.rot90(pictures[rng.integers(PICTURES)], rng.integers(4))
        return (picture * rng.uniform(0.5, 1)).astype(np.uint8)

    with PngWriter(path, (size, size), colour=True) as png:
        for start in range(0, size, CELL):
            strip = np.concatenate([cell() for _ in range(-(-size // CELL))], axis=1)
            png.write(strip[: size - start, :size])


def convolutional() -> tuple[Callable, tuple[int, int], dict]:
    """A network of stride 4 that sees 14 pixels around each; its window and its layout."""
    rng = np.random.default_rng(0)
    kernels = [
        (rng.normal(size=shape) * np.sqrt(2 / np.prod(shape[:3]))).astype(np.float32)
        for shape in ((8, 8, 3, 32), (3, 3, 32, 32), (1, 1, 32, CLASSES))
    ]

    @jax.jit
    def network(images):
        x = images / 127.5 - 1.0
        for i, kernel in enumerate(kernels):
            x = jax.nn.relu(x) if i else x
            strides = (4, 4) if i == 0 else (1, 1)
            layout = ("NHWC", "HWIO", "NHWC")
            x = jax.lax.conv_general_dilated(x, kernel, strides, "SAME", dimension_numbers=layout)
        return jax.nn.softmax(resize_bilinear(x, images.shape[1:3]))

    return network, (512, 512), {"overlap": 64, "margin": 16, "multiple": 4}


def trained(workdir: str) -> tuple[Callable, tuple[int, int], dict]:
    """The network of a run, its window and a layout for it."""
    run = jaxseg.load(workdir)
    task, device = run.task.masks, jax.local_devices()[0]
    params = jax.device_put(run.host(run.variables), device)
    overlap, margin = default_overlap(task.size, task.multiple)
    layout = {"overlap": overlap, "margin": margin, "multiple": task.multiple}
    return functools.partial(jax.jit(run.scores), params), task.size, layout


def keep(probability: np.ndarray) -> np.ndarray:
    """The class and its probability, float32 `h x w x 2`."""
    if probability.shape[-1] == 1:
        return np.concatenate([probability >= 0.5, probability], axis=-1)
    label = probability.argmax(-1)[..., None]
    return np.concatenate([label, np.take_along_axis(probability, label, -1)], axis=-1)


class Patch:
    """A part of an image or its prediction, gathered from the strips that pass by."""

    def __init__(self, top: int, left: int, size: tuple[int, int]):
        self.top, self.left, self._size, self._rows = top, left, size, []

    def see(self, start: int, rows: np.ndarray) -> None:
        first, last = max(0, self.top - start), max(0, self.top + self._size[0] - start)
        self._rows.append(rows[first:last, self.left : self.left + self._size[1]].copy())

    def pixels(self) -> np.ndarray:
        return np.concatenate(self._rows)


def meetings(size: int, window: int, layout: dict) -> list[int]:
    """Where windows that are centred at the first, middle and last meeting of tiles begin."""
    spans, _ = plan(size, window, **layout)
    multiple, borders = layout["multiple"], []
    for before, after in zip(spans, spans[1:], strict=False):
        begin = (before.start + after.start) / 2
        borders.append(min(round(begin / multiple), (size - window) // multiple) * multiple)
    return sorted({borders[0], borders[len(borders) // 2], borders[-1]}) if borders else []


def seam(network, batch: int, pictures: list[Patch], results: list[Patch], margin: int):
    """(largest difference of probability, share of pixels of another class) around meetings."""
    largest, other, pixels = 0.0, 0, 0
    for picture, result in zip(pictures, results, strict=True):
        image = picture.pixels()
        window = np.zeros((batch, *image.shape), np.uint8)
        window[0] = image
        inside = (slice(margin, len(image) - margin), slice(margin, image.shape[1] - margin))
        single = keep(np.asarray(network(window), np.float32)[0])[inside]
        tiled = result.pixels()[inside]
        same = single[..., 0] == tiled[..., 0]
        difference = np.abs(single[..., 1] - tiled[..., 1])
        largest = max(largest, float(difference[same].max()))
        other, pixels = other + int((~same).sum()), pixels + same.size
    return largest, other / max(pixels, 1)


def predict(image_path: Path, mask_path: Path, workdir: str | None, batch: int) -> dict:
    """Predicts the file; returns what was measured."""
    network, window, layout = trained(workdir) if workdir else convolutional()
    image = LargeImage(image_path)
    size, margin = image.size, layout["margin"]
    tops, lefts = (meetings(size[i], window[i], layout) for i in (0, 1))
    pictures = [Patch(top, left, window) for top in tops for left in lefts]
    results = [Patch(top, left, window) for top in tops for left in lefts]
    begin = time.perf_counter()

    def read(start: int, stop: int) -> np.ndarray:
        rows = image.rows(start, stop)
        for patch in pictures:
            patch.see(start, rows)
        return rows

    done, steps = 0, np.zeros(size[1] - 1)
    strips = predict_tiles(read, size, network, window=window, batch=batch, finish=keep, **layout)
    with PngWriter(mask_path, size, palette=PALETTE) as png:
        for strip in strips:
            png.write(strip[..., 0].astype(np.uint8))
            steps += np.abs(np.diff(strip[..., 1], axis=1)).sum(0)
            for patch in results:
                patch.see(done, strip)
            done += len(strip)
            if sys.stderr.isatty():
                print(f"\r{done} of {size[0]} rows", end="", file=sys.stderr, flush=True)
    spans, _ = plan(size[1], window[1], **layout)
    shared = [
        at
        for before, after in zip(spans, spans[1:], strict=False)
        for at in range(after.first, min(before.stop, len(steps)))
    ]
    seconds = time.perf_counter() - begin
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    largest, other = seam(network, batch, pictures, results, margin)
    return {
        "seconds": seconds,
        "peak": peak * (1 if sys.platform == "darwin" else 1024),
        "seam": largest,
        "other": other,
        "steps": np.median(steps[shared]) / np.median(steps) if shared else 1.0,
        "window": f"{window[0]}x{window[1]}, overlap {layout['overlap']}, margin {margin}",
        "device": jax.devices()[0].device_kind,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--size", type=int, default=20000, help="side of the image")
    parser.add_argument("--format", default="png", choices=["png", "jpg", "tif"])
    parser.add_argument("--workdir", help="of a trained run, for its network")
    parser.add_argument("--batch", type=int, default=1, help="windows predicted together")
    parser.add_argument("--outputs", help="folder to leave the image and the mask in")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(args.outputs or temporary)
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / "mosaic.png"
        begin = time.perf_counter()
        draw(path, args.size)
        if args.format != "png":
            whole = pyvips.Image.new_from_file(str(path), access="sequential")
            path = path.with_suffix(f".{args.format}")
            whole.write_to_file(str(path))
        print(f"drawn in {time.perf_counter() - begin:.0f} s, {path.stat().st_size / GIB:.2f} GiB")
        # A fresh process, so that the peak is the prediction's own.
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            job = (path, folder / "mask.png", args.workdir, args.batch)
            found = pool.apply(predict, job)
        Image.MAX_IMAGE_PIXELS = None
        with Image.open(folder / "mask.png") as mask:
            assert mask.size == (args.size, args.size), mask.size
    rate = args.size**2 / 1e6 / found["seconds"]
    print(
        f"{found['device']}, Python {platform.python_version()}, jax {jax.__version__}, windows "
        f"{found['window']}\n\n| image | s | megapixels/s | peak GiB | seam | other class | steps |\n"
        f"|---|---|---|---|---|---|---|\n| {args.size} x {args.size} {args.format} "
        f"| {found['seconds']:.0f} | {rate:.2f} | {found['peak'] / GIB:.2f} | {found['seam']:.1e} "
        f"| {found['other']:.1e} | {found['steps']:.3f} |"
    )


if __name__ == "__main__":
    jaxseg.restart_with_huge_pages(__file__)
    main()
