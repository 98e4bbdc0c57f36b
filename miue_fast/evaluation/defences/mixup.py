"""Weighted sums of two images."""

from dataclasses import dataclass

import torch
from torch import nn

from .._torchvision import transforms
from .base import Defence, Stage, option, register


@register
@dataclass(frozen=True)
class MixUp(Defence):
    """Zhang et al. 2018: lam * image + (1 - lam) * the batch's previous image, lam from Beta(alpha,
    alpha), once per batch.
    """

    name = "mixup"
    stage = Stage.BATCH
    torchvision = True
    alpha: float = option(1.0, 0.01, 100, whole=False)

    def batch(
        self, network: nn.Module, images: torch.Tensor, labels: torch.Tensor, num_classes: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return transforms().MixUp(alpha=self.alpha, num_classes=num_classes)(images, labels)
