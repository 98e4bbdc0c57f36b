"""Grey images, one part of image shortcut squeezing (ISS: Liu, Zhao and Larson 2023, "Image
Shortcut Squeezing").
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from .base import Defence, Stage, register, to_bytes


@register
@dataclass(frozen=True)
class Grayscale(Defence):
    """Luma of ITU-R BT.601 (0.299 R + 0.587 G + 0.114 B), rounded, in all three channels. The test
    images are made grey too, because the network has seen no others.
    """

    name = "grayscale"
    stage = Stage.ONCE
    tests = True

    def misfit(self, shape: Sequence[int], num_classes: int) -> tuple[str, object] | None:
        return None if shape[0] == 3 else ("images of three channels", shape[0])

    def prepare(self, images: torch.Tensor, labels: torch.Tensor, seed: int) -> torch.Tensor:
        weights = torch.tensor([0.299, 0.587, 0.114])[:, None, None]
        grey = [to_bytes((part * weights).sum(1, keepdim=True)) for part in images.split(1000)]
        return torch.cat(grey).expand_as(images).contiguous()
