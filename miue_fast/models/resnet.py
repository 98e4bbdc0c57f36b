"""Residual networks in CIFAR form: a 3x3 stride-1 stem, no max-pool."""

import torch
import torch.nn.functional as F
from torch import nn

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet; one grey channel takes their means


class BasicBlock(nn.Module):
    def __init__(self, inner, outer, stride):
        super().__init__()
        self.conv1 = nn.Conv2d(inner, outer, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outer)
        self.conv2 = nn.Conv2d(outer, outer, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outer)
        self.pick = 1
        if stride != 1 or inner != outer:
            # oneDNN (issue 6035) writes past its buffer in the weight gradient of a strided 1x1 with few channels, channels-last:
            # there the pixels are picked first.
            self.pick = stride if inner < 16 else 1
            self.conv3 = nn.Conv2d(inner, outer, 1, stride // self.pick, bias=False)
            self.bn3 = nn.BatchNorm2d(outer)

    def forward(self, x):
        y = F.relu(self.bn1(self.conv1(x)), inplace=True)
        y = self.bn2(self.conv2(y))
        if hasattr(self, "conv3"):
            x = self.bn3(self.conv3(x[:, :, :: self.pick, :: self.pick]))
        return F.relu(y.add_(x), inplace=True)


class ResNet(nn.Module):
    """Images [B, channels, H, W] on the [0, 1] scale -> logits [B, classes]. `avgpool` gives the features [B, D, 1, 1], after ReLU."""

    def __init__(self, widths, blocks, num_classes, normalize, channels):
        super().__init__()
        self.normalize = normalize
        mean, std = torch.tensor(MEAN)[:, None, None], torch.tensor(STD)[:, None, None]
        self.register_buffer("mean", mean if channels == 3 else mean.mean(0, keepdim=True), persistent=False)
        self.register_buffer("inv_std", 1 / (std if channels == 3 else std.mean(0, keepdim=True)), persistent=False)
        self.conv1 = nn.Conv2d(channels, widths[0], 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(widths[0])
        layers, inner = [], widths[0]
        for stage, outer in enumerate(widths):
            for block in range(blocks):
                layers.append(BasicBlock(inner, outer, 2 if stage and not block else 1))
                inner = outer
        self.layers = nn.Sequential(*layers)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(inner, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x):
        if self.normalize:
            x = (x - self.mean) * self.inv_std
        x = F.relu(self.bn1(self.conv1(x)), inplace=True)
        return self.fc(self.avgpool(self.layers(x)).flatten(1))
