"""VGG with batch normalisation, DenseNet-BC and LeNet-5 in their CIFAR forms."""

import torch
import torch.nn.functional as F
from torch import nn

from .base import NETWORKS, Architecture, Network, Recipe


class VGG(Network):
    """Simonyan & Zisserman 2015 with batch normalisation; one linear layer after the average pool
    instead of three.

    convolutions: how many 3x3 layers each of the five stages has; a stage ends in 2x2 max-pooling
        while there is more than one pixel
    (five times at 32). The convolutions have no bias: the norm behind each would take it out again.
    """

    def __init__(self, width, convolutions, num_classes, normalize, size, channels):
        super().__init__(normalize, channels)
        layers, inner = [], channels
        for stage, count in enumerate(convolutions):
            outer = width << min(stage, 3)
            for _ in range(count):
                layers += [
                    nn.Conv2d(inner, outer, 3, 1, 1, bias=False),
                    nn.BatchNorm2d(outer),
                    nn.ReLU(inplace=True),
                ]
                inner = outer
            if size > 1:
                layers.append(nn.MaxPool2d(2))
                size //= 2
        self.layers = nn.Sequential(*layers)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(inner, num_classes)
        self.kaiming()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(self.avgpool(self.layers(self.normalized(x))).flatten(1))


class DenseLayer(nn.Module):
    """Norm, ReLU, 1x1 to four times the growth, norm, ReLU, 3x3 to `growth` new channels, which
    join the input.
    """

    def __init__(self, inner, growth):
        super().__init__()
        self.bn1, self.conv1 = nn.BatchNorm2d(inner), nn.Conv2d(inner, 4 * growth, 1, bias=False)
        self.bn2, self.conv2 = (
            nn.BatchNorm2d(4 * growth),
            nn.Conv2d(4 * growth, growth, 3, 1, 1, bias=False),
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.conv1(F.relu(self.bn1(x), inplace=True))
        return torch.cat([x, self.conv2(F.relu(self.bn2(y), inplace=True))], 1)


class Transition(nn.Module):
    """Norm, ReLU, 1x1 to half the channels, 2x2 average pooling."""

    def __init__(self, inner):
        super().__init__()
        self.bn, self.conv, self.pool = (
            nn.BatchNorm2d(inner),
            nn.Conv2d(inner, inner // 2, 1, bias=False),
            nn.AvgPool2d(2),
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.pool(self.conv(F.relu(self.bn(x), inplace=True)))


class DenseNet(Network):
    """Huang et al. 2017, DenseNet-BC: compression 1/2, a 3x3 stride-1 stem of two growths without
    norm or max-pool.
    """

    def __init__(self, growth, blocks, num_classes, normalize, channels):
        super().__init__(normalize, channels)
        inner = 2 * growth
        layers = [nn.Conv2d(channels, inner, 3, 1, 1, bias=False)]
        for stage, count in enumerate(blocks):
            for _ in range(count):
                layers.append(DenseLayer(inner, growth))
                inner += growth
            if stage < len(blocks) - 1:
                layers.append(Transition(inner))
                inner //= 2
        self.layers = nn.Sequential(*layers)
        self.bn = nn.BatchNorm2d(inner)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(inner, num_classes)
        self.kaiming()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.relu(self.bn(self.layers(self.normalized(x))), inplace=True)
        return self.fc(self.avgpool(x).flatten(1))


class LeNet5(Network):
    """LeCun et al. 1998 as it is used on CIFAR today: ReLU and max-pooling, 5x5 convolutions
    without padding, widths 6, 16, 120, 84.
    """

    def __init__(self, num_classes, normalize, size, channels):
        super().__init__(normalize, channels)
        left = ((size - 4) // 2 - 4) // 2
        self.conv1, self.conv2 = nn.Conv2d(channels, 6, 5), nn.Conv2d(6, 16, 5)
        self.fc1, self.fc2 = nn.Linear(16 * left * left, 120), nn.Linear(120, 84)
        self.relu = nn.ReLU()
        self.fc = nn.Linear(84, num_classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.max_pool2d(F.relu(self.conv1(self.normalized(x))), 2)
        x = F.max_pool2d(F.relu(self.conv2(x)), 2)
        x = F.relu(self.fc1(x.flatten(1)))
        return self.fc(self.relu(self.fc2(x)))


NETWORKS.add(
    Architecture(
        "vgg11",
        "VGG-11 with batch norm",
        Recipe(200, 0.05, 128, weight_decay=5e-4),
        lambda width, num_classes, normalize, size, channels: VGG(
            width, [1, 1, 2, 2, 2], num_classes, normalize, size, channels
        ),
        width=64,
    )
)
NETWORKS.add(
    Architecture(
        "vgg16",
        "VGG-16 with batch norm",
        Recipe(200, 0.05, 128, weight_decay=5e-4),
        lambda width, num_classes, normalize, size, channels: VGG(
            width, [2, 2, 3, 3, 3], num_classes, normalize, size, channels
        ),
        width=64,
    )
)
NETWORKS.add(
    Architecture(
        "densenet121",
        "DenseNet-121; its width is the growth",
        Recipe(200, 0.1, 64),
        lambda width, num_classes, normalize, size, channels: DenseNet(
            width, [6, 12, 24, 16], num_classes, normalize, channels
        ),
        width=32,
    )
)
NETWORKS.add(
    Architecture(
        "lenet5",
        "LeNet-5",
        Recipe(60, 0.02, 64),
        lambda width, num_classes, normalize, size, channels: LeNet5(
            num_classes, normalize, size, channels
        ),
        feature="relu",
        square=True,
        least=16,
    )
)
