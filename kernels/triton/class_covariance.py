"""Count, mean and covariance of every class on rows sorted by class: means in float64, then tiles
of centred products in fp32.
"""

import torch
import triton
import triton.language as tl

from ._common import on_device_of

MEAN = {"BM": 32, "BD": 64, "num_warps": 4}
TILE = {"BN": 64, "BK": 32, "num_warps": 4, "num_stages": 3}


@triton.jit
def _mean_kernel(features, offsets, means, rests, D, BM: tl.constexpr, BD: tl.constexpr):
    """Columns [BD] of the mean of one class, as a sum of two numbers: the rounding of one would be
    the spread of a collapsed class.
    """
    k = tl.program_id(0).to(tl.int64)
    d = tl.program_id(1) * BD + tl.arange(0, BD)
    begin = tl.load(offsets + k)
    end = tl.load(offsets + k + 1)
    total = tl.zeros((BM, BD), tl.float64)
    for first in range(begin, end, BM):
        rows = first + tl.arange(0, BM)
        inside = (rows < end)[:, None] & (d < D)[None, :]
        total += tl.load(features + rows[:, None] * D + d[None, :], mask=inside, other=0).to(
            tl.float64
        )
    mean = tl.sum(total, 0) / tl.maximum(end - begin, 1).to(tl.float64)
    high = mean.to(tl.float32)
    tl.store(means + k * D + d, high, mask=d < D)
    tl.store(rests + k * D + d, (mean - high.to(tl.float64)).to(tl.float32), mask=d < D)


@triton.jit
def _covariance_kernel(
    features, offsets, means, rests, covariances, D, BN: tl.constexpr, BK: tl.constexpr
):
    """One tile [BN, BN] of the upper triangle of one class, written to both places of the symmetric
    matrix.
    """
    k = tl.program_id(0).to(tl.int64)
    p = tl.program_id(1)
    q = tl.program_id(2)
    if p <= q:
        i = p * BN + tl.arange(0, BN)
        j = q * BN + tl.arange(0, BN)
        known_i = i < D
        known_j = j < D
        high_i = tl.load(means + k * D + i, mask=known_i, other=0)[None, :]
        low_i = tl.load(rests + k * D + i, mask=known_i, other=0)[None, :]
        high_j = tl.load(means + k * D + j, mask=known_j, other=0)[None, :]
        low_j = tl.load(rests + k * D + j, mask=known_j, other=0)[None, :]
        begin = tl.load(offsets + k)
        end = tl.load(offsets + k + 1)
        total = tl.zeros((BN, BN), tl.float32)
        for first in range(begin, end, BK):
            rows = first + tl.arange(0, BK)
            live = (rows < end)[:, None]
            a = tl.load(
                features + rows[:, None] * D + i[None, :], mask=live & known_i[None, :], other=0
            ).to(tl.float32)
            b = tl.load(
                features + rows[:, None] * D + j[None, :], mask=live & known_j[None, :], other=0
            ).to(tl.float32)
            b = tl.where(live, b - high_j - low_j, 0.0)  # 0 past the end, whatever `a` is there
            total = tl.dot((a - high_i - low_i).T, b, total, input_precision="ieee")
        total = tl.div_rn(
            total, tl.zeros((BN, BN), tl.float32) + tl.maximum(end - begin, 1).to(tl.float32)
        )
        upper = (i[:, None] <= j[None, :]) & known_j[None, :]
        matrix = covariances + k * D * D
        tl.store(matrix + i[:, None].to(tl.int64) * D + j[None, :], total, mask=upper)
        tl.store(matrix + j[None, :].to(tl.int64) * D + i[:, None], total, mask=upper)


def class_covariance(features, labels, num_classes):
    width = features.shape[1]
    device = features.device
    classes, order = torch.sort(labels, stable=True)
    offsets = torch.searchsorted(classes, torch.arange(num_classes + 1, device=device))
    features = features[order]
    means, rests = torch.empty((2, num_classes, width), dtype=torch.float32, device=device)
    covariances = torch.empty((num_classes, width, width), dtype=torch.float32, device=device)
    if covariances.numel():
        tiles = triton.cdiv(width, TILE["BN"])
        with on_device_of(features):
            _mean_kernel[(num_classes, triton.cdiv(width, MEAN["BD"]))](
                features, offsets, means, rests, width, **MEAN
            )
            _covariance_kernel[(num_classes, tiles, tiles)](
                features, offsets, means, rests, covariances, width, **TILE
            )
    return offsets.diff(), means, covariances
