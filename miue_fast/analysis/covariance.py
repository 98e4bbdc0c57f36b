"""Class-conditional covariance of features in three numbers: trace, log-determinant, effective
rank.
"""

import math
from dataclasses import asdict, dataclass
from typing import Any

import torch

from ..dispatch.checks import features_and_labels
from ..ops import class_covariance
from ..support.calls import ordinary
from ..support.messages import fail

OP = "class_covariance_summary"


@dataclass(frozen=True)
class ClassRow:
    """One class; `label` as given, `shrinkage` from 0 (the sample covariance) to 1 (a multiple of
    the identity).
    """

    label: int
    count: int
    trace: float
    logdet: float
    effective_rank: float
    shrinkage: float


@dataclass(frozen=True)
class CovarianceSummary:
    """Means over the classes, each class counted once, and the classes themselves."""

    trace: float
    logdet: float
    effective_rank: float
    classes: list[ClassRow]

    def to_dict(self) -> dict[str, Any]:
        """For JSON: the log-determinant of a class without any variance, -inf, becomes None."""
        found = asdict(self)
        for row in (found, *found["classes"]):
            row["logdet"] = row["logdet"] if math.isfinite(row["logdet"]) else None
        return found


@ordinary()
def class_covariance_summary(features: torch.Tensor, labels: torch.Tensor) -> CovarianceSummary:
    """Trace, log-determinant and effective rank of the covariance of features [N, D] inside each
    class, and their means over the classes.

    Covariances are normalised by 1 / n. Per class:
        trace: the mean squared distance to the class mean.
        logdet: of (1 - s) S + s m I, m = trace / D, the estimate of Ledoit and Wolf ("A
            well-conditioned estimator for large-dimensional covariance matrices", J. Multivar.
            Anal. 2004); S itself is singular where a class has at most D images. s = min(1, mean_i
            |x_i x_i' - S|^2 / (n |S - m I|^2)), x_i centred, Frobenius norms.
        effective_rank: exp of the entropy of S's normalised eigenvalues (Roy and Vetterli, EUSIPCO
            2007), 1 to min(D, n - 1).
    A class of equal features (collapsed, or dead) has trace 0, logdet -inf, effective rank 0 and s
    = 1.

    Args:
        features: float [N, D]. labels: integers [N] of the same device, any values; every class
            needs two images.

    Returns: a CovarianceSummary. Memory: K D^2 values, or n^2 where D is larger than every class (n
        images). Deterministic for one machine
    and thread count. Errors: ValueError.
    """
    labels = features_and_labels(OP, features, labels)
    if not torch.isfinite(features).all():
        fail(OP, "features", "finite values", "NaN or infinity")
    if not features.numel():
        fail(OP, "features", "one image and one feature at least", list(features.shape))
    features = features.detach()
    values, classes = labels.unique(return_inverse=True)
    features, counts = (
        features if features.dtype is torch.float64 else features.float(),
        classes.bincount(),
    )
    if counts.min() < 2:
        fail(
            OP,
            "labels",
            "two images of every class",
            f"one of class {values[counts.argmin()].item()}",
        )
    spectra = _gram_spectra if features.shape[1] > counts.max() else _spectra
    rows = [
        _row(*of_class)
        for of_class in zip(
            values.tolist(), counts.tolist(), *spectra(features, classes, len(counts))
        )
    ]
    return CovarianceSummary(
        *(
            sum(getattr(row, what) for row in rows) / len(rows)
            for what in ("trace", "logdet", "effective_rank")
        ),
        rows,
    )


def _spectra(features, classes, count):
    """Per class: mean of |x_i|^4, x_i centred, and the D eigenvalues of its covariance."""
    _, means, covariances = class_covariance(features, classes, count)
    fourth = (features - means[classes]).double().square().sum(1).square()
    return [fourth[classes == k].mean().item() for k in range(count)], [
        torch.linalg.eigvalsh(c.double()) for c in covariances
    ]


def _gram_spectra(features, classes, count):
    """The same where D is larger than every class: the n x n Gram matrix has the eigenvalues that
    are not 0, in D^2 / n^2 of the time.
    """
    fourth, spectra = [], []
    for k in range(count):
        rows = features[classes == k].double()
        rows = rows - rows[0]  # first: equal rows leave exact zeros
        rows = rows - rows.mean(0)
        fourth.append(rows.square().sum(1).square().mean().item())
        some = torch.linalg.eigvalsh(rows @ rows.T / len(rows))
        spectra.append(torch.cat([some.new_zeros(rows.shape[1] - len(rows)), some]))
    return fourth, spectra


def _row(label, count, fourth, eigenvalues):
    eigenvalues = eigenvalues.clamp_min(0)
    trace, squares, width = (
        eigenvalues.sum().item(),
        eigenvalues.square().sum().item(),
        len(eigenvalues),
    )
    if trace == 0:
        return ClassRow(label, count, 0.0, -math.inf, 0.0, 1.0)
    mean = trace / width
    distance = squares - width * mean**2  # |S - m I|^2
    noise = (fourth - squares) / count  # mean_i |x_i x_i' - S|^2 / n
    shrinkage = min(1.0, noise / distance) if distance > 0 else 1.0
    share = eigenvalues / trace
    rank = math.exp(-torch.special.xlogy(share, share).sum().item())
    logdet = ((1 - shrinkage) * eigenvalues + shrinkage * mean).log().sum().item()
    return ClassRow(label, count, trace, logdet, rank, shrinkage)
