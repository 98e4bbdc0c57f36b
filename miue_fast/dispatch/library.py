"""The convolutions of PyTorch's libraries (oneDNN, cuDNN), with channels-last results. The backends
`cpu` and `cuda` build on them.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F

NHWC = torch.channels_last
_BACK = torch.ops.aten.convolution_backward.default
_INPUT_ONLY = [True, False, False]  # of the gradients for the input, the weight and the bias


def convolve(
    x: torch.Tensor,
    weight: torch.Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> torch.Tensor:
    """The convolution [B, K, P, Q] of x [B, C, H, W] and weight [K, C / groups, R, S]."""
    return F.conv2d(x, weight, None, stride, padding, dilation, groups).contiguous(
        memory_format=NHWC
    )


def convolve_back(
    grad: torch.Tensor,
    weight: torch.Tensor,
    size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> torch.Tensor:
    """The gradient of `convolve` with respect to its input of `size` [B, C, H, W].

    PyTorch asks for the input, whose values take no part in this: it gets memory without values.
    """
    x = torch.empty(size, dtype=grad.dtype, device=grad.device, memory_format=NHWC)
    conv = stride, padding, dilation, False, [0, 0], groups
    return _BACK(grad, x, weight, None, *conv, _INPUT_ONLY)[0].contiguous(memory_format=NHWC)
