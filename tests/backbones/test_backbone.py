"""Backbones ready for use, from wherever they come: their features, and what of them is trained."""

import json

import flax
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from checkpoints import vit_tensors, write_safetensors

from jaxseg import backbones
from jaxseg.backbones import build, vit_weights
from jaxseg.backbones.backbone import Backbone, backbone
from jaxseg.backbones.resnet import ResNetVariant
from jaxseg.options import OptionError
from jaxseg.train.checkpoint import Checkpointer

MEAN, STD = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])
IMAGES = np.random.default_rng(0).integers(0, 256, (2, 12, 16, 3), np.uint8)


class Conv(nn.Module):
    """A user's: no `train`, no `patch`."""

    normalization: str = "imagenet"
    layer_names = (("stem",), ("last",))

    @nn.compact
    def __call__(self, image):
        x = nn.relu(nn.Conv(4, (4, 4), strides=4, padding="VALID", name="stem")(image))
        x = nn.Conv(6, (1, 1), name="last")(x)
        return {"cls": x.mean((1, 2)), "patches": x}


class Normed(nn.Module):
    """A user's with batch norm."""

    @nn.compact
    def __call__(self, image, *, train):
        x = nn.BatchNorm(use_running_average=not train, name="norm")(image)
        return {"cls": x.mean((1, 2)), "patches": x}


def _variables(module, **options):
    image = jnp.zeros((1, 8, 8, 3))
    return jax.jit(lambda key: module.init(key, image, **options))(jax.random.key(0))


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    """A tiny ViT as a release has it: patch 4, 2 blocks, 64 wide."""
    return write_safetensors(tmp_path_factory.mktemp("file") / "x.safetensors", vit_tensors())


@pytest.fixture(scope="module")
def vit(file):
    return backbone(file)


def test_features_of_a_file_are_those_of_its_module(vit, file):
    assert vit.source == str(file) and vit.variant.dim == 64 and not vit.trained
    params, variant = vit_weights.to_flax(vit_tensors(), source="x")
    apply = jax.jit(
        lambda x: build(variant).apply({"params": params}, x, layers=(0,), attention=True)
    )
    want = apply(((IMAGES / 255 - MEAN) / STD).astype(np.float32))
    every = [
        vit(IMAGES),
        vit((IMAGES / 255).astype(np.float32)),
        vit(jnp.asarray(IMAGES), layers=[0, -1], attention=True),
    ]
    for found in every:
        assert found["cls"].dtype == found["patches"].dtype == jnp.float32
        assert found["patches"].shape == (2, 3, 4, 64)
        for name in ("cls", "patches"):
            np.testing.assert_allclose(found[name], want[name], atol=1e-4)
    assert "attention" not in every[0] and every[0]["layers"] == {}
    found = every[-1]
    np.testing.assert_allclose(found["layers"][0], want["layers"][0], atol=1e-4)
    np.testing.assert_allclose(found["layers"][-1], found["patches"], atol=1e-6)
    np.testing.assert_allclose(found["layers_cls"][0], want["layers_cls"][0], atol=1e-4)
    np.testing.assert_allclose(found["attention"], want["attention"], atol=1e-4)


@pytest.mark.parametrize("normalization", ["imagenet", "none"])
def test_features_of_a_module_are_those_of_apply(normalization):
    module = Conv()
    variables = _variables(module)
    made = backbone(module, variables, normalization=normalization)
    assert made.variant is None and made.name == "Conv" and not made.trained
    image = IMAGES / 255
    image = (image - MEAN) / STD if normalization == "imagenet" else image
    want = module.apply(variables, image.astype(np.float32))
    for images in (IMAGES, (IMAGES / 255).astype(np.float32), (IMAGES / 255).tolist()):
        found = made(images)
        np.testing.assert_allclose(found["patches"], want["patches"], atol=1e-4)
        np.testing.assert_allclose(found["cls"], want["cls"], atol=1e-4)


