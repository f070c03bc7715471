"""Training and prediction of a multi-class segmenter: images/s, and the share of the peak.

    python benchmarks/classes.py                                      # 480x360, ViT-S/14 and ResNet-50
    python benchmarks/classes.py --size 512 1024 --precision=bfloat16 --batch=16

Prints one markdown table. FLOPs are those of matrix products and convolutions; the peak is the rate of
one large matrix product in the same precision, measured in the same run. `cached` trains the
head alone, on features that are at hand, as a frozen backbone allows.
"""

import argparse

import jax
import jax.numpy as jnp
import numpy as np

from jaxseg import assembly, restart_with_huge_pages
from jaxseg.schema import read_config
from jaxseg.tasks import Facts
from jaxseg.train import loop
from jaxseg.train.speed import best_seconds, compiled, matmul_rate, product_flops

NAMES = tuple(f"class {i}" for i in range(11))
STEPS = 100  # of the schedule


def make_calls(args, variant: str, head: str, train: str) -> dict[str, tuple]:
    """{what: (function, *arguments)} of one training step and of one prediction."""
    config = read_config("deeplab_multiclass:camvid")
    config.head.name = head
    config.backbone.update(variant=variant, train=train, precision=args.precision)
    if variant.startswith("resnet"):
        config.backbone.stride = 16
    task = assembly.make_task(config, NAMES)
    size = tuple(-(-side // task.multiple) * task.multiple for side in args.size)
    task = task.with_facts(Facts(size, names=NAMES), steps=STEPS, batch=args.batch)
    params = jax.jit(task.init)(jax.random.key(0))
    rng = np.random.default_rng(0)
    batch = {
        "image": jnp.array(rng.integers(0, 256, (args.batch, *size, 3), np.uint8)),
        "mask": jnp.array(rng.integers(0, 11, (args.batch, *size), np.uint8)),
        "row": jnp.arange(args.batch),
        "valid": jnp.ones(args.batch, bool),
    }
    cached = task.network.features
    if cached:
        batch["features"] = jax.jit(task.features)(params, batch["image"])
    trained, frozen = task.split(params)
    recipe = assembly.make_settings(config).recipe
    optimizer = recipe.optimizer(STEPS, batch=args.batch, layers=task.layer_names)
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
        ("dinov2_vits14", "linear_norm", "none"),
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
