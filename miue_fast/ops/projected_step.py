"""The projected sign step on the perturbation: functional, and in place on the poison store."""

import torch

from ..dispatch import checks, native, triton
from ..dispatch.registry import DOUBLES, FLOATS, Impl, define
from ..reference.projected_step import projected_step as reference
from ..reference.projected_step import projected_step_ as reference_
from ..support import messages, ranges

define(
    (
        "projected_step(Tensor delta, Tensor grad, Tensor image, float alpha, float eps, "
        "str backend) -> Tensor"
    ),
    reference=reference,
    fake=lambda delta, *args: torch.empty_like(delta, memory_format=torch.contiguous_format),
    kind="pointwise",
    dtypes=DOUBLES,
    impls=[
        Impl("triton", triton.lazy("projected_step"), triton.DEVICES, FLOATS, triton.missing),
        Impl("cuda", native.projected_step, frozenset({"cuda"}), FLOATS, native.cuda_missing),
        Impl("cpu", native.projected_step, frozenset({"cpu"}), DOUBLES, native.cpu_missing),
    ],
)

STORES = frozenset({torch.float32, torch.float16, torch.int8})


define(
    (
        "projected_step_(Tensor(a!) delta, Tensor? index, Tensor grad, Tensor images, "
        "Tensor? flip, float alpha, float eps, Tensor(b!)? nonfinite, Tensor? view, int grid, "
        "str backend) -> ()"
    ),
    reference=checks.with_row_numbers("projected_step_", reference_, store=0, index=1),
    fake=lambda *args: None,
    kind="pointwise",
    dtypes=STORES,
    mutates=(0, 7),
    impls=[
        Impl(
            "triton",
            triton.lazy("projected_step_", "projected_step"),
            triton.DEVICES,
            STORES,
            triton.missing,
        ),
        Impl("cuda", native.projected_step_, frozenset({"cuda"}), STORES, native.cuda_missing),
        Impl("cpu", native.projected_step_, frozenset({"cpu"}), STORES, native.cpu_missing),
    ],
)


def check_step(
    op: str,
    delta: torch.Tensor,
    index: torch.Tensor | None,
    images: torch.Tensor,
    flip: torch.Tensor | None,
    alpha: float,
    eps: float,
    nonfinite: torch.Tensor | None,
) -> tuple[torch.Tensor | None, float, float]:
    """Checks the arguments of a step on a store, all but the gradient. Returns the flip mask,
    contiguous, and alpha and eps as floats. ValueError names the argument that is wrong.
    """
    checks.images(op, images)
    checks.same_store(op, delta, images)
    flip = checks.selection(op, index, flip, len(delta), delta.device)
    alpha, eps = checks.step_sizes(op, alpha, eps)
    checks.no_gradient(op, delta=delta, images=images)
    if delta.requires_grad or (delta.dtype is torch.int8 and eps == 0):
        messages.fail(
            op,
            "delta",
            "no gradient required, and eps > 0 for int8 levels",
            messages.describe(delta),
        )
    if nonfinite is not None and (
        nonfinite.dtype != torch.int64
        or nonfinite.shape != (1,)
        or nonfinite.device != delta.device
    ):
        messages.fail(
            op, "nonfinite", f"an int64 tensor [1] on {delta.device}", messages.describe(nonfinite)
        )
    return flip, alpha, eps


