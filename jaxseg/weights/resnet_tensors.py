"""Turns ResNets in torchvision's layout into the parameters and running statistics of our `ResNet`.

Also whole DeepLabV3 networks as torchvision saves them (`deeplabv3_resnet50`). Nothing is dropped
without saying so, but for batch norm's counters.
"""

import logging
import re
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from jaxseg.backbones.resnet import RESNETS, ResNetVariant
from jaxseg.weights import vit_tensors

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
    tensors: Mapping[str, Any], source: str, *, variant: ResNetVariant | None = None
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
    tree = vit_tensors.fill(tensors, found, _backbone(variant), f"{source} as {variant.name}")
    return tree["params"], tree["batch_stats"], variant


def deeplab_to_flax(tensors: Mapping[str, Any], source: str) -> tuple[Tree, Tree, ResNetVariant]:
    """Converts torchvision's DeepLabV3 on a ResNet: `backbone.*`, `classifier.*`, `aux_classifier.*`.

    torchvision runs it at output stride 8. The auxiliary classifier may be absent.

    Args:
      tensors: as in `to_flax`.
      source: what to call the file in messages.

    Returns:
      Parameters {"backbone": of `ResNet`, "head": of `DeepLabV3`}, `batch_stats` with the same two
      keys, and the backbone's variant.

    Raises:
      ValueError: as in `to_flax`.
    """
    found = _rename(tensors, source)
    variant = _infer_variant(found, tensors, source)
    shapes = {name: tuple(tensors[original].shape) for name, (original,) in found.items()}
    expected = {
        name: (path.replace("/", "/backbone/", 1), *rest)
        for name, (path, *rest) in _backbone(variant).items()
    }
    channels = shapes.get("classifier.0.project.0.weight", (256,))[0]
    outputs = shapes.get("classifier.4.weight", (21,))[0]
    auxiliary = any(name.startswith("aux_classifier.") for name in found)
    expected |= _head(variant.dim, channels, outputs, auxiliary=auxiliary)
    tree = vit_tensors.fill(
        tensors, found, expected, f"{source} as a DeepLabV3 on {variant.name}, {outputs} outputs"
    )
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
            f"holds {vit_tensors.some_of(found)}"
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


class _Table(dict):
    """Maps torchvision's names to (path in our variables, shape in torchvision, transform)."""

    def conv(self, name: str, path: str, n_out: int, n_in: int, size: int) -> None:
        shape = (n_out, n_in, size, size)
        self[f"{name}.weight"] = (f"params/{path}/kernel", shape, vit_tensors.conv_kernel)

    def point(self, name: str, path: str, n_out: int, n_in: int) -> None:
        """A 1x1 convolution that is a `Dense` here."""
        shape = (n_out, n_in, 1, 1)
        self[f"{name}.weight"] = (f"params/{path}/kernel", shape, lambda w: w[:, :, 0, 0].T)

    def bias(self, name: str, path: str, count: int) -> None:
        self[f"{name}.bias"] = (f"params/{path}/bias", (count,), np.asarray)

    def norm(self, name: str, path: str, count: int) -> None:
        for theirs, ours in [
            ("weight", f"params/{path}/scale"),
            ("bias", f"params/{path}/bias"),
            ("running_mean", f"batch_stats/{path}/mean"),
            ("running_var", f"batch_stats/{path}/var"),
        ]:
            self[f"{name}.{theirs}"] = (ours, (count,), np.asarray)


def _backbone(v: ResNetVariant) -> vit_tensors.Expected:
    table = _Table()
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


def _head(dim: int, channels: int, outputs: int, *, auxiliary: bool) -> vit_tensors.Expected:
    table = _Table()

    def classify(name: str, path: str, n_in: int) -> None:
        table.point(name, f"{path}/classify", outputs, n_in)
        table.bias(name, f"{path}/classify", outputs)

    def point_norm(conv: str, norm: str, path: str, n_in: int) -> None:
        table.point(conv, f"{path}/conv", channels, n_in)
        table.norm(norm, f"{path}/norm", channels)

    pyramid = "classifier.0"
    point_norm(f"{pyramid}.convs.0.0", f"{pyramid}.convs.0.1", "head/aspp/point", dim)
    for i in range(3):
        name = f"{pyramid}.convs.{i + 1}"
        table.conv(f"{name}.0", f"head/aspp/atrous{i}/conv", channels, dim, 3)
        table.norm(f"{name}.1", f"head/aspp/atrous{i}/norm", channels)
    point_norm(f"{pyramid}.convs.4.1", f"{pyramid}.convs.4.2", "head/aspp/pool", dim)
    point_norm(f"{pyramid}.project.0", f"{pyramid}.project.1", "head/aspp/project", 5 * channels)
    table.conv("classifier.1", "head/conv/conv", channels, channels, 3)
    table.norm("classifier.2", "head/conv/norm", channels)
    classify("classifier.4", "head", channels)
    if auxiliary:
        # On the third of the four stages, half as wide as the last.
        middle = dim // 8
        table.conv("aux_classifier.0", "head/auxiliary/conv/conv", middle, dim // 2, 3)
        table.norm("aux_classifier.1", "head/auxiliary/conv/norm", middle)
        classify("aux_classifier.4", "head/auxiliary", middle)
    return table
