"""Backbones and heads put together: what passes between them, of our own modules and a user's."""

import logging

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxseg.backbones import build
from jaxseg.backbones.backbone import backbone
from jaxseg.backbones.vit import Variant
from jaxseg.heads import HEADS, GuidedDecoder
from jaxseg.networks import Network, Segmenter
from jaxseg.networks.network import as_network
from jaxseg.networks.segmenter import default_stride
from jaxseg.options import OptionError
from jaxseg.train.state import split_params

MEAN, STD = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])
IMAGE = np.random.default_rng(0).random((2, 24, 40, 3)).astype(np.float32)


class Conv(nn.Module):
    """A user's convolutional backbone: no `train`, no `patch`."""

    stride: int = 8
    layer_names = (("stem",), ("last",))

    @nn.compact
    def __call__(self, image):
        size = (self.stride, self.stride)
        x = nn.relu(nn.Conv(4, size, strides=size, padding="VALID", name="stem")(image))
        x = nn.Conv(6, (1, 1), name="last")(x)
        return {"cls": x.mean((1, 2)), "patches": x}


class Normed(nn.Module):
    """A user's with batch norm in both of its layers."""

    layer_names = (("first",), ("second",))

    @nn.compact
    def __call__(self, image, *, train):
        x = nn.max_pool(image, (4, 4), (4, 4))
        for name in ("first", "second"):
            x = nn.BatchNorm(use_running_average=not train, name=name)(x)
        return {"cls": x.mean((1, 2)), "patches": x}


class Maps(nn.Module):
    """Three maps of strides 2, 4 and 8, of which the patches are another."""

    as_mapping: bool = False

    def __call__(self, image):
        maps = {s: nn.avg_pool(image, (s, s), (s, s)) for s in (2, 4, 8)}
        stages = maps if self.as_mapping else tuple(maps.values())
        return {"cls": image.mean((1, 2)), "patches": maps[4] + 1, "stages": stages}


class Shown(nn.Module):
    """A user's head that gives what it gets, without extras and without `train`."""

    @nn.compact
    def __call__(self, features, image):
        return features


class ShownMaps(nn.Module):
    """A user's head that gets all maps, and gives them as extras."""

    several_maps = True

    def __call__(self, features, image, *, train):
        return image, {str(key): x for key, x in features.items()}


def _init(network, size=IMAGE.shape[1:3]):
    return jax.jit(lambda key: network.init(key, size))(jax.random.key(0))


def test_a_users_backbone_and_head():
    module = Conv()
    network = Segmenter(module, Shown())
    assert isinstance(network, Network) and network.name == "Shown on Conv"
    assert (network.multiple, network.needs, network.features) == (8, (), False)
    assert network.frozen == () and network.params == {}
    variables = _init(network)
    assert set(variables["params"]) == {"backbone"}  # the head has none
    want = module.apply({"params": variables["params"]["backbone"]}, (IMAGE - MEAN) / STD)
    logits, extras = network.apply(variables, IMAGE)
    np.testing.assert_allclose(logits, want["patches"], atol=1e-5)
    assert extras == {}
    for size in ((24, 44), (20, 40)):
        with pytest.raises(
            ValueError, match=f"{size[0]}x{size[1]} are no multiple of the stride 8"
        ):
            jax.eval_shape(lambda size=size: network.init(jax.random.key(0), size))


def test_features_at_hand_are_not_computed_again():
    network = Segmenter(backbone(Conv(), _init_conv(), train="none"), Shown())
    assert network.features and network.frozen == ("backbone",)
    variables = {"params": network.params}
    features = network.apply(variables, IMAGE, method="features")
    logits, _ = network.apply(variables, IMAGE, features=features.astype(jnp.float16))
    assert logits.dtype == jnp.float32
    np.testing.assert_allclose(logits, features, rtol=1e-3, atol=1e-3)
    nothing, _ = network.apply(variables, IMAGE, features=jnp.zeros_like(features))
    assert not np.any(nothing)


def _init_conv():
    return jax.jit(Conv().init)(jax.random.key(1), IMAGE)


