import torch
import torch.nn.functional as F

from .conv_epilogue import conv_epilogue_, conv_grad_epilogue_, finished, finished_grad, mask_bytes
from .projected_step import projected_step_

NHWC, FP8 = torch.channels_last, torch.float8_e4m3fn


def convolve(x, weight, stride, padding, dilation, groups):
    """The convolution alone, by PyTorch's library: channels-last [B, K, P, Q]. bfloat16 on a CPU is
    computed in float32, because oneDNN has wrong results of one column (`dispatch/library.py`).
    """
    dtype = x.dtype
    if dtype == torch.bfloat16 and x.device.type == "cpu":
        x, weight = x.float(), weight.float()
    y = F.conv2d(x, weight, None, stride, padding, dilation, groups)
    return y.to(dtype).contiguous(memory_format=NHWC)


def convolve_back(grad, weight, size, stride, padding, dilation, groups):
    """Its gradient with respect to the input [B, C, H, W] of `size`: channels-last. The input's
    values take no part in it.
    """
    x = torch.empty(size, dtype=grad.dtype, device=grad.device, memory_format=NHWC)
    back = torch.ops.aten.convolution_backward
    grads = back(
        grad,
        x,
        weight,
        None,
        stride,
        padding,
        dilation,
        False,
        [0, 0],
        groups,
        [True, False, False],
    )
    return grads[0].contiguous(memory_format=NHWC)


def result_dtype(operand):
    """Products of e4m3 values leave as bfloat16."""
    return torch.bfloat16 if operand.dtype == FP8 else operand.dtype


def widened(tensor):
    return tensor.float() if tensor.dtype == FP8 else tensor


def conv_forward(
    x, weight, bias, residual, stride, padding, dilation, groups, relu, want_mask, scale=None
):
    y = convolve(widened(x), widened(weight), stride, padding, dilation, groups)
    mask = torch.empty(
        mask_bytes(y.numel()) if want_mask else 0, dtype=torch.uint8, device=y.device
    )
    if scale is None:
        conv_epilogue_(y, bias, residual, relu, mask if want_mask else None)
    else:
        y = finished(y * scale, result_dtype(x), bias, residual, relu, mask if want_mask else None)
    return y, mask


def conv_input_grad(
    grad, weight, addend, mask, size, stride, padding, dilation, groups, scale=None
):
    out = convolve_back(widened(grad), widened(weight), size, stride, padding, dilation, groups)
    if scale is not None:
        return finished_grad(out * scale, result_dtype(grad), addend, mask)
    conv_grad_epilogue_(out, addend, mask)
    return out


def conv_input_grad_step_(
    delta,
    index,
    grad,
    weight,
    images,
    flip,
    stride,
    padding,
    dilation,
    groups,
    alpha,
    eps,
    nonfinite,
):
    size = [len(grad), *images.shape[1:]]
    image_grad = conv_input_grad(grad, weight, None, None, size, stride, padding, dilation, groups)
    projected_step_(delta, index, image_grad, images, flip, alpha, eps, nonfinite)
