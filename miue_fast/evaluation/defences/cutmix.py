"""Rectangles of other images."""

from dataclasses import dataclass

import torch
from torch import nn

from .._torchvision import transforms
from .base import Defence, Stage, option, register


@register
@dataclass(frozen=True)
class CutMix(Defence):
    """Yun et al. 2019: a rectangle of the batch's previous image; the targets are the shares of the
    pixels.
    """

    name = "cutmix"
    stage = Stage.BATCH
    torchvision = True
    alpha: float = option(1.0, 0.01, 100, whole=False)

    def batch(
        self, network: nn.Module, images: torch.Tensor, labels: torch.Tensor, num_classes: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return transforms().CutMix(alpha=self.alpha, num_classes=num_classes)(images, labels)