def test_running_statistics_are_used_and_default_to_fresh_ones():
    module = Normed()
    variables = flax.core.freeze(_variables(module, train=False))
    seen = {"norm": {"mean": jnp.array([1.0, 2, 3]), "var": jnp.full(3, 4.0)}}
    with_some = backbone(module, {**variables, "batch_stats": seen}, normalization="none")
    fresh = backbone(module, {"params": variables["params"]}, normalization="none")
    image = IMAGES / 255
    np.testing.assert_allclose(fresh(IMAGES)["patches"], image, atol=1e-4)
    want = (image - [1, 2, 3]) / 2
    np.testing.assert_allclose(with_some(IMAGES)["patches"], want, atol=1e-4)
    assert isinstance(with_some.params, dict)


def test_a_size_is_compiled_once():
    traced = []

    class Noted(nn.Module):
        @nn.compact
        def __call__(self, image, *, attention=False):
            traced.append((image.shape[1:3], attention))
            x = nn.Dense(2)(image)
            return {"cls": x.mean((1, 2)), "patches": x}

    made = backbone(Noted(), _variables(Noted()))
    for _ in range(3):
        made(IMAGES)
        made(IMAGES[:, :8])
        made(IMAGES, attention=True)
    # Others are looks at shapes alone.
    asked = sorted(t for t in traced if t[0][1] == 16)
    assert asked == [((8, 16), False), ((12, 16), False), ((12, 16), True)]


def test_a_name_of_the_catalogue():
    made = backbone("shapes_micro8")
    assert made.variant == backbones.BACKBONES["vit_micro8"] and not made.trained
    assert made.source.endswith("shapes_micro8.safetensors")
    shapes = jax.eval_shape(made.module.init, jax.random.key(0), jnp.zeros((1, 8, 8, 3)))["params"]
    assert jax.tree.map(jnp.shape, made.params) == jax.tree.map(jnp.shape, shapes)