def test_what_is_frozen_is_called_by_its_path():
    params = _init_conv()["params"]
    network = Segmenter(backbone(Conv(), {"params": params}, freeze=1), HEADS["bilinear"]())
    assert network.layer_names == (("backbone/stem",), ("backbone/last",))
    assert network.frozen == ("backbone/stem", "backbone/last")
    jax.tree.map(np.testing.assert_array_equal, network.params, {"backbone": params})
    variables = jax.eval_shape(lambda: network.init(jax.random.key(0), (24, 40)))
    trained, frozen = split_params(variables["params"], network.frozen)
    assert set(frozen["backbone"]) == {"stem", "last"} and set(trained) == {"head"}
    assert not network.features  # a part of it may learn


@pytest.mark.parametrize(
    ("options", "learns"), [({}, True), ({"train": "none"}, False), ({"freeze": 1}, False)]
)
def test_batch_norm_learns_in_a_backbone_that_is_trained_as_a_whole(options, learns):
    network = Segmenter(backbone(Normed(), **options), Shown())
    variables = _init(network)
    _, changed = network.apply(variables, IMAGE, train=True)
    before, after = (v["batch_stats"]["backbone"]["first"]["mean"] for v in (variables, changed))
    assert np.array_equal(before, after) != learns
    # In evaluation nothing does.
    once, again = (network.apply(variables, IMAGE)[0] for _ in range(2))
    np.testing.assert_array_equal(once, again)


@pytest.mark.parametrize("as_mapping", [True, False])
def test_heads_for_several_maps_get_them_by_stride(as_mapping):
    images = IMAGE[:, :, :32]
    network = Segmenter(Maps(as_mapping), ShownMaps())
    _, maps = network.apply({}, images)
    assert set(maps) == {"2", "4", "8", "auxiliary"}
    normalised = ((images - MEAN) / STD).astype(np.float32)
    for s in (2, 4, 8):
        want = normalised.reshape(2, 24 // s, s, 32 // s, s, 3).mean((2, 4))
        np.testing.assert_allclose(maps[str(s)], want, atol=1e-5)
    np.testing.assert_array_equal(maps["auxiliary"], maps["4"])
    # Others get the map that is for them.
    logits, _ = Segmenter(Maps(as_mapping), Shown()).apply({}, images)
    np.testing.assert_allclose(logits, maps["4"] + 1, atol=1e-5)


TINY = Variant("tiny", patch=14, dim=64, depth=4, heads=1, grid=2)


@pytest.mark.parametrize(
    ("patch", "stride", "found"), [(14, 0, 16), (14, 8, 8), (8, 0, 8), (8, 16, 16), (12, 0, 16)]
)
def test_a_patch_becomes_a_cell_of_the_stride(patch, stride, found):
    assert default_stride(patch) == (patch if patch == 8 else 16)
    shape = Variant("tiny", patch=patch, dim=64, depth=1, heads=1, grid=2)
    network = Segmenter(backbone(build(shape)), Shown(), stride=stride)
    assert network.multiple == found
    size = (2 * found, 3 * found)
    logits = jax.eval_shape(
        lambda: network.apply(network.init(jax.random.key(0), size), jnp.zeros((1, *size, 3)))[0]
    )
    assert logits.shape == (1, 2, 3, 64)


def test_strides_of_a_resnet():
    made = backbone(variant="resnet18")
    for asked, found in [(0, 16), (8, 8), (32, 32)]:
        network = Segmenter(made, HEADS["bilinear"](), stride=asked)
        assert network.multiple == found and network.backbone.module.output_stride == found


@pytest.mark.parametrize(
    ("asked", "taken"),
    [
        ((-1,), (-1,)),
        ((0, -1), (0, -1)),
        ((-3, -2, -1), (-3, -2, -1)),  # they are there
        ((-7, -4, -1), (-3, -2, -1)),  # after 6, 9 and 12 of 12: 2, 3 and 4 of 4
        ((-12, -1), (-4, -1)),
        ((-6, -5, -1), (-2, -1)),  # after 7 and 8 of 12: once 3 of 4
    ],
)
def test_layers_by_their_share_of_the_depth(asked, taken, caplog):
    with caplog.at_level(logging.WARNING):
        network = Segmenter(backbone(build(TINY)), Shown(), layers=asked)
    assert network.module.layers == taken
    assert ("has 4 blocks: in place of the blocks" in caplog.text) == (asked != taken)


def test_layers_are_joined_in_the_order_asked_for():
    network = Segmenter(backbone(build(TINY)), Shown(), layers=(-1, 1), stride=16)
    size = (32, 16)
    variables = jax.eval_shape(lambda: network.init(jax.random.key(0), size))
    rng = np.random.default_rng(0)
    variables = jax.tree.map(lambda x: rng.normal(0, 0.2, x.shape).astype(x.dtype), variables)
    image = jnp.full((1, *size, 3), 0.5)  # the same at any size
    logits, _ = jax.jit(network.apply)(variables, image)
    small = jnp.broadcast_to((0.5 - MEAN) / STD, (1, 28, 14, 3))
    apply = jax.jit(lambda p, x: build(TINY).apply({"params": p}, x, layers=(1,)))
    out = apply(variables["params"]["backbone"], small)
    want = np.concatenate([out["patches"], out["layers"][1]], -1)
    np.testing.assert_allclose(logits, want, atol=1e-4)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Segmenter(build(TINY), Shown(), layers=(4,)), "layers has 4; ViT allows -4 to 3"),
        (lambda: Segmenter(build(TINY), Shown(), layers=(-13,)), "layers has -13; ViT allows -4"),
        (lambda: Segmenter(build(TINY), Shown(), layers=()), r"layers is \(\); allowed: block"),
        (lambda: Segmenter(build(TINY), Shown(), layers=(1.0,)), "layers is .*; allowed: block"),
        (
            lambda: Segmenter(Conv(), Shown(), layers=(0,)),
            "the backbone Conv has no layers to give",
        ),
        (lambda: Segmenter(Conv(), Shown(), stride=16), "stride is 16; the backbone Conv has 8"),
        (
            lambda: Segmenter(backbone(variant="resnet18"), Shown(), stride=4),
            r"stride is 4; resnet18 allows \(8, 16, 32\)",
        ),
        (lambda: Segmenter(Conv(), Shown), "head is the class Shown; allowed: a Flax"),
        (lambda: Segmenter(Conv(), Conv()), r"head is Conv\(self, image\); allowed"),
        (lambda: Segmenter(Conv, Shown()), "source is a type; allowed"),
        (
            lambda: Segmenter(Conv(), GuidedDecoder(prior=0.1)),
            "prior is 0.1, which is solved for on pretrained features",
        ),
        (
            lambda: Segmenter(backbone(Conv(), {"params": {}}, freeze=1), GuidedDecoder(prior=0.1)),
            "prior is 0.1; allowed with a backbone that is trained: 0",
        ),
        (
            lambda: Segmenter(backbone(Maps(), {"params": {}}), GuidedDecoder(prior=0.1)),
            r"prior is 0.1; allowed with a Maps: 0",
        ),
    ],
)
def test_what_does_not_fit_is_named(make, message):
    with pytest.raises(OptionError, match=message):
        make()


