"""Transposed pixel-adaptive convolution: our fast form against its definition and against torch.

    python benchmarks/pac.py [--repeats 9] [--skip-patches]

k = 5, stride 2, 16 guide channels, float32. "patches" is the definition in
`jaxseg/ops/pac/reference.py`; "torch unfold" is the same in torch: zeros inserted, `F.unfold` of
input and guide, one einsum, on all cores (and on the GPU where JAX runs on one). The forms take
turns within one process; each figure is the median over the repeats. Peak memory: for JAX what
the compiled program allocates for temporaries and results (`memory_analysis`); for torch what the
process grows by in one forward and backward pass, in a process of its own (VmHWM), or
`max_memory_allocated` on a GPU.
"""

import argparse
import importlib.util
import multiprocessing
import os
import platform
import statistics
import time

import numpy as np

SIZES = ((4, 32, 32, 64), (4, 64, 64, 32), (2, 112, 112, 32))
GUIDE, K = 16, 5


def make_inputs(size: tuple[int, int, int, int]) -> list[np.ndarray]:
    """x, guide, weight and the gradient of the output, NHWC."""
    b, h, w, c = size
    random = np.random.default_rng(0)
    shapes = ((b, h, w, c), (b, 2 * h, 2 * w, GUIDE), (K, K, c, c), (b, 2 * h, 2 * w, c))
    scales = (1.0, 0.25, 1 / (K * c**0.5), 1.0)
    pairs = zip(shapes, scales, strict=True)
    return [(s * random.standard_normal(n)).astype(np.float32) for n, s in pairs]


def jax_form(form: str, size) -> tuple:
    """(forward, forward and backward, bytes): compiled calls that wait for their result."""
    import jax

    from jaxseg.ops.pac import pac_conv_transpose

    x, guide, weight, dy = map(jax.device_put, make_inputs(size))

    def forward(x, guide, weight):
        return pac_conv_transpose(
            x, guide, weight, stride=2, padding=2, output_padding=1, form=form
        )

    def both(x, guide, weight, dy):
        y, pull = jax.vjp(forward, x, guide, weight)
        return y, pull(dy)

    run_forward = jax.jit(forward).lower(x, guide, weight).compile()
    run_both = jax.jit(both).lower(x, guide, weight, dy).compile()
    memory = run_both.memory_analysis()
    return (
        lambda: jax.block_until_ready(run_forward(x, guide, weight)),
        lambda: jax.block_until_ready(run_both(x, guide, weight, dy)),
        memory.temp_size_in_bytes + memory.output_size_in_bytes,
    )


