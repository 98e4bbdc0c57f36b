"""Training on the CPU with this library's convolutions, without a change to the network: inside
`packed_training`, float32 convolutions that `packed.worth` names run on packed weights, their
weight gradients too. Everything else is PyTorch's.
"""

import contextlib
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.function import once_differentiable
from torch.overrides import TorchFunctionMode
from torch.utils.weak import WeakIdKeyDictionary

from ..dispatch import native
from ..dispatch.library import convolve, convolve_back
from .packed import NHWC, PackedConv, chosen

WIDE = 128  # channels on both sides of a network's widest convolutions
_WEIGHT_ONLY = [False, True, False]  # of the gradients for the input, the weight and the bias


def packed_training(
    network: nn.Module, backend: str, device: torch.device
) -> contextlib.AbstractContextManager:
    """A context in which this thread's `torch.nn.functional.conv2d` takes packed weights where that
    is faster, for the training of `network`. It changes nothing on a GPU, without the C++ kernels,
    with another backend than "auto" and "cpu", or for a network without convolutions of WIDE
    channels: there packing after each step costs more than it gains.

    The results are deterministic: the same bits for any number of threads on one instruction level.
    They differ from PyTorch's by roundings. A gradient can be taken once: the derivative of a
    gradient raises RuntimeError.
    """
    wide = any(
        isinstance(module, nn.Conv2d) and min(module.weight.shape[:2]) >= WIDE
        for module in network.modules()
    )
    if not wide or backend not in ("auto", "cpu") or device.type != "cpu" or native.cpu_missing():
        return contextlib.nullcontext()
    return _Packed()


class _Packed(TorchFunctionMode):
    """weights: parameter -> its packed forms (of the convolution, of its input gradient), whose
    memory is taken again; a form is packed at every use, because what changes a parameter through
    `.data` leaves no trace.
    """

    def __init__(self) -> None:
        super().__init__()
        self.weights: Any = WeakIdKeyDictionary()

    def __torch_function__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is F.conv2d and (found := self._convolution(*args, **(kwargs or {}))) is not None:
            return found
        return func(*args, **(kwargs or {}))

    def _convolution(
        self, input, weight, bias=None, stride=1, padding=0, dilation=1, groups=1
    ) -> torch.Tensor | None:
        """None where PyTorch's is taken."""
        if input.dim() != 4 or input.dtype != torch.float32 or isinstance(padding, str):
            return None
        if not input.numel() or torch.is_autocast_enabled("cpu"):
            return None
        conv = tuple(
            tuple(v) if isinstance(v, Sequence) else (v, v) for v in (stride, padding, dilation)
        )
        families = [chosen(weight, *conv, groups, back) for back in (False, True)]
        if not any(families) or input.shape[1] != weight.shape[1]:
            return None
        forms = self.weights.get(weight)
        if forms is None or [form and form.family for form in forms] != families:
            forms = self.weights[weight] = [
                family and PackedConv(family, back) for back, family in zip((False, True), families)
            ]
        return _Convolution.apply(input, weight, bias, conv, forms)


class _Convolution(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, conv, forms):
        x = x.contiguous(memory_format=NHWC)
        ctx.save_for_backward(x, weight)
        stride, padding, dilation = conv
        ctx.conv, ctx.back, ctx.biased = (*conv, 1), forms[1], bias is not None
        packed = forms[0]
        if packed is None:
            y = convolve(x, weight, stride, padding, dilation, 1)
            return y if bias is None else y.add_(bias[:, None, None])
        packed.refold(weight)
        return packed.forward(x, weight, bias, None, *ctx.conv, False, False)[0]

    @staticmethod
    @once_differentiable
    def backward(ctx, *grads):
        (x, weight), grad = ctx.saved_tensors, grads[0].contiguous(memory_format=NHWC)
        grad_x = grad_weight = grad_bias = None
        if ctx.needs_input_grad[0]:
            if ctx.back is None:
                grad_x = convolve_back(grad, weight, x.shape, *ctx.conv)
            else:
                ctx.back.refold(weight)
                grad_x = ctx.back.input_grad(grad, weight, None, None, x.shape, *ctx.conv)
        if ctx.needs_input_grad[1]:
            grad_weight = _weight_grad(x, weight, grad, ctx.conv)
        if ctx.biased and ctx.needs_input_grad[2]:
            grad_bias = grad.sum((0, 2, 3))
        return grad_x, grad_weight, grad_bias, None, None


def _weight_grad(x, weight, grad, conv):
    """Winograd's weight gradient from 32 channels on, at stride 1; else the library's."""
    stride, padding, dilation, groups = conv
    if stride == (1, 1) and weight.shape[2:] == (3, 3) and min(weight.shape[:2]) >= 32:
        return native.conv_weight_grad(x, grad)
    return torch.ops.aten.convolution_backward(
        grad, x, weight, None, stride, padding, dilation, False, [0, 0], groups, _WEIGHT_ONLY
    )[1]
