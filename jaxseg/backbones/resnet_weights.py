"""Turns ResNets in torchvision's layout into the parameters and running statistics of our `ResNet`.

Of a DeepLabV3 as torchvision saves it (`deeplabv3_resnet50`) they are the backbone. Nothing is dropped
without saying so, but for batch norm's counters.
"""

import logging
import re
from collections.abc import Iterable, Mapping
from typing import Any

from jaxseg.backbones.family import Family
from jaxseg.backbones.resnet import RESNETS, ResNet, ResNetVariant
from jaxseg.weights import tensors as files
from jaxseg.weights.tensors import Expected, Table

_log = logging.getLogger(__name__)

_WRAPPER = re.compile(r"^(?:module\.)+")
_BACKBONE = re.compile(r"^(?:backbone\.)?(?=(?:conv1|bn1|layer\d+|fc)\.)")
_COUNTER = re.compile(r"(?:^|\.)num_batches_tracked$")
# Classifiers of torchvision's ResNet and DeepLabV3, and the head in DINO's training files.
_LEFT_OUT = re.compile(r"^(?:fc|classifier|aux_classifier|head)\.")

Tree = dict[str, Any]


def is_resnet(names: Iterable[str]) -> bool:
    """Whether a file with tensors of these names is a ResNet, alone or in a DeepLabV3."""
    return any(name.endswith("layer1.0.conv1.weight") for name in names)


def to_flax(
    tensors: Mapping[str, Any], *, source: str, variant: ResNetVariant | None = None
) -> tuple[Tree, Tree, ResNetVariant]:
    """Converts a ResNet's tensors by name, and says which ResNet it is.

    Args:
      tensors: arrays, or objects with `shape` and `read()`, in the key layout of torchvision's
        ResNet, alone or under `backbone.` (DeepLabV3, whose classifiers are left out); float32,
        float16 or bfloat16.
      source: what to call the file in messages.
      variant: the expected shape; inferred from the tensors if None.

    Returns:
      Parameters and `batch_stats` in the layout of `ResNet`, nested dicts of float32 arrays; and the
      variant.

    Raises:
      ValueError: another architecture; or tensors missing, unknown or of another shape, all named.
    """
    found = _rename(tensors, source)
    if left_out := [original for name, (original,) in found.items() if _LEFT_OUT.match(name)]:
        _log.info("%s: left out, not part of the backbone: %s", source, ", ".join(left_out))
    found = {name: original for name, original in found.items() if not _LEFT_OUT.match(name)}
    variant = variant or _infer_variant(found, tensors, source)
    tree = files.fill(tensors, found, _backbone(variant), f"{source} as {variant.name}")
    return tree["params"], tree["batch_stats"], variant


def _rename(tensors: Mapping[str, Any], source: str) -> dict[str, tuple[str]]:
    """Maps names in torchvision's layout, the backbone's without a prefix, to the file's."""
    found: dict[str, tuple[str]] = {}
    for original in tensors:
        name = _BACKBONE.sub("", _WRAPPER.sub("", original))
        if _COUNTER.search(name):
            continue
        if name in found:
            raise ValueError(f"{source} holds {name} twice: as {found[name][0]} and as {original}")
        found[name] = (original,)
    return found


def _infer_variant(
    found: Mapping[str, tuple[str]], tensors: Mapping[str, Any], source: str
) -> ResNetVariant:
    """The variant of tensors with these names; raises ValueError if they are no ResNet's."""
    blocks = [
        {m[1] for name in found if (m := re.match(rf"layer{i}\.(\d+)\.", name))}
        for i in range(1, 5)
    ]
    stem = tuple(tensors[found["conv1.weight"][0]].shape) if "conv1.weight" in found else ()
    if not all(blocks) or len(stem) != 4:
        raise ValueError(
            f"{source} is not a ResNet in torchvision's layout (conv1 and layer1 to layer4): it "
            f"holds {files.some_of(found)}"
        )
    counts = tuple(len(stage) for stage in blocks)
    bottleneck = "layer1.0.conv3.weight" in found
    fields = dict(
        blocks=counts, bottleneck=bottleneck, width=stem[0], small_stem=stem[2:] == (3, 3)
    )
    for known in RESNETS.values():
        if known.stem_stride == 1 and all(getattr(known, k) == v for k, v in fields.items()):
            return known
    depth = 2 + sum(counts) * (3 if bottleneck else 2)
    return ResNetVariant(name=f"resnet{depth}_{stem[0]}wide", **fields)


def _backbone(v: ResNetVariant) -> Expected:
    table = Table()
    table.conv("conv1", "conv1", v.width, 3, 3 if v.small_stem else 7)
    table.norm("bn1", "bn1", v.width)
    last = v.width
    for stage, blocks in enumerate(v.blocks):
        width = v.width * 2**stage
        out = width * (4 if v.bottleneck else 1)
        for j in range(blocks):
            theirs, ours = f"layer{stage + 1}.{j}", f"layer{stage + 1}_{j}"
            if v.bottleneck:
                convs = [(width, last, 1), (width, width, 3), (out, width, 1)]
            else:
                convs = [(width, last, 3), (width, width, 3)]
            for i, (n_out, n_in, size) in enumerate(convs, start=1):
                table.conv(f"{theirs}.conv{i}", f"{ours}/conv{i}", n_out, n_in, size)
                table.norm(f"{theirs}.bn{i}", f"{ours}/bn{i}", n_out)
            if last != out or (stage and j == 0):
                table.conv(f"{theirs}.downsample.0", f"{ours}/downsample_conv", out, last, 1)
                table.norm(f"{theirs}.downsample.1", f"{ours}/downsample_bn", out)
            last = out
    return table


FAMILY = Family("resnet", ResNet, ResNetVariant, RESNETS, holds=is_resnet, to_flax=to_flax)
