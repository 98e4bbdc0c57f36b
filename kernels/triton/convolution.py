"""Frozen convolutions without im2col: out[channels, pixels] += weight[channels, k] @ input[pixels +
tap, k].T, tap by tap.

A tile of the input is one box of a tensor descriptor (TMA on sm_90, pointer arithmetic on sm_80):
[images, rows, columns, channels] at the tap's place, zero where it leaves the image. Stride 2 reads
and writes through the view [B, H / 2, 2, W / 2, 2 C]; its input gradient is four parity classes
with 1, 2, 2 and 4 taps. Weights lie as [K, R * R * C]. A stem has too few channels for a
descriptor: its input is gathered, and its gradient puts pixels on M and the columns (channel,
horizontal tap) on N, so that it reads `grad` once per row of taps.

Operands in e4m3 leave as bfloat16, multiplied with `scale`. wgmma takes 8-bit values only with the
reduction innermost, so that the input gradient's weights lie as [C, R * R * K] there.
"""

from functools import lru_cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from ._common import capability, large_blocks, on_device_of
from ._store import load_image, store_row
from .conv_epilogue import as_words, from_words, mask_bytes, to_words
from .projected_step import move, projected_step_

NHWC, FP8 = torch.channels_last, torch.float8_e4m3fn
STEM = 16  # a first layer has at most this many input channels
# Tiles: pixels, reduction step BK, warps and stages. No spills, and two blocks or more on a
# multiprocessor, where they are used:
LARGE = {  # by output channels; 16-bit values on GPUs with TMA and 227 KB of shared memory
    128: {"pixels": 128, "BK": 64, "num_warps": 8, "num_stages": 3},
    64: {"pixels": 256, "BK": 64, "num_warps": 8, "num_stages": 2},
}
SMALL = {
    "pixels": 64,
    "BK": 32,
    "num_warps": 4,
    "num_stages": 3,
}  # float32, other GPUs, channels that no large tile divides
STEM_TILE = {"BM": 64, "pixels": 128, "BK": 32, "num_warps": 8, "num_stages": 2}
STEM_GRAD = {  # by `_large`; the step that follows the products must round twice
    True: {"pixels": 128, "BK": 64, "num_warps": 4, "num_stages": 3, "enable_fp_fusion": False},
    False: {"pixels": 64, "BK": 32, "num_warps": 4, "num_stages": 3, "enable_fp_fusion": False},
}


class Size(NamedTuple):
    """Constants of every kernel here: channels of the input and of the result, rows and columns of
    the result, taps on a side, stride.
    """

    C: int
    K: int
    P: int
    Q: int
    R: int
    STRIDE: int


class Box(NamedTuple):
    """A tile of pixels: how many cover an image downwards and across; its images, rows, columns."""

    TH: int
    TW: int
    NB: int
    HB: int
    WB: int


class Strip(NamedTuple):
    """A tile of one image, of which HALO columns on either side belong to its neighbours."""

    TH: int
    TW: int
    HALO: int
    HB: int
    WB: int


class Step(NamedTuple):
    """What the projected step needs beside the gradient (`projected_step_`); int8 values of delta
    are multiplied with `level`.
    """

    delta: torch.Tensor
    index: torch.Tensor | None
    images: torch.Tensor
    flip: torch.Tensor | None
    nonfinite: torch.Tensor | None
    alpha: float
    eps: float
    level: float
    inverse_level: float
    count: int


@triton.jit
def _place(
    program,
    TH: tl.constexpr,
    TW: tl.constexpr,
    NB: tl.constexpr,
    HB: tl.constexpr,
    WB: tl.constexpr,
):
    """The first image, row and column of a tile of pixels."""
    return program // (TH * TW) * NB, program // TW % TH * HB, program % TW * WB


