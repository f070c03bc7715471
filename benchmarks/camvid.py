"""Street scenes in 11 classes: heads on the same frozen features, at the same resolution.

    python benchmarks/camvid.py --root=../shared/data/camvid \
        --weights=../shared/weights/dinov2_vits14_derived_fp16.pth --workdir=/tmp/camvid

Trains each head on the train split with `configs/deeplab_multiclass.py:camvid`, and prints one markdown
table of scores on the val split. Finished runs in the workdir are not done again, so the script can be
stopped and started. `+ scales` is the same run evaluated at three scales and mirrored.
"""

import argparse
import time
from pathlib import Path

from jaxseg import restart_with_huge_pages, run
from jaxseg.schema import read_config

COLUMNS = ("miou", "pixel_accuracy", "mean_accuracy", "boundary_iou")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--root", required=True)
    parser.add_argument("--weights", required=True)
    parser.add_argument("--workdir", required=True)
    parser.add_argument("--heads", nargs="+", default=["linear_norm", "guided", "deeplabv3plus"])
    parser.add_argument("--scales", action="store_true", help="evaluate at three scales as well")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    rows = []
    for head in args.heads:
        config = read_config("deeplab_multiclass:camvid")
        config.seed = args.seed
        config.head.name = head
        config.data.root, config.backbone.weights = args.root, args.weights
        config.data.cache_dir = str(Path(args.workdir) / "features")
        folder = Path(args.workdir) / f"{head}-{args.seed}"
        begin = time.monotonic()
        rows.append((head, run.train(config, folder), time.monotonic() - begin))
        if args.scales:
            how = {"eval.scales": (0.75, 1.0, 1.25), "eval.flip": True, "eval.report": False}
            rows.append((f"{head} + scales", run.evaluate(folder, how), 0.0))
    names = list(rows[0][1]["per_class"])
    print("| head | " + " | ".join((*(c.replace("_", " ") for c in COLUMNS), *names)) + " | s |")
    print("|" + "---|" * (2 + len(COLUMNS) + len(names)))
    for head, result, seconds in rows:
        cells = [result[c] for c in COLUMNS] + [result["per_class"][n]["iou"] for n in names]
        shown = " | ".join("" if c is None else f"{c:.3f}" for c in cells)
        print(f"| {head} | {shown} | {seconds:.0f} |")


if __name__ == "__main__":
    restart_with_huge_pages(__file__)
    main()
