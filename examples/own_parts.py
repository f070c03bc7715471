"""A backbone, head, source and loss of one's own: `python examples/own_parts.py --workdir=W [--predict]`."""

import argparse

import flax.linen as nn
import numpy as np

import jaxseg


class Backbone(nn.Module):
    @nn.compact
    def __call__(self, image, train):
        x = nn.Conv(32, (8, 8), strides=4)(image)
        x = nn.relu(nn.BatchNorm(use_running_average=not train)(x))
        return {"cls": x.mean((1, 2)), "patches": x}


class Head(nn.Module):
    @nn.compact
    def __call__(self, features, image, train):
        x = nn.Dropout(0.2, deterministic=not train)(features)
        return jaxseg.ops.resize.resize_bilinear(nn.Conv(3, (3, 3))(x), image.shape[1:3])


class Discs:  # bright or dark ones on grey noise, in images of three sizes
    def __init__(self, seeds):
        self.seeds = seeds

    def __len__(self):
        return len(self.seeds)

    def __getitem__(self, index):
        rng = np.random.default_rng(self.seeds[index])
        size = [(64, 64), (48, 64), (72, 56)][index % 3]
        y, x = np.indices(size) - rng.integers(16, 40, (2, 1, 1))
        mask = (x**2 + y**2 < 12**2) * rng.integers(1, 3)
        image = np.array([120, 210, 30])[mask, None] + rng.integers(0, 30, (*size, 3))
        return {"image": image.astype(np.uint8), "mask": mask}


def squares(logits, labels, valid):
    return (((nn.softmax(logits) - nn.one_hot(labels, 3)) ** 2).sum(-1) * valid).sum() / valid.sum()


parser = argparse.ArgumentParser()
parser.add_argument("--workdir", required=True)
parser.add_argument("--steps", type=int, default=200)
parser.add_argument("--predict", action="store_true", help="with what was trained before")
args = parser.parse_args()
network = jaxseg.Segmenter(Backbone(), Head())
task = jaxseg.tasks.Multiclass(network, ["ground", "bright", "dark"], ["cross_entropy", squares])
if args.predict:
    new = Discs([100])[0]
    mask = jaxseg.load(args.workdir, task=task).predict(new["image"])
    print(f"{(mask == new['mask']).mean():.1%} of the pixels of a new image are right")
else:  # from the newest checkpoint, where there is one
    data = {"train": Discs(range(60)), "val": Discs(range(60, 75))}
    run = jaxseg.fit(task, data, steps=args.steps, workdir=args.workdir)
    print(f"mIoU after {run.step} steps: {run.evaluate('val')['miou']:.3f}")
