"""Batch norm in training with this library's kernel: statistics in one pass and the result in
another, and a gradient that takes the following in-place ReLU with it.
"""

import weakref
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from ..dispatch import native
from ..dispatch.library import NHWC

# Below so many values a call costs more than the kernel saves.
WORTH = 1 << 17
LANES = 16  # channels come in whole vectors of every instruction level


class Normalised:
    """The result of one call of batch norm, whose ReLU the next call may be.

    result: a weak reference to the result. of_relu: in the backward pass, the gradient that the
    ReLU has given on as it came, because that of batch norm sets its zeros; else None.
    """

    def __init__(self) -> None:
        self.result: Any = None
        self.of_relu: torch.Tensor | None = None


def takes(
    x: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    training: bool,
    momentum: float | None,
) -> bool:
    """Whether `normalise` takes these arguments of `torch.nn.functional.batch_norm`."""
    return (
        training
        and momentum is not None
        and x.dim() == 4
        and x.numel() >= WORTH
        and x.dtype in (torch.float32, torch.bfloat16)
        and x.shape[1] % LANES == 0
        and x.numel() > x.shape[1]
        and x.is_contiguous(memory_format=NHWC)
        and all(p is None or p.dtype == torch.float32 for p in (weight, bias))
    )


def normalise(
    x: torch.Tensor,
    running_mean: torch.Tensor | None,
    running_var: torch.Tensor | None,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    momentum: float,
    eps: float,
) -> tuple[torch.Tensor, Normalised]:
    """`torch.nn.functional.batch_norm` in training of an x [B, C, H, W] that `takes` takes, and
    what `relu` needs. The running statistics are updated in place.
    """
    made = Normalised()
    y, mean, variance = _BatchNorm.apply(x, weight, bias, eps, made)
    rows = x.numel() // x.shape[1]
    if running_mean is not None:
        running_mean.lerp_(mean.to(running_mean.dtype), momentum)
    if running_var is not None:
        corrected = variance * (rows / (rows - 1))
        running_var.lerp_(corrected.to(running_var.dtype), momentum)
    made.result = weakref.ref(y)
    return y, made


def relu(made: Normalised) -> torch.Tensor:
    """ReLU in place of the result that `made` knows, which nothing else has used."""
    return _Relu.apply(made.result(), made)


class _BatchNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, eps, made):
        y, mean, variance, inverse = native.batch_norm(x, weight, bias, eps)
        ctx.save_for_backward(x, weight, bias, mean, inverse)
        ctx.made = made
        ctx.mark_non_differentiable(mean, variance)
        return y, mean, variance

    @staticmethod
    @once_differentiable
    def backward(ctx, *grads):
        x, weight, bias, mean, inverse = ctx.saved_tensors
        of_relu, ctx.made.of_relu = ctx.made.of_relu, None
        grad, masked = grads[0], of_relu is not None
        if masked and grad.data_ptr() != of_relu.data_ptr():
            # An autograd function that no mode sees has used the result before its ReLU.
            off = _result(x, weight, bias, mean, inverse) <= 0
            grad, masked = grad - of_relu * off, False
        grad = grad.to(x.dtype).contiguous(memory_format=NHWC)
        found = native.batch_norm_grad(grad, x, weight, bias, mean, inverse, masked)
        return *(g if need else None for g, need in zip(found, ctx.needs_input_grad)), None, None


class _Relu(torch.autograd.Function):
    @staticmethod
    def forward(ctx, y, made):
        ctx.mark_dirty(y)
        ctx.made = made
        return y.clamp_min_(0)

    @staticmethod
    @once_differentiable
    def backward(ctx, *grads):
        ctx.made.of_relu = grads[0]
        return grads[0], None


def _result(x, weight, bias, mean, inverse):
    """The result of batch norm, in float32."""
    scale = inverse if weight is None else inverse * weight
    y = (x.float() - mean[:, None, None]) * scale[:, None, None]
    return y if bias is None else y + bias[:, None, None]
