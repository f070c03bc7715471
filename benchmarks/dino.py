"""One step of DINO: images/s, the share of the peak, and where the time goes.

    python benchmarks/dino.py                       # 2 x 224 + 8 x 96, ViT-S/16, float32
    python benchmarks/dino.py --precision=bfloat16 --batch=128
    python benchmarks/dino.py --files=IMAGES        # end to end from image files as well

Prints one markdown table. The peak is the rate of one large matrix product in the same precision,
measured in the same run. Parts are timed by themselves; their sum is not exactly the step, in which XLA
fuses and overlaps them. The Pillow row draws the same recipe with Pillow on one core.
"""

import argparse
import time
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image, ImageEnhance, ImageFilter, ImageOps

from jaxseg import assembly, restart_with_huge_pages
from jaxseg.backbones import BACKBONES
from jaxseg.ops.crops import View, draw_views
from jaxseg.schema import read_config
from jaxseg.tasks import Facts
from jaxseg.train import loop
from jaxseg.train.speed import best_seconds, compiled, matmul_rate, product_flops

# Of the schedules.
STEPS, EXAMPLES = 1000, 10000


def pillow_views(image: Image.Image, views: Sequence[View], rng: np.random.Generator) -> None:
    """The recipe of `ops.crops`, as a data loader would draw it."""
    width, height = image.size
    for view in views:
        area = rng.uniform(*view.scale) * width * height
        ratio = np.exp(rng.uniform(*np.log(view.ratio)))
        w = min(width, round((area * ratio) ** 0.5))
        h = min(height, round((area / ratio) ** 0.5))
        left, top = rng.integers(0, width - w + 1), rng.integers(0, height - h + 1)
        crop = image.crop((left, top, left + w, top + h))
        crop = crop.resize((view.size, view.size), Image.Resampling.BICUBIC)
        if rng.random() < view.flip:
            crop = ImageOps.mirror(crop)
        if rng.random() < view.jitter:
            kinds = {
                ImageEnhance.Brightness: view.brightness,
                ImageEnhance.Contrast: view.contrast,
                ImageEnhance.Color: view.saturation,
            }
            for kind in rng.permutation([*kinds, None]):
                if kind is None:
                    hue, saturation, value = crop.convert("HSV").split()
                    shift = int(rng.uniform(-view.hue, view.hue) * 255) % 256
                    hue = hue.point(lambda x, s=shift: (x + s) % 256)
                    crop = Image.merge("HSV", (hue, saturation, value)).convert("RGB")
                else:
                    strength = kinds[kind]
                    crop = kind(crop).enhance(rng.uniform(1 - strength, 1 + strength))
        if rng.random() < view.gray:
            crop = crop.convert("L").convert("RGB")
        if rng.random() < view.blur:
            crop = crop.filter(ImageFilter.GaussianBlur(rng.uniform(*view.blur_sigma)))
        if rng.random() < view.solarize:
            crop = ImageOps.solarize(crop)
        np.asarray(crop)


def make_batch(count: int, height: int, width: int) -> dict[str, np.ndarray]:
    """Smooth images: noise would be no picture of what Pillow's filters usually meet."""
    small = np.random.default_rng(0).integers(0, 256, (count, 8, 8, 3), np.uint8)
    return {
        "image": np.stack([np.asarray(Image.fromarray(x).resize((width, height))) for x in small]),
        "extent": np.tile(np.array([[height, width]], np.int32), (count, 1)),
        "row": np.arange(count, dtype=np.int32),
        "valid": np.ones(count, bool),
    }


