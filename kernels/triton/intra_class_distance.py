"""Within-class distance value and gradient by direct differences in fp32, on rows sorted by
class.
"""

import torch
import triton
import triton.language as tl

from ._common import log1p, on_device_of

TILES = [  # 16 values per thread
    {"BM": 16, "BD": 128, "STAGES": 3, "num_warps": 4},
    {"BM": 4, "BD": 512, "STAGES": 3, "num_warps": 4},
    {"BM": 2, "BD": 2048, "STAGES": 3, "num_warps": 8},
]
SURE = tl.constexpr(2.0**-100)  # from here on, squares that count are normal numbers
LEAST, LARGEST = (
    tl.constexpr(2.0**-126),
    tl.constexpr(3.4028235e38),
)  # the smallest normal number and the largest


@triton.jit
def _rescaled(difference):
    """The norms of the rows, times a power of two each while they are squared, so that nothing
    overflows or underflows.
    """
    scale, back = _powers(tl.max(tl.abs(difference), 1))
    a = difference * scale[:, None]
    return tl.sqrt_rn(tl.sum(a * a, 1)) * back


@triton.jit
def _powers(largest):
    """The power of two that brings these numbers to about 1, and the one that takes them back."""
    field = tl.minimum(tl.maximum((largest.to(tl.int32, bitcast=True) >> 23) & 255, 1), 253)
    return ((254 - field) << 23).to(tl.float32, bitcast=True), (field << 23).to(
        tl.float32, bitcast=True
    )


@triton.jit
def _difference(features, rows, j, known, first, D, BD: tl.constexpr):
    e = first + tl.arange(0, BD)
    a = tl.load(
        features + rows[:, None] * D + e[None, :], mask=known[:, None] & (e < D)[None, :], other=0
    ).to(tl.float32)
    return a - tl.load(features + j * D + e, mask=e < D, other=0).to(tl.float32)[None, :]


@triton.jit
def _pairs_kernel(
    features,
    starts,
    ends,
    order,
    sums,
    addend,
    grad,
    B,
    D,
    scale,
    weight,
    GRAD: tl.constexpr,
    WHOLE: tl.constexpr,
    BM: tl.constexpr,
    BD: tl.constexpr,
    STAGES: tl.constexpr,
):
    """BM sorted rows against the members of their classes, one member at a time. WHOLE: D <= BD.

    Without GRAD: sums = scale * sum_j ||f_i - f_j||.

    With GRAD: columns [BD] of sum_j (1 + own_i / own_j) / d_ij * (f_i - f_j), own = 1 + sums, times
        `weight` / own_i, added to `addend`
    and written in the caller's row order (weight / own_i / d_ij alone may be too small). A d_ij
    that is no normal number counts as 0."""
    rows = tl.program_id(0).to(tl.int64) * BM + tl.arange(0, BM)
    known = rows < B
    d = tl.program_id(1) * BD + tl.arange(0, BD)
    mine = tl.load(
        features + rows[:, None] * D + d[None, :], mask=known[:, None] & (d < D)[None, :], other=0
    ).to(tl.float32)
    row_start = tl.load(starts + rows, mask=known, other=B)
    row_end = tl.load(ends + rows, mask=known, other=0)
    if GRAD:
        own = 1 + tl.load(sums + rows, mask=known, other=0)
        total = tl.zeros((BM, BD), tl.float32)
    else:
        distances = tl.zeros((BM,), tl.float32)
    for j in tl.range(tl.min(row_start), tl.max(row_end), num_stages=STAGES):
        other = tl.load(features + j * D + d, mask=d < D, other=0).to(tl.float32)
        difference = mine - other[None, :]
        if WHOLE:
            squared = tl.sum(difference * difference, 1)
        else:
            squares = tl.zeros((BM, BD), tl.float32)
            for first in range(0, D, BD):
                a = _difference(features, rows, j, known, first, D, BD)
                squares += a * a
            squared = tl.sum(squares, 1)
        distance = tl.sqrt_rn(squared)
        member = (row_start <= j) & (j < row_end)
        if WHOLE:  # of wider rows the code for pairs that are next to never there would spill
            unsure = member & (rows != j) & ~((squared >= SURE) & (squared <= LARGEST))
            if tl.max(unsure.to(tl.int32)) > 0:
                distance = tl.where(unsure, _rescaled(difference), distance)
        if GRAD:
            pair = (1 + own / (1 + tl.load(sums + j))) / distance
            pair = tl.where(member & ~(distance < LEAST), pair, 0.0)
            total += pair[:, None] * difference
        else:
            distances += tl.where(member, distance, 0.0)
    if GRAD:
        target = tl.load(order + rows, mask=known, other=0)[:, None] * D + d[None, :]
        inside = known[:, None] & (d < D)[None, :]
        total = total * weight / own[:, None]
        if addend is not None:
            total += tl.load(addend + target, mask=inside, other=0)
        tl.store(grad + target, total, mask=inside)
    else:
        tl.store(sums + rows, distances * scale, mask=known)


@triton.jit
def _loss_kernel(sums, addend, loss, B, per_row, BLOCK: tl.constexpr):
    """loss = addend + per_row * sum_i log1p(sums_i): one program, fixed order."""
    total = tl.zeros((BLOCK,), tl.float32)
    for first in range(0, B, BLOCK):
        rows = first + tl.arange(0, BLOCK).to(tl.int64)
        sum_of_row = tl.load(sums + rows, mask=rows < B, other=0)
        total += log1p(sum_of_row)
    value = tl.sum(total) * per_row
    if addend is not None:
        value += tl.load(addend)
    tl.store(loss, value)


def weighted(features, labels, normalize_dim, want_grad, weight=1.0, addend=(None, None)):
    """addend + weight * (loss, gradient), fp32; in place where there is an addend."""
    b, d = features.shape
    loss, grad = addend
    if loss is None:
        loss = torch.empty((), dtype=torch.float32, device=features.device)
        grad = torch.empty(
            (b, d) if want_grad else (0,), dtype=torch.float32, device=features.device
        )
    if b == 0:
        return loss.fill_(torch.nan), grad
    classes, order = torch.sort(labels, stable=True)
    starts, ends = (
        torch.searchsorted(classes, classes),
        torch.searchsorted(classes, classes, right=True),
    )
    features = features[order]
    sums = torch.empty(b, dtype=torch.float32, device=features.device)
    scale = 1 / d if normalize_dim and d else 1.0
    tile = next((tile for tile in TILES if tile["BD"] >= d), TILES[-1])
    row_tiles = triton.cdiv(b, tile["BM"])
    with on_device_of(features):
        arguments = (
            features,
            starts,
            ends,
            order,
            sums,
            addend[1],
            grad,
            b,
            d,
            scale,
            weight * scale / b,
        )
        _pairs_kernel[(row_tiles, 1)](*arguments, GRAD=False, WHOLE=tile["BD"] >= d, **tile)
        _loss_kernel[(1,)](sums, addend[0], loss, b, weight / b, BLOCK=1024, num_warps=8)
        if grad.numel():
            _pairs_kernel[(row_tiles, triton.cdiv(d, tile["BD"]))](
                *arguments, GRAD=True, WHOLE=tile["BD"] >= d, **tile
            )
    return loss, grad


def intra_class_distance(features, labels, normalize_dim, want_grad):
    return weighted(features, labels, normalize_dim, want_grad)
