"""What the kernels share: the device guard of every launcher and two exact device functions."""

from contextlib import nullcontext

import torch
import triton
import triton.language as tl


def on_device_of(tensor):
    """Triton launches on the current device; make it the tensor's."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()


def capability(tensor):
    """Of the GPU; the interpreter stands in for a Hopper."""
    return torch.cuda.get_device_capability(tensor.device) if tensor.is_cuda else (9, 0)


def large_blocks(tensor):
    """Whether the GPU has wgmma or its successor, TMA and 227 KB of shared memory for a block:
    sm_90, sm_100, sm_103.
    """
    return capability(tensor)[0] in (9, 10)


@triton.jit
def log(x):
    """ln(x) of 0 and of normal x > 0 to about one ulp; the hardware's lg2 has only an absolute
    error bound near 1.
    """
    bits = x.to(tl.int32, bitcast=True)
    exponent = (bits - 0x3F3504F3) >> 23  # x = m * 2^exponent, m in [sqrt(1/2), sqrt(2))
    m = (bits - (exponent << 23)).to(tl.float32, bitcast=True)
    y = tl.div_rn(m - 1, m + 1)
    z = y * y
    series = z * (1 / 3 + z * (1 / 5 + z * (1 / 7 + z * (1 / 9 + z * (1 / 11)))))
    value = exponent.to(tl.float32) * 0.6931471805599453 + 2 * (y + y * series)
    special = (x == 0) | (x != x) | (x == float("inf"))
    return tl.where(special, tl.where(x == 0, float("-inf"), x), value)


@triton.jit
def log1p(x):
    """ln(1 + x) of x >= 0; the factor restores what 1 + x rounded away."""
    w = 1 + x
    factor = tl.where(x > 1e8, 1.0, tl.div_rn(x, w - 1))
    return tl.where(w == 1, x, log(w) * factor)


@triton.jit
def power_of_two_over(x, EXPONENT: tl.constexpr):
    """The power of two p with x * p in [2^EXPONENT, 2^(EXPONENT + 1)), for x from 2^(EXPONENT -
    100) up.
    """
    field = tl.maximum((x.to(tl.int32, bitcast=True) >> 23) & 255, 27 + EXPONENT)
    return ((254 + EXPONENT - field) << 23).to(tl.float32, bitcast=True)
