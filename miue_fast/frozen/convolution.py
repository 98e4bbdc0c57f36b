"""The convolution of a frozen network: batch norm folded into its weights, ReLU and residual in its
epilogue.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import nn

from ..dispatch import native
from ..dispatch.registry import OPS
from ..ops.convolution import resolve
from ..ops.geometry import geometry, quantised
from . import matrix
from .base import NHWC, Gradients, Layer, Tape, gather, keep, scale_and_shift, spread, wide
from .matrix import MatrixConv
from .packed import PackedConv, chosen


class Calls(NamedTuple):
    """What a convolution calls for images of one size."""

    forward: Callable  # with the arguments of the op conv_forward
    input_grad: Callable  # with those of conv_input_grad
    out: tuple[int, ...]  # (K, P, Q), the size of the result for one image


@dataclass(eq=False, kw_only=True)
class Conv(Layer):
    """relu(conv(inputs[0]) * scale + shift + inputs[1]).

    It is resolved once: `resolve` (at freeze and refold) chooses the implementations that serve the
    device, the type and the backend, and the first image of a size has the geometry checked and, on
    a GPU, the faster implementation looked up for that size. From then on a call is a call. On a
    CPU, in float32, each direction that `packed.worth` names runs on packed weights.

    pick: only every pick-th pixel of the input is looked at (a slice before a 1x1 convolution).
    norms: (scale, shift) per output channel, of `constants.py`. fp8: e4m3 operands, each tensor
    with a scale of its own.
    """

    module: nn.Conv2d
    pick: int = 1
    norms: list[Any] = field(default_factory=list)
    fp8: bool = False
    weight: torch.Tensor = field(init=False, repr=False)
    back_weight: torch.Tensor = field(init=False, repr=False)  # of the input gradient
    bias: torch.Tensor = field(init=False, repr=False)
    weight_scale: torch.Tensor = field(init=False, repr=False)  # with fp8

    def __post_init__(self) -> None:
        self.geometry, self.shape = self._geometry(), list(self.module.weight.shape)
        self.conv = tuple(self.geometry.values())
        self.packed: dict[bool, PackedConv | MatrixConv] = {}  # by whether it is the input gradient

    def _geometry(self) -> dict[str, Any]:
        m = self.module
        return {
            "stride": [self.pick * s for s in m.stride],
            "padding": list(m.padding),
            "dilation": list(m.dilation),
            "groups": m.groups,
        }

    def refold(
        self, dtype: torch.dtype, device: torch.device, input_scale: torch.Tensor | None = None
    ) -> None:
        self.same("geometry", self.geometry, self._geometry())
        self.same("weights", self.shape, list(self.module.weight.shape))
        w = self.module.weight.detach().double()
        scale, shift = scale_and_shift(self.norms, len(w), w.device)
        if self.module.bias is not None:
            shift = shift + self.module.bias.detach().double() * scale
        w = w * scale[:, None, None, None]
        keep(self, "bias", shift.to(wide(dtype)))
        if self.fp8:
            w, weight_scale = quantised(w)
            keep(self, "weight_scale", weight_scale)
            keep(self, "weight", w.contiguous(memory_format=NHWC))
            # With the reduction innermost in memory, as the Triton kernel reads it.
            keep(self, "back_weight", w.permute(1, 2, 3, 0).contiguous().permute(3, 0, 1, 2))
            return
        keep(self, "weight", w.to(dtype).contiguous(memory_format=NHWC))
        if input_scale is None:
            self.back_weight = self.weight
        else:
            w = (w * input_scale[:, None, None]).to(dtype)
            keep(self, "back_weight", w.contiguous(memory_format=NHWC))
        for back, packed in self.packed.items():
            packed.refold(self.back_weight if back else self.weight)

    def resolve(self, backend: str, device: torch.device, dtype: torch.dtype) -> None:
        if backend != "auto" or device.type != "cuda":  # there the size of the images decides
            for name in ("conv_forward", "conv_input_grad"):
                OPS[name].resolve(backend, device.type, self.weight.dtype)
        super().resolve(backend, device, dtype)
        self.backend = backend
        self.packed = vars(self).get("packed", {})  # a copy packs anew
        self.calls: dict[tuple[int, ...], Calls] = {}  # by the size of an image

    def _resolve(self, size: torch.Size) -> Calls:
        conv, out = geometry("conv_forward", self.weight, size, *self.conv)
        forward, input_grad = (
            resolve(name, self.backend, self.weight, size, *conv)
            for name in ("conv_forward", "conv_input_grad")
        )
        if packed := self._pack(back=False):
            forward = packed.forward
        if packed := self._pack(back=True):
            input_grad = packed.input_grad
        calls = self.calls[size[1:]] = Calls(forward, input_grad, tuple(out[1:]))
        return calls

    def _pack(self, back: bool) -> PackedConv | MatrixConv | None:
        """This direction on packed weights, where that is the faster way."""
        if self.backend not in ("auto", "cpu") or self.fp8:
            return None
        packed, level = self.packed.get(back), native.cpu_level()
        if matrix.chosen(self.weight, self.conv[3], back):
            if isinstance(packed, MatrixConv):
                return packed
            packed = MatrixConv(back)
        elif family := chosen(self.weight, *self.conv, back):
            if isinstance(packed, PackedConv) and (packed.family, packed.level) == (family, level):
                return packed
            packed = PackedConv(family, back)
        else:
            self.packed.pop(back, None)
            return None
        packed.refold(self.back_weight if back else self.weight)
        self.packed[back] = packed
        return packed

    def _quantised(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The values that are multiplied with the weights, and the scale of the products."""
        x, scale = quantised(x)
        return x, scale * self.weight_scale

    def forward(
        self, tape: Tape, x: torch.Tensor, residual: torch.Tensor | None = None
    ) -> torch.Tensor:
        size = tape.sizes[self.inputs[0]] = x.shape
        calls = self.calls.get(size[1:]) or self._resolve(size)
        x, scale = self._quantised(x) if self.fp8 else (x, None)
        if residual is not None and residual.shape[1:] != calls.out:
            return self._broadcast(tape, calls, x, residual, scale)
        y, mask = calls.forward(
            x, self.weight, self.bias, residual, *self.conv, self.relu, self.relu, scale
        )
        if self.relu:
            tape.masks[self.out] = mask
        return y

    def _broadcast(self, tape, calls, x, residual, scale):
        """A sum in which the residual, or the convolution's result, is spread over the other."""
        y, _ = calls.forward(x, self.weight, self.bias, None, *self.conv, False, False, scale)
        tape.kept[self.out] = y.shape
        tape.sizes[self.inputs[1]] = residual.shape
        y, residual = spread(y, residual)
        return self.finish(tape, y.clone(memory_format=NHWC), None, residual)

    def backward(self, tape: Tape, grad: torch.Tensor, owned: bool, gradients: Gradients) -> None:
        whole, first = grad, self.inputs[0]
        if self.out in tape.kept:
            grad = gather(whole, tape.kept[self.out])
        grad, scale = self._quantised(grad) if self.fp8 else (grad, None)
        size = tape.sizes[first]
        addend, mask = gradients.due(first)
        part = self.calls[size[1:]].input_grad(
            grad, self.back_weight, addend, mask, size, *self.conv, scale
        )
        gradients.sums[first] = part, True
        if len(self.inputs) == 2:
            apart = self.out in tape.kept
            gradients.add(
                self.inputs[1],
                gather(whole, tape.sizes[self.inputs[1]]) if apart else whole,
                owned and not apart,
            )
