"""The projected sign step: functional on flat tensors, and in place on rows of the poison store."""

import torch
import triton
import triton.language as tl

from ._common import on_device_of
from ._store import load_image, seen_pixel, split_program, store_row, to_scale

WARPS = 4
BLOCK = 4 * 32 * WARPS
OPTIONS = {
    "num_warps": WARPS,
    "enable_fp_fusion": False,
}  # a fused multiply-add rounds once where the contract rounds twice
ALL = tl.constexpr(tl.PropagateNan.ALL)
HALF_EVEN = tl.constexpr(
    1.5 * 2**23
)  # adding it leaves no fraction bits: rounds |x| < 2^22 to the nearest even integer


@triton.jit
def _clamp(x, low, high):
    return tl.minimum(tl.maximum(x, low, propagate_nan=ALL), high, propagate_nan=ALL)


@triton.jit
def _step(delta, grad, image, alpha, eps):
    """All fp32; a gradient of 0 or NaN moves nothing."""
    moved = tl.where(grad > 0, delta - alpha, tl.where(grad < 0, delta + alpha, delta))
    step = _clamp(image + _clamp(moved, -eps, eps), 0.0, 1.0) - image
    return tl.where(
        step < 0.0 - eps, 0.0 - eps, tl.where(step > eps, eps, step)
    )  # the budget, whatever the image and the sum's rounding


@triton.jit
def _flat_kernel(out, delta, grad, image, n, alpha, eps, BLOCK: tl.constexpr):
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    live = i < n
    d = tl.load(delta + i, mask=live, other=0).to(tl.float32)
    g = tl.load(grad + i, mask=live, other=0).to(tl.float32)
    x = tl.load(image + i, mask=live, other=0).to(tl.float32)
    tl.store(out + i, _step(d, g, x, alpha, eps).to(out.dtype.element_ty), mask=live)


@triton.jit
def count(grad, live, nonfinite):
    bad = tl.sum((live & ~(tl.abs(grad) < float("inf"))).to(tl.int32))
    if bad > 0:
        tl.atomic_add(nonfinite, bad.to(tl.int64))


@triton.jit
def move(delta, grad, image, live, nonfinite, alpha, eps, level, inverse_level):
    """The step in place on the poison store's elements `delta` (pointers); counts the live
    gradients that are NaN or Inf.
    """
    value = _step(to_scale(tl.load(delta, mask=live, other=0), level), grad, image, alpha, eps)
    kind = delta.dtype.element_ty
    if kind == tl.int8:
        value = _clamp(value * inverse_level, -127.0, 127.0) + HALF_EVEN - HALF_EVEN
    tl.store(delta, value.to(kind), mask=live)
    if nonfinite is not None:
        count(grad, live, nonfinite)


@triton.jit
def _moved_back(grad, view, row, p, live, H, stride, W: tl.constexpr):
    """The gradient of pixels p of the store, where the view of this row has them; else 0."""
    at, inside = seen_pixel(view, row, p, H, W, True)
    return tl.load(grad + at * stride, mask=live & inside, other=0).to(tl.float32)


@triton.jit
def _cell_sums(grad, view, row, p, live, H, stride, W: tl.constexpr, GRID: tl.constexpr):
    """The sums over the cells of pixels p: down each column of a cell, then over the columns."""
    top = p // W // GRID * GRID
    left = p % W // GRID * GRID
    total = tl.zeros(p.shape, tl.float32)
    for j in range(GRID):
        column = tl.zeros(p.shape, tl.float32)
        for i in range(GRID):
            there = live & (top + i < H) & (left + j < W)
            column += _moved_back(grad, view, row, (top + i) * W + left + j, there, H, stride, W)
        total += column
    return total


@triton.jit
def _store_kernel(
    delta,
    index,
    grad,
    images,
    flip,
    view,
    nonfinite,
    alpha,
    eps,
    level,
    inverse_level,
    rows,
    plane,
    row_stride,
    channel_stride,
    pixel_stride,
    C: tl.constexpr,
    W: tl.constexpr,
    GRID: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program: BLOCK pixels of one channel of one row; the C programs that share a
    channels-last gradient run side by side.
    """
    row, channel, p = split_program(plane, C, BLOCK)
    source, exists = store_row(index, row, rows)
    live = (p < plane) & exists
    base = (source * C + channel) * plane
    grad += row * row_stride + channel * channel_stride
    g = _moved_back(grad, view, row, p, live, plane // W, pixel_stride, W)
    x = load_image(images + base, flip, row, p, p % W, W, live)
    if GRID == 1:
        move(delta + base + p, g, x, live, nonfinite, alpha, eps, level, inverse_level)
    else:
        if nonfinite is not None:
            count(g, live, nonfinite)
        g = _cell_sums(grad, view, row, p, live, plane // W, pixel_stride, W, GRID)
        move(delta + base + p, g, x, live, None, alpha, eps, level, inverse_level)


def projected_step(delta, grad, image, alpha, eps):
    delta, grad, image = delta.contiguous(), grad.contiguous(), image.contiguous()
    out = torch.empty_like(delta)
    n = delta.numel()
    if n:
        with on_device_of(delta):
            _flat_kernel[(triton.cdiv(n, BLOCK),)](
                out, delta, grad, image, n, alpha, eps, BLOCK=BLOCK, **OPTIONS
            )
    return out


def projected_step_(delta, index, grad, images, flip, alpha, eps, nonfinite, view=None, grid=1):
    b, c, h, w = grad.shape
    if grad.numel() == 0:
        return
    if h > 1 and grad.stride(2) != w * grad.stride(
        3
    ):  # neither NCHW nor channels-last: no single step from pixel to pixel
        grad = grad.contiguous()
    level, inverse_level = (eps / 127, 127 / eps) if delta.dtype == torch.int8 else (1.0, 1.0)
    with on_device_of(delta):
        _store_kernel[(b * c * triton.cdiv(h * w, BLOCK),)](
            delta,
            index,
            grad,
            images,
            None if flip is None else flip.view(torch.uint8),
            view,
            nonfinite,
            alpha,
            eps,
            level,
            inverse_level,
            delta.shape[0],
            h * w,
            grad.stride(0),
            grad.stride(1),
            grad.stride(3),
            C=c,
            W=w,
            GRID=min(grid, max(h, w)),
            BLOCK=BLOCK,
            **OPTIONS,
        )
