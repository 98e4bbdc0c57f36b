"""Random crops and flips, as victims train with them."""

from dataclasses import dataclass

import torch

from .base import Transform, register


@register
@dataclass(frozen=True)
class Crop(Transform):
    """Each image + delta is mirrored with the probability `Options.flip` and then moved by up to an
    eighth of its width in both directions, with zeros from outside: the crop of `evaluate`. Fused
    into `perturbed_input` and `projected_step_`.
    """

    name = "crop"
    about = "random crops and flips"
    moves = True

    def view(
        self, batch: int, shape: torch.Size, flip: float, generator: torch.Generator
    ) -> torch.Tensor:
        furthest = shape[-1] // 8
        moved = torch.randint(-furthest, furthest + 1, (batch, 2), generator=generator)
        mirrored = torch.rand((batch, 1), generator=generator, dtype=torch.float32) < flip
        return torch.cat([moved, mirrored], 1).to(torch.int32)
