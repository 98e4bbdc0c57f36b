"""The fused layers of a FrozenNet other than convolutions: what each computes, what it keeps for
its input gradient, and that gradient.
"""

from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from ..support.messages import fail
from .base import NHWC, Gradients, Layer, Tape, dense, gather, keep, scale_and_shift, spread, wide

_AVG_POOL_BACK = torch.ops.aten.avg_pool2d_backward.default
_ADAPTIVE_BACK = torch.ops.aten._adaptive_avg_pool2d_backward.default
_MAX_POOL_BACK = torch.ops.aten.max_pool2d_with_indices_backward.default


@dataclass(eq=False, kw_only=True)
class Linear(Layer):
    """relu(inputs[0] W^T * scale + shift), [B, D]. norms: (scale, shift) per output."""

    module: nn.Linear
    norms: list[Any] = field(default_factory=list)
    weight: torch.Tensor = field(init=False, repr=False)
    bias: torch.Tensor = field(init=False, repr=False)

    def __post_init__(self) -> None:
        self.shape = list(self.module.weight.shape)

    def refold(
        self, dtype: torch.dtype, device: torch.device, input_scale: torch.Tensor | None = None
    ) -> None:
        self.same("weights", self.shape, list(self.module.weight.shape))
        w = self.module.weight.detach().double()
        scale, shift = scale_and_shift(self.norms, len(w), w.device)
        if self.module.bias is not None:
            shift = shift + self.module.bias.detach().double() * scale
        keep(self, "weight", (w * scale[:, None]).to(dtype))
        keep(self, "bias", shift.to(wide(dtype)))

    def forward(self, tape: Tape, x: torch.Tensor) -> torch.Tensor:
        if x.dim() != 2 or x.shape[1] != self.weight.shape[1]:
            fail(
                "FrozenNet",
                "images",
                f"a size that gives {self.name} {self.weight.shape[1]} values per image",
                list(x.shape[1:]),
            )
        return self.finish(tape, F.linear(x, self.weight), self.bias)

    def backward(self, tape: Tape, grad: torch.Tensor, owned: bool, gradients: Gradients) -> None:
        gradients.add(self.inputs[0], grad @ self.weight, True)


@dataclass(eq=False)
class Affine(Layer):
    """relu(inputs[0] * scale + shift) per channel: a batch norm that no convolution comes before.

    channels: 1 where one number counts for all. constant: whether training leaves the numbers as
    they are.
    """

    norms: list[Any] = field(default_factory=list)
    channels: int = 1
    constant: bool = False
    scale: torch.Tensor = field(init=False, repr=False)
    shift: torch.Tensor = field(init=False, repr=False)

    def refold(
        self, dtype: torch.dtype, device: torch.device, input_scale: torch.Tensor | None = None
    ) -> None:
        pair = scale_and_shift(self.norms, self.channels, device)
        scale, shift = (v[:, None, None].to(wide(dtype)) for v in pair)
        keep(self, "scale", scale)
        keep(self, "shift", shift)

    def forward(self, tape: Tape, x: torch.Tensor) -> torch.Tensor:
        flat = x.dim() == 2
        scale, shift = (v.flatten() if flat else v for v in (self.scale, self.shift))
        y = dense(torch.addcmul(shift, x.to(scale.dtype), scale).to(x.dtype))
        tape.sizes[self.inputs[0]] = x.shape  # one channel may become several
        return self.finish(tape, y)

    def backward(self, tape: Tape, grad: torch.Tensor, owned: bool, gradients: Gradients) -> None:
        scale = self.scale.flatten() if grad.dim() == 2 else self.scale
        gradients.add(
            self.inputs[0], gather((grad * scale).to(grad.dtype), tape.sizes[self.inputs[0]]), True
        )


@dataclass(eq=False)
class Add(Layer):
    """relu(inputs[0] + inputs[1]) where no convolution takes the sum into its epilogue. With one
    input it is a ReLU of its own.
    """

    def forward(
        self, tape: Tape, x: torch.Tensor, other: torch.Tensor | None = None
    ) -> torch.Tensor:
        if other is not None and other.shape != x.shape:
            tape.kept[self.out] = x.shape, other.shape
            x, other = spread(x, other)
        layout = NHWC if x.dim() == 4 else torch.contiguous_format
        return self.finish(tape, x.clone(memory_format=layout), None, other)

    def backward(self, tape: Tape, grad: torch.Tensor, owned: bool, gradients: Gradients) -> None:
        shapes = tape.kept.get(self.out, [grad.shape] * len(self.inputs))
        for value, shape in zip(self.inputs, shapes):
            gradients.add(value, gather(grad, shape), owned and len(self.inputs) == 1)


