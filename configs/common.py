"""What all experiments share: presets after the colon, and the sections that configs have."""

from collections.abc import Sequence

import ml_collections

_GUIDED = dict(
    width=96,
    dropout=0.1,
    guide_widths=(16, 32, 64),
    prior=0.0,  # penalty of a linear classifier of frozen features, solved for first; 0 = none
)


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
    """The keys of every experiment, with their defaults; `jaxseg/config.py` knows what is allowed."""
    config = ml_collections.ConfigDict()
    config.seed = 0

    config.data = ml_collections.ConfigDict(
        dict(
            name="shapes",  # shapes or kinds (drawn), folder, coco, images or tfds
            root="",  # folder, coco, images: the data; tfds: where the prepared data sets are
            categories=(),  # names; empty = all
            mask_values="auto",  # folder: 0/255, 0/1 (255 = void), or auto: 0/1 if a mask has a 1
            mask_threshold=0,  # folder: foreground is every value from here, for soft masks; 0 = off
            limit=0,  # read only so many examples of each split, evenly spaced; 0 = all
            length=0,  # shapes: how many are drawn for training; 0 = 2000
            size=(0, 0),  # (height, width) of the images, multiples of the stride; (0, 0) = native
            threads=2,  # that decode, in each process
            workers=0,  # processes that decode, beside the threads
            memory_gigabytes=4.0,  # decoded images and cached features kept in memory
            cache_dir="",  # also keep the features of a frozen backbone here, for later runs
            cache_gigabytes=20.0,  # at most this much there
            tfds=dict(
                name="",
                image_key="image",
                mask_key="segmentation_mask",
                label_key="",  # read for pretraining, where mask_key is empty
                foreground=(1,),
                void=(),
            ),
        )
    )
    config.backbone = ml_collections.ConfigDict(
        dict(
            weights="",  # a name of the catalogue, a file, or a workdir; empty = start from scratch
            variant="vit_micro16",  # the architecture where there are no weights
            normalization="imagenet",
            precision="float32",  # or bfloat16
        )
    )
    config.optim = ml_collections.ConfigDict(
        dict(
            name="adamw",
            lr=1e-3,
            lr_batch=0,  # if set, lr is for a batch of so many, and grows with the batch
            schedule="cosine",
            warmup=0.05,  # share of the run
            final_lr=0.0,
            weight_decay=0.01,
            weight_decay_end=-1.0,  # reached along a cosine; negative = it stays
            clip_norm=1.0,  # of the whole gradient; 0 = off
            clip_each=0.0,  # of each tensor's gradient; 0 = off
            average=0.0,  # decay of the parameters' moving average, which is then evaluated
        )
    )
    config.train = ml_collections.ConfigDict(
        dict(
            batch=16,  # over all devices
            accumulate=1,  # parts in which a batch is taken, for less memory (batch norm sees one at a time)
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
            batch=16,
            checkpoint="latest",  # or best
            report=True,
        )
    )
    config.sharding = ml_collections.ConfigDict(dict(params="replicated"))
    return config


def get_dense_config() -> ml_collections.ConfigDict:
    """The base, and what every kind of segmentation adds."""
    config = get_base_config()
    config.backbone.update(
        train="auto",  # none, all, or auto: none with weights, all without
        freeze=0,  # of a backbone that is trained: so many of its first blocks or stages rest
        layers=(-1,),  # blocks of a ViT whose patch tokens the head gets
        norm="batch",  # of a ResNet; or group, from scratch only
        stride=0,  # image pixels per token; 0 = the patch size, 16 for patch 14 and for a ResNet
    )
    config.optim.layer_decay = 1.0  # of the learning rate, for each layer farther from the head
    config.augment = ml_collections.ConfigDict(
        dict(flip=0.0, scale=(1.0, 1.0), brightness=0.0, contrast=0.0, saturation=0.0)
    )
    config.eval.update(
        scales=(1.0,),  # relative sizes at which images are predicted, and averaged
        flip=False,  # average with the mirrored image
        window=(0, 0),  # predict windows of (height, width), blended; (0, 0) = whole images
        overlap=0.5,  # of the windows
    )
    return config


