"""Mutual information of one-dimensional projections by counting in bins."""

import torch


def terrell_scott(points: int) -> int:
    """ceil((2 N)^(1/3)) bins (Terrell and Scott, "Oversmoothed nonparametric density estimates",
    JASA 1985).
    """
    bins = 1
    while bins**3 < 2 * points:
        bins += 1
    return bins


def histogram(u: torch.Tensor, v: torch.Tensor, *, bins: int, miller_madow: bool) -> torch.Tensor:
    """Plug-in mutual information in nats, float64 [S], of each row pair of u and v [S, N] over bins
    x bins cells of equal frequency.
    """
    slices, points = u.shape
    row = torch.arange(slices, device=u.device)[:, None]
    cells = (row * bins + _ranks(u, bins)) * bins + _ranks(v, bins)
    joint = torch.bincount(cells.flatten(), minlength=slices * bins * bins).view(slices, bins, bins)

    def entropy(counts):
        share = counts.flatten(1).double() / points
        plain = -torch.special.xlogy(share, share).sum(1)
        return plain + ((share > 0).sum(1).double() - 1) / (2 * points) if miller_madow else plain

    return entropy(joint.sum(2)) + entropy(joint.sum(1)) - entropy(joint)


def _ranks(values, bins):
    """The bin of each value, int64 [S, N]: the edges are sample quantiles, and equal values share a
    bin.
    """
    at = torch.arange(1, bins, device=values.device) * values.shape[1] // bins
    return torch.searchsorted(
        values.sort(1).values[:, at].contiguous(), values.contiguous(), right=True
    )