def projected_step(
    delta: torch.Tensor,
    grad: torch.Tensor,
    image: torch.Tensor,
    alpha: float,
    eps: float,
    *,
    backend: str = "auto",
) -> torch.Tensor:
    """One projected sign-gradient step: clamp(clamp(image + clamp(delta - alpha * sign(grad), -eps,
    eps), 0, 1) - image, -eps, eps).

    Args:
        delta, grad, image: one shape, one float dtype, one device; image on the [0, 1] scale.
            sign(0) = sign(NaN) = 0. The budget goes first: no finite or infinite value ends further
            than eps (rounded to delta's dtype) from 0. An image value outside [0, 1], which no step
            can bring there within eps, gets the eps that is nearest; a NaN in image or delta stays
            NaN.
        alpha: step size, >= 0. eps: L-inf budget, 0 to 1; both on the [0, 1] scale (8/255, not 8).

    Returns: the new delta, contiguous. float16 and bfloat16 compute in fp32 and round once, so all
        backends agree bit for bit.
    Not differentiable (PGD descends, it is not differentiated through); ValueError if delta
    requires a gradient, or one is taken with respect to grad or image.
    """
    op = "projected_step"
    if not isinstance(delta, torch.Tensor) or delta.dtype not in DOUBLES or delta.requires_grad:
        messages.fail(
            op, "delta", "a float tensor that does not require a gradient", messages.describe(delta)
        )
    for name, tensor in (("grad", grad), ("image", image)):
        if (
            not isinstance(tensor, torch.Tensor)
            or tensor.shape != delta.shape
            or tensor.dtype != delta.dtype
            or tensor.device != delta.device
        ):
            messages.fail(op, name, messages.describe(delta), messages.describe(tensor))
    checks.no_gradient(op, delta=delta, grad=grad, image=image)
    alpha, eps = checks.step_sizes(op, alpha, eps)
    return torch.ops.miue_fast.projected_step(delta, grad, image, alpha, eps, backend)


def projected_step_(
    delta: torch.Tensor,
    index: torch.Tensor | None,
    grad: torch.Tensor,
    images: torch.Tensor,
    flip: torch.Tensor | None = None,
    *,
    alpha: float,
    eps: float,
    nonfinite: torch.Tensor | None = None,
    view: torch.Tensor | None = None,
    grid: int = 1,
    backend: str = "auto",
) -> None:
    """The projected sign step in place on rows `index` of the poison store; each row is read and
    written once.

    Args:
        delta: the store [N, C, H, W], contiguous: float32, float16, or int8 levels (value = level *
            eps / 127, rounded to the nearest level, so the projection on the image range then holds
            to half a level). The budget holds as in `projected_step`; a NaN becomes level 0.
        index: int64 [B], unique, in [0, N) (out of range: ValueError on the CPU, undefined on a
            GPU), or None for all rows.
        grad: [B, C, H, W] float32, float16 or bfloat16, any strides: the gradient with respect to
            the network's input.
        images: [N, C, H, W] uint8 (value / 255) or float32 on the [0, 1] scale (outside it: as in
            `projected_step`), contiguous.
        flip: bool [B] or None: rows whose image was mirrored along W. delta is not mirrored.
        alpha, eps: step size and L-inf budget on the [0, 1] scale; eps > 0 for int8.
        nonfinite: int64 [1] or None: incremented by the number of NaN and Inf in grad (they count
            as sign 0, or +-1 for Inf).
        view: int32 [B, 3] or None: the view of `perturbed_input` that grad is the gradient of. Each
            pixel takes the gradient from where the view moved it (the exact transpose); where the
            view cut it off the gradient is 0 and nothing moves. A gradient where the view has
            padding is not read, and not counted in `nonfinite`.
        grid: the sign is that of the sum of grad over cells of grid x grid pixels of the store
            (after the view), per channel, so that equal perturbations in a cell stay equal as far
            as [0, 1] lets them. Cells start at the upper left corner, and the last ones are cut at
            the border. The sum is taken in fp32 down each column of a cell and then over the
            columns from left to right, on every backend: a sum of exactly 0 moves nothing, and a
            NaN (or Inf and -Inf) among its gradients stops a whole cell.

    Bitwise the same on every backend. Errors: ValueError, BackendError.
    """
    op = "projected_step_"
    flip, alpha, eps = check_step(op, delta, index, images, flip, alpha, eps, nonfinite)
    checks.gradient(
        op, grad, (len(delta) if index is None else len(index), *delta.shape[1:]), delta.device
    )
    if view is not None:
        view = checks.view(op, view, len(grad), delta.device)
    if grid != 1 or grid is True:
        ranges.whole(op, "grid", grid)
    torch.ops.miue_fast.projected_step_(
        delta, index, grad, images, flip, alpha, eps, nonfinite, view, grid, backend
    )
