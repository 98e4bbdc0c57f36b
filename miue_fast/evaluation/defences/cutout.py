"""A hole in every image."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from .base import Defence, Stage, option, register


@register
@dataclass(frozen=True)
class Cutout(Defence):
    """DeVries and Taylor 2017: a black square with its centre anywhere in the image, cut off at the
    border.

    size: side in pixels; None: half the image's width, 16 at 32 as in the paper.
    """

    name = "cutout"
    stage = Stage.BATCH
    size: int | None = option(None, 1, 10_000)

    def misfit(self, shape: Sequence[int], num_classes: int) -> tuple[str, object] | None:
        if (self.size or 0) <= min(shape[1:]):
            return None
        return f"a square within {shape[2]} x {shape[1]}", self.size

    def batch(
        self, network: nn.Module, images: torch.Tensor, labels: torch.Tensor, num_classes: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        size = images.shape[-1] // 2 if self.size is None else self.size
        inside = []
        for length in images.shape[-2:]:
            first = torch.randint(length, (len(images), 1)) - size // 2
            place = torch.arange(length)
            inside.append((place >= first) & (place < first + size))
        hole = (inside[0][:, :, None] & inside[1][:, None, :])[:, None]
        return images.masked_fill(hole.to(images.device), 0.0), labels