@triton.jit
def _pixels(n, p, q, NB: tl.constexpr, HB: tl.constexpr, WB: tl.constexpr):
    """Image, row and column of each pixel of a tile."""
    t = tl.arange(0, NB * HB * WB)
    return n + t // (HB * WB), p + t // WB % HB, q + t % WB


@triton.jit
def _finish(
    acc,
    scale,
    bias,
    residual,
    y,
    mask,
    B,
    n,
    p,
    q,
    m,
    SIZE: tl.constexpr,
    RELU: tl.constexpr,
    BM: tl.constexpr,
    BOX: tl.constexpr,
):
    """The epilogue on [channels, pixels]: what lies outside the result is not stored."""
    K: tl.constexpr = SIZE.K
    BN: tl.constexpr = BOX.NB * BOX.HB * BOX.WB
    v = acc.T
    if scale is not None:
        v *= tl.load(scale)
    if bias is not None:
        k = m + tl.arange(0, BM)
        v += tl.load(bias + k, mask=k < K, other=0)[None, :]
    if residual is not None:
        v += residual.load([n, p, q, m]).reshape(BN, BM).to(tl.float32)
    v = v.to(y.dtype)
    if RELU:
        v = tl.where(v <= 0, 0.0, v)
    y.store([n, p, q, m], v.reshape(BOX.NB, BOX.HB, BOX.WB, BM))
    if mask is not None:
        pn, pp, pq = _pixels(n, p, q, BOX.NB, BOX.HB, BOX.WB)
        word = m // 16 + tl.arange(0, BM // 16)
        live = ((pn < B) & (pp < SIZE.P) & (pq < SIZE.Q))[:, None] & (word < K // 16)[None, :]
        pixel = (pn.to(tl.int64) * SIZE.P + pp) * SIZE.Q + pq
        tl.store(
            mask + pixel[:, None] * (K // 16) + word[None, :],
            to_words(~(v <= 0), BN, BM),
            mask=live,
        )


@triton.jit
def _convolution_kernel(
    x,
    weight,
    scale,
    bias,
    residual,
    y,
    mask,
    B,
    SIZE: tl.constexpr,
    RELU: tl.constexpr,
    PRECISION: tl.constexpr,
    BM: tl.constexpr,
    BK: tl.constexpr,
    BOX: tl.constexpr,
):
    C: tl.constexpr = SIZE.C
    R: tl.constexpr = SIZE.R
    BN: tl.constexpr = BOX.NB * BOX.HB * BOX.WB
    MT: tl.constexpr = (SIZE.K + BM - 1) // BM
    m = tl.program_id(0) % MT * BM
    n, p, q = _place(tl.program_id(0) // MT, BOX.TH, BOX.TW, BOX.NB, BOX.HB, BOX.WB)
    acc = tl.zeros((BM, BN), tl.float32)
    for step in range(R * R * (C // BK)):
        tap = step // (C // BK)
        c = step % (C // BK) * BK
        r = tap // R
        s = tap % R
        if SIZE.STRIDE == 1:
            a = x.load([n, p + r - R // 2, q + s - R // 2, c])
        else:  # row 2 p + r - R // 2 = 2 (p - R // 2 + down // 2) + down % 2
            down = r + R // 2
            right = s + R // 2
            a = x.load(
                [n, p - R // 2 + down // 2, down % 2, q - R // 2 + right // 2, right % 2 * C + c]
            )
        w = weight.load([m, tap * C + c])
        acc = tl.dot(w, a.reshape(BN, BK).T, acc, input_precision=PRECISION)
    _finish(acc, scale, bias, residual, y, mask, B, n, p, q, m, SIZE, RELU, BM, BOX)


@triton.jit
def _stem_kernel(
    x,
    weight,
    scale,
    bias,
    residual,
    y,
    mask,
    B,
    SIZE: tl.constexpr,
    RELU: tl.constexpr,
    PRECISION: tl.constexpr,
    BM: tl.constexpr,
    BK: tl.constexpr,
    BOX: tl.constexpr,
):
    """The same with x and weight as pointers; all taps and channels are one reduction of R * R *
    C.
    """
    C: tl.constexpr = SIZE.C
    K: tl.constexpr = SIZE.K
    R: tl.constexpr = SIZE.R
    BN: tl.constexpr = BOX.NB * BOX.HB * BOX.WB
    MT: tl.constexpr = (K + BM - 1) // BM
    H: tl.constexpr = SIZE.P * SIZE.STRIDE
    W: tl.constexpr = SIZE.Q * SIZE.STRIDE
    m = tl.program_id(0) % MT * BM
    n, p, q = _place(tl.program_id(0) // MT, BOX.TH, BOX.TW, BOX.NB, BOX.HB, BOX.WB)
    pn, pp, pq = _pixels(n, p, q, BOX.NB, BOX.HB, BOX.WB)
    k = m + tl.arange(0, BM)
    acc = tl.zeros((BM, BN), tl.float32)
    for first in range(0, R * R * C, BK):
        j = first + tl.arange(0, BK)
        row = pp[:, None] * SIZE.STRIDE + (j // (R * C) - R // 2)[None, :]
        column = pq[:, None] * SIZE.STRIDE + (j // C % R - R // 2)[None, :]
        live = (
            (pn < B)[:, None]
            & (row >= 0)
            & (row < H)
            & (column >= 0)
            & (column < W)
            & (j < R * R * C)[None, :]
        )
        pixel = (pn.to(tl.int64)[:, None] * H + row) * W + column
        a = tl.load(x + pixel * C + (j % C)[None, :], mask=live, other=0)
        w = tl.load(
            weight + k[:, None] * (R * R * C) + j[None, :],
            mask=(k < K)[:, None] & (j < R * R * C)[None, :],
            other=0,
        )
        acc = tl.dot(w, a.T, acc, input_precision=PRECISION)
    _finish(acc, scale, bias, residual, y, mask, B, n, p, q, m, SIZE, RELU, BM, BOX)


@triton.jit
def _input_grad_kernel(
    grad,
    weight,
    scale,
    addend,
    out,
    mask,
    B,
    SIZE: tl.constexpr,
    PRECISION: tl.constexpr,
    BM: tl.constexpr,
    BK: tl.constexpr,
    BOX: tl.constexpr,
):
    """Rows STRIDE p + a and columns STRIDE q + b of the input: of the taps those with r = a + R //
    2 and s = b + R // 2 modulo STRIDE.
    """
    C: tl.constexpr = SIZE.C
    K: tl.constexpr = SIZE.K
    R: tl.constexpr = SIZE.R
    STRIDE: tl.constexpr = SIZE.STRIDE
    BN: tl.constexpr = BOX.NB * BOX.HB * BOX.WB
    MT: tl.constexpr = (C + BM - 1) // BM
    m = tl.program_id(0) % MT * BM
    parity = tl.program_id(0) // MT % (STRIDE * STRIDE)
    a = parity // STRIDE
    b = parity % STRIDE
    tile = tl.program_id(0) // (MT * STRIDE * STRIDE)
    n, p, q = _place(tile, BOX.TH, BOX.TW, BOX.NB, BOX.HB, BOX.WB)
    first_r = (a + R // 2) % STRIDE
    first_s = (b + R // 2) % STRIDE
    rows = (R - first_r + STRIDE - 1) // STRIDE
    columns = (R - first_s + STRIDE - 1) // STRIDE
    acc = tl.zeros((BM, BN), tl.float32)
    for step in range(rows * columns * (K // BK)):
        tap = step // (K // BK)
        k = step % (K // BK) * BK
        r = first_r + tap // columns * STRIDE
        s = first_s + tap % columns * STRIDE
        g = grad.load([n, p + (a + R // 2 - r) // STRIDE, q + (b + R // 2 - s) // STRIDE, k])
        if scale is None:
            w = weight.load([k, (r * R + s) * C + m]).T
        else:
            w = weight.load([m, (r * R + s) * K + k])
        acc = tl.dot(w, g.reshape(BN, BK).T, acc, input_precision=PRECISION)
    v = acc.T
    if scale is not None:
        v *= tl.load(scale)
    if addend is not None:
        if STRIDE == 1:
            other = addend.load([n, p, q, m])
        else:
            other = addend.load([n, p, a, q, b * C + m])
        v += other.reshape(BN, BM).to(tl.float32)
    v = v.to(out.dtype)
    if mask is not None:
        pn, pp, pq = _pixels(n, p, q, BOX.NB, BOX.HB, BOX.WB)
        word = m // 16 + tl.arange(0, BM // 16)
        live = ((pn < B) & (pp < SIZE.P) & (pq < SIZE.Q))[:, None] & (word < C // 16)[None, :]
        row = pn.to(tl.int64) * (SIZE.P * STRIDE) + pp * STRIDE + a
        pixel = row * (SIZE.Q * STRIDE) + pq * STRIDE + b
        words = tl.load(mask + pixel[:, None] * (C // 16) + word[None, :], mask=live, other=0)
        v = tl.where(from_words(words, BN, BM), v, 0.0)
    if STRIDE == 1:
        out.store([n, p, q, m], v.reshape(BOX.NB, BOX.HB, BOX.WB, BM))
    else:
        out.store([n, p, a, q, b * C + m], v.reshape(BOX.NB, BOX.HB, 1, BOX.WB, BM))


@triton.jit
def _stem_grad_kernel(
    grad,
    weight,
    addend,
    out,
    mask,
    step,
    SIZE: tl.constexpr,
    CP: tl.constexpr,
    PRECISION: tl.constexpr,
    BK: tl.constexpr,
    STRIP: tl.constexpr,
):
    """A tile of one image, as [pixels, channels]: stored to `out`, or applied to `step.delta` as a
    projected step. CP: C, padded to a power of two.

    Column 4 c + s of the products belongs to channel c and horizontal tap s. They are shifted by
    their tap and summed at the end; tiles that do not hold whole rows overlap by HALO columns on
    either side."""
    C: tl.constexpr = SIZE.C
    K: tl.constexpr = SIZE.K
    R: tl.constexpr = SIZE.R
    STRIDE: tl.constexpr = SIZE.STRIDE
    HALO: tl.constexpr = STRIP.HALO
    HB: tl.constexpr = STRIP.HB
    WB: tl.constexpr = STRIP.WB
    BN: tl.constexpr = HB * WB
    H: tl.constexpr = SIZE.P * STRIDE
    W: tl.constexpr = SIZE.Q * STRIDE
    parity = tl.program_id(0) % (STRIDE * STRIDE)
    a = parity // STRIDE
    b = parity % STRIDE
    tile = tl.program_id(0) // (STRIDE * STRIDE)
    n, p, q = _place(tile, STRIP.TH, STRIP.TW, 1, HB, WB - 2 * HALO)
    q -= HALO
    j = tl.arange(0, 4 * CP)
    s = j % 4
    wanted = (j // 4 < C) & (s < R) & ((b + R // 2 - s) % STRIDE == 0)
    sums = tl.zeros((BN, 4 * CP), tl.float32)
    for r in range((a + R // 2) % STRIDE, R, STRIDE):
        for first in range(0, K, BK):
            g = grad.load([n, p + (a + R // 2 - r) // STRIDE, q, first])
            k = first + tl.arange(0, BK)
            w = tl.load(
                weight + ((k[:, None] * R + r) * R + s[None, :]) * C + j[None, :] // 4,
                mask=wanted[None, :],
                other=0,
            )
            sums = tl.dot(g.reshape(BN, BK), w, sums, input_precision=PRECISION)
    t = tl.arange(0, BN)
    source = t[:, None] % WB + ((b + R // 2 - s) // STRIDE)[None, :]
    inside = wanted[None, :] & (source >= 0) & (source < WB)
    moved = tl.gather(sums, tl.where(inside, t[:, None] // WB * WB + source, 0), 0)
    v = tl.sum(tl.where(inside, moved, 0.0).reshape(BN, CP, 4), 2)

    c = tl.arange(0, CP)
    pp = p + t // WB
    pq = q + t % WB
    mine = (t % WB >= HALO) & (t % WB < WB - HALO) & (pp < SIZE.P) & (pq < SIZE.Q)
    live = mine[:, None] & (c < C)[None, :]
    row = (pp * STRIDE + a)[:, None]
    column = (pq * STRIDE + b)[:, None]
    if step is None:
        i = ((n.to(tl.int64) * H + row) * W + column) * C + c[None, :]
        if addend is not None:
            v += tl.load(addend + i, mask=live, other=0).to(tl.float32)
        v = v.to(out.dtype.element_ty)
        if mask is not None:
            v = tl.where(
                (tl.load(mask + i // 8, mask=live, other=0) >> (i % 8).to(tl.uint8)) & 1 != 0,
                v,
                0.0,
            )
        tl.store(out + i, v, mask=live)
    else:
        stored, exists = store_row(step.index, n.to(tl.int64), step.count)
        live &= exists
        base = stored * C * H * W
        i = c[None, :] * (H * W) + row * W + column
        x = load_image(step.images + base, step.flip, n, i, column, W, live)
        g = v.to(grad.dtype).to(tl.float32)
        move(
            step.delta + base + i,
            g,
            x,
            live,
            step.nonfinite,
            step.alpha,
            step.eps,
            step.level,
            step.inverse_level,
        )


def _check(op, weight, size, stride, padding, dilation, groups):
    (k, c, r, s), (h, w) = weight.shape, size[2:]
    steps = [[1, 1], [2, 2]] if h % 2 == w % 2 == 0 else [[1, 1]]
    supported = (
        groups == 1
        and list(dilation) == [1, 1]
        and (r, s) in ((1, 1), (3, 3))
        and list(padding) == [r // 2, r // 2]
        and list(stride) in steps
        and k % 16 == 0
        and c > 0
        and (c % 16 == 0 or c < STEM)
    )
    if weight.dtype == FP8:
        supported = supported and k % 32 == c % 32 == 0  # wgmma reduces 32 of them at a time
        if (has := capability(weight)) < (8, 9):
            raise RuntimeError(
                f"{op}: e4m3 products need compute capability 8.9 or later, "
                f"this GPU has {has[0]}.{has[1]}"
            )
    if not supported:
        raise RuntimeError(
            f"{op}: no Triton kernel for {str(weight.dtype)[6:]} weights {list(weight.shape)} "
            f"on {h}x{w}, stride {list(stride)}, padding {list(padding)}, "
            f"dilation {list(dilation)}, groups {groups}"
        )


def _large(tensor):
    """Whether the large tiles serve."""
    return large_blocks(tensor) and tensor.dtype != torch.float32


def _dividing(tile, reduction):
    """The tile with BK a divisor of the reduction: a box must not reach into the next tap or
    column.
    """
    bk = tile["BK"]
    while reduction % bk:
        bk //= 2
    return {**tile, "BK": bk}


def _tile(like, channels, reduction, divides=False):
    """The tile of a product with `channels` rows; `divides`: it must not reach past them."""
    large = _large(like)
    bm = 128 if large and channels > 64 and not 0 < channels % 128 <= 64 else 64
    while divides and channels % bm:
        bm //= 2
    tile = {"BM": bm, **(LARGE[bm] if large and bm in LARGE else SMALL)}
    if like.dtype == FP8:  # as many bytes
        tile["BK"] *= 2
    return _dividing(tile, reduction)


@lru_cache
def _box(pixels, b, h, w, halo=None):
    """Images, rows and columns of a tile, and how many tiles cover h x w: the fewest tiles of all,
    then images in one, then the widest.

    With `halo` a tile holds one image, and tiles narrower than w overlap by so many columns on
    either side."""

    def covered(box):
        _, hb, wb = box
        step = wb if halo is None or wb >= w else wb - 2 * halo
        return triton.cdiv(h, hb), triton.cdiv(w, step), step

    def cost(box):
        (th, tw, _), (nb, _, wb) = covered(box), box
        return triton.cdiv(b, nb) * th * tw, nb, -wb

    powers = [2**k for k in range(9)]  # a box has at most 256 in each dimension
    boxes = [
        (pixels // (hb * wb), hb, wb)
        for hb in powers
        for wb in powers
        if hb * wb <= pixels <= 256 * hb * wb
    ]
    if halo is not None:
        boxes = [(nb, hb, wb) for nb, hb, wb in boxes if nb == 1 and wb > 2 * halo]
    nb, hb, wb = box = min(boxes, key=cost)
    th, tw, step = covered(box)
    tile = {"TH": th, "TW": tw, "NB": nb, "HB": hb, "WB": wb}
    return tile if halo is None else {**tile, "HALO": (wb - step) // 2}


def _descriptor(tensor, shape, block):
    """A dense tensor seen as `shape`."""
    strides = [1]
    for size in reversed(shape[1:]):
        strides.insert(0, strides[0] * size)
    return TensorDescriptor(tensor, list(shape), strides, block)


def _pixels_of(tensor, block, stride=1):
    """[B, C, H, W] as NHWC, or with stride 2 as [B, H / 2, 2, W / 2, 2 C]; block: of NHWC."""
    if tensor is None:
        return None
    b, c, h, w = tensor.shape
    if stride == 1:
        return _descriptor(tensor, (b, h, w, c), block)
    nb, hb, wb, cb = block
    return _descriptor(tensor, (b, h // 2, 2, w // 2, 2 * c), [nb, hb, 1, wb, cb])


def _aligned(tensor):
    """TMA wants 16 bytes."""
    return (
        tensor
        if tensor is None or tensor.data_ptr() % 16 == 0
        else tensor.clone(memory_format=torch.preserve_format)
    )


def _rows_of(weight):
    """[K, R * R * C]; no copy where the weight is channels-last."""
    return _aligned(weight.permute(0, 2, 3, 1).reshape(len(weight), -1).contiguous())


def _result_dtype(operand):
    return torch.bfloat16 if operand.dtype == FP8 else operand.dtype


def _precision(dtype):
    return (
        "tf32x3" if dtype == torch.float32 else "ieee"
    )  # of 16-bit operands every product is exact


def conv_forward(
    x, weight, bias, residual, stride, padding, dilation, groups, relu, want_mask, scale=None
):
    _check("conv_forward", weight, x.shape, stride, padding, dilation, groups)
    (b, c, h, w), (k, _, r, _), step = x.shape, weight.shape, stride[0]
    y = torch.empty(
        (b, k, h // step, w // step), dtype=_result_dtype(x), device=x.device, memory_format=NHWC
    )
    mask = torch.empty(
        mask_bytes(y.numel()) if want_mask else 0, dtype=torch.uint8, device=x.device
    )
    if y.numel() == 0:
        return y, mask
    mask[y.numel() // 64 * 8 :] = 0  # the bits past the end
    stem = c % 16 != 0
    tile = dict(STEM_TILE) if stem else _tile(x, k, c)
    box = _box(tile.pop("pixels"), b, *y.shape[2:])
    weight, x = _rows_of(weight), _aligned(x)
    if not stem:
        x = _pixels_of(x, [box["NB"], box["HB"], box["WB"], tile["BK"]], step)
        weight = _descriptor(weight, weight.shape, [tile["BM"], tile["BK"]])
    out = [box["NB"], box["HB"], box["WB"], tile["BM"]]
    programs = triton.cdiv(b, box["NB"]) * box["TH"] * box["TW"] * triton.cdiv(k, tile["BM"])
    with on_device_of(y):
        (_stem_kernel if stem else _convolution_kernel)[(programs,)](
            x,
            weight,
            scale,
            bias,
            _pixels_of(_aligned(residual), out),
            _pixels_of(y, out),
            as_words(mask) if want_mask else None,
            b,
            SIZE=Size(c, k, *y.shape[2:], r, step),
            RELU=relu,
            PRECISION=_precision(y.dtype),
            **tile,
            BOX=Box(**box),
        )
    return y, mask


def conv_input_grad(
    grad, weight, addend, mask, size, stride, padding, dilation, groups, scale=None
):
    _check("conv_input_grad", weight, size, stride, padding, dilation, groups)
    (b, c, _, _), (k, _, r, _), (_, _, p, q), step = size, weight.shape, grad.shape, stride[0]
    out = torch.empty(size, dtype=_result_dtype(grad), device=grad.device, memory_format=NHWC)
    if out.numel() == 0:
        return out
    if c % 16:
        _stem_grad(grad, weight, step, addend, out, mask)
        return out
    tile = _tile(grad, c, k, divides=step == 2)
    box = _box(tile.pop("pixels"), b, p, q)
    if scale is None:
        weight = _descriptor(rows := _rows_of(weight), rows.shape, [tile["BK"], tile["BM"]])
    else:
        weight = _descriptor(
            rows := _rows_of(weight.transpose(0, 1)), rows.shape, [tile["BM"], tile["BK"]]
        )
    block = [box["NB"], box["HB"], box["WB"], tile["BM"]]
    programs = (
        triton.cdiv(b, box["NB"]) * box["TH"] * box["TW"] * triton.cdiv(c, tile["BM"]) * step * step
    )
    with on_device_of(out):
        _input_grad_kernel[(programs,)](
            _pixels_of(_aligned(grad), [*block[:3], tile["BK"]]),
            weight,
            scale,
            _pixels_of(_aligned(addend), block, step),
            _pixels_of(out, block, step),
            as_words(mask),
            b,
            SIZE=Size(c, k, p, q, r, step),
            PRECISION=_precision(out.dtype),
            **tile,
            BOX=Box(**box),
        )
    return out


def _stem_grad(grad, weight, stride, addend=None, out=None, mask=None, step=None):
    (b, _, p, q), (k, c, r, _) = grad.shape, weight.shape
    tile = _dividing(STEM_GRAD[_large(grad)], k)
    box = dict(_box(tile.pop("pixels"), b, p, q, r // 2))
    block = [box.pop("NB"), box["HB"], box["WB"], tile["BK"]]
    with on_device_of(grad):
        _stem_grad_kernel[(b * box["TH"] * box["TW"] * stride * stride,)](
            _pixels_of(_aligned(grad), block),
            _rows_of(weight),
            addend,
            out,
            mask,
            step,
            SIZE=Size(c, k, p, q, r, stride),
            CP=max(4, triton.next_power_of_2(c)),
            PRECISION=_precision(grad.dtype),
            **tile,
            STRIP=Strip(**box),
        )


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
    _check("conv_input_grad_step_", weight, size, stride, padding, dilation, groups)
    if size[1] > STEM:  # not an image: the image_grad goes through memory
        image_grad = conv_input_grad(
            grad, weight, None, None, size, stride, padding, dilation, groups
        )
        projected_step_(delta, index, image_grad, images, flip, alpha, eps, nonfinite)
    elif grad.numel():
        level, inverse_level = (eps / 127, 127 / eps) if delta.dtype == torch.int8 else (1.0, 1.0)
        flip = None if flip is None else flip.view(torch.uint8)
        scalars = alpha, eps, level, inverse_level, len(delta)
        step = Step(delta, index, images, flip, nonfinite, *scalars)
        _stem_grad(grad, weight, stride[0], step=step)
