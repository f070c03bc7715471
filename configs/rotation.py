"""Learning from rotations: Gidaris, Singh, Komodakis, ICLR 2018.

    python main.py --config=configs/rotation.py:laptop --config.data.name=images \
        --config.data.root=IMAGES --workdir=W

The other pretext task, on the data, the backbones, the loop and the analysis of `configs/dino.py`, to be
compared with it at equal time. Paper: ResNet-50 on ImageNet, 48.2 linear top-1.

Presets, after a colon:
  laptop    images of 32 x 32, the network of `configs/dino.py:laptop`, as long on two CPU cores.
  runlocal  ten steps, to see that everything works.
"""

import ml_collections

from jaxseg.schema import base_config, parse_presets

PRESETS = ("laptop", "runlocal")


def get_config(arg: str | None = None) -> ml_collections.ConfigDict:
    """The config; `arg` holds presets, comma separated."""
    presets = parse_presets(arg, PRESETS)
    config = base_config("rotation")
    config.backbone.drop_path = 0.1
    config.data.size = (256, 256)
    config.backbone.variant = "resnet50"
    config.views.update(size=224, scale=(0.4, 1.0), jitter=0.0, gray=0.0)
    config.optim.update(lr=1e-3, lr_batch=256, warmup=0.05, weight_decay=0.05)
    config.train.update(batch=64, epochs=100.0, log_every=50, eval_every=2000, checkpoint_every=500)
    config.eval.split = "val"
    if "laptop" in presets:
        config.backbone.variant = "resnet10_mini"
        config.data.size = (32, 32)
        config.views.size = 32
        config.train.update(batch=128, epochs=14.0, eval_every=1000)
    if "runlocal" in presets:
        config.data.limit = 32
        config.eval.limit = 32
        config.train.update(batch=8, steps=10, log_every=2, eval_every=5)
    return config