@dataclass(eq=False)
class Concat(Layer):
    """The inputs one after the other along the channels."""

    def forward(self, tape: Tape, *parts: torch.Tensor) -> torch.Tensor:
        for value, part in zip(self.inputs, parts):
            tape.sizes[value] = part.shape
        return self.finish(tape, dense(torch.cat(parts, 1)))

    def backward(self, tape: Tape, grad: torch.Tensor, owned: bool, gradients: Gradients) -> None:
        start = 0
        for value in self.inputs:
            stop = start + tape.sizes[value][1]
            part = grad[:, start:stop].clone(
                memory_format=NHWC if grad.dim() == 4 else torch.contiguous_format
            )
            gradients.add(value, part, True)
            start = stop


@dataclass(eq=False)
class MaxPool(Layer):
    """Max pooling, which keeps the place of each maximum inside its window: one byte per result."""

    kernel: tuple[int, int] = (1, 1)
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (0, 0)
    ceil: bool = False

    def _corner(self, shape, width, device):
        """Index of each window's corner in its plane; it may lie outside, before the first
        pixel.
        """
        top, left = (
            torch.arange(n, device=device) * s - p
            for n, s, p in zip(shape[2:], self.stride, self.padding)
        )
        return top[:, None], left[None, :]

    def forward(self, tape: Tape, x: torch.Tensor) -> torch.Tensor:
        tape.sizes[self.inputs[0]] = x.shape
        y, index = F.max_pool2d(
            x, self.kernel, self.stride, self.padding, 1, self.ceil, return_indices=True
        )
        top, left = self._corner(y.shape, x.shape[3], x.device)
        place = (index // x.shape[3] - top) * self.kernel[1] + index % x.shape[3] - left
        tape.kept[self.out] = place.to(torch.uint8)
        return self.finish(tape, y.contiguous(memory_format=NHWC))

    def backward(self, tape: Tape, grad: torch.Tensor, owned: bool, gradients: Gradients) -> None:
        size, place = tape.sizes[self.inputs[0]], tape.kept[self.out].long()
        top, left = self._corner(grad.shape, size[3], grad.device)
        index = (place // self.kernel[1] + top) * size[3] + place % self.kernel[1] + left
        x = torch.empty(size, dtype=grad.dtype, device=grad.device, memory_format=NHWC)
        window = self.kernel, self.stride, self.padding, [1, 1], self.ceil
        gradients.add(self.inputs[0], dense(_MAX_POOL_BACK(grad, x, *window, index)), True)


@dataclass(eq=False)
class AvgPool(Layer):
    """Average pooling. With `kernel` None it is adaptive, to `stride` pixels."""

    kernel: tuple[int, int] | None = None
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (0, 0)
    ceil: bool = False
    count_padding: bool = True

    def forward(self, tape: Tape, x: torch.Tensor) -> torch.Tensor:
        tape.sizes[self.inputs[0]] = x.shape
        if self.kernel is None:
            y = F.adaptive_avg_pool2d(x, self.stride)
        else:
            y = F.avg_pool2d(
                x, self.kernel, self.stride, self.padding, self.ceil, self.count_padding
            )
        return self.finish(tape, dense(y))

    def backward(self, tape: Tape, grad: torch.Tensor, owned: bool, gradients: Gradients) -> None:
        size = tape.sizes[self.inputs[0]]
        if self.kernel is None and tuple(self.stride) == (1, 1):
            part = (grad / (size[2] * size[3])).expand(size)
        else:
            x = torch.empty(size, dtype=grad.dtype, device=grad.device, memory_format=NHWC)
            if self.kernel is None:
                part = _ADAPTIVE_BACK(grad, x)
            else:
                window = self.kernel, self.stride, self.padding, self.ceil, self.count_padding
                part = _AVG_POOL_BACK(grad, x, *window, None)
        gradients.add(self.inputs[0], dense(part), True)


@dataclass(eq=False)
class Flatten(Layer):
    """[B, C, H, W] as [B, C H W] in PyTorch's order. expected: how many values an image must have
    (-1: any number).
    """

    expected: int = -1

    def forward(self, tape: Tape, x: torch.Tensor) -> torch.Tensor:
        tape.sizes[self.inputs[0]] = x.shape
        y = x.flatten(1)
        if self.expected not in (-1, y.shape[1]):
            fail(
                "FrozenNet",
                "images",
                f"a size that gives {self.name} {self.expected} values per image",
                y.shape[1],
            )
        own = y.clone(memory_format=torch.contiguous_format) if self.relu else y.contiguous()
        return self.finish(tape, own)

    def backward(self, tape: Tape, grad: torch.Tensor, owned: bool, gradients: Gradients) -> None:
        gradients.add(self.inputs[0], dense(grad.view(tape.sizes[self.inputs[0]])), owned)
