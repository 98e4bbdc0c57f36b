"""Images plus perturbation, gathered, mirrored, normalised and laid out as the network wants them,
in one pass.
"""

from collections.abc import Iterable

import torch

from ..dispatch import checks, native, triton
from ..dispatch.registry import FLOATS, Impl, define
from ..reference.perturbed_input import perturbed_input as reference
from ..reference.projected_step import transposed
from ..support import messages


def _fake(images, delta, index, flip, mean, std, eps, dtype, channels_last, view, backend):
    batch = images.shape[0] if index is None else index.shape[0]
    layout = torch.channels_last if channels_last else torch.contiguous_format
    return torch.empty(
        (batch, *images.shape[1:]), dtype=dtype, device=images.device, memory_format=layout
    )


define(
    (
        "perturbed_input(Tensor images, Tensor? delta, Tensor? index, Tensor? flip, float[] mean, "
        "float[] std, float eps, ScalarType dtype, bool channels_last, Tensor? view, str backend) "
        "-> Tensor"
    ),
    reference=checks.with_row_numbers("perturbed_input", reference, store=0, index=2),
    fake=_fake,
    kind="pointwise",
    dtypes=FLOATS,
    dtype_of=lambda *args: args[7],
    impls=[
        Impl("triton", triton.lazy("perturbed_input"), triton.DEVICES, FLOATS, triton.missing),
        Impl("cuda", native.perturbed_input, frozenset({"cuda"}), FLOATS, native.cuda_missing),
        Impl("cpu", native.perturbed_input, frozenset({"cpu"}), FLOATS, native.cpu_missing),
    ],
)


def _constants(op, values):
    """Mean or std as a list of floats; None is an empty one."""
    expected, limit = "finite numbers, one per channel", torch.finfo(torch.float32).max
    if isinstance(values, str):
        messages.fail(op, "mean and std", expected, f"str {values!r}")
    return [
        checks.number(op, "mean and std", value, expected, -limit, limit)
        for value in (() if values is None else values)
    ]


def transposed_view(view: torch.Tensor) -> torch.Tensor:
    """The view, int32 [B, 3], that brings the gradient of what `view` shows back to where that came
    from: its transpose.
    """
    return transposed(view).to(torch.int32)


def perturbed_input(
    images: torch.Tensor,
    delta: torch.Tensor | None = None,
    index: torch.Tensor | None = None,
    flip: torch.Tensor | None = None,
    mean: Iterable[float] | None = None,
    std: Iterable[float] | None = None,
    *,
    view: torch.Tensor | None = None,
    eps: float | None = None,
    dtype: torch.dtype = torch.float32,
    channels_last: bool = True,
    backend: str = "auto",
) -> torch.Tensor:
    """(view(flip(images[index]) + delta[index]) - mean) / std as a new network input
    [B, C, H, W].

    Args:
        images: [N, C, H, W] uint8 (value / 255) or float32, contiguous; of any range: nothing is
            clamped here.
        delta: the poison store [N, C, H, W], float32, float16 or int8 levels (value = level * eps /
            127; needs `eps`), or None.
        index: int64 [B] in [0, N) (out of range: ValueError on the CPU, undefined on a GPU), or
            None for all rows.
        flip: bool [B] or None: rows whose image is mirrored along W; delta is not mirrored.
        view: int32 [B, 3] or None: how each row of image + delta is seen, as (down, right,
            mirrored): mirrored along W where the third number is not 0, then moved by so many
            pixels. What comes in from outside is 0 (before the normalisation), as in a crop with
            zero padding; `flip` by contrast mirrors the image under its delta.
        mean, std: C numbers each, on the [0, 1] scale, or None for no normalisation. std is applied
            as a product with float32(1/std).
        dtype: of the result: float32, float16 or bfloat16; the arithmetic is fp32, rounded once.
        channels_last: the result's memory format.

    Not differentiable: its gradient with respect to delta is the network's input gradient (times
        1/std), see `projected_step_`. Tensors that require a gradient are refused while gradients
        are enabled. A view is linear, and its transpose is the view (-down, -right, 0) or, where it
        is mirrored, (-down, right, 1).
    Bitwise the same on every backend. Errors: ValueError, BackendError.
    """
    op = "perturbed_input"
    checks.images(op, images)
    if delta is not None:
        checks.same_store(op, delta, images)
        if delta.dtype is torch.int8 and eps is None:
            messages.fail(op, "eps", "the budget of the int8 store, > 0", "None")
    eps = (
        0.0
        if eps is None
        else checks.number(op, "eps", eps, "a number from 0 to 1 ([0, 1] image scale)", 0, 1)
    )
    if delta is not None and delta.dtype is torch.int8 and not eps:
        messages.fail(op, "eps", "the budget of the int8 store, > 0", eps)
    if how := checks.differentiated(images) or checks.differentiated(delta):
        messages.fail(op, "images and delta", "no gradient required (detach them)", how)
    flip = checks.selection(op, index, flip, images.shape[0], images.device)
    if view is not None:
        batch = images.shape[0] if index is None else index.shape[0]
        view = checks.view(op, view, batch, images.device)
    mean, std = _constants(op, mean), _constants(op, std)
    if ((mean or std) and not len(mean) == len(std) == images.shape[1]) or 0 in std:
        messages.fail(
            op, "mean and std", f"{images.shape[1]} numbers each, no std of 0", f"{mean} and {std}"
        )
    if dtype not in FLOATS:
        messages.fail(op, "dtype", "float32, float16 or bfloat16", dtype)
    return torch.ops.miue_fast.perturbed_input(
        images, delta, index, flip, mean, std, eps, dtype, channels_last, view, backend
    )
