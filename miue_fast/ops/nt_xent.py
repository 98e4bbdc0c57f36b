"""NT-Xent with several positives: mean_i -log(P_i / A_i) over cosine similarities."""

import torch

from ..dispatch import checks, native, triton
from ..dispatch.registry import DOUBLES, FLOATS, Impl, define
from ..reference.nt_xent import formula
from ..reference.nt_xent import nt_xent as reference
from ..support import messages
from . import _loss

define(
    (
        "nt_xent(Tensor features, Tensor labels, float temperature, str denominator, "
        "bool want_grad, str backend) -> (Tensor, Tensor)"
    ),
    reference=reference,
    truth=_loss.truth(formula, drop=1),
    fake=_loss.fake,
    kind="loss",
    dtypes=DOUBLES,
    impls=[
        Impl("triton", triton.lazy("nt_xent"), triton.DEVICES, FLOATS, triton.missing),
        Impl("cuda", native.nt_xent, frozenset({"cuda"}), FLOATS, native.cuda_missing),
        Impl("cpu", native.nt_xent, frozenset({"cpu"}), DOUBLES, native.cpu_missing),
    ],
    route=_loss.route("nt_xent"),
)
_scalar = _loss.differentiable_in_features("nt_xent")


def nt_xent(
    features: torch.Tensor,
    labels: torch.Tensor,
    temperature: float | None = None,
    *,
    denominator: str = "all",
    backend: str = "auto",
    t: float | None = None,
) -> torch.Tensor:
    """NT-Xent loss of a batch, differentiable in `features`.

    mean_i log(A_i / P_i), P_i = sum_{j: y_j = y_i} exp(cos(f_i, f_j) / t), A_i = the same sum over
    all j, the pair (i, i) included in both (MI-UE, ICLR 2026). denominator="negatives": A_i sums
    over the pairs of other classes only; a batch of one class then gives -inf.

    Args:
        features: [B, D] float32, float16, bfloat16 (float64 on the CPU). Norms are clamped at 1e-8
            (the gradient of a row below that is projected like any other row's, which the clamped
            formula would not do), and may be as large as the dtype's numbers. Where a row's norm is
            too large for the dtype, the loss is right or, in CUDA C++, NaN. Gradients are float32
            (float64 for float64) until they have been multiplied by the gradient of the loss, so
            that those of float16 features do not underflow with loss scaling. On a Hopper the
            pairs' weights are rounded to float16 (2^-11 each), and a cosine is one sum of tensor
            cores (at most 2^-18 of it is lost), for half-precision rows of at most 512 columns:
            Triton above 2,048 rows, CUDA C++ above 512.
        labels: [B], any integer dtype, any values.
        temperature: a number from 1e-3 to 10, 0.1 if it is not given. `t` is another name for it;
            both at once are refused, and so are tensors: the loss is not differentiable in it.
        backend: "auto", "triton", "cuda", "cpu" or "reference".

    Derivatives: once, backward (autograd, torch.func.grad, vjp, jacrev) or in forward mode (jvp,
        jacfwd); a second one raises RuntimeError.
        vmap calls the op for one batch after the other.
    Returns: a scalar, float32 (float64 for float64). An empty batch gives NaN, NaN features give
        NaN.
    Memory: O(B * D) and at most 32 MB. Deterministic: the same input gives the same bits on one
        machine and thread count.
    Errors: ValueError (shape, dtype, device, temperature), BackendError (the backend cannot serve
        this here).
    """
    if t is not None:
        if temperature is not None:
            messages.fail(
                "nt_xent",
                "temperature and t",
                "one of the two (they are names for the same number)",
                "both",
            )
        temperature = t
    temperature = checks.temperature("nt_xent", 0.1 if temperature is None else temperature)
    labels = checks.features_and_labels("nt_xent", features, labels)
    checks.denominator("nt_xent", denominator)
    return _scalar(features, labels, temperature, denominator, backend)
