"""Several classes: DeepLabV3 and V3+ (Chen et al. 2017, 2018) on a ViT or a ResNet.

    python main.py --config=configs/deeplab_multiclass.py --workdir=W

Draws the `shapes` data set and finds every kind of object in it, with a small ViT trained from
scratch. `--config.head.name=` deeplabv3plus, deeplabv3, guided or linear.

Presets, after a colon:
  camvid    street scenes, 11 classes, on frozen pretrained features (`--config.data.root=`,
            `--config.backbone.weights=`); any folder of images and index masks with a classes.txt. The
            head is `guided`: atrous context, then a decoder that reaches full resolution, where V3+
            stops at a quarter of it and loses what is a few pixels wide.
  coco5     person, bicycle, car, cat, dog in the layout of the Freiburg deep-learning lab
            (`--config.data.root=`), images at 256 x 256.
  voc       PASCAL VOC 2012 in folders (`{train,val}/{images,labels}`, the masks as released; TFDS has
            none of them); ResNet-50 and the paper's recipe, weights by `--config.backbone.weights=`.
  finetune  trains the backbone too, lower layers more slowly; `camvid,finetune` has val mIoU 0.806.
  runlocal  ten steps, to see that everything works.
"""

import ml_collections

from jaxseg.schema import base_config, parse_presets

PRESETS = ("camvid", "coco5", "voc", "finetune", "runlocal")
_VOC = "background aeroplane bicycle bird boat bottle bus car cat chair cow diningtable dog horse "
_VOC += "motorbike person pottedplant sheep sofa train tvmonitor"


def get_config(arg: str | None = None) -> ml_collections.ConfigDict:
    """The config; `arg` holds presets, comma separated."""
    presets = parse_presets(arg, PRESETS)
    config = base_config("multiclass")
    config.head.name = "deeplabv3plus"
    config.head.deeplabv3plus.update(channels=64, separable=True, reduce=64, low_width=32)
    config.augment.flip = 0.5
    config.optim.update(name="muon", lr=4e-3, weight_decay=0.05, average=0.99)
    config.train.update(batch=8, epochs=8.0, eval_every=1000, checkpoint_every=250, log_every=50)
    if "camvid" in presets or "coco5" in presets:
        config.head.deeplabv3plus.update(channels=128, reduce=128, low_width=64)
        # Class weights instead of Dice find more of the rare classes, but at the cost of the rest.
        config.loss.dice = 1.0
        config.optim.lr = 3e-3
        config.train.eval_every = 0
    if "camvid" in presets:
        config.data.name = "class_masks"
        config.backbone.update(stride=8, layers=(-4, -1))
        config.head.name = "guided"  # val mIoU 0.735; deeplabv3plus 0.692, linear 0.633
        config.train.update(batch=4, epochs=15.0, log_every=20)
        config.eval.batch = 4
    if "coco5" in presets:
        config.data.update(name="coco", size=(256, 256))
        config.backbone.layers = (-4, -1)
        config.optim.average = 0.98
        config.train.update(epochs=30.0, log_every=10)
        config.eval.batch = 8
    if "voc" in presets:
        config.data.update(name="class_masks", size=(512, 512), classes=tuple(_VOC.split()))
        config.backbone.update(variant="resnet50", train="all")
        config.head.deeplabv3plus.update(
            channels=256, reduce=0, separable=False, auxiliary=True, low_width=64
        )
        config.augment.scale = (0.5, 2.0)
        config.optim.update(
            name="sgd",
            lr=7e-3,
            schedule="poly",
            warmup=0.0,
            weight_decay=1e-4,
            average=0.0,
            clip_norm=0.0,
        )
        config.train.update(batch=16, epochs=0.0, steps=30000, eval_every=5000)
    if "finetune" in presets:
        config.backbone.train = "all"
        config.optim.update(name="adamw", lr=3e-4, layer_decay=0.75)
    if "runlocal" in presets:
        config.data.limit = 16
        config.train.update(batch=4, steps=10, log_every=2, eval_every=0)
        config.eval.batch = 4
    return config
