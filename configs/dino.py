"""Learning to see without labels: DINO (Caron et al., ICCV 2021).

    python main.py --config=configs/dino.py --config.data.name=images --config.data.root=IMAGES \
        --workdir=W

`IMAGES` is a folder or a zip file of images (`{train,val,test}/<class>/...`; neither level is needed,
and the classes serve k-NN alone). Afterwards `--config.backbone.weights=W` uses the teacher's backbone
in `configs/pac_objseg.py`, and `--mode=analyze` shows what it learnt.

Without a preset: ViT-S/16 by the paper's recipe, with crops of images that have been fitted into
`data.size`, 256 x 256. Presets, after a colon:
  s16          the same on ImageNet through TFDS, prepared as array_record, fitted into 384 x 384 (100
               epochs, batch 512, on 8 GPUs; the authors' code: k-NN 69.3, linear 74.0, which compare
               with all training images: `--config.eval.limit=0`).
  small        low-resolution images, few of them, one GPU: 32 x 32 pixels, ViT with patch 4.
  laptop       a small ResNet, within half an hour on two CPU cores (20,000 images of CIFAR-10: k-NN
               0.506, untrained 0.317).
  course       task 1 of the Freiburg deep-learning lab: 2 x 192 + 4 x 72 crops, 128 outputs, batch
               128, 10 epochs.
  shapes       the backbone of `configs/pac_objseg.py`, from drawn images alone.
  small_batch  what the authors advise for batches far below 1024: a slower teacher (0.9995) with a
               lower temperature (0.02 here; they give no number).
  runlocal     ten steps, to see that everything works.
"""

import ml_collections

from jaxseg.schema import base_config, parse_presets

PRESETS = ("s16", "small", "laptop", "course", "shapes", "small_batch", "runlocal")


def get_config(arg: str | None = None) -> ml_collections.ConfigDict:
    """The config; `arg` holds presets, comma separated."""
    presets = parse_presets(arg, PRESETS)
    config = base_config("dino")
    config.backbone.drop_path = 0.1
    config.data.size = (256, 256)
    config.backbone.variant = "dino_vits16"
    config.optim.update(
        lr=5e-4,
        lr_batch=256,
        warmup=0.1,
        final_lr=1e-6,
        weight_decay=0.04,
        weight_decay_end=0.4,
        clip_norm=0.0,
        clip_each=3.0,
    )
    config.train.update(batch=64, epochs=100.0, log_every=50, eval_every=2000, checkpoint_every=500)
    config.eval.split = "val"
    if "s16" in presets:
        config.data.update(name="tfds", size=(384, 384))
        config.data.tfds.update(name="imagenet2012", mask_key="", label_key="label")
        config.eval.update(resolution=224, crop=0.875, limit=50000)
        config.train.update(batch=512, eval_every=5000)
    if "small" in presets or "laptop" in presets:
        _small(config)
    if "laptop" in presets:
        _laptop(config)
    if "course" in presets:
        config.backbone.variant = "resnet18"
        config.views.update(global_size=192, local_size=72, local_count=4)
        config.dino.update(
            outputs=128,
            teacher_temperature=0.04,
            warmup_teacher_temperature=0.01,
            warmup_teacher_epochs=1,
        )
        config.train.update(batch=128, epochs=10.0, eval_every=200)
    if "shapes" in presets:
        _shapes(config)
    if "small_batch" in presets:
        config.dino.update(momentum=0.9995, teacher_temperature=0.02)
    if "runlocal" in presets:
        config.data.limit = 32
        config.eval.limit = 32
        config.dino.update(outputs=256, hidden=128, bottleneck=64)
        config.train.update(batch=8, steps=10, log_every=2, eval_every=5)
    return config


def _small(config: ml_collections.ConfigDict) -> None:
    """Images of 32 x 32, as those of CIFAR."""
    config.data.size = (32, 32)
    config.backbone.variant = "vit_small4"
    config.views.update(
        global_size=32, local_size=16, local_count=6, blur=(0.0, 0.0, 0.0), local_scale=(0.1, 0.4)
    )
    config.dino.update(outputs=4096, hidden=1024, freeze_last_layer=1.0)
    config.train.update(batch=256, epochs=200.0)


def _laptop(config: ml_collections.ConfigDict) -> None:
    config.backbone.variant = "resnet10_mini"
    config.views.local_count = 2
    config.dino.update(outputs=1024, batch_norm=True, momentum=0.99, freeze_last_layer=0.5)
    config.optim.update(lr=1e-3, lr_batch=0, weight_decay_end=-1.0)
    config.train.update(batch=64, epochs=27.0, eval_every=1000, log_every=50)
    config.eval.batch = 100


def _shapes(config: ml_collections.ConfigDict) -> None:
    """Shoals of 128 x 128: crops of about the scale of `shapes`, whose colours tell little."""
    config.data.update(name="kinds", length=20000, size=(128, 128))
    config.backbone.update(variant="vit_micro8", drop_path=0.0)
    config.views.update(
        global_size=64,
        global_scale=(0.2, 0.6),
        local_size=32,
        local_scale=(0.06, 0.2),
        local_count=4,
    )
    config.views.update(blur=(0.5, 0.1, 0.3), saturation=0.4, hue=0.5)
    config.dino.update(
        outputs=1024, hidden=1024, batch_norm=True, momentum=0.99, freeze_last_layer=0.2
    )
    config.optim.update(lr=1e-3, lr_batch=0, weight_decay_end=-1.0)
    config.train.update(batch=64, epochs=16.0, eval_every=500, log_every=25)
    config.eval.update(split="test", limit=550, batch=50)
