"""Noise on every batch."""

from dataclasses import dataclass

import torch
from torch import nn

from .base import Defence, Stage, option, register


@register
@dataclass(frozen=True)
class GaussianNoise(Defence):
    """Fresh normal noise of deviation std / 255 in every epoch, clamped to the image range."""

    name = "gaussian-noise"
    stage = Stage.BATCH
    std: float = option(8.0, 0.1, 128, whole=False)

    def batch(
        self, network: nn.Module, images: torch.Tensor, labels: torch.Tensor, num_classes: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        noise = torch.randn(images.shape).to(images.device) * (self.std / 255)
        return (images + noise).clamp_(0, 1), labels
