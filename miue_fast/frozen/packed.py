"""Frozen convolutions in this library's own C++: their weights are transformed and packed once.

A 3x3 convolution takes 4 products per result in tiles of 4x4 results, or 7.1 in tiles of 2x2, where
the direct form takes 9 (S. Winograd 1980; A. Lavin and S. Gray, CVPR 2016). With stride 2 the outer
taps meet other places than the middle one does: 5.1 products. 1x1 convolutions are products alone.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from ..dispatch import native
from ..dispatch.masks import mask_bytes

NHWC = torch.channels_last
# Families of csrc/ops.h with the number of products along one dimension.
PRODUCTS = {
    "three4": 6,
    "three2": 4,
    "strided": 9,
    "strided_back": 9,
    "one": 1,
    "one_strided": 1,
    "one_back": 1,
}


def family_of(
    weight: torch.Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    back: bool,
    small: bool = False,
) -> str | None:
    """The family that computes this convolution, or with `back` its input gradient; None where no
    family does.

    Args:
        weight: [K, C / groups, R, S] float32 on the CPU.
        small: tiles of 2x2 results at stride 1, which take 4/9 of the memory of 4x4.
    """
    taps = tuple(weight.shape[2:])
    plain = groups == 1 and tuple(dilation) == (1, 1) and weight.dtype == torch.float32
    if not plain or weight.device.type != "cpu" or native.cpu_missing():
        return None
    if tuple(padding) != (taps[0] // 2, taps[1] // 2) or taps not in ((1, 1), (3, 3)):
        return None
    kinds = {
        ((3, 3), (1, 1)): ("three2" if small else "three4",) * 2,
        ((3, 3), (2, 2)): ("strided", "strided_back"),
        ((1, 1), (1, 1)): ("one", "one"),
        ((1, 1), (2, 2)): ("one_strided", "one_back"),
    }
    found = kinds.get((taps, tuple(stride)))
    return found[back] if found else None


@dataclass(eq=False)
class PackedConv:
    """One direction of a frozen convolution, float32 on the CPU.

    Deterministic: the same bits for any number of threads, images per call and repetition, on one
    instruction level. weights: in the order in which the kernels of `level` read them.
    """

    family: str
    back: bool
    weights: torch.Tensor = field(init=False, repr=False)
    level: str | None = field(init=False, default=None)

    def refold(self, weight: torch.Tensor) -> None:
        """Packs the forward's weights [K, C, R, S] anew, into the same memory where it fits."""
        count, channels = weight.shape[:2]
        self.inputs, self.results = (count, channels) if self.back else (channels, count)
        size = native.packed_weights_size(self.family, self.inputs, self.results)
        if self.level is None or self.weights.numel() != size:
            self.weights = torch.empty(size)
        native.pack_weights(self.family, self.back, weight, self.inputs, self.results, self.weights)
        self.level = native.cpu_level()

    def __call__(
        self,
        x: torch.Tensor,
        size: Sequence[int],
        bias: torch.Tensor | None = None,
        residual: torch.Tensor | None = None,
        *,
        relu: bool = False,
        want_mask: bool = False,
        keep: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """relu(conv(x) + bias + residual) and the ReLU's bits, or (conv(x) + residual) where a bit
        of `keep` is set and 0 elsewhere.

        Args:
            x: [B, C, H, W] channels-last. size: [B, K, P, Q] of the result. bias: [K]. residual:
                like the result, channels-last. keep: bits as `conv_epilogue_` writes them; not
                together with relu.

        Errors: RuntimeError where the weights were packed for another instruction level.
        """
        if self.level != native.cpu_level():
            raise RuntimeError(
                f"packed convolution: expected weights packed for {native.cpu_level()}, "
                f"got {self.level}; call refold()"
            )
        y = torch.empty(tuple(size), memory_format=NHWC)
        mask = torch.empty(mask_bytes(y.numel()), dtype=torch.uint8) if want_mask else None
        native.packed_conv(self.family, x, self.weights, bias, residual, relu, mask, keep, y)
        return y, mask
