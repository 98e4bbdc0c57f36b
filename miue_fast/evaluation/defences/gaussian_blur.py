"""Blur before training."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from .._torchvision import transforms
from .base import Defence, Stage, option, register


@register
@dataclass(frozen=True)
class GaussianBlur(Defence):
    """A Gaussian of deviation `sigma` pixels, with reflected borders (torchvision)."""

    name = "gaussian-blur"
    stage = Stage.ONCE
    torchvision = True
    sigma: float = option(1.0, 0.1, 10, whole=False)

    @property
    def width(self) -> int:
        """Width of the kernel in pixels: three deviations on each side."""
        return 2 * math.ceil(3 * self.sigma) + 1

    def misfit(self, shape: Sequence[int], num_classes: int) -> tuple[str, object] | None:
        if self.width // 2 < min(shape[1:]):
            return None
        expected = f"a kernel ({self.width} pixels) that fits {shape[2]} x {shape[1]}"
        return expected, f"sigma {self.sigma:g}"

    def prepare(self, images: torch.Tensor, labels: torch.Tensor, seed: int) -> torch.Tensor:
        blur = transforms().functional.gaussian_blur
        sizes = [self.width] * 2, [self.sigma] * 2
        return torch.cat([blur(part, *sizes) for part in images.split(1000)])
