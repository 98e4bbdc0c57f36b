"""A perturbation of one value per cell."""

import dataclasses
from dataclasses import dataclass

from .base import Transform, option, register


@register
@dataclass(frozen=True)
class Grid(Transform):
    """The gradient is summed over cells of size x size pixels of the image, per channel, before its
    sign, so that a perturbation is one value per cell (as far as [0, 1] lets it): JPEG and resizing
    leave coarse patterns where they take independent pixels away. Fused into `projected_step_`.
    """

    name = "grid"
    about = "one value per cell of N x N pixels (grid:4)"
    size: int = option(dataclasses.MISSING, 2, 4096)

    @property
    def cells(self) -> int:
        return self.size
