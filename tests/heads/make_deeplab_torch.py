"""DeepLabV3 on ResNet-50 in plain PyTorch, and its logits for random weights, for `test_deeplab.py`.

Run from the root of the repository where PyTorch is installed:

    python tests/heads/make_deeplab_torch.py

writes `tests/heads/deeplab_torch.npz`: the names and shapes of all tensors, and logits. The weights
themselves are not stored: whoever knows name and shape draws the same numbers with `draw`.
"""

import json
import zlib
from pathlib import Path

import numpy as np

STORED = Path(__file__).with_name("deeplab_torch.npz")
OUTPUTS = 5
OUTPUT_STRIDES = (8, 16)
# Every so many pixels are stored.
STEP = 4


def draw(name, shape):
    """The tensor called `name`, with statistics and scales that are not those of the start."""
    rng = np.random.default_rng(zlib.crc32(name.encode()))
    if name == "image":
        return rng.normal(size=shape).astype(np.float32)
    if name.endswith("num_batches_tracked"):
        return np.array(7)
    if name.endswith("running_var"):
        return rng.uniform(0.5, 1.5, shape).astype(np.float32)
    if len(shape) == 1 and name.endswith("weight"):
        # The last scale of a residual block is small, so that sixteen blocks do not explode.
        most = 0.6 if ".bn3." in name else 1.2
        return rng.uniform(most / 2, most, shape).astype(np.float32)
    if len(shape) == 1:
        return rng.normal(0, 0.2, shape).astype(np.float32)
    return rng.normal(0, np.sqrt(2 / np.prod(shape[1:])), shape).astype(np.float32)


IMAGE = draw("image", (1, 65, 97, 3))


def network(output_stride):
    """The network in evaluation, its tensors named as in torchvision's `deeplabv3_resnet50`."""
    import torch
    from torch import nn
    from torch.nn import functional

    class Bottleneck(nn.Module):
        def __init__(self, n_in, width, stride, dilation):
            super().__init__()
            self.conv1 = nn.Conv2d(n_in, width, 1, bias=False)
            self.bn1 = nn.BatchNorm2d(width)
            self.conv2 = nn.Conv2d(width, width, 3, stride, dilation, dilation, bias=False)
            self.bn2 = nn.BatchNorm2d(width)
            self.conv3 = nn.Conv2d(width, 4 * width, 1, bias=False)
            self.bn3 = nn.BatchNorm2d(4 * width)
            self.downsample = None
            if n_in != 4 * width:
                self.downsample = nn.Sequential(
                    nn.Conv2d(n_in, 4 * width, 1, stride, bias=False), nn.BatchNorm2d(4 * width)
                )

        def forward(self, x):
            y = self.bn1(self.conv1(x)).relu()
            y = self.bn2(self.conv2(y)).relu()
            y = self.bn3(self.conv3(y))
            return (y + (x if self.downsample is None else self.downsample(x))).relu()

    def stage(n_in, width, blocks, stride, first, rest):
        """`first` and `rest` are the rates of the first block and of the others."""
        made = [Bottleneck(n_in, width, stride, first)]
        return nn.Sequential(
            *made, *[Bottleneck(4 * width, width, 1, rest) for _ in range(blocks - 1)]
        )

    class Backbone(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv1 = nn.Conv2d(3, 64, 7, 2, 3, bias=False)
            self.bn1 = nn.BatchNorm2d(64)
            self.layer1 = stage(64, 64, 3, 1, 1, 1)
            self.layer2 = stage(256, 128, 4, 2, 1, 1)
            if output_stride == 8:
                self.layer3 = stage(512, 256, 6, 1, 1, 2)
                self.layer4 = stage(1024, 512, 3, 1, 2, 4)
            else:
                self.layer3 = stage(512, 256, 6, 2, 1, 1)
                self.layer4 = stage(1024, 512, 3, 1, 1, 2)

        def forward(self, x):
            x = functional.max_pool2d(self.bn1(self.conv1(x)).relu(), 3, 2, 1)
            x = self.layer3(self.layer2(self.layer1(x)))
            return x, self.layer4(x)

    def conv_norm(n_in, n_out, size, rate=1):
        padding = rate * (size // 2)
        conv = nn.Conv2d(n_in, n_out, size, padding=padding, dilation=rate, bias=False)
        return [conv, nn.BatchNorm2d(n_out), nn.ReLU()]

    class Pyramid(nn.Module):
        def __init__(self, rates):
            super().__init__()
            self.convs = nn.ModuleList(
                [nn.Sequential(*conv_norm(2048, 256, 1))]
                + [nn.Sequential(*conv_norm(2048, 256, 3, rate)) for rate in rates]
                + [nn.Sequential(nn.AdaptiveAvgPool2d(1), *conv_norm(2048, 256, 1))]
            )
            self.project = nn.Sequential(*conv_norm(5 * 256, 256, 1), nn.Dropout(0.5))

        def forward(self, x):
            maps = [conv(x) for conv in self.convs]
            maps[-1] = functional.interpolate(maps[-1], x.shape[2:], mode="bilinear")
            return self.project(torch.cat(maps, 1))

    class DeepLabV3(nn.Module):
        def __init__(self):
            super().__init__()
            rates = (12, 24, 36) if output_stride == 8 else (6, 12, 18)
            self.backbone = Backbone()
            self.classifier = nn.Sequential(
                Pyramid(rates), *conv_norm(256, 256, 3), nn.Conv2d(256, OUTPUTS, 1)
            )
            self.aux_classifier = nn.Sequential(
                *conv_norm(1024, 256, 3), nn.Dropout(0.1), nn.Conv2d(256, OUTPUTS, 1)
            )

        def forward(self, image):
            middle, last = self.backbone(image)
            maps = self.classifier(last), self.aux_classifier(middle)
            return [functional.interpolate(m, image.shape[2:], mode="bilinear") for m in maps]

    return DeepLabV3().eval()


def shapes(output_stride=8):
    """{name: shape} of the network's tensors."""
    return {k: list(v.shape) for k, v in network(output_stride).state_dict().items()}


def logits(output_stride):
    """(logits, auxiliary logits) `H x W x K` of `IMAGE`."""
    import torch

    net = network(output_stride)
    drawn = {k: torch.tensor(draw(k, tuple(v.shape))) for k, v in net.state_dict().items()}
    net.load_state_dict(drawn)
    with torch.no_grad():
        maps = net(torch.tensor(IMAGE).permute(0, 3, 1, 2))
    return tuple(m[0].permute(1, 2, 0).numpy() for m in maps)


def main():
    stored = {"shapes": json.dumps(shapes())}
    for stride in OUTPUT_STRIDES:
        main_logits, auxiliary = logits(stride)
        for name, value in [("logits", main_logits), ("auxiliary", auxiliary)]:
            print(f"output stride {stride}: {name} {value.mean():.3f} +- {value.std():.3f}")
            stored[f"{name}{stride}"] = value[::STEP, ::STEP]
    np.savez_compressed(STORED, **stored)


if __name__ == "__main__":
    main()
