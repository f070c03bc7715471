"""A backbone and a head as one network, from images in [0, 1] to logits.

What passes between them is the map `patches`, `B x h x w x C`. A head whose class says `several_maps = True`
gets, of a backbone with `stages`, these as a mapping {stride: map}, whose `"auxiliary"` is the last map but
one, for auxiliary losses.
"""

import dataclasses
import logging
import math
from collections.abc import Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxseg.backbones import contract
from jaxseg.backbones.backbone import Backbone
from jaxseg.backbones.backbone import backbone as make_backbone
from jaxseg.heads import solved_of, takes_several_maps
from jaxseg.networks.network import Network, with_extras
from jaxseg.nn.normalize import normalize
from jaxseg.ops.resize import resize_bilinear
from jaxseg.options import OptionError, option

log = logging.getLogger(__name__)

# The depth that presets count blocks for: those of ViT-S and ViT-B.
_USUAL_DEPTH = 12


def default_stride(patch: int) -> int:
    """Image pixels per token: the patch size where that is a power of two, else 16.

    A patch-14 backbone sees the image resized by 14/16, so that the heads' factors of two end at
    full resolution.
    """
    return patch if patch & (patch - 1) == 0 else 16


class BackboneAndHead(nn.Module):
    """Backbone features, then a head.

    Attributes:
      backbone: gives the features; see `jaxseg.backbones.contract`.
      head: `head(features, image_BxHxWx3, train=...) -> (logits_BxHxWxK, extras)`.
      stride: image pixels per cell of the last map. H and W must be multiples of it.
      layers: blocks whose patch tokens are concatenated, each after the final norm; -1 is the last.
      normalization: a key of `NORMALIZATIONS`, applied to what the backbone sees, not to the guide.
      trains_backbone: whether the backbone's batch norm takes part in training; else it keeps the
        statistics that it has.
      resized: whether images are resized so that the backbone's patches become cells of `stride`.
    """

    backbone: nn.Module
    head: nn.Module
    stride: int
    layers: tuple[int, ...] = (-1,)
    normalization: str = "imagenet"
    trains_backbone: bool = False
    resized: bool = True

    def features(
        self, image_BxHxWx3: jax.Array, *, train: bool = False
    ) -> jax.Array | dict[Any, jax.Array]:
        """Features of images in [0, 1], float32.

        Returns:
          One map `B x H/stride x W/stride x C` (of all `layers`), or, where there are several and the
          head takes them, the backbone's maps by their stride, and "auxiliary".
        """
        height, width = image_BxHxWx3.shape[1:3]
        if height % self.stride or width % self.stride:
            raise ValueError(
                f"images of {height}x{width} are no multiple of the stride {self.stride}"
            )
        x = image_BxHxWx3
        patch = contract.contract(self.backbone).patch
        if patch > 1 and self.resized:
            x = resize_bilinear(x, (height // self.stride * patch, width // self.stride * patch))
        x = normalize(x, self.normalization)
        wanted = {} if self.layers == (-1,) else {"layers": self.layers}
        out = contract.call(self.backbone, x, train=train and self.trains_backbone, **wanted)
        if "stages" in out and takes_several_maps(self.head):
            stages = out["stages"]
            if isinstance(stages, Mapping):
                stages = [x for _, x in sorted(stages.items())]
            # Where stages share a stride, the later one replaces the earlier.
            return {**{height // x.shape[1]: x for x in stages}, "auxiliary": stages[-2:][0]}
        if wanted:
            return jnp.concatenate([out["layers"][i] for i in self.layers], axis=-1)
        return out["patches"]

    def __call__(
        self,
        image_BxHxWx3: jax.Array,
        *,
        features: Any = None,
        train: bool = False,
        **inputs: jax.Array,
    ) -> tuple[jax.Array, dict[str, Any]]:
        """Logits of images.

        Args:
          image_BxHxWx3: float in [0, 1].
          features: what `features` gives for them, if that is at hand; any float dtype.
          train: whether dropout, batch norm and the like are on (needs the rng `dropout`).
          **inputs: what else the head takes.

        Returns:
          (logits float32 `B x H x W x K`, named extras of the head).
        """
        if features is None:
            features = self.features(image_BxHxWx3, train=train)
        if not isinstance(features, dict):
            features = features.astype(jnp.float32)  # they may come from the cache
        inputs |= contract.taken(self.head, {"train": train})
        return with_extras(self.head(features, image_BxHxWx3, **inputs))


@dataclasses.dataclass(frozen=True)
class Joint:
    """How a head is put on a backbone.

    Attributes:
      layers: blocks of a ViT whose patch tokens the head gets.
      stride: image pixels per cell; 0 for the patch size, 16 for patch 14 and for a ResNet.
    """

    layers: tuple[int, ...] = option((-1,), "blocks of a ViT whose patch tokens the head gets")
    stride: int = option(
        0,
        "image pixels per token; 0 = the patch size, 16 for patch 14 and for a ResNet",
        choices=(0, 4, 8, 16, 32),
    )

    def __post_init__(self):
        layers = self.layers
        if not layers or not all(isinstance(i, int) and not isinstance(i, bool) for i in layers):
            raise OptionError(f"layers is {layers}; allowed: block numbers, as in (-1,)")


def Segmenter(  # noqa: N802 (it is used as a class)
    backbone: Backbone | nn.Module | str,
    head: nn.Module,
    *,
    layers: Sequence[int] = (-1,),
    stride: int = 0,
    train: str | bool = "auto",
) -> Network:
    """A network of a backbone and a head.

    Args:
      backbone: from `jaxseg.backbone`, or what that takes.
      head: `head(features, image_BxHxWx3, train=...) -> (logits_BxHxWxK, extras)`, one of
        `jaxseg.heads` or a Flax module of one's own. One whose class says `several_maps = True` gets
        all maps of a backbone with several, by their stride; others the map `patches`.
      layers: blocks of a ViT whose patch tokens are concatenated; -1 is the last.
      stride: image pixels per cell of the map that the head gets; 0 for the patch size (16 where that is
        no power of two), for 16 in a ResNet, and for that of a backbone of one's own.
      train: as in `jaxseg.backbone`; "auto" for as it was made.

    Raises:
      OptionError: layers, stride or features do not fit.
    """
    made = make_backbone(backbone, train=train)
    needs = contract.needed(head, "head", ("features", "image"))
    joint = Joint(tuple(layers), stride)
    known = contract.contract(made.module)
    module = made.module
    if known.with_stride:
        module = known.with_stride(stride)
    measured = contract.stride_of(module)
    multiple, resized = measured, measured == known.patch > 1
    if resized:
        multiple = stride = stride or default_stride(known.patch)
    else:
        if stride not in (0, measured) and not known.with_stride:
            raise OptionError(f"stride is {stride}; the backbone {made.name} has {measured}")
        multiple, stride = math.lcm(measured, known.patch), measured
    layers = _layers(joint.layers, known, made)
    together = BackboneAndHead(
        backbone=module,
        head=head,
        stride=stride,
        layers=layers,
        normalization=made.normalization,
        # A backbone that is trained in part keeps the statistics of its batch norm.
        trains_backbone=made.resting == (),
        resized=resized,
    )
    solved = check_solved(head, made)
    several = "stages" in contract.outputs(module)
    resting = made.resting
    frozen = ("backbone",) if resting is None else tuple(f"backbone/{n}" for n in resting)
    if solved is not None:
        solved = dataclasses.replace(solved, path=f"head/{solved.path}")
        frozen += (solved.path,)
    return Network(
        together,
        multiple=multiple,
        params={} if made.params is None else {"backbone": made.params},
        statistics={"backbone": made.statistics} if made.statistics else {},
        frozen=frozen,
        layer_names=tuple(tuple(f"backbone/{n}" for n in names) for names in known.layer_names),
        features=resting is None and not several,
        backbone=dataclasses.replace(made, module=module),
        solved=solved,
        needs=needs,
        name=f"{type(head).__name__} on {made.name}",
    )


def check_solved(head: nn.Module, made: Backbone) -> Any:
    """What a head leaves to be solved for, see `jaxseg.heads.solved`; None for nothing.

    Raises:
      OptionError: that needs one map of a backbone that rests.
    """
    solved = solved_of(head)
    if solved is None:
        return None
    if made.resting is not None and made.params is None:
        raise OptionError(
            f"prior is {solved.penalty}, which is solved for on pretrained features: give "
            "--config.backbone.weights=NAME|FILE|WORKDIR, such as dinov2_vits14, or "
            "--config.head.guided.prior=0"
        )
    if made.resting is not None:
        raise OptionError(f"prior is {solved.penalty}; allowed with a backbone that is trained: 0")
    if "stages" in contract.outputs(made.module):
        raise OptionError(
            f"prior is {solved.penalty}; allowed with a {made.name}: 0 (it is solved for on the tokens "
            "of a ViT)"
        )
    return solved


def _layers(layers: tuple[int, ...], known: contract.Contract, made: Backbone) -> tuple[int, ...]:
    """Block numbers that a backbone has: those of presets, for 12 blocks, by their share of the depth."""
    depth, name = known.depth, made.name
    if not depth or "layers" not in known.keywords:
        # The configs' layers are of ViTs, and say nothing of our other families.
        if layers != (-1,) and made.variant is None:
            raise OptionError(f"layers is {layers}; the backbone {name} has no layers to give")
        return (-1,)
    if all(-depth <= i < depth for i in layers):
        return layers
    if depth < _USUAL_DEPTH and all(-_USUAL_DEPTH <= i < 0 for i in layers):
        shares = [(_USUAL_DEPTH + i + 1) / _USUAL_DEPTH for i in layers]
        fitted = tuple(dict.fromkeys(math.ceil(share * depth) - 1 - depth for share in shares))
        log.warning(
            "%s has %d blocks: in place of the blocks %s of %d its blocks %s are taken",
            *(name, depth, layers, _USUAL_DEPTH, fitted),
        )
        return fitted
    bad = next(i for i in layers if not -depth <= i < depth)
    raise OptionError(f"layers has {bad}; {name} allows {-depth} to {depth - 1}")
