"""Object segmentation: one class of object against the background, with a guided upsampler.

python main.py --config=configs/pac_objseg.py --workdir=W
"""

import ml_collections

from configs.common import get_base_config, parse_presets

PRESETS = ("runlocal", "course")


def get_config(arg: str | None = None) -> ml_collections.ConfigDict:
    """The config; `arg` holds presets, comma separated, see PRESETS."""
    presets = parse_presets(arg, PRESETS)
    config = get_base_config()
    if "course" in presets:
        config.data.name = "folder"
        config.head.name = "pac_course"
        config.optim.update(name="adam", lr=5e-4, schedule="constant", warmup=0.0, clip_norm=0.0)
        config.train.update(batch=4, epochs=5.0, log_every=10)
        config.eval.batch = 4
    if "runlocal" in presets:
        config.train.update(steps=10, batch=8, log_every=2)
    return config
