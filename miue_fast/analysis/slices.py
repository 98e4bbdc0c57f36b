"""Random directions, and work cut into pieces that fit the cache: what the sliced estimators
share.
"""

from collections.abc import Iterator
from typing import Any

import torch

PIECE = {"cpu": 1 << 20, "cuda": 1 << 25}  # values of one temporary


def slice_directions(
    width_x: int, width_y: int, slices: int, *, shared: bool = True, seed: int = 0
) -> tuple[torch.Tensor, torch.Tensor]:
    """Unit vectors, uniform on the spheres: (theta [slices, width_x], phi [slices, width_y]),
    float32 on the CPU.

    With `shared` phi is theta. The same seed gives the same directions, whatever machine the
    features are on."""
    draw = torch.Generator().manual_seed(seed)

    def unit(width):
        direction = torch.randn(slices, width, generator=draw, dtype=torch.float64)
        return (direction / direction.norm(dim=1, keepdim=True)).float()

    theta = unit(width_x)
    return theta, theta if shared else unit(width_y)


def standard(values: torch.Tensor) -> torch.Tensor:
    """Each row with mean 0 and deviation 1; a constant row becomes 0."""
    centred = values - values.mean(1, keepdim=True)
    deviation = centred.square().mean(1, keepdim=True).sqrt()
    return centred / torch.where(deviation > 0, deviation, 1)


def parts(total: int, size: int) -> list[slice]:
    """Slices that cover range(total), `size` (at least 1) each."""
    size = max(1, size)
    return [slice(start, min(start + size, total)) for start in range(0, total, size)]


def pairs(*rows: torch.Tensor) -> Iterator[tuple[Any, ...]]:
    """Differences between all points of a slice, in blocks: (slices, points, one [s, p, N] per
    argument [S, N]).

    The same point twice stands at [:, i, points.start + i] of a block.
    """
    count, points = rows[0].shape
    room = PIECE[rows[0].device.type]
    for some in parts(count, room // points**2):
        for block in parts(points, room // points):
            yield some, block, *(row[some, block, None] - row[some, None, :] for row in rows)


def without_itself(block: torch.Tensor, points: slice, value: float) -> torch.Tensor:
    """The block of `pairs` with `value` in place of each point's pair with itself, in place."""
    block.diagonal(points.start, 1, 2).fill_(value)
    return block
