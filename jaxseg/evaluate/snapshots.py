"""Features of held-out images in the course of a training, for the t-SNE over its epochs."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from jaxseg.files import replacing

FOLDER = "features"


def keep(
    workdir: Path,
    step: int,
    found: Mapping[str, np.ndarray],
    names: Sequence[str],
    size: tuple[int, int],
) -> None:
    """Keeps features of a step, with what tells whose they are.

    Args:
      workdir: the run's folder.
      step: of the training.
      found: `cls`, `category` and `mean` of the images.
      names: of the categories.
      size: at which the images were seen.
    """
    target = workdir / FOLDER
    target.mkdir(exist_ok=True)
    with replacing(target / f"{step:08d}.npz") as temporary:
        np.savez(
            temporary,
            cls=found["cls"].astype(np.float16),
            category=found["category"],
            mean=found["mean"],
            names=np.array(names, np.str_),
            size=np.array(size),
        )


def same_images(
    kept: Mapping[str, np.ndarray],
    found: Mapping[str, np.ndarray],
    names: Sequence[str],
    size: tuple[int, int],
) -> bool:
    """Whether what `keep` wrote is of the images of `found`, seen in the same way."""
    return (
        "mean" in kept
        and tuple(kept["names"]) == tuple(names)
        and tuple(kept["size"]) == size
        and kept["mean"].shape == found["mean"].shape
        # Sums differ in their last digits between numbers of devices.
        and np.allclose(kept["mean"], found["mean"], atol=1e-4)
    )
