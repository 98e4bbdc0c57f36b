"""The poison step's loss and its feature gradient in one call: what the inner loop calls, without
autograd.
"""

import torch

from ..dispatch import checks, native, triton
from ..dispatch.registry import DOUBLES, FLOATS, Impl, define
from ..reference.mi_ue_value_and_grad import formula
from ..reference.mi_ue_value_and_grad import mi_ue_value_and_grad as reference
from ..support import messages
from . import _loss

define(
    (
        "mi_ue_value_and_grad(Tensor features, Tensor labels, float temperature, float zeta, "
        "str denominator, bool normalize_dim, str backend) -> (Tensor, Tensor)"
    ),
    reference=reference,
    truth=_loss.truth(formula, drop=0),
    fake=lambda features, *args: _loss.fake(features, None, True, None),
    kind="loss",
    dtypes=DOUBLES,
    impls=[
        Impl("triton", triton.lazy("mi_ue_value_and_grad"), triton.DEVICES, FLOATS, triton.missing),
        Impl("cuda", native.mi_ue_value_and_grad, frozenset({"cuda"}), FLOATS, native.cuda_missing),
        Impl("cpu", native.mi_ue_value_and_grad, frozenset({"cpu"}), DOUBLES, native.cpu_missing),
    ],
    route=_loss.route("mi_ue_value_and_grad"),
)


def mi_ue_value_and_grad(
    features: torch.Tensor,
    labels: torch.Tensor,
    temperature: float = 0.1,
    zeta: float = 0.1,
    *,
    denominator: str = "all",
    normalize_dim: bool = True,
    backend: str = "auto",
) -> tuple[torch.Tensor, torch.Tensor]:
    """Loss nt_xent + zeta * intra_class_distance of a batch and its gradient, without autograd.

    Args:
        features: [B, D] float32, float16, bfloat16 (float64 on the CPU). A Hopper rounds large
            batches as in `nt_xent`.
        labels: [B], any integer dtype, any values.
        temperature, denominator: as in `nt_xent`. normalize_dim: as in `intra_class_distance`.
        zeta: weight of the distance term; at 0 the term is not computed.
        backend: "auto", "triton", "cuda", "cpu" or "reference".

    Returns: (loss, grad): a scalar and d loss / d features [B, D], both float32 (float64 for
        float64). Scale the gradient before you round it to float16, or its smallest values are
        lost.
    Deterministic on one machine and thread count. Errors: ValueError, BackendError as in `nt_xent`.
    """
    op, limit = "mi_ue_value_and_grad", torch.finfo(torch.float64).max
    temperature = checks.temperature(op, temperature)
    zeta = checks.number(op, "zeta", zeta, "a finite number", -limit, limit)
    checks.denominator(op, denominator)
    labels = checks.features_and_labels(op, features, labels)
    if checks.transformed() and checks.differentiated(features):
        messages.fail(
            op,
            "features",
            (
                "no derivative (the gradient is returned; "
                "use nt_xent and intra_class_distance under torch.func, or detach them)"
            ),
            "features that one is taken of",
        )
    with torch.no_grad():
        return torch.ops.miue_fast.mi_ue_value_and_grad(
            features.detach(), labels, temperature, zeta, denominator, bool(normalize_dim), backend
        )
