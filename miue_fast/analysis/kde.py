"""Mutual information of one-dimensional projections from Gaussian kernel densities."""

import math

import torch

from .slices import pairs, standard, without_itself


def scott(points: int) -> float:
    """N^(-1/6): Scott's rule in two dimensions, in units of the sample's deviation (Scott,
    "Multivariate Density Estimation", 1992).
    """
    return points ** (-1 / 6)


def kde(u: torch.Tensor, v: torch.Tensor, *, bandwidth: float) -> torch.Tensor:
    """Leave-one-out mutual information in nats, float64 [S], of each row pair of u and v [S, N].

    mean_i log p(u_i, v_i) / (p(u_i) p(v_i)), each density from the other N - 1 points; the joint
    kernel has the covariance bandwidth^2 * Sigma, Sigma that of the sample, and the two others are
    its marginals. Written in decorrelated coordinates, the determinant of Sigma is the Gaussian
    part -0.5 log(1 - rho^2), the kernels give the rest."""
    points = u.shape[1]
    u, v = standard(u), standard(v)
    rho = (u.double() * v.double()).mean(1)
    rest = (1 - rho.square()).clamp_min(
        points**-2.0
    )  # N points do not resolve less than 1 / N of their spread
    w = ((v - rho[:, None] * u) / rest[:, None].sqrt()).to(u.dtype)
    scale = 1 / (math.sqrt(2) * bandwidth)
    ratio = torch.zeros_like(rho)

    def log_sum(exponent, block):
        return without_itself(exponent, block, -math.inf).logsumexp(2)

    for some, block, du, dv, dw in pairs(u * scale, v * scale, w * scale):
        du, dv, dw = du.square_(), dv.square_(), dw.square_()
        joint = (
            log_sum((du + dw).neg_(), block) - log_sum(du.neg_(), block) - log_sum(dv.neg_(), block)
        )
        ratio[some] += joint.double().sum(1)
    return ratio / points + math.log(points - 1) - rest.log() / 2
