"""Frozen convolutions in this library's own C++ (csrc/cpu/tiles.h), whose weights are transformed
and packed once per refold.

A 3x3 convolution takes 4 products per result in tiles of 4x4 results, or 7.1 in tiles of 2x2, where
the direct form takes 9 (S. Winograd 1980; A. Lavin and S. Gray, CVPR 2016). With stride 2 the outer
taps meet other places than the middle one does, which takes 5.1. A 1x1 convolution is products
alone. Which of them beat the library is a rule by shape and instruction level; its table is in
docs/performance-notes.md and is measured again by `python -m benchmarks.studies.packed`.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from ..dispatch import native
from ..dispatch.masks import mask_bytes

NHWC = torch.channels_last
MOST = 64 << 20  # bytes of the packed weights of one direction of one convolution
_ONE, _TWO = (1, 1), (2, 2)
# (taps, stride) -> the family of the convolution and that of its input gradient
_FAMILIES = {
    ((3, 3), _ONE): ("three4", "three4"),
    ((3, 3), _TWO): ("strided", "strided_back"),
    (_ONE, _ONE): ("one", "one"),
    (_ONE, _TWO): ("one_strided", "one_back"),
}


def family_of(
    weight: torch.Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    back: bool,
) -> str | None:
    """The family that computes this convolution, or with `back` its input gradient; None where no
    family does. Tiles of 2x2 results stand in for those of 4x4 whose weights take more than MOST.

    Args: weight: [K, C / groups, R, S] float32 on the CPU.
    """
    taps = weight.shape[2], weight.shape[3]
    found = _FAMILIES.get((taps, tuple(stride)))
    plain = groups == 1 and tuple(dilation) == _ONE and weight.dtype == torch.float32
    if found is None or not plain or weight.device.type != "cpu" or native.cpu_missing():
        return None
    if tuple(padding) != (taps[0] // 2, taps[1] // 2) or not weight.numel():
        return None
    sides = weight.shape[:2] if back else (weight.shape[1], weight.shape[0])
    for family in (found[back], "three2") if found[back] == "three4" else (found[back],):
        if 4 * native.packed_weights_size(family, *sides) <= MOST:
            return family
    return None


def worth(family: str, back: bool, channels: int, results: int, level: str | None) -> bool:
    """Whether the family was measured faster than the library's convolution and an epilogue pass.

    Args: channels, results: of the convolution, or of the input gradient's own convolution.
    """
    if level not in ("avx2", "avx512"):
        return False
    if family in ("three4", "three2"):
        return min(channels, results) >= 16 or (back and channels >= 32)
    if family in ("strided", "strided_back"):
        # 1.2 times at 256 channels going back is not worth the memory of 81 products.
        return channels >= (512 if back else 256) or (level == "avx2" and channels >= 64)
    return family == "one_back" or (channels >= 256 and not back)


def chosen(
    weight: torch.Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    back: bool,
) -> str | None:
    """The family that `auto` takes for this convolution, or with `back` for its input gradient, at
    the instruction level in use; None where the library is faster. Arguments as in `family_of`.
    """
    family = family_of(weight, stride, padding, dilation, groups, back)
    sides = weight.shape[:2] if back else (weight.shape[1], weight.shape[0])
    return family if family and worth(family, back, *sides, native.cpu_level()) else None


@dataclass(eq=False)
class PackedConv:
    """One direction of a frozen convolution, float32 on the CPU.

    Deterministic: the bits are the same for any number of threads, images per call and repetition
    on one instruction level. weights: in the order in which the kernels of `level` read them.
    """

    family: str
    back: bool
    weights: torch.Tensor = field(init=False, repr=False)
    level: str | None = field(init=False, default=None)

    def refold(self, weight: torch.Tensor) -> None:
        """Packs the forward's weights [K, C, R, S] anew, into the same memory where they fit."""
        count, channels = weight.shape[:2]
        sides = (count, channels) if self.back else (channels, count)
        size = native.packed_weights_size(self.family, *sides)
        if self.level is None or self.weights.numel() != size:
            self.weights = torch.empty(size, dtype=torch.float32)
        native.pack_weights(self.family, self.back, weight, *sides, self.weights)
        self.level = native.cpu_level()

    def _refuse(self):
        raise RuntimeError(
            f"packed convolution: expected weights packed for {native.cpu_level()}, "
            f"got {self.level}; call refold()"
        )

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
        """`conv_forward` with its arguments, of which `weight` gives the sizes alone.

        Errors: RuntimeError where the weights were packed for another instruction level.
        """
        if self.level != native.cpu_level():
            self._refuse()
        step, (rows, columns) = stride[0], x.shape[2:]
        size = len(x), len(weight), -(-rows // step), -(-columns // step)
        y = torch.empty(size, dtype=torch.float32, memory_format=NHWC)
        mask = torch.empty(mask_bytes(y.numel()) if want_mask else 0, dtype=torch.uint8)
        kept = mask if want_mask else None
        native.packed_conv(self.family, x, self.weights, bias, residual, relu, kept, None, y)
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
        """`conv_input_grad` with its arguments, of which `weight` and `stride` are not looked at.

        Errors: as in `forward`.
        """
        if self.level != native.cpu_level():
            self._refuse()
        y = torch.empty(tuple(size), dtype=torch.float32, memory_format=NHWC)
        native.packed_conv(self.family, grad, self.weights, None, addend, False, None, mask, y)
        return y
