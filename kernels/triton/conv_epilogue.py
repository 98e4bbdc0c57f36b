"""What follows a convolution and its input gradient, in place; and the ReLU's bits as 16-bit words,
for these kernels and the convolutions.

Bit j of word i belongs to value 16 i + j of the tensor in NHWC order. Channels in multiples of 16:
a word never crosses a pixel."""

import torch
import triton
import triton.language as tl

from ._common import on_device_of

WARPS = 4
WORDS = 2 * 32 * WARPS // 4  # 16-bit words of one program: 8 values per thread
OPTIONS = {"num_warps": WARPS, "enable_fp_fusion": False}


def mask_bytes(count):
    return triton.cdiv(count, 64) * 8


@triton.jit
def to_words(keep, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """[ROWS, COLUMNS] of booleans -> [ROWS, COLUMNS / 16] of words."""
    bits = (
        tl.reshape(keep, (ROWS, COLUMNS // 16, 16)).to(tl.int32) << tl.arange(0, 16)[None, None, :]
    )
    return tl.sum(bits, 2).to(tl.int16)


@triton.jit
def from_words(words, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """The inverse of `to_words`."""
    bits = (words.to(tl.int32)[:, :, None] >> tl.arange(0, 16)[None, None, :]) & 1
    return tl.reshape(bits, (ROWS, COLUMNS)) != 0


@triton.jit
def _forward_kernel(
    y, bias, residual, mask, count, words, C: tl.constexpr, RELU: tl.constexpr, WORDS: tl.constexpr
):
    first = tl.program_id(0).to(tl.int64) * WORDS
    word = first + tl.arange(0, WORDS)
    within = tl.arange(0, WORDS)[:, None] * 16 + tl.arange(0, 16)[None, :]
    i = first * 16 + within
    live = i < count
    v = tl.load(y + i, mask=live, other=0).to(tl.float32)
    if bias is not None:
        v += tl.load(bias + ((first * 16 % C).to(tl.int32) + within) % C)
    if residual is not None:
        v += tl.load(residual + i, mask=live, other=0).to(tl.float32)
    v = v.to(y.dtype.element_ty)
    if RELU:
        v = tl.where(v <= 0, 0.0, v)
    tl.store(y + i, v, mask=live)
    if mask is not None:
        tl.store(
            mask + word[:, None],
            to_words(live & ~(v <= 0), WORDS, 16),
            mask=(word < words)[:, None],
        )


@triton.jit
def _grad_kernel(grad, addend, mask, count, WORDS: tl.constexpr):
    word = tl.program_id(0).to(tl.int64) * WORDS + tl.arange(0, WORDS)
    i = word[:, None] * 16 + tl.arange(0, 16)[None, :]
    live = i < count
    g = tl.load(grad + i, mask=live, other=0)
    if addend is not None:
        g = (g.to(tl.float32) + tl.load(addend + i, mask=live, other=0).to(tl.float32)).to(g.dtype)
    if mask is not None:
        words = tl.load(mask + word, mask=word * 16 < count, other=0)
        g = tl.where(from_words(words[:, None], WORDS, 16), g, 0.0)
    tl.store(grad + i, g, mask=live)


def as_words(mask):
    return None if mask is None else mask.view(torch.int16)


def conv_epilogue_(y, bias, residual, relu, mask):
    words = mask_bytes(y.numel()) // 2
    if words:
        with on_device_of(y):
            _forward_kernel[(triton.cdiv(words, WORDS),)](
                y,
                bias,
                residual,
                as_words(mask),
                y.numel(),
                words,
                C=y.shape[1],
                RELU=relu,
                WORDS=WORDS,
                **OPTIONS,
            )


def conv_grad_epilogue_(grad, addend, mask):
    words = triton.cdiv(grad.numel(), 16)
    if words:
        with on_device_of(grad):
            _grad_kernel[(triton.cdiv(words, WORDS),)](
                grad, addend, as_words(mask), grad.numel(), WORDS=WORDS, **OPTIONS
            )
