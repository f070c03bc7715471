"""The class that is asked for, found by attention: task 2 of the Freiburg deep-learning lab.

    python main.py --config=configs/attention_singleclass.py --workdir=W

Draws the `shapes` data set; any kind of object in it can be asked for.

Presets, after a colon:
  coco5     person, bicycle, car, cat, dog in the lab's layout (`--config.data.root=`), images at
            256 x 256.
  course    the lab's own form of attention: values times weights, dot product, batch norm.
  runlocal  ten steps, to see that everything works.
"""

import ml_collections

from jaxseg.schema import base_config, parse_presets

PRESETS = ("coco5", "course", "runlocal")


def get_config(arg: str | None = None) -> ml_collections.ConfigDict:
    """The config; `arg` holds presets, comma separated."""
    presets = parse_presets(arg, PRESETS)
    config = base_config("query")
    config.head.attention.width = 128
    config.augment.flip = 0.5
    config.optim.update(name="muon", lr=4e-3, weight_decay=0.05, average=0.99)
    config.train.update(batch=8, epochs=8.0, eval_every=1000, checkpoint_every=250, log_every=50)
    if "coco5" in presets:
        config.data.update(name="coco", size=(256, 256))
        config.backbone.layers = (-4, -1)
        config.head.attention.width = 256
        config.loss.dice = 1.0
        config.optim.update(lr=3e-3, average=0.98)
        # Each image is asked about often: five classes, most of them absent.
        config.train.update(batch=8, epochs=60.0, eval_every=0, log_every=10)
        config.eval.batch = 8
    if "course" in presets:
        config.head.attention.update(width=512, context="course", norm="batch")
    if "runlocal" in presets:
        config.data.limit = 16
        config.train.update(batch=4, steps=10, log_every=2, eval_every=0)
        config.eval.batch = 4
    return config
