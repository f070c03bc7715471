"""Object segmentation: one class of object against the background, on ViT features.

    python main.py --config=configs/pac_objseg.py --workdir=W

Draws the `shapes` data set and trains the `guided` head on a small ViT that was pretrained on other
drawn images without labels (`configs/dino.py:shapes`) and rests. `--config.backbone.weights=` trains a
ViT from scratch together with the head.

Presets, after a colon:
  real      images of your own on a frozen pretrained backbone (`--config.data.root=`,
            `--config.backbone.weights=`): flips, BCE + Dice, features computed once,
            a linear classifier of them solved for before the head is trained.
  course    exercise 4 of the TUM course cv3dst, with the course's own PAC network: BCE, Adam 5e-4,
            batch 4, 5 epochs, images cropped to multiples of 16. `--config.head.name=linear` is its
            part I. Two differences: batches run on across epochs, where the course's last batch of
            an epoch is short; and the backbone sees ImageNet-normalised images, as its weights
            expect (the course: `--config.backbone.normalization=none`).
  runlocal  ten steps, to see that everything works.
"""

import ml_collections

from jaxseg.schema import base_config, parse_presets

PRESETS = ("runlocal", "course", "real")


def get_config(arg: str | None = None) -> ml_collections.ConfigDict:
    """The config; `arg` holds presets, comma separated."""
    presets = parse_presets(arg, PRESETS)
    config = base_config("binary")
    config.head.name = "guided"
    config.backbone.update(weights="shapes_micro8", layers=(-3, -2, -1))
    config.loss.dice = 1.0
    config.augment.flip = 0.5
    config.optim.update(name="muon", lr=4e-3, weight_decay=0.05, average=0.99)
    config.train.update(batch=8, epochs=12.0, eval_every=1000, checkpoint_every=250, log_every=50)
    if "real" in presets or "course" in presets:
        config.data.name = "binary_masks"
        config.backbone.update(weights="", layers=(-1,))
        config.head.guided.guide_widths = (8, 16, 32)
        config.train.update(batch=4, eval_every=0, log_every=10)
        config.eval.batch = 4
    if "real" in presets:
        config.optim.update(lr=3e-3, average=0.98)
        config.backbone.layers = (-7, -4, -1)
        config.head.guided.prior = 3e-4
        config.train.update(epochs=12.0, min_steps=600)
    if "course" in presets:
        config.head.name = "pac_course"
        config.loss.dice = 0.0
        config.augment.flip = 0.0
        config.optim.update(
            name="adam", lr=5e-4, schedule="constant", warmup=0.0, clip_norm=0.0, average=0.0
        )
        config.train.epochs = 5.0
    if "runlocal" in presets:
        config.data.limit = 32
        config.train.update(steps=10, log_every=2, eval_every=0)
    return config
