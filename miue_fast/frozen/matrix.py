"""Frozen convolutions in bfloat16 on the matrix tiles of a processor (AMX): weights are laid out
once, forward and input gradient are C++ of this library with the epilogue in them.

Which convolutions take them is a rule of measured layers (`worth`); its table is in
docs/performance-notes.md and is measured again by `python -m benchmarks.studies.packed`.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import torch

from ..dispatch import native
from ..dispatch.library import out_size
from ..dispatch.masks import mask_bytes

NHWC = torch.channels_last


def worth(channels: int, results: int) -> bool:
    """Whether the matrix tiles were measured faster than the library's convolution and an epilogue
    pass.

    Args: channels, results: of the convolution, or of the input gradient's own convolution.
    """
    return results >= 32 and (channels >= 32 or channels <= 4)


def worth_weight_grad(channels: int, results: int, taps: int) -> bool:
    """Whether the weight gradient of a convolution with so many taps was measured faster on the
    matrix tiles: with one tap, laying out images and gradients takes too large a share.
    """
    return min(channels, results) >= (64 if taps > 1 else 256)


def takes(weight: torch.Tensor, groups: int) -> bool:
    """Whether the matrix tiles can compute a convolution with weight [K, C / groups, R, S], and its
    gradients, here.
    """
    half = weight.dtype == torch.bfloat16 and weight.device.type == "cpu" and weight.numel() > 0
    return half and groups == 1 and native.matrix_missing() is None


def chosen(weight: torch.Tensor, groups: int, back: bool) -> bool:
    """Whether `auto` takes the matrix tiles for a convolution with weight [K, C / groups, R, S], or
    with `back` for its input gradient.
    """
    results, channels = weight.shape[:2]
    sides = (results, channels) if back else (channels, results)
    return takes(weight, groups) and worth(*sides)


@dataclass(eq=False)
class MatrixConv:
    """One direction of a frozen convolution, bfloat16 on a CPU with matrix tiles.

    Sums are taken in float32, in an order that depends on the convolution alone, and rounded once,
    after the epilogue. Deterministic: the bits are the same for any number of threads, images per
    call and repetition. weights: in the order in which the kernel reads them.
    """

    family: ClassVar[str] = "matrix"
    back: bool
    weights: torch.Tensor = field(init=False, repr=False)

    def refold(self, weight: torch.Tensor) -> None:
        """Lays the forward's weights [K, C, R, S] out anew, into the same memory."""
        there = getattr(self, "weights", None)
        self.weights = native.pack_matrix_weights(weight, self.back, there)

    def forward(
        self,
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        residual: torch.Tensor | None,
        stride: Sequence[int],
        padding: Sequence[int],
        dilation: Sequence[int],
        groups: int,
        relu: bool,
        want_mask: bool,
        scale: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """`conv_forward` with its arguments, of which `weight` gives the sizes alone."""
        taps, size = weight.shape[2:], out_size(x.shape, weight, stride, padding, dilation)
        y = torch.empty(size, dtype=x.dtype, memory_format=NHWC)
        mask = torch.empty(mask_bytes(y.numel()) if want_mask else 0, dtype=torch.uint8)
        kept, conv = mask if want_mask else None, (stride, padding, dilation)
        native.matrix_conv(x, self.weights, bias, residual, relu, kept, None, y, taps, conv, False)
        return y, mask

    def input_grad(
        self,
        grad: torch.Tensor,
        weight: torch.Tensor,
        addend: torch.Tensor | None,
        mask: torch.Tensor | None,
        size: Sequence[int],
        stride: Sequence[int],
        padding: Sequence[int],
        dilation: Sequence[int],
        groups: int,
        scale: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """`conv_input_grad` with its arguments, of which `weight` gives the sizes alone."""
        y = torch.empty(tuple(size), dtype=grad.dtype, memory_format=NHWC)
        taps, conv = weight.shape[2:], (stride, padding, dilation)
        native.matrix_conv(grad, self.weights, None, addend, False, None, mask, y, taps, conv, True)
        return y
