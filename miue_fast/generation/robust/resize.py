"""A smaller picture, and back."""

import functools
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from .base import Change, Transform, option, register


@functools.lru_cache(maxsize=256)
def _there_and_back(side: int, smaller: int) -> torch.Tensor:
    """[side, side], float32: what bilinear resizing of a line of pixels down (antialiased) and up
    again does to it.
    """
    pixels = torch.eye(side)[None, None]
    down = F.interpolate(pixels, (smaller, side), mode="bilinear", antialias=True)
    return F.interpolate(down, (side, side), mode="bilinear")[0, 0]


@register
@dataclass(frozen=True)
class Resize(Transform):
    """The batch is resized to a width that is drawn from `smallest` times its own up to all of it,
    with antialiased bilinear weights, and back. Both are products with one matrix per axis, whose
    transposes are the gradient: the same bits in every run, on a GPU too.
    """

    name = "resize"
    about = "random resizing down and up, from half the size (resize:0.5)"
    changes = True
    smallest: float = option(0.5, 0.05, 1, whole=False)

    def change(self, shape: torch.Size, generator: torch.Generator) -> Change | None:
        height, width = shape[2:]
        least = max(1, round(self.smallest * width))
        smaller = int(torch.randint(least, width + 1, (), generator=generator))
        if smaller == width:
            return None
        rows = _there_and_back(height, max(1, round(smaller * height / width)))
        columns = _there_and_back(width, smaller)
        return lambda images: rows.to(images.device) @ images @ columns.T.to(images.device)
