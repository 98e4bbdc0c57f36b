"""The within-class distance term of MI-UE ("l2sim" in existing scripts)."""

import torch

from ..dispatch import checks, native, triton
from ..dispatch.registry import DOUBLES, FLOATS, Impl, define
from ..reference.intra_class_distance import formula
from ..reference.intra_class_distance import intra_class_distance as reference
from . import _loss

define(
    (
        "intra_class_distance(Tensor features, Tensor labels, bool normalize_dim, bool want_grad, "
        "str backend) -> (Tensor, Tensor)"
    ),
    reference=reference,
    truth=_loss.truth(formula, drop=1),
    fake=_loss.fake,
    kind="loss",
    dtypes=DOUBLES,
    impls=[
        Impl("triton", triton.lazy("intra_class_distance"), triton.DEVICES, FLOATS, triton.missing),
        Impl("cuda", native.intra_class_distance, frozenset({"cuda"}), FLOATS, native.cuda_missing),
        Impl("cpu", native.intra_class_distance, frozenset({"cpu"}), DOUBLES, native.cpu_missing),
    ],
)
_scalar = _loss.differentiable_in_features("intra_class_distance")


def intra_class_distance(
    features: torch.Tensor,
    labels: torch.Tensor,
    *,
    normalize_dim: bool = True,
    backend: str = "auto",
) -> torch.Tensor:
    """Within-class distance of a batch, differentiable in `features`.

    mean_i log(1 + s * sum_{j: y_j = y_i} ||f_i - f_j||_2), s = 1/D with `normalize_dim`, else 1
    (MI-UE, ICLR 2026). Differences are taken directly in fp32, inside a class only; a pair at
    distance 0, or below the smallest normal number (1.2e-38 in float32), has gradient 0. Right for
    distances of any other size whose sum over a class is a number of the result's dtype
    (Triton: with more than 2,048 columns for distances from 1e-18 to 1e19).

    Args:
        features: [B, D] float32, float16, bfloat16 (float64 on the CPU), not normalised. Gradients
            as in `nt_xent`.
        labels: [B], any integer dtype, any values.
        backend: "auto", "triton", "cuda", "cpu" or "reference".

    Derivatives: as in `nt_xent`.
    Returns: a scalar, float32 (float64 for float64). An empty batch gives NaN, NaN features give
        NaN.
    Memory: O(B * D). Deterministic on one machine and thread count.
    Errors: ValueError (shape, dtype, device), BackendError (the backend cannot serve this here).
    """
    labels = checks.features_and_labels("intra_class_distance", features, labels)
    return _scalar(features, labels, bool(normalize_dim), backend)


def l2sim(features: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """`intra_class_distance(features, labels)` under the name that existing MI-UE scripts call."""
    return intra_class_distance(features, labels)
