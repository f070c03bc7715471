"""How fast a ViT runs forward, and what share of the machine's measured matrix-product rate that is.

    python benchmarks/vit.py [--variant=dino_vits16] [--size=224] [--batch=8]

Compares with a large square matrix product of the same dtype on the same device in the same run.
Prints one Markdown table, a row for each dtype; the device is the one JAX picks (GPU if there is one).
"""

import argparse
import platform

import flax
import jax
import jax.numpy as jnp

from jaxseg import restart_with_huge_pages
from jaxseg.backbones.vit import VARIANTS, Variant, ViT
from jaxseg.train.speed import best_seconds, matmul_rate


def forward_flops(variant: Variant, size: int) -> float:
    """Floating-point operations of one image's matrix products (a multiply-add counts as two)."""
    patches = (size // variant.patch) ** 2
    n, d = patches + 1 + variant.registers, variant.dim
    embed = 2 * patches * 3 * variant.patch**2 * d
    block = 2 * n * d * d * (4 + 2 * variant.mlp_ratio) + 4 * n * n * d
    return embed + variant.depth * block


def measure(variant: Variant, dtype: jnp.dtype, args: argparse.Namespace) -> str:
    """Returns the table row of one dtype."""
    model = ViT(variant, dtype=dtype)
    image = jax.random.normal(jax.random.key(0), (args.batch, args.size, args.size, 3))
    params = jax.jit(model.init)(jax.random.key(1), image[:1])
    forward = jax.jit(lambda params, image: model.apply(params, image)["patches"])
    seconds = best_seconds(forward, params, image, repeats=args.repeats)
    rate = args.batch * forward_flops(variant, args.size) / seconds
    reference = matmul_rate(dtype, args.matmul, repeats=args.repeats)
    return (
        f"| {variant.name} | {args.size} | {args.batch} | {jnp.dtype(dtype).name} "
        f"| {1e3 * seconds:.1f} | {args.batch / seconds:.1f} | {rate / 1e9:.0f} "
        f"| {reference / 1e9:.0f} | {100 * rate / reference:.0f} % |"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--variant", default="dino_vits16", choices=list(VARIANTS))
    parser.add_argument("--size", type=int, default=224, help="side of the square images")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--matmul", type=int, default=0, help="side of the reference matrices")
    args = parser.parse_args()
    device = jax.devices()[0]
    variant = VARIANTS[args.variant]
    print(
        f"{device.device_kind} ({device.platform}), Python {platform.python_version()}, "
        f"jax {jax.__version__}, flax {flax.__version__}\n"
    )
    print(
        "| variant | size | batch | dtype | ms | images/s | GFLOP/s | matmul GFLOP/s | share |\n"
        "|---|---|---|---|---|---|---|---|---|"
    )
    for dtype in (jnp.float32, jnp.bfloat16):
        print(measure(variant, dtype, args), flush=True)


if __name__ == "__main__":
    restart_with_huge_pages(__file__)
    main()
