"""Draws docs/shapes.png from a finished run on the built-in data set.

python docs/picture.py W
"""

import sys
from pathlib import Path

import matplotlib

matplotlib.use("agg")
import matplotlib.pyplot as plt  # noqa: E402

import jaxseg  # noqa: E402
from jaxseg.data import Shapes  # noqa: E402
from jaxseg.report.palette import overlay  # noqa: E402

COLUMNS = 7


def main(workdir: str) -> None:
    run, source = jaxseg.load(workdir), Shapes(part="test")
    figure, axes = plt.subplots(3, COLUMNS, figsize=(14, 6.2))
    for column in range(COLUMNS):
        image, mask = source[column]["image"], source[column]["mask"] == 1
        pictures = (image, mask, overlay(image, run.predict(image) == 1))
        for axis, picture in zip(axes[:, column], pictures, strict=True):
            axis.imshow(picture, cmap="gray")
            axis.set(xticks=[], yticks=[])
    for axis, name in zip(axes[:, 0], ("image", "mask", "predicted"), strict=True):
        axis.set_ylabel(name, fontsize=13)
    figure.tight_layout(pad=0.4)
    figure.savefig(Path(__file__).with_name("shapes.png"), dpi=80)


if __name__ == "__main__":
    main(sys.argv[1])
