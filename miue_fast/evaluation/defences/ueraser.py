"""Strong augmentation in the style of UEraser."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from .._torchvision import transforms
from .base import Defence, Stage, option, register

EDGES = 0.5  # chance of each of the first three steps


def plasma(count: int, height: int, width: int) -> torch.Tensor:
    """Random clouds [count, 1, height, width] from 0 to 1: octaves of uniform noise on grids of 2,
    3, 5, 9... points, each octave weaker by a roughness from 0.1 to 0.7.
    """
    rough = torch.rand(count, 1, 1, 1) * 0.6 + 0.1
    side, weight, cloud = 2, torch.ones_like(rough), torch.zeros(count, 1, height, width)
    while side // 2 < max(height, width):
        cloud += weight * F.interpolate(
            torch.rand(count, 1, side, side), (height, width), mode="bilinear", align_corners=True
        )
        side, weight = 2 * side - 1, weight * rough
    low, high = cloud.amin((2, 3), keepdim=True), cloud.amax((2, 3), keepdim=True)
    return (cloud - low) / (high - low)


def strong(images: torch.Tensor) -> torch.Tensor:
    """One draw of UEraser's chain: plasma brightness, plasma contrast and channel shuffle, each for
    every second image, then one operation of TrivialAugment (Müller and Hutter 2021) per image.
    Images [B, C, H, W] and result are on the [0, 1] scale; the result has 8-bit values.
    """
    count, channels, height, width = images.shape
    device = images.device

    def chosen():
        return (torch.rand(count, 1, 1, 1) < EDGES).to(device)

    strength = torch.rand(count, 1, 1, 1).to(device)
    brighter = (images + (2 * plasma(count, height, width).to(device) - 1) * strength).clamp(0, 1)
    images = torch.where(chosen(), brighter, images)
    contrast = ((images - 0.5) * (4 * plasma(count, height, width).to(device)) + 0.5).clamp(0, 1)
    images = torch.where(chosen(), contrast, images)
    order = torch.rand(count, channels).argsort(1).to(device)
    shuffled = images.gather(1, order[:, :, None, None].expand_as(images))
    images = torch.where(chosen(), shuffled, images)
    trivial = transforms().TrivialAugmentWide()
    return (
        torch.stack([trivial(image) for image in (images * 255).round().to(torch.uint8)]).float()
        / 255
    )


@register
@dataclass(frozen=True)
class UEraser(Defence):
    """In the style of UEraser (Qin et al. 2023, "Learning the Unlearnable"): `strong`; with draws >
    1 the draw of the largest loss.

    Not the authors' program: the clouds are sums of octaves instead of their library's fractal, and
    the loss that picks a draw is computed in eval mode, which leaves the running statistics alone.
    draws=5 is the paper's error-maximising form.
    """

    name = "ueraser"
    stage = Stage.BATCH
    torchvision = True
    draws: int = option(1, 1, 20)

    def batch(
        self, network: nn.Module, images: torch.Tensor, labels: torch.Tensor, num_classes: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if self.draws == 1:
            return strong(images), labels
        offers = [strong(images) for _ in range(self.draws)]
        training = network.training
        network.eval()
        with torch.no_grad():
            losses = torch.stack(
                [F.cross_entropy(network(offer), labels, reduction="none") for offer in offers]
            )
        network.train(training)
        best = losses.argmax(0)
        return torch.stack(offers)[best, torch.arange(len(labels), device=labels.device)], labels
