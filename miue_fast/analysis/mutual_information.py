"""Sliced mutual information between two sets of features, by four estimators."""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch

from ..dispatch.registry import DOUBLES
from ..support.calls import ordinary
from ..support.messages import describe, fail
from .histogram import histogram, terrell_scott
from .kde import kde, scott
from .knn import knn
from .mine import mine
from .slices import PIECE, parts, slice_directions, standard

OP = "mutual_information"
ESTIMATORS = {"histogram": histogram, "kde": kde, "knn": knn, "mine": mine}
LEAST = 20  # points


@dataclass(frozen=True)
class MutualInformation:
    """Sliced mutual information in nats.

    value: mean over the slices. stderr: standard error of that mean over the slices (None for one
        slice): it covers the choice of
    directions, not the choice of points. per_slice: float64 [S] on the CPU. options: what the
    numbers depend on besides the data."""

    value: float
    stderr: float | None
    per_slice: torch.Tensor
    estimator: str
    options: dict

    def to_dict(self) -> dict[str, Any]:
        """Everything but `per_slice`, for JSON."""
        return {
            "value": self.value,
            "stderr": self.stderr,
            "estimator": self.estimator,
            "options": self.options,
        }


@ordinary()
def mutual_information(
    x: torch.Tensor,
    y: torch.Tensor,
    estimator: str = "histogram",
    *,
    slices: int = 200,
    shared: bool = True,
    seed: int = 0,
    bins: int | None = None,
    miller_madow: bool = True,
    bandwidth: float | None = None,
    k: int = 3,
    hidden: int = 16,
    steps: int = 300,
    batch: int = 512,
) -> MutualInformation:
    """Sliced mutual information of paired samples: the mean over random directions of I(theta . x;
    phi . y), in nats.

    (Goldfeld and Greenewald, "Sliced Mutual Information", NeurIPS 2021.) In more than a few
    dimensions I(x; y) itself cannot be estimated from thousands of points; each slice is a problem
    of one dimension by one. SI <= I, and SI = 0 only where x and y are independent.

    Args:
        x, y: float [N, D] and [N, E] of one device, row i of x belongs to row i of y; N >= 20.
            Computed in float32.
        estimator: one of the four below.
        slices: number of directions, uniform on the sphere.
        shared: one direction for both, theta = phi (D = E): clean and poisoned features live in one
            space. False: independent ones, as in the paper, whose value falls with 1 / D.
        seed: of the directions, and of MINE's weights and batches.
        bins, miller_madow: histogram. bandwidth: kde. k: knn. hidden, steps, batch: mine. Each
            estimator reads its own.

    Estimators, with what was measured on Gaussians of N = 2000 at correlation 0.5 / 0.7 / 0.9 (I =
    0.144 / 0.337 / 0.830; more in benchmarks/results/mi_gaussian.json) and the time of one slice
    there on one CPU core:
        "histogram": counts in bins x bins cells of equal frequency (None: Terrell and Scott 1985,
        ceil((2 N)^(1/3)) bins). Cells of equal
            frequency, because mutual information does not change under monotone maps and so neither
            do they: no range, no clipping, no bins emptied by an outlier; equal values stay
                together. `miller_madow` adds (occupied cells - 1) / (2 N) to each
            entropy (Miller 1955); without it the estimate is (bins - 1)^2 / (2 N) too high. -2 / -3
            / -6 %: what varies inside a bin is not seen, the more the stronger the dependence (-14
            % at 0.99). 0.5 ms: the one for many slices.
        "kde": Gaussian kernels, leave-one-out, with the sample's covariance as shape (None: Scott's
        rule, N^(-1/6) deviations).
            -6 / -2 / -1 %: the joint density is noisier than its marginals, and the logarithm turns
            noise into a deficit of about 0.01 nats. O(N^2) time: 50 ms.
        "knn": Kraskov, Stoegbauer and Grassberger 2004, estimator 1, `k` neighbours. +1 / +1 / +1
        %, with the largest spread
            between samples (13 / 7 / 3 % of a single slice). O(N^2) time: 45 ms.
        "mine": Belghazi et al. 2018, a small network per slice (`hidden` twice, `steps` batches of
        `batch`), judged on a held-out quarter.
            -4 / -3 / -2 %: a lower bound. 100 ms (500 ms where few slices train together).
    All in pieces of a few MB: the memory does not grow with `slices` or with N^2. 100 slices of N =
        2000 take 0.06 s (histogram), 5 s
    (kde, knn) and 11 s (mine) on one core; 500 slices of 3000 x 512 features take 0.5 s
    (histogram).

    An identical pair (x is y) has infinite mutual information when it is continuous; what is
    returned then is the estimator's resolution: "histogram" log(bins) + (bins - 1) / (2 N), "knn"
    psi(N) - psi(k), "kde" about log(N) + 1.8 (the share 1 - rho^2 is floored at N^-2), "mine" what
    its network reaches. A published figure for clean features against themselves that is finite,
    such as 0.71 nats,
    can only be of this kind: finite because of the bins, and comparable only between equal bins and
        equal N.

    Deterministic for one machine, thread count and set of arguments. Errors: ValueError.
    """
    _check(x, y, estimator, shared)
    points = len(x)
    own = _options(estimator, points, bins, miller_madow, bandwidth, k, hidden, steps, batch)
    _whole("slices", slices, 1)
    x, y = (_centred(name, side) for name, side in (("x", x), ("y", y)))
    theta, phi = (
        t.to(x.device)
        for t in slice_directions(x.shape[1], y.shape[1], slices, shared=shared, seed=seed)
    )
    width = own["hidden"] * max(2 * own["batch"], points) // 4 if estimator == "mine" else points
    extra = {"seed": seed} if estimator == "mine" else {}
    found = []
    with torch.no_grad():
        for some in parts(slices, PIECE[x.device.type] // width):
            u, v = standard(theta[some] @ x.T), standard(phi[some] @ y.T)
            found.append(ESTIMATORS[estimator](u, v, **own, **extra).cpu())
    per_slice = torch.cat(found)
    stderr = per_slice.std().item() / math.sqrt(slices) if slices > 1 else None
    options = {"points": points, "slices": slices, "shared": shared, "seed": seed, **own}
    return MutualInformation(per_slice.mean().item(), stderr, per_slice, estimator, options)


def gaussian_sliced_mi(
    cov_xx: torch.Tensor,
    cov_yy: torch.Tensor,
    cov_xy: torch.Tensor,
    theta: torch.Tensor,
    phi: torch.Tensor | None = None,
) -> torch.Tensor:
    """What `mutual_information` estimates, for jointly Gaussian (x, y): -0.5 log(1 - rho^2) of each
    slice in nats, float64 [S].

    rho = theta' cov_xy phi / sqrt(theta' cov_xx theta * phi' cov_yy phi).

    Args:
        cov_xx [D, D], cov_yy [E, E], cov_xy [D, E]: float, any scale.
        theta [S, D], phi [S, E] (None: theta): from `slice_directions`, with the arguments that
            `mutual_information` was given.
    """
    theta = theta.double()
    phi = theta if phi is None else phi.double()

    def form(left, matrix, right):
        return ((left @ matrix.double()) * right).sum(1)

    squared = form(theta, cov_xy, phi).square() / (
        form(theta, cov_xx, theta) * form(phi, cov_yy, phi)
    )
    return -torch.log1p(-squared) / 2


def _whole(name, value, least, most=None):
    if not isinstance(value, int) or value < least or (most is not None and value > most):
        fail(
            OP,
            name,
            f"a whole number >= {least}"
            if most is None
            else f"a whole number from {least} to {most}",
            repr(value),
        )


def _check(x, y, estimator, shared):
    for name, side in (("x", x), ("y", y)):
        if (
            not isinstance(side, torch.Tensor)
            or side.dim() != 2
            or side.dtype not in DOUBLES
            or not side.shape[1]
        ):
            fail(OP, name, "a float tensor [N, D]", describe(side))
    if len(x) < LEAST:
        fail(OP, "x", f"at least {LEAST} points", len(x))
    if len(y) != len(x) or y.device != x.device:
        fail(OP, "y", f"{len(x)} points on {x.device}", describe(y))
    if shared and x.shape[1] != y.shape[1]:
        fail(
            OP,
            "shared",
            "False for x and y of different widths",
            f"True with {x.shape[1]} and {y.shape[1]}",
        )
    check_estimators(OP, [estimator])


def check_estimators(op: str, names: Iterable[str]) -> None:
    for name in names:
        if name not in ESTIMATORS:
            fail(op, "estimator", " or ".join(map(repr, ESTIMATORS)), repr(name))


def _options(estimator, points, bins, miller_madow, bandwidth, k, hidden, steps, batch):
    """The options that the estimator reads, checked, None replaced."""
    if estimator == "histogram":
        bins = terrell_scott(points) if bins is None else bins
        _whole("bins", bins, 2, points)
        return {"bins": bins, "miller_madow": bool(miller_madow)}
    if estimator == "kde":
        bandwidth = scott(points) if bandwidth is None else bandwidth
        if not 0 < bandwidth < math.inf:
            fail(OP, "bandwidth", "a finite number > 0 (in deviations)", bandwidth)
        return {"bandwidth": bandwidth}
    if estimator == "knn":
        _whole("k", k, 1, points - 1)
        return {"k": k}
    for name, value, least in (("hidden", hidden, 1), ("steps", steps, 1), ("batch", batch, 2)):
        _whole(name, value, least)
    return {"hidden": hidden, "steps": steps, "batch": min(batch, points)}


def _centred(name, side):
    side = side if side.dtype is torch.float64 else side.float()
    centred = (side - side.mean(0)).float()
    if not torch.isfinite(centred).all():
        fail(OP, name, "finite values", "NaN or infinity")
    return centred