TINY = ResNetVariant("tiny", (1, 1, 1, 1), bottleneck=False, width=4, small_stem=True)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The workdir of a run on images that were not normalised."""
    path = tmp_path_factory.mktemp("run")
    variables = _variables(build(TINY))
    state = {
        "params": {"backbone": variables["params"]},
        "extra": {"statistics": jax.tree.map(lambda x: x + 1, variables["batch_stats"])},
    }
    saver = Checkpointer(path)
    saver.save(state, 3)
    saver.wait()
    saver.close()
    (path / "model.json").write_text(json.dumps({"variant": backbones.to_json(TINY)}))
    (path / "config.json").write_text(json.dumps({"backbone": {"normalization": "none"}}))
    return path


def test_of_a_workdir_the_images_are_normalised_as_in_its_run(folder):
    made = backbone(folder)
    assert made.variant == TINY and made.normalization == "none" and not made.trained
    variables = {"params": made.params, "batch_stats": made.statistics}
    want = jax.jit(build(TINY).apply)(variables, (IMAGES / 255).astype(np.float32))
    np.testing.assert_allclose(made(IMAGES)["cls"], want["cls"], rtol=1e-3, atol=1e-3)
    assert backbone(folder, normalization="none").normalization == "none"
    with pytest.raises(OptionError, match="'imagenet'; the run in .* was trained with 'none'"):
        backbone(folder, normalization="imagenet")


def test_a_module_may_say_how_its_images_are_normalised():
    assert backbone(Conv(normalization="none")).normalization == "none"
    assert (
        backbone(Conv(normalization="none"), normalization="imagenet").normalization == "imagenet"
    )
    assert backbone(Normed()).normalization == "imagenet"


# Blocks of vit_micro8 from the input on; what comes before them rests with the first.
EMBEDDING = ("cls_token", "pos_embed", "register_tokens", "patch_embed")


@pytest.mark.parametrize(
    ("weights", "options", "resting"),
    [
        (False, {}, ()),
        (True, {}, None),
        (True, {"train": "all"}, ()),
        (True, {"train": True}, ()),
        (False, {"train": False}, None),
        (False, {"train": "none"}, None),
        (True, {"freeze": 1}, (*EMBEDDING, "blocks_0")),
        (False, {"freeze": 2}, (*EMBEDDING, "blocks_0", "blocks_1")),
        (True, {"train": "all", "freeze": 1}, (*EMBEDDING, "blocks_0")),
    ],
)
def test_what_rests(weights, options, resting):
    source = "shapes_micro8" if weights else ""
    made = backbone(source, variant="vit_micro8", **options)
    assert made.resting == resting and made.trained == (resting is not None)


def test_a_backbone_keeps_what_it_was_made_with_unless_told_otherwise():
    resting = backbone("shapes_micro8")
    assert backbone(resting).resting is None
    assert backbone(resting, train="all").resting == ()
    assert len(backbone(resting, freeze=1).resting) == 5
    frozen = backbone("shapes_micro8", freeze=2)
    assert backbone(frozen).resting == frozen.resting
    assert backbone(frozen, train="none").resting is None


def test_other_weights_rest():
    made = backbone(Conv())
    variables = _variables(Conv())
    other = made.with_weights(variables["params"], {})
    assert made.trained and not other.trained and other.resting is None
    assert other.params is variables["params"] and other.module is made.module


def test_options_reach_the_module():
    made = backbone(variant="vit_micro16", precision="bfloat16", remat=True, drop_path=0.2)
    assert made.module.dtype == "bfloat16" and made.module.remat and made.module.drop_path == 0.2
    # Those of another family say nothing here.
    assert backbone(variant="vit_micro16", norm="group").module == build(
        backbones.BACKBONES["vit_micro16"], dtype="float32"
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(variant="vit_micro8", train="some"), "train is 'some'; allowed: auto, none, all"),
        (dict(variant="vit_micro8", train="none", freeze=1), "freeze is 1; with train='none'"),
        (dict(variant="vit_micro8", freeze=5), "freeze is 5; vit_micro8 allows 0 to 4"),
        (dict(source=Conv(), freeze=2), "freeze is 2; Conv allows 0 to 1"),
        (dict(source=Normed(), freeze=1), "freeze is 1; Normed allows 0 to 0"),
        (dict(variant="vit"), "variant is 'vit'; allowed: dino_vitt16"),
        (dict(), "variant is ''; allowed: dino_vitt16"),
        (
            dict(variant="vit_micro8", rematerialize=True),
            "rematerialize is no option; allowed: drop",
        ),
        (
            dict(variant="vit_micro8", normalization="x"),
            "normalization is 'x'; allowed: imagenet, none",
        ),
        (dict(source=Conv(normalization="y")), "normalization is 'y'; allowed"),
        (
            dict(source="shapes_micro8", variables={"params": {}}),
            "variables are given; allowed where",
        ),
        (dict(source=Conv(), variables={"w": 1}), "variables are .'w'.; allowed: .*init of Conv"),
        (dict(source=Conv(), variables=[1]), "variables are list; allowed"),
        (dict(source=Conv(), variables={"params": {}, "cache": {}}), "Conv has variables in cache"),
        (dict(source=Conv(), variant="vit_micro8"), "variant is 'vit_micro8'; it says nothing of"),
        (
            dict(source=Conv(), remat=True),
            "remat is True; it says nothing of a module of one's own",
        ),
        (dict(source=Conv), "source is a type; allowed: a name, a file, a workdir, or a Flax"),
        (dict(source=3), "source is a int; allowed"),
    ],
)
def test_what_is_refused(arguments, message):
    with pytest.raises(OptionError, match=message):
        backbone(**arguments)


@pytest.mark.parametrize(
    "images",
    [
        IMAGES[0],
        IMAGES[..., :1],
        IMAGES.astype(np.int32),
        IMAGES > 3,
        np.zeros((2, 3)),
        np.array(1.0),
    ],
)
def test_what_are_no_images_is_named(vit, images):
    with pytest.raises(OptionError, match=f"images are {images.dtype} .*; allowed: B x H x W x 3"):
        vit(images)


def test_what_cannot_be_given_is_named():
    with pytest.raises(OptionError, match="the backbone vit_micro8 has no weights yet"):
        backbone(variant="vit_micro8")(IMAGES)
    made = backbone(Conv(), _variables(Conv()))
    with pytest.raises(OptionError, match="backbone Conv has no attention, layers to give"):
        made(IMAGES, layers=(-1,), attention=True)
    assert isinstance(made, Backbone)
