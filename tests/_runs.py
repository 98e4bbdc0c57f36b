"""A small run of `generate`, and a small network, for tests of both loops."""

import torch
from torch import nn

SMALL = {
    "model": "small_resnet",
    "progress": False,
    "steps": 2,
    "batch": 16,
    "train_batch": 16,
    "width": 2,
    "device": "cpu",
}


class Plain(nn.Module):
    """Two convolutions, so that the step is fused into the first one where it can be."""

    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 8, 3, padding=1)
        self.conv2 = nn.Conv2d(8, 8, 3, stride=2, padding=1)
        self.avgpool, self.fc = nn.AdaptiveAvgPool2d(1), nn.Linear(8, 4)

    def forward(self, x):
        mean = torch.tensor([0.5, 0.4, 0.3], dtype=x.dtype, device=x.device)[:, None, None]
        x = self.conv2(torch.relu(self.conv1((x - mean) * 4)))
        return self.fc(self.avgpool(torch.relu(x)).flatten(1))
