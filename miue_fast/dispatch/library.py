"""The convolutions of PyTorch's libraries (oneDNN, cuDNN), with channels-last results. The backends
`cpu` and `cuda` build on them.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F

NHWC = torch.channels_last
_BACK = torch.ops.aten.convolution_backward.default
# of the gradients for the input, the weight and the bias
_INPUT_ONLY, _WEIGHT_ONLY = [True, False, False], [False, True, False]


def out_size(
    size: Sequence[int],
    weight: torch.Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
) -> list[int]:
    """The size [B, K, P, Q] of the convolution of [B, C, H, W] with this weight."""
    (b, _, h, w), (k, _, r, s) = size, weight.shape
    return [
        b,
        k,
        (h + 2 * padding[0] - dilation[0] * (r - 1) - 1) // stride[0] + 1,
        (w + 2 * padding[1] - dilation[1] * (s - 1) - 1) // stride[1] + 1,
    ]


def one_column(weight: torch.Tensor, stride: Sequence[int], columns: int) -> bool:
    """Whether results of one column come from several columns with a stride. oneDNN (PyTorch 2.13)
    computes those, and the weight gradient, wrongly in bfloat16 on a processor with AMX, as
    `make fuzz` found. They are small enough to be computed in float32.

    Args: weight: [K, C / groups, R, S]. columns: of the result.
    """
    return columns == 1 and stride[1] > 1 and weight.shape[3] > 1


def convolve(
    x: torch.Tensor,
    weight: torch.Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> torch.Tensor:
    """The convolution [B, K, P, Q] of x [B, C, H, W] and weight [K, C / groups, R, S]."""
    dtype = weight.dtype
    if (
        dtype == torch.bfloat16
        and weight.device.type == "cpu"
        and one_column(weight, stride, out_size(x.shape, weight, stride, padding, dilation)[3])
    ):
        x, weight = x.float(), weight.float()
    y = F.conv2d(x, weight, None, stride, padding, dilation, groups)
    return y.to(dtype).contiguous(memory_format=NHWC)


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


def convolve_weight_grad(
    grad: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> torch.Tensor:
    """The gradient of `convolve` with respect to its weight, of which the sizes count."""
    dtype = weight.dtype
    if dtype == torch.bfloat16 and one_column(weight, stride, grad.shape[3]):
        grad, x, weight = grad.float(), x.float(), weight.float()
    conv = stride, padding, dilation, False, [0, 0], groups
    return _BACK(grad, x, weight, None, *conv, _WEIGHT_ONLY)[1].to(dtype)
