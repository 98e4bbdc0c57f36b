"""What all networks share: the normalisation of their input, and the initialisation of
convolutions.
"""

import torch
from torch import nn

MEAN, STD = (
    (0.485, 0.456, 0.406),
    (0.229, 0.224, 0.225),
)  # ImageNet; one grey channel takes their means


class Network(nn.Module):
    """Images [B, channels, H, W] on the [0, 1] scale -> logits [B, classes], by a classifier called
    `fc`.
    """

    def __init__(self, normalize, channels):
        super().__init__()
        self.normalize = normalize
        mean, std = torch.tensor(MEAN)[:, None, None], torch.tensor(STD)[:, None, None]
        self.register_buffer(
            "mean", mean if channels == 3 else mean.mean(0, keepdim=True), persistent=False
        )
        self.register_buffer(
            "inv_std", 1 / (std if channels == 3 else std.mean(0, keepdim=True)), persistent=False
        )

    def normalized(self, x):
        return (x - self.mean) * self.inv_std if self.normalize else x

    def kaiming(self):
        """Every convolution: Kaiming normal, fan-out (He et al. 2015)."""
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
