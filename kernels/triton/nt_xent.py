"""NT-Xent value and gradient in four launches: unit rows, row sums over column tiles, coefficients
and loss, gradient (two if resident).

Rows are scaled by powers of two to norms in [2^12, 2^13) and held as fp16: exact for half-precision
features, and as a sum hi + lo for fp32 features. Products of such operands are exact in fp32
accumulators, so similarities are as good as fp32 at the fp16 rate of the tensor cores. The
gradient's weights are split into hi + lo in the same way. Up to STORED_ROWS the similarities are
kept (at most 16 MB, in L2); above, they are computed a second time for the gradient:
* "resident", half-precision features of up to 512 columns on a Hopper (227 KB of shared memory,
  sums in registers): a program keeps its rows in shared memory and reads every other row once, for
      its similarities and for the gradient, like the keys that are the values of an
  attention. There is no room for two parts of the weights: they are rounded to fp16 (2^-11), and so
  are those in G . z, so that only what is orthogonal to z sees the rounding.
  Its workload is a call of `nt_xent` at B = 8,192 and D = 512 in bfloat16 where CUDA C++ has not
  been built: 0.66 ms are predicted, against 1.3 ms recomputed (docs/performance-notes.md). In a PGD
  step of ResNet-18 it saves 2 %.
* "recomputed", all others: tile by tile, for each slab of the gradient's columns.
"""

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from ._common import capability, log, log1p, on_device_of, power_of_two_over

STORED_ROWS = 2048
WIDTH = 64  # rows are padded to a multiple of it, so that no product needs a mask along K
UNIT = {"ROWS": 4, "BD": 512, "num_warps": 4}
# Tiles per launch: no spills on sm_80 and sm_90 for one fp16 operand, and for two (fp32 features).
SUMS = {
    ("stored", 1): {"BM": 64, "BN": 64, "BK": 64, "num_warps": 4, "num_stages": 4},
    ("stored", 2): {"BM": 64, "BN": 64, "BK": 64, "num_warps": 4, "num_stages": 3},
    ("recomputed", 1): {"BM": 128, "BN": 64, "BK": 64, "num_warps": 8, "num_stages": 3},
    ("recomputed", 2): {"BM": 64, "BN": 64, "BK": 64, "num_warps": 4, "num_stages": 3},
}
GRADIENT = {
    ("stored", 1): {"BM": 64, "BN": 64, "BK": 64, "BD": 64, "num_warps": 8, "num_stages": 3},
    ("stored", 2): {"BM": 64, "BN": 64, "BK": 64, "BD": 64, "num_warps": 8, "num_stages": 3},
    ("recomputed", 1): {"BM": 64, "BN": 64, "BK": 32, "BD": 256, "num_warps": 8, "num_stages": 3},
    ("recomputed", 2): {"BM": 64, "BN": 32, "BK": 32, "BD": 128, "num_warps": 8, "num_stages": 3},
}
# By the width of the padded rows, which is a power of two here.
RESIDENT_SUMS = {
    512: {"BM": 128, "BN": 32, "BK": 512, "num_warps": 8, "num_stages": 2},
    256: {"BM": 128, "BN": 64, "BK": 256, "num_warps": 8, "num_stages": 2},
    128: {"BM": 128, "BN": 64, "BK": 128, "num_warps": 8, "num_stages": 3},
    64: {"BM": 128, "BN": 64, "BK": 64, "num_warps": 8, "num_stages": 3},
}
RESIDENT_GRADIENT = {
    512: {"BM": 64, "BN": 64, "WIDTH": 512, "num_warps": 8, "num_stages": 2},
    256: {"BM": 64, "BN": 64, "WIDTH": 256, "num_warps": 4, "num_stages": 2},
    128: {"BM": 128, "BN": 64, "WIDTH": 128, "num_warps": 8, "num_stages": 3},
    64: {"BM": 128, "BN": 64, "WIDTH": 64, "num_warps": 8, "num_stages": 3},
}
RESIDENT_PROGRAMS = 128  # of a gradient: one for each multiprocessor; a constant, as below
PROJECT = {"ROWS": 4, "BD": 128, "num_warps": 4}
# enough to fill any GPU; a constant, so that the order of the sums depends on the shape alone
PROGRAMS = 256


