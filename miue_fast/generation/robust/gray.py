"""Grey pictures."""

from dataclasses import dataclass

import torch

from ...support.messages import fail
from .base import Change, Transform, option, register

LUMA = 0.299, 0.587, 0.114  # ITU-R BT.601, as in the defence grayscale


def _luma(images: torch.Tensor) -> torch.Tensor:
    weights = torch.tensor(LUMA, device=images.device)[:, None, None]
    return (images * weights).sum(1, keepdim=True).expand_as(images)


@register
@dataclass(frozen=True)
class Gray(Transform):
    """The batch is replaced by its luma in a share of the steps."""

    name = "gray"
    about = "grey pictures in a share of the steps (gray:0.4)"
    changes = True
    share: float = option(0.4, 0, 1, whole=False)

    def check(self, shape: torch.Size) -> None:
        if shape[1] != 3:
            fail("option", "robust", "images of three channels for gray", shape[1])

    def change(self, shape: torch.Size, generator: torch.Generator) -> Change | None:
        drawn = float(torch.rand((), generator=generator, dtype=torch.float32))
        return _luma if drawn < self.share else None
