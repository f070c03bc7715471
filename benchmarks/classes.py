"""Training and prediction of a multi-class segmenter: images/s, and the share of the peak.

    python benchmarks/classes.py                                      # 480x360, ViT-S/14 and ResNet-50
    python benchmarks/classes.py --size 512 1024 --precision=bfloat16 --batch=16

Prints one markdown table. FLOPs are those of matrix products and convolutions; the peak is the rate of
one large matrix product in the same precision, measured in the same run. `cached` trains the
head alone, on features that are at hand, as a frozen backbone allows.
"""

import argparse
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from configs.deeplab_multiclass import get_config  # noqa: E402
from jaxseg import run  # noqa: E402
from jaxseg.experiment import frozen_paths, make_model, make_task  # noqa: E402
from jaxseg.huge_pages import restart_with_huge_pages  # noqa: E402
from jaxseg.backbones import BACKBONES  # noqa: E402
from jaxseg.train import loop, optim  # noqa: E402
from jaxseg.train.speed import (  # noqa: E402
    best_seconds,
    compiled,
    matmul_rate,
    product_flops,
)
from jaxseg.train.state import split_params  # noqa: E402

NAMES = tuple(f"class {i}" for i in range(11))


def make_calls(args, variant: str, head: str, train: str) -> dict[str, tuple]:
    """{what: (function, *arguments)} of one training step and of one prediction."""
    config = get_config("camvid")
    config.head.name = head
    config.backbone.update(variant=variant, train=train, precision=args.precision)
    if variant.startswith("resnet"):
        config.backbone.stride = 16
    model = make_model(config, BACKBONES[variant], NAMES)
    size = tuple(-(-side // model.stride) * model.stride for side in args.size)
    task = make_task(config, model, size=size, names=NAMES, categories=("all",))
    params = jax.jit(task.init)(jax.random.key(0))
    rng = np.random.default_rng(0)
    batch = {
        "image": jnp.array(rng.integers(0, 256, (args.batch, *size, 3), np.uint8)),
        "mask": jnp.array(rng.integers(0, 11, (args.batch, *size), np.uint8)),
        "row": jnp.arange(args.batch),
        "valid": jnp.ones(args.batch, bool),
    }
    cached = train == "none" and not variant.startswith("resnet")
    if cached:
        batch["features"] = jax.jit(task.features)(params, batch["image"])
    trained, frozen = split_params(params, frozen_paths(config, BACKBONES[variant]))
    schedule = optim.make_schedule(config.optim, 100)
    optimizer = run.make_optimizer(config, task, schedule, 100)
    state = loop.make_state(task, trained, optimizer)
    step = loop.make_train_step(task, optimizer, seed=0)
    judged = task.predicting(params, state.extra)

    def predict(params, batch):
        return task.decide(task.logits(params, batch)[0])

    return {
        f"{variant}, {head}, training" + ", cached" * cached: (step, state, frozen, batch),
        f"{variant}, {head}, prediction": (predict, judged, {"image": batch["image"]}),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", type=int, nargs=2, default=(360, 480), help="height and width")
    parser.add_argument("--precision", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    peak = matmul_rate(args.precision, repeats=args.repeats)
    print(f"{jax.devices()[0].device_kind}, {args.precision}: peak {peak / 1e9:.0f} GFLOP/s\n")
    print("| what | images/s | GFLOP an image | share of the peak |")
    print("|---|---|---|---|", flush=True)
    calls = {}
    for variant, head, train in (
        ("dinov2_vits14", "linear", "none"),
        ("dinov2_vits14", "deeplabv3plus", "none"),
        ("resnet50", "deeplabv3plus", "all"),
    ):
        calls |= make_calls(args, variant, head, train)
    for what, call in compiled(calls).items():
        seconds, flops = best_seconds(*call, repeats=args.repeats), product_flops(*calls[what])
        rate, work = args.batch / seconds, flops / args.batch / 1e9
        print(f"| {what} | {rate:.2f} | {work:.0f} | {flops / seconds / peak:.0%} |", flush=True)


if __name__ == "__main__":
    restart_with_huge_pages(__file__)
    main()