class Rows(NamedTuple):
    """What the gradient needs of every row: float32 [padded], and pull and push only of rows that
    exist.
    """

    inverse: torch.Tensor  # a scaled row times this number is a unit row
    norms: torch.Tensor  # clamped
    own: torch.Tensor  # the unit row's norm: 1, or 0 for a row of zeros
    top: torch.Tensor  # what is subtracted from cosines with other classes before exp
    pull: torch.Tensor  # coefficients of pairs of one class, and of two
    push: torch.Tensor


@triton.jit
def _unit_kernel(
    features, stride, hi, lo, inverse, norms, own, B, D, width, ROWS: tl.constexpr, BD: tl.constexpr
):
    """Scaled rows u with z = u * inverse, clamped norms and ||z||; padding rows and columns are
    zero.
    """
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    columns = tl.arange(0, BD)
    squares = tl.zeros(
        (ROWS, BD), tl.float64
    )  # an error in the norm is one in every cosine of the row, divided by t
    for first in range(0, D, BD):
        d = first + columns
        f = tl.load(
            features + rows[:, None] * stride + d[None, :],
            mask=(rows < B)[:, None] & (d < D)[None, :],
            other=0,
        ).to(tl.float64)
        squares += f * f
    length = tl.sqrt(tl.sum(squares, 1))
    norm = tl.where(length < 1e-8, 1e-8, length)
    reciprocal = 1 / norm
    if lo is not None:
        restore = tl.full((ROWS,), 2.0**-12, tl.float32)  # u = 2^12 z, rounded as hi + lo
        scale = 4096 * reciprocal
    else:
        power = power_of_two_over(norm.to(tl.float32), 12)  # u = f times a power of two: exact
        scale = power.to(tl.float64)
        restore = (reciprocal / power).to(tl.float32)
    for first in range(0, width, BD):
        d = first + columns
        f = tl.load(
            features + rows[:, None] * stride + d[None, :],
            mask=(rows < B)[:, None] & (d < D)[None, :],
            other=0,
        ).to(tl.float64)
        u = f * scale[:, None]
        high = u.to(tl.float32).to(tl.float16)
        target = rows[:, None] * width + d[None, :]
        inside = (d < width)[None, :]
        tl.store(hi + target, high, mask=inside)
        if lo is not None:
            tl.store(
                lo + target, (u - high.to(tl.float64)).to(tl.float32).to(tl.float16), mask=inside
            )
    tl.store(inverse + rows, restore)
    tl.store(norms + rows, norm.to(tl.float32))
    tl.store(own + rows, (length * reciprocal).to(tl.float32))


@triton.jit
def _cosines(raw, inverse, own, rows, columns):
    """Products of scaled rows as cosines; of the diagonal, P's largest term, free of rounding."""
    s = raw * (tl.load(inverse + rows)[:, None] * tl.load(inverse + columns)[None, :])
    itself = tl.load(own + rows)
    return tl.where(rows[:, None] == columns[None, :], (itself * itself)[:, None], s)


@triton.jit
def _similarities(
    hi, lo, inverse, own, rows, columns, width, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr
):
    """One [BM, BN] tile of cosines."""
    k = tl.arange(0, BK)
    left = rows[:, None].to(tl.int64) * width + k[None, :]
    right = columns[:, None].to(tl.int64) * width + k[None, :]
    raw = tl.zeros((BM, BN), tl.float32)
    for _ in range(0, width, BK):
        a = tl.load(hi + left)
        b = tl.load(hi + right)
        raw = tl.dot(a, b.T, raw, input_precision="ieee")
        if lo is not None:
            raw = tl.dot(a, tl.load(lo + right).T, raw, input_precision="ieee")
            raw = tl.dot(tl.load(lo + left), b.T, raw, input_precision="ieee")
        left += BK
        right += BK
    return _cosines(raw, inverse, own, rows, columns)


@triton.jit
def _whole(hi, rows, WIDTH: tl.constexpr):
    """Scaled rows with all their columns."""
    return tl.load(hi + rows[:, None].to(tl.int64) * WIDTH + tl.arange(0, WIDTH)[None, :])


@triton.jit
def _exp(x, rate):
    """exp(x / t); rate = log2(e) / t."""
    return tl.exp2(x * rate)


