"""What all experiments share: presets after the colon, and the sections that every config has."""

from collections.abc import Sequence

import ml_collections


def parse_presets(arg: str | None, allowed: Sequence[str]) -> tuple[str, ...]:
    """Reads `config.py:preset,preset`.

    Raises:
      ValueError: naming the unknown preset and those allowed.
    """
    presets = tuple(p for p in (arg or "").split(",") if p)
    for preset in presets:
        if preset not in allowed:
            raise ValueError(f"no preset {preset!r}; allowed after the colon: {', '.join(allowed)}")
    return presets


def get_base_config() -> ml_collections.ConfigDict:
    """Every key an experiment can set, with its default; `jaxseg/config.py` knows what is allowed."""
    config = ml_collections.ConfigDict()
    config.seed = 0
    config.task = "segmentation"

    config.data = ml_collections.ConfigDict(
        dict(
            name="shapes",  # shapes, folder or tfds
            root="",  # folder: the data; tfds: where the prepared data sets are
            categories=(),  # names; empty = all
            mask_values="auto",  # folder: 0/255, 0/1 (255 = void), or auto: 0/1 if a mask has a 1
            mask_threshold=0,  # folder: foreground is every value from here, for soft masks; 0 = off
            limit=0,  # read only the first so many examples of each split; 0 = all
            size=(0, 0),  # (height, width) of the images, multiples of the stride; (0, 0) = native
            threads=2,  # that decode, in each process
            workers=0,  # processes that decode, beside the threads
            memory_gigabytes=4.0,  # decoded images and cached features kept in memory
            cache_dir="",  # also keep the features of a frozen backbone here, for later runs
            cache_gigabytes=20.0,  # at most this much there
            tfds=dict(
                name="", image_key="image", mask_key="segmentation_mask", foreground=(1,), void=()
            ),
        )
    )
    config.backbone = ml_collections.ConfigDict(
        dict(
            weights="",  # a name of the catalogue, a file, or a workdir; empty = start from scratch
            variant="vit_micro16",  # the architecture where there are no weights
            train="auto",  # none, all, or auto: none with weights, all without
            layers=(-1,),  # blocks whose patch tokens the head gets
            stride=0,  # image pixels per token; 0 = the patch size, 16 for patch 14
            normalization="imagenet",
            precision="float32",  # or bfloat16
        )
    )
    config.head = ml_collections.ConfigDict(
        dict(
            name="guided",  # each head reads the options under its own name
            guided=dict(width=96, dropout=0.1, guide_widths=(16, 32, 64)),
            pac_joint=dict(channels=32, guide_channels=16),
        )
    )
    config.loss = ml_collections.ConfigDict(dict(bce=1.0, dice=0.0, focal=0.0, jaccard=0.0))
    config.augment = ml_collections.ConfigDict(
        dict(flip=0.0, scale=(1.0, 1.0), brightness=0.0, contrast=0.0, saturation=0.0)
    )
    config.optim = ml_collections.ConfigDict(
        dict(
            name="adamw",
            lr=1e-3,
            schedule="cosine",
            warmup=0.05,  # share of the run
            weight_decay=0.01,
            clip_norm=1.0,  # global; 0 = off
            average=0.0,  # decay of the parameters' moving average, which is then evaluated
        )
    )
    config.train = ml_collections.ConfigDict(
        dict(
            batch=16,  # over all devices
            epochs=20.0,
            min_steps=0,  # at least so many, whatever the epochs say
            steps=0,  # exactly so many; 0 = from epochs
            log_every=20,
            eval_every=0,  # on the val split, if there is one; picks the best checkpoint
            checkpoint_every=200,
        )
    )
    config.eval = ml_collections.ConfigDict(
        dict(
            split="test",
            categories=(),  # to evaluate on; empty = those of data.categories
            batch=16,
            threshold=0.5,
            checkpoint="latest",  # or best
            report=True,
        )
    )
    config.sharding = ml_collections.ConfigDict(dict(params="replicated"))
    return config
