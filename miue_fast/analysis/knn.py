"""Mutual information of one-dimensional projections from nearest neighbours."""

import math

import torch

from .slices import pairs, standard, without_itself


def knn(u: torch.Tensor, v: torch.Tensor, *, k: int) -> torch.Tensor:
    """Estimator 1 of Kraskov, Stoegbauer and Grassberger (Phys. Rev. E 69, 2004) in nats, float64
    [S], of each row pair of [S, N].

    psi(k) + psi(N) - mean_i psi(n_u + 1) + psi(n_v + 1): n counts the points closer in one
    coordinate than the k-th neighbour in both (maximum norm, standardised coordinates), counted
    exactly and without the point itself. Where k or more points coincide with point i,
    the radius is 0: k is then their number, and n counts the points that are equal in one
        coordinate (Gao et al., NeurIPS 2017).
    """
    points = u.shape[1]
    total = torch.zeros(len(u), dtype=torch.float64, device=u.device)
    for some, block, du, dv in pairs(standard(u), standard(v)):
        du, dv = du.abs_(), dv.abs_()
        both = without_itself(torch.maximum(du, dv), block, math.inf)
        radius = (
            both.topk(k, largest=False, sorted=False)
            .values.amax(2, keepdim=True)
            .clamp_min(torch.finfo(du.dtype).tiny)
        )
        total[some] += (both < radius).sum(2).clamp_min(k).double().digamma().sum(1)
        for distance in (du, dv):
            closer = (distance < radius).sum(
                2
            )  # with the point itself, which is the + 1 of the formula
            total[some] -= closer.double().digamma().sum(1)
    return total / points + torch.tensor(float(points), dtype=torch.float64).digamma().item()