def torch_form(size, device: str) -> tuple:
    """(forward, forward and backward) of the unfold form in torch, NCHW."""
    import torch
    import torch.nn.functional as F

    torch.set_num_threads(len(os.sched_getaffinity(0)))
    arrays = make_inputs(size)
    x, guide, dy = (
        torch.from_numpy(arrays[i]).permute(0, 3, 1, 2).contiguous().to(device) for i in (0, 1, 3)
    )
    weight = torch.from_numpy(arrays[2]).permute(2, 3, 0, 1).contiguous().to(device)
    b, c, h, w = x.shape

    def forward(x, guide, weight):
        windows = F.unfold(guide, K, padding=K // 2).view(b, GUIDE, K * K, 4 * h * w)
        difference = windows - guide.reshape(b, GUIDE, 1, 4 * h * w)
        kernel = torch.exp(-0.5 * (difference * difference).sum(1, keepdim=True))
        spread = x.new_zeros(b, c, 2 * h, 2 * w)
        spread[:, :, ::2, ::2] = x
        columns = F.unfold(spread, K, padding=K // 2).view(b, c, K * K, 4 * h * w)
        y = torch.einsum("bckn,cok->bon", columns * kernel, weight.reshape(c, -1, K * K))
        return y.view(b, -1, 2 * h, 2 * w)

    def wait():
        if device == "cuda":
            torch.cuda.synchronize()

    def run_forward():
        with torch.no_grad():
            y = forward(x, guide, weight)
        wait()
        return y

    leaves = [t.requires_grad_() for t in (x, guide, weight)]

    def run_both():
        y = forward(*leaves)
        gradients = torch.autograd.grad(y, leaves, dy)
        wait()
        return y, gradients

    return run_forward, run_both


def _status_bytes(key: str) -> int:
    with open("/proc/self/status") as file:
        line = next(line for line in file if line.startswith(key))
    return int(line.split()[1]) * 1024


def _torch_peak(size, device: str, results) -> None:
    import torch

    _, both = torch_form(size, device)
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        both()
        results.put(torch.cuda.max_memory_allocated() - before)
    else:
        before = _status_bytes("VmRSS")
        both()
        results.put(_status_bytes("VmHWM") - before)


def torch_peak(size, device: str) -> int:
    """Bytes that one forward and backward pass adds, measured in a fresh process."""
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    process = context.Process(target=_torch_peak, args=(size, device, results))
    process.start()
    peak = results.get()
    process.join()
    return peak


def measure(size, names: list[str], device: str, repeats: int) -> dict[str, tuple]:
    """name -> (milliseconds forward, milliseconds forward and backward, bytes)."""
    calls, memory = {}, {}
    for name in names:
        if name == "torch unfold":
            memory[name] = torch_peak(size, device)
            calls[name] = torch_form(size, device)
        else:
            *calls[name], memory[name] = jax_form(name, size)
    times = {(name, i): [] for name in names for i in (0, 1)}
    for repeat in range(repeats + 1):
        for (name, i), measured in times.items():
            start = time.perf_counter()
            calls[name][i]()
            if repeat:  # the first turn warms up
                measured.append(1e3 * (time.perf_counter() - start))
    median = {key: statistics.median(measured) for key, measured in times.items()}
    return {name: (median[name, 0], median[name, 1], memory[name]) for name in names}


def agree(size, device: str) -> float:
    """Largest difference between our forward pass and torch's, relative to the largest value."""
    ours = np.asarray(jax_form("fast", size)[0]())
    theirs = torch_form(size, device)[0]().permute(0, 2, 3, 1).cpu().numpy()
    return float(np.abs(ours - theirs).max() / np.abs(theirs).max())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--skip-patches", action="store_true", help="it takes seconds per call")
    options = parser.parse_args()
    import jax

    device = "cuda" if jax.default_backend() == "gpu" else "cpu"
    names = ["fast"] + ([] if options.skip_patches else ["patches"])
    versions = [f"Python {platform.python_version()}", f"jax {jax.__version__}"]
    if importlib.util.find_spec("torch"):
        import torch

        if device == "cpu" or torch.cuda.is_available():
            names.append("torch unfold")
        versions.append(f"torch {torch.__version__}")
    cores = len(os.sched_getaffinity(0))
    print(f"{jax.devices()[0].device_kind}, {cores} cores, {', '.join(versions)}")
    if "torch unfold" in names:
        print(f"largest relative difference from torch: {agree(SIZES[0], device):.1e}")
    print(
        "\n| input BxHxWxC | form | forward ms | x fast | forward + backward ms | x fast | peak MB |"
    )
    print("|---|---|---|---|---|---|---|")
    for size in SIZES:
        results = measure(size, names, device, options.repeats)
        fast = results["fast"]
        for name in names:
            forward, both, peak = results[name]
            print(
                f"| {'x'.join(map(str, size))} | {name} | {forward:.1f} | {forward / fast[0]:.1f} "
                f"| {both:.1f} | {both / fast[1]:.1f} | {peak / 1e6:.0f} |",
                flush=True,
            )
        if "torch unfold" not in names:
            print(f"| {'x'.join(map(str, size))} | torch unfold | torch not installed | | | | |")


if __name__ == "__main__":
    main()
