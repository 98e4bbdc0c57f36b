"""Fewer levels of colour, one part of image shortcut squeezing (ISS: Liu, Zhao and Larson 2023)."""

from dataclasses import dataclass

import torch

from .base import Defence, Stage, option, register


@register
@dataclass(frozen=True)
class BitDepth(Defence):
    """2**bits evenly spaced levels from 0 to 255, each value to the nearest."""

    name = "bit-depth"
    stage = Stage.ONCE
    bits: int = option(2, 1, 7)

    def prepare(self, images: torch.Tensor, labels: torch.Tensor, seed: int) -> torch.Tensor:
        top = 2**self.bits - 1
        levels = ((torch.arange(256) * top / 255).round() * 255 / top).round().to(torch.uint8)
        return levels[images.long()]
