"""Object segmentation on real sequences: heads on one object, on all, and on objects never seen.

    python benchmarks/objseg.py --root=../shared/data/obj_seg \
        --weights=../shared/weights/dinov2_vits14_derived_fp16.pth --workdir=/tmp/objseg

Prints one markdown table. `unseen` is four folds over the categories in alphabetical order: fold f
holds out every fourth from f, trains on the train split of the others, and scores both splits of the
held-out ones (the mean of the two, weighted by images); the figure is the mean over held-out
categories. Runs finished in the workdir are not done again, so the script can be stopped and started;
the seconds include features and evaluation, and are those of a training only where it was not resumed.
"""

import argparse
import logging
import statistics
import time
from pathlib import Path

from jaxseg import restart_with_huge_pages, run
from jaxseg.data import BinaryMasks
from jaxseg.schema import read_config

# Head, preset, epochs.
RECIPES = {
    "linear": ("course", 30.0),
    "pac_course": ("course", 30.0),
    "guided": ("real", None),
}


def make_config(args: argparse.Namespace, head: str, categories: tuple[str, ...], seed: int):
    """The config of one training."""
    preset, epochs = RECIPES[head]
    config = read_config(f"pac_objseg:{preset}")
    config.seed = seed
    config.head.name = head
    config.data.root, config.data.categories = args.root, categories
    config.data.cache_dir = str(Path(args.workdir) / "features")
    config.backbone.weights = args.weights
    config.eval.report = False
    if epochs:
        config.train.epochs = epochs
    return config


def score(config, workdir: Path, held_out: tuple[str, ...] = ()) -> tuple[dict[str, float], float]:
    """Trains, and returns (iou by category, seconds of training)."""
    begin = time.monotonic()
    result = run.train(config, workdir)
    seconds = time.monotonic() - begin
    if not held_out:
        return {"": result["iou"]}, seconds
    ious: dict[str, list[float]] = {name: [] for name in held_out}
    for split in ("train", "test"):
        overrides = {"eval.categories": held_out, "eval.split": split, "eval.report": False}
        result = run.evaluate(workdir, overrides)
        for name in held_out:
            row = result["categories"][name]
            ious[name] += [row["iou"]] * row["images"]
    return {name: statistics.mean(values) for name, values in ious.items()}, seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--root", required=True)
    parser.add_argument("--weights", required=True)
    parser.add_argument("--workdir", required=True)
    parser.add_argument("--heads", nargs="+", default=list(RECIPES), choices=list(RECIPES))
    parser.add_argument("--one", default="dog", help="the category of the first column")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    logging.getLogger("jaxseg").setLevel(logging.WARNING)
    names = BinaryMasks(args.root).categories
    print(f"| head | {args.one} | all {len(names)} | unseen | worst unseen | s, {args.one} |")
    print("|---|---|---|---|---|---|", flush=True)
    for head in args.heads:
        folder = Path(args.workdir) / f"{head}-{args.seed}"
        one, seconds = score(make_config(args, head, (args.one,), args.seed), folder / "one")
        everything, _ = score(make_config(args, head, names, args.seed), folder / "all")
        unseen: dict[str, float] = {}
        for fold in range(4):
            held_out = names[fold::4]
            rest = tuple(n for n in names if n not in held_out)
            config = make_config(args, head, rest, args.seed)
            unseen |= score(config, folder / f"fold{fold}", held_out)[0]
        worst = min(unseen, key=unseen.get)
        print(
            f"| {head} | {one['']:.4f} | {everything['']:.4f} "
            f"| {statistics.mean(unseen.values()):.4f} | {worst} {unseen[worst]:.3f} | {seconds:.0f} |",
            flush=True,
        )


if __name__ == "__main__":
    restart_with_huge_pages(__file__)
    main()
