"""Smaller images: what becomes of pictures that are scaled down before somebody trains on them."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image

from ...data.sources import resize
from .base import Defence, Stage, option, register


@register
@dataclass(frozen=True)
class Resize(Defence):
    """Training and test images are scaled down once, to `side` x `side`, by Pillow's bilinear
    filter with antialiasing, and rounded to 8 bits. The victim is built for that size and never
    sees another: nothing is enlarged again, because an owner who has small pictures trains on
    small pictures. The random crop's padding is an eighth of the new width.

    A network that cannot be built for the size (lenet5 below 16, vit off a multiple of 4) is
    refused.
    """

    name = "resize"
    stage = Stage.ONCE
    tests = True
    side: int = option(24, 8, 512)

    def misfit(self, shape: Sequence[int], num_classes: int) -> tuple[str, object] | None:
        height, width = shape[1:]
        if height == width > self.side:
            return None
        return f"square images of more than {self.side} pixels a side", f"{width} x {height}"

    def shape(self, shape: Sequence[int]) -> tuple[int, ...]:
        return (shape[0], self.side, self.side)

    def prepare(self, images: torch.Tensor, labels: torch.Tensor, seed: int) -> torch.Tensor:
        out = np.empty((len(images), *self.shape(images.shape[1:])), np.uint8)
        for target, image in zip(out, images.numpy()):
            for plane, pixels in zip(target, image):  # Pillow scales each channel by itself
                plane[:] = resize(Image.fromarray(pixels), self.side)
        return torch.from_numpy(out)