def test_what_is_solved_for_rests_with_the_backbone():
    network = Segmenter(backbone(Conv(), _init_conv()), GuidedDecoder(prior=0.1))
    assert network.solved.path == "head/prior"
    assert network.frozen == ("backbone", "head/prior")


class Whole(nn.Module):
    multiple = 4
    layer_names = [["a"], ["b", "c"]]

    def __call__(self, image, *, query_B, train):
        return image


def test_a_module_alone_is_a_network():
    network = as_network(Whole())
    assert (network.multiple, network.name, network.needs) == (4, "Whole", ("query_B",))
    assert network.layer_names == (("a",), ("b", "c"))
    assert as_network(network) is network
    with pytest.raises(OptionError, match="network is a str; allowed: jaxseg.Segmenter"):
        as_network("unet")
    with pytest.raises(OptionError, match="network is a type; allowed: jaxseg.Segmenter"):
        as_network(Whole)


@pytest.mark.parametrize("out", [(1.0, {}), {"logits": IMAGE}, (IMAGE, IMAGE), (IMAGE, {}, {})])
def test_what_are_no_logits_is_named(out):
    class Gives(nn.Module):
        def __call__(self, image):
            return out

    with pytest.raises(OptionError, match="gives .*; allowed: logits, or"):
        as_network(Gives()).apply({}, IMAGE)
