"""Residual networks (He et al. 2016) in CIFAR form: a 3x3 stride-1 stem, no max-pool."""

import torch
import torch.nn.functional as F
from torch import nn

from .base import NETWORKS, Architecture, Network, Recipe


def _shortcut(inner, outer, stride):
    """What a block that changes the shape puts on its other branch: how many pixels are picked
    before the 1x1 convolution, the convolution and its norm.

    oneDNN (issue 6035) writes past its buffer in the weight gradient of a strided 1x1 with few
    channels, channels-last: there the pixels are picked first.
    """
    pick = stride if inner < 16 else 1
    return pick, nn.Conv2d(inner, outer, 1, stride // pick, bias=False), nn.BatchNorm2d(outer)


class BasicBlock(nn.Module):
    """Two 3x3 convolutions, the first of which carries the stride."""

    expansion = 1

    def __init__(self, inner, width, stride):
        super().__init__()
        self.conv1 = nn.Conv2d(inner, width, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.pick = 1
        if stride != 1 or inner != width:
            self.pick, self.conv3, self.bn3 = _shortcut(inner, width, stride)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = F.relu(self.bn1(self.conv1(x)), inplace=True)
        y = self.bn2(self.conv2(y))
        if hasattr(self, "conv3"):
            x = self.bn3(self.conv3(x[:, :, :: self.pick, :: self.pick]))
        return F.relu(y.add_(x), inplace=True)


class Bottleneck(nn.Module):
    """1x1, 3x3 (which carries the stride), 1x1 to four times the width."""

    expansion = 4

    def __init__(self, inner, width, stride):
        super().__init__()
        outer = width * self.expansion
        self.conv1 = nn.Conv2d(inner, width, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, stride, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = nn.Conv2d(width, outer, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(outer)
        self.pick = 1
        if stride != 1 or inner != outer:
            self.pick, self.conv4, self.bn4 = _shortcut(inner, outer, stride)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = F.relu(self.bn1(self.conv1(x)), inplace=True)
        y = F.relu(self.bn2(self.conv2(y)), inplace=True)
        y = self.bn3(self.conv3(y))
        if hasattr(self, "conv4"):
            x = self.bn4(self.conv4(x[:, :, :: self.pick, :: self.pick]))
        return F.relu(y.add_(x), inplace=True)


class ResNet(Network):
    """`avgpool` gives the features [B, D, 1, 1], after ReLU. widths: one per stage; blocks: per
    stage, or one number for all.
    """

    def __init__(self, widths, blocks, num_classes, normalize, channels, block=BasicBlock):
        super().__init__(normalize, channels)
        self.conv1 = nn.Conv2d(channels, widths[0], 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(widths[0])
        layers, inner = [], widths[0]
        counts = [blocks] * len(widths) if isinstance(blocks, int) else blocks
        for stage, (width, count) in enumerate(zip(widths, counts)):
            for number in range(count):
                layers.append(block(inner, width, 2 if stage and not number else 1))
                inner = width * block.expansion
        self.layers = nn.Sequential(*layers)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(inner, num_classes)
        self.kaiming()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.relu(self.bn1(self.conv1(self.normalized(x))), inplace=True)
        return self.fc(self.avgpool(self.layers(x)).flatten(1))


# The step sizes of the two large networks are those of the literature on CIFAR; that of
# small_resnet was tuned for a few thousand images on a CPU.
NETWORKS.add(
    Architecture(
        "resnet18",
        "ResNet-18, 11.2 M parameters",
        Recipe(200, 0.5, 128),
        lambda width, num_classes, normalize, size, channels: ResNet(
            [width, 2 * width, 4 * width, 8 * width], 2, num_classes, normalize, channels
        ),
        width=64,
    )
)
NETWORKS.add(
    Architecture(
        "small_resnet",
        "for CPUs: one block at each of width, 2 width, 4 width",
        Recipe(20, 0.1, 64),
        lambda width, num_classes, normalize, size, channels: ResNet(
            [width, 2 * width, 4 * width], 1, num_classes, normalize, channels
        ),
        width=8,
    )
)
NETWORKS.add(
    Architecture(
        "resnet50",
        "ResNet-50",
        Recipe(200, 0.1, 128),
        lambda width, num_classes, normalize, size, channels: ResNet(
            [width, 2 * width, 4 * width, 8 * width],
            [3, 4, 6, 3],
            num_classes,
            normalize,
            channels,
            Bottleneck,
        ),
        width=64,
    )
)