@triton.jit
def _sums_kernel(
    hi,
    lo,
    inverse,
    own,
    labels,
    similarity,
    same_sums,
    other_sums,
    tops,
    B,
    padded,
    width,
    rate,
    tiles,
    NEGATIVES: tl.constexpr,
    RESIDENT: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    """Partial P and N (and their shift, with NEGATIVES) of BM rows over `tiles` column tiles.
    RESIDENT: BK is the width.
    """
    rows = tl.program_id(0) * BM + tl.arange(0, BM)
    split = tl.program_id(1).to(tl.int64)
    row_labels = tl.load(labels + rows, mask=rows < B, other=0)
    row_own = tl.load(own + rows)
    same_sum = tl.zeros((BM,), tl.float32)
    other_sum = tl.zeros((BM,), tl.float32)
    top = tl.full((BM,), float("-inf"), tl.float32)
    if RESIDENT:
        mine = _whole(hi, rows, BK)
    for tile in range(split * tiles, tl.minimum((split + 1) * tiles, padded // BN)):
        columns = tile * BN + tl.arange(0, BN)
        if RESIDENT:
            s = _cosines(
                tl.dot(mine, _whole(hi, columns, BK).T, input_precision="ieee"),
                inverse,
                own,
                rows,
                columns,
            )
        else:
            s = _similarities(hi, lo, inverse, own, rows, columns, width, BM, BN, BK)
        if similarity is not None:
            tl.store(similarity + rows[:, None].to(tl.int64) * padded + columns[None, :], s)
        live = (columns < B)[None, :]
        same = row_labels[:, None] == tl.load(labels + columns, mask=columns < B, other=0)[None, :]
        e = _exp(s - row_own[:, None], rate)
        same_sum += tl.sum(tl.where(same & live, e, 0.0), 1)
        other = live & ~same
        if NEGATIVES:
            highest = tl.maximum(top, tl.max(tl.where(other, s, float("-inf")), 1))
            fading = tl.where(top == float("-inf"), 0.0, _exp(top - highest, rate))
            e = _exp(s - highest[:, None], rate)
            other_sum *= fading
            top = highest
        other_sum += tl.sum(tl.where(other, e, 0.0), 1)
    tl.store(same_sums + split * padded + rows, same_sum)
    tl.store(other_sums + split * padded + rows, other_sum)
    if NEGATIVES:
        tl.store(tops + split * padded + rows, top)


@triton.jit
def _coefficients_kernel(
    own,
    same_sums,
    other_sums,
    tops,
    top,
    pull,
    push,
    log_pull,
    log_push,
    loss,
    power,
    B,
    padded,
    rate,
    share,
    splits,
    NEGATIVES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program: merges the partial sums in order; two coefficients per row, the loss, and the
    weights' power of two.

    log_pull, log_push: for the resident gradient, log2 of the coefficients times exp(-shift / t);
        -inf on padding.
    """
    total = tl.zeros((BLOCK,), tl.float32)
    largest = tl.zeros((BLOCK,), tl.float32)
    for first in range(0, padded, BLOCK):
        rows = first + tl.arange(0, BLOCK)
        live = rows < B
        row_own = tl.load(own + rows, mask=live, other=0)
        same_sum = tl.zeros((BLOCK,), tl.float32)
        other_sum = tl.zeros((BLOCK,), tl.float32)
        highest = tl.full((BLOCK,), float("-inf"), tl.float32)
        if NEGATIVES:
            for split in range(0, splits):
                highest = tl.maximum(
                    highest, tl.load(tops + split * padded + rows, mask=live, other=float("-inf"))
                )
        for split in range(0, splits):
            same_sum += tl.load(same_sums + split * padded + rows, mask=live, other=1)
            part = tl.load(other_sums + split * padded + rows, mask=live, other=1)
            if NEGATIVES:
                here = tl.load(tops + split * padded + rows, mask=live, other=float("-inf"))
                part *= tl.where(here == float("-inf"), 0.0, _exp(here - highest, rate))
            other_sum += part
        if NEGATIVES:
            natural = rate * 0.6931471805599453
            value = log(other_sum) - log(same_sum) + (highest - row_own) * natural
            row_pull = tl.div_rn(-1.0, same_sum)
            row_push = tl.div_rn(1.0, other_sum)
            tl.store(top + rows, highest, mask=live)
        else:
            value = log1p(tl.div_rn(other_sum, same_sum))
            row_pull = tl.div_rn(-other_sum, same_sum * (same_sum + other_sum))
            row_push = tl.div_rn(1.0, same_sum + other_sum)
        tl.store(pull + rows, row_pull, mask=live)
        tl.store(push + rows, row_push, mask=live)
        if log_pull is not None:
            inside = rows < padded
            bits = 1.4426950408889634
            tl.store(
                log_pull + rows,
                tl.where(live, log(-row_pull) * bits - row_own * rate, float("-inf")),
                mask=inside,
            )
            shift = highest if NEGATIVES else row_own
            tl.store(
                log_push + rows,
                tl.where(live, log(row_push) * bits - shift * rate, float("-inf")),
                mask=inside,
            )
        total += tl.where(live, value, 0.0)
        largest = tl.maximum(largest, tl.where(live, -row_pull * same_sum, 0.0))
    tl.store(loss, tl.sum(total) * share)
    # A weight is at most twice `largest`, the sum of a row's pulls and of its pushes.
    tl.store(power, power_of_two_over(tl.max(largest), 12))


@triton.jit
def _gradient_kernel(
    grad,
    hi,
    lo,
    of,
    labels,
    similarity,
    power,
    B,
    D,
    padded,
    width,
    rate,
    factor,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    BD: tl.constexpr,
):
    """[BM, BD] of df = (G - (G . z) z) / ||f||, G = W z; G . z = sum_j W_ij s_ij needs no other
    part of the row. of: Rows.
    """
    rows = tl.program_id(0) * BM + tl.arange(0, BM)
    d = tl.program_id(1) * BD + tl.arange(0, BD)
    known = rows < B
    row_labels = tl.load(labels + rows, mask=known, other=0)[:, None]
    row_own = tl.load(of.own + rows)[:, None]
    row_top = tl.load(of.top + rows, mask=known, other=0)[:, None]
    row_pull = tl.load(of.pull + rows, mask=known, other=0)[:, None]
    row_push = tl.load(of.push + rows, mask=known, other=0)[:, None]
    scale = tl.load(power)
    g = tl.zeros((BM, BD), tl.float32)
    along = tl.zeros((BM,), tl.float32)
    for first in range(0, padded, BN):
        columns = first + tl.arange(0, BN)
        live = columns < B
        if similarity is not None:
            s = tl.load(similarity + rows[:, None].to(tl.int64) * padded + columns[None, :])
        else:
            s = _similarities(hi, lo, of.inverse, of.own, rows, columns, width, BM, BN, BK)
        same = row_labels == tl.load(labels + columns, mask=live, other=0)[None, :]
        mine = tl.where(same, row_pull, row_push) * _exp(s - tl.where(same, row_own, row_top), rate)
        shift = tl.where(
            same,
            tl.load(of.own + columns)[None, :],
            tl.load(of.top + columns, mask=live, other=0)[None, :],
        )
        theirs = tl.where(
            same,
            tl.load(of.pull + columns, mask=live, other=0)[None, :],
            tl.load(of.push + columns, mask=live, other=0)[None, :],
        )
        w = tl.where(live[None, :], mine + theirs * _exp(s - shift, rate), 0.0)
        along += tl.sum(w * s, 1)
        # inverse is in (2^-13, 2^-12]
        w *= (tl.load(of.inverse + columns) * (scale * 4096))[None, :]
        w_hi = w.to(tl.float16)
        w_lo = (w - w_hi.to(tl.float32)).to(tl.float16)
        tile = columns[:, None].to(tl.int64) * width + d[None, :]
        inside = (d < width)[None, :]
        z_hi = tl.load(hi + tile, mask=inside, other=0)
        g = tl.dot(w_hi, z_hi, g, input_precision="ieee")
        g = tl.dot(w_lo, z_hi, g, input_precision="ieee")
        if lo is not None:
            g = tl.dot(w_hi, tl.load(lo + tile, mask=inside, other=0), g, input_precision="ieee")
    inside = known[:, None] & (d < D)[None, :]
    mine = rows[:, None].to(tl.int64) * width + d[None, :]
    z = tl.load(hi + mine, mask=inside, other=0).to(tl.float32)
    if lo is not None:
        z += tl.load(lo + mine, mask=inside, other=0).to(tl.float32)
    z *= tl.load(of.inverse + rows)[:, None]
    g *= tl.div_rn(1.0, scale * 4096)
    out = (g - along[:, None] * z) * tl.div_rn(factor, tl.load(of.norms + rows))[:, None]
    tl.store(grad + rows[:, None].to(tl.int64) * D + d[None, :], out, mask=inside)


@triton.jit
def _resident_gradient_kernel(
    parts,
    along,
    hi,
    inverse,
    log_pull,
    log_push,
    labels,
    power,
    B,
    padded,
    rate,
    tiles,
    BM: tl.constexpr,
    BN: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """[BM, WIDTH] of G = W z over `tiles` column tiles, and of G . z, both to be scaled by
    _project_kernel.

    W_ij = +-(exp2(s_ij / t + a_i) + exp2(s_ij / t + a_j)), in logarithms to base 2, a of the pair's
    kind."""
    rows = tl.program_id(0) * BM + tl.arange(0, BM)
    split = tl.program_id(1).to(tl.int64)
    d = tl.arange(0, WIDTH)
    row_labels = tl.load(labels + rows, mask=rows < B, other=0)
    row_pull = tl.load(log_pull + rows)
    row_push = tl.load(log_push + rows)
    row_rate = tl.load(inverse + rows) * rate
    scale = tl.load(power) * 4096
    mine = _whole(hi, rows, WIDTH)
    g = tl.zeros((BM, WIDTH), tl.float32)
    dot = tl.zeros((BM,), tl.float32)
    for tile in range(split * tiles, tl.minimum((split + 1) * tiles, padded // BN)):
        columns = tile * BN + tl.arange(0, BN)
        theirs = _whole(hi, columns, WIDTH)
        raw = tl.dot(mine, theirs.T, input_precision="ieee")
        column_inverse = tl.load(inverse + columns)[None, :]
        same = row_labels[:, None] == tl.load(labels + columns, mask=columns < B, other=0)[None, :]
        logit = raw * row_rate[:, None] * column_inverse
        w = tl.exp2(logit + tl.where(same, row_pull[:, None], row_push[:, None]))
        w += tl.exp2(
            logit
            + tl.where(
                same, tl.load(log_pull + columns)[None, :], tl.load(log_push + columns)[None, :]
            )
        )
        w *= column_inverse * scale  # inverse is in (2^-13, 2^-12]
        w = tl.where((columns < B)[None, :], tl.where(same, -w, w), 0.0).to(
            tl.float16
        )  # a row's coefficient alone may overflow
        dot += tl.sum(w.to(tl.float32) * raw, 1)
        g = tl.dot(w, theirs, g, input_precision="ieee")
    tl.store(parts + (split * B + rows[:, None]) * WIDTH + d[None, :], g, mask=(rows < B)[:, None])
    tl.store(along + split * padded + rows, dot)


@triton.jit
def _project_kernel(
    grad,
    parts,
    along,
    hi,
    inverse,
    norms,
    power,
    B,
    D,
    padded,
    width,
    splits,
    factor,
    ROWS: tl.constexpr,
    BD: tl.constexpr,
):
    """df = (G - (G . z) z) / ||f|| of the sums of the parts, in order; grad may be the only part of
    rows without padding.
    """
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    d = tl.program_id(1) * BD + tl.arange(0, BD)
    inside = (rows < B)[:, None] & (d < D)[None, :]
    at = rows[:, None] * width + d[None, :]
    g = tl.zeros((ROWS, BD), tl.float32)
    dot = tl.zeros((ROWS,), tl.float32)
    source = parts + at
    for split in range(0, splits):
        g += tl.load(source, mask=inside, other=0)
        dot += tl.load(along + split * padded + rows)
        source += B * width  # several parts are of at most 8,192 rows
    row_inverse = tl.load(inverse + rows)
    z = tl.load(hi + at, mask=inside, other=0).to(tl.float32) * row_inverse[:, None]
    out = (g - (dot * row_inverse)[:, None] * z) * tl.div_rn(
        factor, tl.load(power) * 4096
    )  # divided twice: the product may be inf
    out *= tl.div_rn(1.0, tl.load(norms + rows))[:, None]
    tl.store(grad + rows[:, None] * D + d[None, :], out, mask=inside)


def nt_xent(features, labels, temperature, denominator, want_grad):
    b, d = features.shape
    device = features.device
    loss = torch.empty((), dtype=torch.float32, device=device)
    grad = torch.empty((b, d) if want_grad else (0,), dtype=torch.float32, device=device)
    if b == 0:
        return loss.fill_(torch.nan), grad
    if d > 1 and features.stride(1) != 1:
        features = features.contiguous()
    pieces = 2 if features.dtype == torch.float32 else 1
    width = triton.cdiv(max(d, 1), WIDTH) * WIDTH
    form = "stored" if b <= STORED_ROWS else "recomputed"
    resident = (
        form == "recomputed"
        and pieces == 1
        and width <= max(RESIDENT_SUMS)
        and capability(features)[0] == 9
    )
    if resident:
        width = triton.next_power_of_2(width)
        sums, gradient = RESIDENT_SUMS[width], RESIDENT_GRADIENT[width]
    else:
        sums, gradient = SUMS[form, pieces], GRADIENT[form, pieces]
    padded = triton.cdiv(b, sums["BM"]) * sums["BM"]
    row_tiles, column_tiles = padded // sums["BM"], padded // sums["BN"]
    per_split = triton.cdiv(column_tiles, triton.cdiv(PROGRAMS, row_tiles))
    splits = triton.cdiv(column_tiles, per_split)
    negatives = denominator == "negatives"

    halves = torch.empty((pieces, padded, width), dtype=torch.float16, device=device)
    hi, lo = halves[0], halves[1] if pieces == 2 else None
    inverse, norms, own, top, pull, push, power, log_pull, log_push = torch.empty(
        (9, padded), dtype=torch.float32, device=device
    )
    log_pull, log_push = (log_pull, log_push) if resident else (None, None)
    top = top if negatives else own
    same_sums, other_sums, tops = torch.empty(
        (3, splits, padded), dtype=torch.float32, device=device
    )
    similarity = (
        torch.empty((padded, padded), dtype=torch.float32, device=device)
        if want_grad and form == "stored"
        else None
    )
    rate = math.log2(math.e) / temperature
    with on_device_of(features):
        _unit_kernel[(padded // UNIT["ROWS"],)](
            features, features.stride(0), hi, lo, inverse, norms, own, b, d, width, **UNIT
        )
        _sums_kernel[(row_tiles, splits)](
            hi,
            lo,
            inverse,
            own,
            labels,
            similarity,
            same_sums,
            other_sums,
            tops,
            b,
            padded,
            width,
            rate,
            per_split,
            NEGATIVES=negatives,
            RESIDENT=resident,
            **sums,
        )
        _coefficients_kernel[(1,)](
            own,
            same_sums,
            other_sums,
            tops,
            top,
            pull,
            push,
            log_pull,
            log_push,
            loss,
            power,
            b,
            padded,
            rate,
            1 / b,
            splits,
            NEGATIVES=negatives,
            BLOCK=1024,
            num_warps=8,
        )
        if grad.numel() and resident:
            _resident_gradient(
                grad,
                hi,
                inverse,
                norms,
                log_pull,
                log_push,
                labels,
                power,
                b,
                d,
                padded,
                width,
                rate,
                1 / (b * temperature),
                gradient,
            )
        elif grad.numel():
            _gradient_kernel[(padded // gradient["BM"], triton.cdiv(d, gradient["BD"]))](
                grad,
                hi,
                lo,
                Rows(inverse, norms, own, top, pull, push),
                labels,
                similarity,
                power,
                b,
                d,
                padded,
                width,
                rate,
                1 / (b * temperature),
                **gradient,
            )
    return loss, grad


def _resident_gradient(
    grad,
    hi,
    inverse,
    norms,
    log_pull,
    log_push,
    labels,
    power,
    b,
    d,
    padded,
    width,
    rate,
    factor,
    tile,
):
    row_tiles, column_tiles = padded // tile["BM"], padded // tile["BN"]
    per_split = triton.cdiv(column_tiles, triton.cdiv(RESIDENT_PROGRAMS, row_tiles))
    splits = triton.cdiv(column_tiles, per_split)
    parts = grad if splits == 1 and d == width else grad.new_empty((splits, b, width))
    along = grad.new_empty((splits, padded))
    _resident_gradient_kernel[(row_tiles, splits)](
        parts,
        along,
        hi,
        inverse,
        log_pull,
        log_push,
        labels,
        power,
        b,
        padded,
        rate,
        per_split,
        **tile,
    )
    _project_kernel[(padded // PROJECT["ROWS"], triton.cdiv(d, PROJECT["BD"]))](
        grad,
        parts,
        along,
        hi,
        inverse,
        norms,
        power,
        b,
        d,
        padded,
        width,
        splits,
        factor,
        **PROJECT,
    )