def make_parts(task, optimizer, state, step, batch) -> dict[str, tuple]:
    """The step and its parts, each compiled by itself, with their arguments."""
    keys = jax.random.split(jax.random.key(0), len(batch["row"]))
    statistics, crops = state.extra["student_statistics"], task.views.crops()

    def draw(keys, batch):
        return draw_views(keys, batch["image"], batch["extent"], crops)

    def teacher(params, views):
        return task.project(params, statistics, views[:2])[0]

    def student(params, views):
        logits, _, _ = task.project(params, statistics, views, keys)
        return (logits**2).sum()

    def update(grads, state):
        updates, _ = optimizer.update(grads, state.opt_state, state.params)
        return jax.tree.map(jnp.add, state.params, updates)

    views = [jnp.zeros((len(keys), view.size, view.size, 3)) + 0.5 for view in crops]
    parts = {
        "augmentation": (draw, keys, batch),
        "teacher": (teacher, state.params, views),
        "student, forward and backward": (jax.grad(student), state.params, views),
        "optimiser": (update, state.params, state),
        "whole step": (step, state, {}, batch),
    }
    return compiled(parts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--preset", default="")
    parser.add_argument("--variant", choices=tuple(BACKBONES), help="in place of the preset's")
    parser.add_argument("--precision", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--outputs", type=int, help="in place of the preset's")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--files", default="", help="a folder or zip file of images")
    parser.add_argument("--threads", type=int, default=16, help="that read the files")
    parser.add_argument("--workers", type=int, default=0, help="processes of so many threads each")
    args = parser.parse_args()

    try:
        config = read_config(f"dino:{args.preset}")
    except ValueError as error:
        parser.error(str(error))
    config.backbone.precision = args.precision
    config.backbone.variant = args.variant or config.backbone.variant
    config.dino.outputs = args.outputs or config.dino.outputs
    config.train.batch = args.batch
    source = _files(args, config, parser) if args.files else None
    settings = assembly.make_settings(config)
    facts = Facts(tuple(config.data.size), examples=EXAMPLES)
    task = assembly.make_task(config, ()).with_facts(facts, steps=STEPS, batch=args.batch)
    hold, hold_steps = task.held
    held = dict(hold=hold, hold_steps=hold_steps)
    optimizer = settings.recipe.optimizer(STEPS, batch=args.batch, **held)
    host_batch = make_batch(args.batch, *config.data.size)
    batch = jax.device_put(host_batch)
    state = loop.make_state(task, jax.jit(task.init)(jax.random.key(0)), optimizer)
    step = jax.jit(loop.make_train_step(task, optimizer, seed=0))

    parts = make_parts(task, optimizer, state, step, batch)
    time_of = {name: best_seconds(*call, repeats=args.repeats) for name, call in parts.items()}
    whole = time_of["whole step"]
    rate = matmul_rate(args.precision, repeats=args.repeats)
    flops = product_flops(step, state, {}, batch)
    views = config.views
    print(
        f"{config.backbone.variant}, 2 x {views.global_size} + {views.local_count} x {views.local_size}, "
        f"K = {config.dino.outputs}, batch {args.batch}, {args.precision}, "
        f"{jax.devices()[0].device_kind}: {args.batch / whole:.2f} images/s, "
        f"{flops / whole / 1e9:.0f} GFLOP/s, {flops / whole / rate:.0%} of the measured "
        f"{rate / 1e9:.0f} GFLOP/s\n"
    )
    print("| part | ms an image | share of the step |\n|---|---|---|")
    for name, value in time_of.items():
        print(f"| {name} | {1e3 * value / args.batch:.3g} | {value / whole:.0%} |", flush=True)
    rng = np.random.default_rng(0)
    begin = time.perf_counter()
    images = host_batch["image"][:16]
    for image in images:
        pillow_views(Image.fromarray(image), task.views.crops(), rng)
    pillow = (time.perf_counter() - begin) / len(images)
    print(f"| the same views in Pillow, one core | {1e3 * pillow:.3g} | |", flush=True)
    if source is not None:
        _from_files(args, task, source, settings.reading, parts["whole step"][0], state, whole)


def _files(args, config, parser):
    """The source of `--files`, and the config for reading it: before the hours that the rest may take."""
    config.data.update(name="images", root=args.files, memory_gigabytes=0.0)
    config.data.update(threads=args.threads, workers=args.workers)
    try:
        return assembly.make_data(config).split("train")
    except ValueError as error:
        parser.error(f"--files: {error}")


def _from_files(args, task, source, reading, step, state, whole: float) -> None:
    """Images/s of steps fed from files, as a share of the rate without reading."""
    options = dict(reading=reading, batch=args.batch, seed=0)
    reader = task.reader(source, frozen={}, digest="", **options)
    # What is read ahead before the first step must not count.
    ahead = 2 * args.threads * max(args.workers, 1)
    steps = max(2 * ahead, 20)
    begin = None
    for i, batch in enumerate(reader.train_batches(0, ahead + steps)):
        if i == ahead:
            jax.block_until_ready(state)
            begin = time.perf_counter()
        batch = {k: batch[k] for k in ("image", "extent", "row", "valid")}
        state, _ = step(state, {}, batch)
    jax.block_until_ready(state)
    each = (time.perf_counter() - begin) / steps
    print(f"\nfrom files: {args.batch / each:.2f} images/s, {whole / each:.0%} of the rate above")


if __name__ == "__main__":
    restart_with_huge_pages(__file__)
    main()
