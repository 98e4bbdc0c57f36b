"""Training on the CPU with this library's convolutions and batch norm, without a change to the
network: inside `packed_training`, float32 convolutions that `packed.worth` names run on packed
weights, and under bfloat16 autocast those that `matrix.worth` names run on matrix tiles, their
weight gradients too; batch norm that `batch_norm.takes` names runs with the ReLU behind it.
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
from ..dispatch.library import convolve, convolve_back, convolve_weight_grad, one_column, out_size
from . import batch_norm, matrix
from .matrix import MatrixConv
from .packed import NHWC, PackedConv, chosen

_WAYS = (False, True)  # the convolution, and its input gradient
WIDE = 128  # channels on both sides of a network's widest convolutions


def packed_training(
    network: nn.Module, backend: str, device: torch.device, dtype: str = "float32"
) -> contextlib.AbstractContextManager:
    """A context in which this thread's `torch.nn.functional.conv2d` takes packed weights where that
    is faster, and `batch_norm` this library's kernel, for the training of `network`. It changes
    nothing on a GPU, without the C++ kernels, with another backend than "auto" and "cpu", or for a
    network without convolutions of WIDE channels: there packing after each step costs more than it
    gains. With dtype "bfloat16", for training under autocast, a narrow network gets right what the
    library computes wrongly, too.

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
        self.normalised: batch_norm.Normalised | None = None  # by the last call
        self.weights: Any = WeakIdKeyDictionary()

    def __torch_function__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        last, self.normalised = self.normalised, None
        if func is F.batch_norm and self.wide:
            return self._batch_norm(*args, **(kwargs or {}))
        if last is not None and _is_relu_of(last, func, args, kwargs):
            return batch_norm.relu(last)
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
        half = torch.is_autocast_enabled("cpu")
        if half and torch.get_autocast_dtype("cpu") != torch.bfloat16:
            return None
        if (not half and input.dtype != torch.float32) or input.shape[1] != groups * weight.shape[
            1
        ]:
            return None
        must = half and one_column(weight, conv[0], out_size(input.shape, weight, *conv)[3])
        if not (must or self.wide):
            return None
        used = weight.detach()
        used = used.to(torch.bfloat16, memory_format=NHWC) if half else used
        forms = self._forms(weight, used, conv, groups)
        if not (must or any(forms)):
            return None
        return _Convolution.apply(input.to(used.dtype), weight, bias, used, (*conv, groups), forms)

    def _batch_norm(
        self,
        input,
        running_mean,
        running_var,
        weight=None,
        bias=None,
        training=False,
        momentum=0.1,
        eps=1e-5,
    ) -> torch.Tensor:
        if not batch_norm.takes(input, weight, bias, training, momentum):
            rest = running_mean, running_var, weight, bias, training, momentum, eps
            return F.batch_norm(input, *rest)
        y, self.normalised = batch_norm.normalise(
            input, running_mean, running_var, weight, bias, momentum, eps
        )
        return y

    def _forms(self, weight, used, conv, groups):
        """This library's forms of the convolution and of its input gradient; None: PyTorch's."""
        if used.dtype == torch.bfloat16:
            wanted = [MatrixConv.family if matrix.chosen(used, groups, b) else None for b in _WAYS]
        else:
            wanted = [chosen(used, *conv, groups, back) for back in _WAYS]
        forms = self.weights.get(weight)
        if forms is None or [form and form.family for form in forms] != wanted:
            forms = self.weights[weight] = [
                family and (MatrixConv(b) if family == MatrixConv.family else PackedConv(family, b))
                for b, family in zip(_WAYS, wanted)
            ]
        return forms


def _is_relu_of(made, func, args, kwargs):
    """Whether a call is the in-place ReLU of the result of batch norm that the call before made."""
    if not args or args[0] is not made.result():
        return False
    if func is F.relu:
        inplace = args[1:] == (True,) or kwargs == {"inplace": True}
        return inplace and args[0].requires_grad
    return func in (torch.relu_, torch.Tensor.relu_) and args[0].requires_grad


class _Convolution(torch.autograd.Function):
    """used: the weight's values in the type that the convolution computes in. forms: of `_Packed`,
    packed anew at every use.
    """

    @staticmethod
    def forward(ctx, x, weight, bias, used, conv, forms):
        x = x.contiguous(memory_format=NHWC)
        ctx.save_for_backward(x, used)
        packed, ctx.back = forms
        ctx.conv, ctx.biased = conv, bias is not None
        if packed is None:
            with torch.autocast("cpu", enabled=False):
                y = convolve(x, used, *conv)
            return y if bias is None else y.add_(bias[:, None, None])
        packed.refold(used)
        return packed.forward(x, used, bias, None, *conv, relu=False, want_mask=False)[0]

    @staticmethod
    @once_differentiable
    def backward(ctx, *grads):
        (x, used), grad = ctx.saved_tensors, grads[0].contiguous(memory_format=NHWC)
        grad_x = grad_weight = grad_bias = None
        if ctx.needs_input_grad[0]:
            if ctx.back is None:
                grad_x = convolve_back(grad, used, x.shape, *ctx.conv)
            else:
                ctx.back.refold(used)
                grad_x = ctx.back.input_grad(grad, used, None, None, x.shape, *ctx.conv)
        if ctx.needs_input_grad[1]:
            grad_weight = _weight_grad(x, used, grad, ctx.conv)
        if ctx.biased and ctx.needs_input_grad[2]:
            grad_bias = grad.sum((0, 2, 3), dtype=torch.float32)
        return grad_x, grad_weight, grad_bias, None, None, None


def _weight_grad(x, used, grad, conv):
    """float32, as the weight is: on matrix tiles, or by Winograd's transforms for 3x3 taps at
    stride 1 from 32 channels on; else the library's.
    """
    stride, groups = conv[0], conv[3]
    results, channels, *taps = used.shape
    if matrix.takes(used, groups):
        if matrix.worth_weight_grad(channels, results, taps[0] * taps[1]):
            return native.matrix_weight_grad(x, grad, taps, conv[:3])
    elif (
        used.dtype == torch.float32
        and (stride, taps, groups) == ((1, 1), [3, 3], 1)
        and min(channels, results) >= 32
    ):
        return native.conv_weight_grad(x, grad)
    return convolve_weight_grad(grad, x, used, *conv).float()
