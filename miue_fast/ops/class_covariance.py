"""Count, mean and covariance of every class: what the analysis of features sums over a whole data
set.
"""

import torch

from ..dispatch import checks, native, triton
from ..dispatch.registry import DOUBLES, FLOATS, Impl, define
from ..reference.class_covariance import class_covariance as _reference
from ..support import messages

OP = "class_covariance"


def _check(features, labels, num_classes):
    if labels.numel():
        low, high = labels.aminmax()
        low, high = (
            (low.item(), high.item())
            if labels.device.type == "cpu"
            else torch.stack((low, high)).tolist()
        )  # one wait on a GPU
        if low < 0 or high >= num_classes:
            messages.fail(OP, "labels", f"values from 0 to {num_classes - 1}", f"{low} to {high}")


def _fake(features, labels, num_classes, backend):
    wide = torch.float64 if features.dtype == torch.float64 else torch.float32
    width = features.shape[1]
    sizes = (num_classes, width), (num_classes, width, width)
    return labels.new_empty(num_classes), *(features.new_empty(size, dtype=wide) for size in sizes)


define(
    (
        f"{OP}(Tensor features, Tensor labels, int num_classes, str backend) "
        "-> (Tensor, Tensor, Tensor)"
    ),
    reference=_reference,
    fake=_fake,
    kind="statistics",
    dtypes=DOUBLES,
    check=_check,
    impls=[
        Impl("triton", triton.lazy(OP), triton.DEVICES, FLOATS, triton.missing),
        Impl("cuda", native.class_covariance, frozenset({"cuda"}), FLOATS, native.cuda_missing),
        Impl("cpu", native.class_covariance, frozenset({"cpu"}), DOUBLES, native.cpu_missing),
    ],
)


def class_covariance(
    features: torch.Tensor,
    labels: torch.Tensor,
    num_classes: int | None = None,
    *,
    backend: str = "auto",
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Count, mean and covariance of the features of every class.

    C_k = 1/n_k sum_{i: y_i = k} (f_i - m_k) (f_i - m_k)^T with the class mean m_k, in two passes:
    the difference of the sum of squares and the squared mean cancels where classes have collapsed,
    which is where MI-UE ends. Means are summed in float64, products in float32 (float64 for
    float64).

    Args:
        features: [B, D] float32, float16, bfloat16 (float64 on the CPU), any strides.
        labels: [B], any integer dtype, values from 0 to num_classes - 1.
        num_classes: K, or None for the largest label + 1.
        backend: "auto", "triton", "cuda", "cpu" or "reference".

    Returns: counts int64 [K], means [K, D] and covariances [K, D, D], float32 (float64 for
        float64). An empty class has 0 everywhere; NaN features give NaN in their class. Triton and
        CUDA C++ give inf where a class's sum of products is beyond float32 (values above about
        1e19); the others do so only where the covariance is. A covariance is symmetric to the bit,
        and 0 where all rows of a class are equal.
    Memory: the result has K * D^2 values; the CPU needs O(B * D) more. Deterministic: the same bits
        on one machine for any thread count.
    Not differentiable: features that require a gradient are refused. On a GPU the check of the
        labels waits for the device.
    Errors: ValueError (shape, dtype, device, values of the labels), BackendError (the backend
        cannot serve this here).
    """
    labels = checks.features_and_labels(OP, features, labels)
    checks.no_gradient(OP, features=features)  # an autograd rule that says so costs every call 9 us
    if num_classes is None:
        num_classes = int(labels.max()) + 1 if len(labels) else 0
    if isinstance(num_classes, bool) or not isinstance(num_classes, int) or num_classes < 0:
        messages.fail(
            OP,
            "num_classes",
            "a whole number from 0, or None",
            f"{type(num_classes).__name__} {num_classes!r}",
        )
    return torch.ops.miue_fast.class_covariance(features, labels, num_classes, backend)
