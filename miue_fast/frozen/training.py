"""Training on the CPU with this library's convolutions, without a change to the network: inside
`packed_training`, float32 convolutions that `packed.worth` names run on packed weights, and under
bfloat16 autocast those that `matrix.worth` names run on matrix tiles, their weight gradients too.
Everything else is PyTorch's.
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
from ..dispatch.library import columns_of, convolve, convolve_back, convolve_weight_grad, one_column
from . import matrix
from .matrix import MatrixConv
from .packed import NHWC, PackedConv, chosen

WIDE = 128  # channels on both sides of a network's widest convolutions


def packed_training(
    network: nn.Module, backend: str, device: torch.device, dtype: str = "float32"
) -> contextlib.AbstractContextManager:
    """A context in which this thread's `torch.nn.functional.conv2d` takes packed weights where that
    is faster, for the training of `network`. It changes nothing on a GPU, without the C++ kernels,
    with another backend than "auto" and "cpu", or for a network without convolutions of WIDE
    channels: there packing after each step costs more than it gains. With dtype "bfloat16", for
    training under autocast, a narrow network gets right what the library computes wrongly, too.

    The results are deterministic: the same bits for any number of threads on one instruction level.
    They differ from PyTorch's by roundings. A gradient can be taken once: the derivative of a
    gradient raises RuntimeError.
    """
    wide = any(
        isinstance(module, nn.Conv2d) and min(module.weight.shape[:2]) >= WIDE
        for module in network.modules()
    )
    if backend not in ("auto", "cpu") or device.type != "cpu" or native.cpu_missing():
        return contextlib.nullcontext()
    return _Packed(wide) if wide or dtype == "bfloat16" else contextlib.nullcontext()


class _Packed(TorchFunctionMode):
    """weights: parameter -> its packed forms (of the convolution, of its input gradient), whose
    memory is taken again; a form is packed at every use, because what changes a parameter through
    `.data` leaves no trace. wide: whether that is worth its while; else only what the library
    computes wrongly is computed here.
    """

    def __init__(self, wide: bool) -> None:
        super().__init__()
        self.wide = wide
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
        if input.dim() != 4 or not input.numel() or isinstance(padding, str):
            return None
        conv = tuple(
            tuple(v) if isinstance(v, Sequence) else (v, v) for v in (stride, padding, dilation)
        )
        if torch.is_autocast_enabled("cpu"):
            return self._in_bfloat16(input, weight, bias, conv, groups)
        if input.dtype != torch.float32 or not self.wide:
            return None
        families = [chosen(weight, *conv, groups, back) for back in (False, True)]
        if not any(families) or input.shape[1] != groups * weight.shape[1]:
            return None
        forms = self.weights.get(weight)
        if forms is None or [form and form.family for form in forms] != families:
            forms = self.weights[weight] = [
                family and PackedConv(family, back) for back, family in zip((False, True), families)
            ]
        return _Convolution.apply(input, weight, bias, conv, forms)

    def _in_bfloat16(self, input, weight, bias, conv, groups):
        if (
            torch.get_autocast_dtype("cpu") != torch.bfloat16
            or input.shape[1] != groups * weight.shape[1]
        ):
            return None
        if not self.wide and not one_column(weight, conv[0], columns_of(input, weight, *conv)):
            return None
        half = weight.detach().to(torch.bfloat16, memory_format=NHWC)
        return _MatrixConvolution.apply(
            input.to(torch.bfloat16), weight, bias, half, (*conv, groups)
        )


class _MatrixConvolution(torch.autograd.Function):
    """half: the weight's values in bfloat16."""

    @staticmethod
    def forward(ctx, x, weight, bias, half, conv):
        x = x.contiguous(memory_format=NHWC)
        ctx.save_for_backward(x, half)
        ctx.conv, ctx.biased = conv, bias is not None
        if not matrix.chosen(half, conv[3], back=False):
            with torch.autocast("cpu", enabled=False):
                y = convolve(x, half, *conv)
            return y if bias is None else y.add_(bias[:, None, None])
        packed = MatrixConv(False)
        packed.refold(half)
        return packed.forward(x, half, bias, None, *conv, relu=False, want_mask=False)[0]

    @staticmethod
    @once_differentiable
    def backward(ctx, *grads):
        (x, half), grad = ctx.saved_tensors, grads[0].contiguous(memory_format=NHWC)
        grad_x = grad_weight = grad_bias = None
        if ctx.needs_input_grad[0]:
            if matrix.chosen(half, ctx.conv[3], back=True):
                packed = MatrixConv(True)
                packed.refold(half)
                grad_x = packed.input_grad(grad, half, None, None, x.shape, *ctx.conv)
            else:
                grad_x = convolve_back(grad, half, x.shape, *ctx.conv)
        if ctx.needs_input_grad[1]:
            results, channels, *taps = half.shape
            if ctx.conv[3] == 1 and matrix.worth_weight_grad(channels, results, taps[0] * taps[1]):
                grad_weight = native.matrix_weight_grad(x, grad, taps, ctx.conv[:3])
            else:
                grad_weight = convolve_weight_grad(grad, x, half, *ctx.conv).float()
        if ctx.biased and ctx.needs_input_grad[2]:
            grad_bias = grad.sum((0, 2, 3), dtype=torch.float32)
        return grad_x, grad_weight, grad_bias, None, None


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
    return convolve_weight_grad(grad, x, weight, stride, padding, dilation, groups)
