"""Small maps: `jaxseg.ops.conv` against XLA's convolution, forward and backward in one run.

python benchmarks/conv.py
"""

import argparse
from functools import partial

import jax

from jaxseg.ops.conv import conv_general_dilated
from jaxseg.train.speed import best_seconds

# (side, channels in, out, stride) of the last stages on images of 32 x 32, and of ResNet-18 on 224 x 224.
SHAPES = (
    (8, 256, 512, 2),
    (4, 512, 512, 1),
    (4, 128, 256, 2),
    (2, 256, 256, 1),
    (1, 512, 512, 1),
    (14, 256, 512, 2),
    (7, 512, 512, 1),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    print(
        "| map | kernel | stride | XLA, ms | ours, ms | times as fast |\n|---|---|---|---|---|---|"
    )
    for side, inner, outer, stride in SHAPES:
        x = jax.random.normal(jax.random.key(0), (args.batch, side, side, inner))
        w = jax.random.normal(jax.random.key(1), (3, 3, inner, outer))

        def loss(x, w, convolve, stride=stride):
            y = convolve(
                x,
                w,
                (stride, stride),
                ((1, 1), (1, 1)),
                dimension_numbers=("NHWC", "HWIO", "NHWC"),
            )
            return (y**2).sum()

        xla, ours = (
            best_seconds(
                jax.jit(jax.grad(partial(loss, convolve=convolve), (0, 1))),
                x,
                w,
                repeats=args.repeats,
            )
            for convolve in (jax.lax.conv_general_dilated, conv_general_dilated)
        )
        print(
            f"| {args.batch} x {side} x {side} x {inner} | 3 x 3 x {outer} | {stride} "
            f"| {1e3 * xla:.1f} | {1e3 * ours:.1f} | {xla / ours:.1f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