def get_segmentation_config() -> ml_collections.ConfigDict:
    """What the segmentation of one object class adds."""
    config = get_dense_config()
    config.task = "segmentation"
    config.head = ml_collections.ConfigDict(
        dict(
            name="guided",  # each head reads the options under its own name
            guided=_GUIDED,
            pac_joint=dict(channels=32, guide_channels=16),
        )
    )
    config.loss = ml_collections.ConfigDict(
        dict(bce=1.0, dice=0.0, focal=0.0, jaccard=0.0, lovasz=0.0)
    )
    config.eval.update(
        categories=(),  # to evaluate on; empty = those of data.categories
        threshold=0.5,
    )
    return config


def _get_classes_config() -> ml_collections.ConfigDict:
    config = get_dense_config()
    config.data.update(
        classes=(),  # names; empty = those of the data
        void=(),  # folder: further ids that are ignored
        images="",  # folder: its subfolder of images; coco: where the images are
        labels="",  # folder: its subfolder of masks; coco: the annotation file
        overlap="smaller-on-top",  # coco: of objects; last-on-top, void
        crowd="void",  # coco: or paint
    )
    config.data.tfds.ids = ()  # values of the classes in the masks; empty = 0, 1, 2, ...
    config.loss = ml_collections.ConfigDict(
        dict(cross_entropy=1.0, dice=0.0, focal=0.0, hard_pixels=0.0, lovasz_softmax=0.0)
    )
    config.eval.split = "val"
    return config


def get_multiclass_config() -> ml_collections.ConfigDict:
    """What the segmentation of several classes adds."""
    config = _get_classes_config()
    config.task = "multiclass"
    deeplab = dict(channels=256, rates=(), norm="batch", dropout=0.1, separable=False)
    deeplab |= dict(reduce=0, auxiliary=False)
    config.head = ml_collections.ConfigDict(
        dict(
            name="deeplabv3plus",
            guided=_GUIDED,
            deeplabv3=deeplab,
            deeplabv3plus={**deeplab, "low_level": "stem", "low_width": 64},
        )
    )
    config.class_weights = "none"  # or median_frequency, inverse_log: of the training masks
    config.label_smoothing = 0.0
    config.auxiliary = 0.4  # weight of the auxiliary head's loss
    return config


def get_attention_config() -> ml_collections.ConfigDict:
    """What the segmentation of the class that is asked for adds."""
    config = _get_classes_config()
    config.task = "attention"
    config.questions = 4  # asked about each image in a training step
    config.head = ml_collections.ConfigDict(
        dict(
            name="attention",
            attention=dict(
                width=512,
                attention="dot",  # or additive
                context="scaled",  # or course
                channels=64,
                low_channels=48,
                dropout=0.1,
                norm="group",
            ),
        )
    )
    return config


def get_pretraining_config() -> ml_collections.ConfigDict:
    """The base, and what learning without labels adds."""
    config = get_base_config()
    config.backbone.update(
        drop_path=0.1,  # stochastic depth of a ViT's last block
        remat=False,  # compute activations again instead of keeping them: less memory, more time
    )
    config.views = ml_collections.ConfigDict(
        dict(
            flip=0.5,
            jitter=0.8,  # probability of the colour changes; their strengths follow
            brightness=0.4,
            contrast=0.4,
            saturation=0.2,
            hue=0.1,
            gray=0.2,
        )
    )
    config.eval.update(
        train_split="train",  # whose labelled images k-NN compares with
        limit=2000,  # images of each split, evenly spaced, that k-NN compares; 0 = all
        resolution=0,  # shorter side of the images that the backbone sees; 0 = that of data.size
        crop=1.0,  # share of the sides that k-NN and the probe see; 0.875 is the field's for ImageNet
        k=20,
        temperature=0.07,
    )
    return config
