"""JPEG compression of a random quality."""

from dataclasses import dataclass
from functools import partial

import torch

from ...ops import jpeg_round_trip
from ...support.messages import fail
from .base import Change, Transform, option, register


@register
@dataclass(frozen=True)
class Jpeg(Transform):
    """In a share of the steps the batch goes through JPEG with 4:2:0 subsampling, of one quality
    from `lowest` to `highest`. The gradient goes straight through the roundings, so that it is the
    exact transpose of the chroma filter: `jpeg_round_trip`.

    Errors on creation: ValueError: an option is out of range, `highest` is below `lowest`.
    """

    name = "jpeg"
    about = "JPEG of a random quality from 60 to 95 in a share of the steps (jpeg:60)"
    changes = True
    lowest: int = option(60, 1, 100)
    highest: int = option(95, 1, 100)
    share: float = option(0.6, 0, 1, whole=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.highest < self.lowest:
            expected = f"a whole number from lowest, {self.lowest}, to 100"
            self.refuse("highest of jpeg", expected, str(self.highest))

    def check(self, shape: torch.Size) -> None:
        if shape[1] != 3:
            fail("option", "robust", "images of three channels for jpeg", shape[1])

    def change(self, shape: torch.Size, generator: torch.Generator) -> Change | None:
        drawn = float(torch.rand((), generator=generator, dtype=torch.float32))
        quality = int(torch.randint(self.lowest, self.highest + 1, (), generator=generator))
        return partial(jpeg_round_trip, quality=quality) if drawn < self.share else None
