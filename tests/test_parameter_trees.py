"""The parameter tree of every shipped module: its paths, shapes and dtypes, as one short digest each.

Flax draws initial values by path, and stored runs are read by it: a norm that has another name, or is
another module's, changes the numbers and orphans old checkpoints. Only where that is meant, a digest here
changes. Of a module that is new the skipped test tells the digest to add.
"""

import hashlib

import flax
import jax
import jax.numpy as jnp
import pytest

from jaxseg.backbones import BACKBONES, build
from jaxseg.backbones.backbone import backbone
from jaxseg.heads import HEADS, takes_several_maps
from jaxseg.heads.projection import ProjectionHead
from jaxseg.networks import NETWORKS, Segmenter

HEAD_TREES = {
    "linear": "b4c8a993",
    "bilinear": "b4c8a993",
    "linear_norm": "69d78a12",
    "pac_course": "8743abc6",
    "pac_joint": "57c1fe4c",
    "guided": "518acb19",
    "deeplabv3": "1c030c4e da12808b",
    "deeplabv3plus": "62d9ed79 767dba2d",
    "attention": "d8026cff 2f1f9bb1",
}
# Options under which there are other parameters.
HEAD_FORMS = [
    ("guided", dict(prior=0.1), "47d37d03"),
    ("deeplabv3", dict(auxiliary=True, separable=True, reduce=16), "86092710 6bc8af38"),
    ("deeplabv3", dict(norm="group"), "068e7ad0 6b191bfd"),
    ("deeplabv3plus", dict(low_level="pyramid", auxiliary=True), "6703e3a7 b2892b52"),
    ("deeplabv3plus", dict(norm="group", separable=True), "600d3db1 74ddf32a"),
    ("attention", dict(attention="additive", norm="batch"), "0fa3370c e3eb722d"),
    ("attention", dict(context="course"), "d9c2c6fe d979df6b"),
]
BACKBONE_TREES = {
    "dino_vitt16": "c967a390",
    "dino_vits16": "2d7888fe",
    "dino_vits8": "461877df",
    "dino_vitb16": "50588fc0",
    "dino_vitb8": "2acb4408",
    "dinov2_vits14": "170b3ef2",
    "dinov2_vits14_reg": "2ab86b68",
    "dinov2_vitb14": "d17c317e",
    "dinov2_vitb14_reg": "7ccf0add",
    "dinov2_vitl14": "a0954f8c",
    "dinov2_vitl14_reg": "5e8fd4cb",
    "vit_micro16": "638680b1",
    "vit_micro8": "1abc6c34",
    "vit_small4": "13e5f9de",
    "resnet18": "8d0801f3",
    "resnet50": "43fd798d",
    "resnet101": "4d21ef1b",
    "resnet18_small": "6157866c",
    "resnet10_mini": "0e001502",
}
BACKBONE_FORMS = [
    ("resnet10_mini", dict(norm="group"), "1a7685e2"),
]
NETWORK_TREES = {
    "unet": "473f0d55",
}
NETWORK_FORMS = [
    ("unet", dict(norm="group"), "ad4c0b2a"),
    ("unet", dict(norm="none", padding="valid"), "976cb73c"),
    ("unet", dict(encoder="vgg16"), "fad1a83b"),
]
# By (norm_last_layer, batch_norm).
PROJECTION_TREES = {
    (False, False): "df956d9a",
    (False, True): "5c828739",
    (True, False): "7f02a1a0",
    (True, True): "7d2400b1",
}
SEGMENTER_TREE = "03a330dc"


def digest(init, *inputs, **named) -> str:
    """Of what `init` gives, which is not computed."""
    shapes = jax.eval_shape(lambda key: init(key, *inputs, **named), jax.random.key(0))
    leaves = flax.traverse_util.flatten_dict(shapes, sep="/").items()
    lines = sorted(f"{path} {leaf.shape} {leaf.dtype}" for path, leaf in leaves)
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:8]


def test_what_is_frozen_is_there():
    assert HEAD_TREES.keys() <= HEADS.keys() and BACKBONE_TREES.keys() <= BACKBONES.keys()
    assert NETWORK_TREES.keys() <= NETWORKS.keys()


def check(found: str, frozen: str | None, name: str) -> None:
    if frozen is None:
        pytest.skip(f"the tree of {name} is not frozen yet: {found}")
    assert found == frozen


def of_head(head) -> str:
    """On one map, and on several where a head takes them."""
    image, one = jnp.zeros((1, 32, 48, 3)), jnp.zeros((1, 4, 6, 20))
    several = {4: jnp.zeros((1, 8, 12, 10)), 16: jnp.zeros((1, 2, 3, 40)), "auxiliary": one}
    asks = {"query_B": jnp.zeros(1, jnp.int32)} if getattr(head, "asks", False) else {}
    found = [digest(head.init, one, image, **asks)]
    if takes_several_maps(head):
        found.append(digest(head.init, several, image, **asks))
    return " ".join(found)


@pytest.mark.parametrize("name", HEADS)
def test_head(name):
    check(of_head(HEADS[name](outputs=2)), HEAD_TREES.get(name), name)


@pytest.mark.parametrize(("name", "options", "frozen"), HEAD_FORMS)
def test_form_of_a_head(name, options, frozen):
    check(of_head(HEADS[name](outputs=2, **options)), frozen, f"{name} {options}")


def of_backbone(module) -> str:
    side = getattr(module, "patch", 32)
    return digest(module.init, jnp.zeros((1, side, side, 3)))


@pytest.mark.parametrize("name", BACKBONES)
def test_backbone(name):
    check(of_backbone(build(BACKBONES[name])), BACKBONE_TREES.get(name), name)


@pytest.mark.parametrize(("name", "options", "frozen"), BACKBONE_FORMS)
def test_form_of_a_backbone(name, options, frozen):
    check(of_backbone(build(BACKBONES[name], **options)), frozen, f"{name} {options}")


@pytest.mark.parametrize("name", NETWORKS)
def test_network(name):
    network = NETWORKS[name](outputs=2)
    check(digest(network.init, jnp.zeros((1, 64, 64, 3))), NETWORK_TREES.get(name), name)


@pytest.mark.parametrize(("name", "options", "frozen"), NETWORK_FORMS)
def test_form_of_a_network(name, options, frozen):
    network = NETWORKS[name](outputs=2, **options)
    check(digest(network.init, jnp.zeros((1, 64, 64, 3))), frozen, f"{name} {options}")


@pytest.mark.parametrize("batch_norm", [False, True])
@pytest.mark.parametrize("norm_last_layer", [False, True])
def test_projection(norm_last_layer, batch_norm):
    head = ProjectionHead(16, norm_last_layer=norm_last_layer, batch_norm=batch_norm)
    frozen = PROJECTION_TREES[norm_last_layer, batch_norm]
    check(digest(head.init, jnp.zeros((1, 12))), frozen, "projection")


def test_segmenter():
    """What lies where in a whole network, and that layers are joined."""
    made = backbone(variant="vit_micro8")
    network = Segmenter(made, HEADS["guided"](), layers=(0, -1))
    check(digest(lambda key: network.init(key, (32, 32))), SEGMENTER_TREE, network.name)
