"""The projected sign step on the perturbation: functional, and in place on the poison store."""

import torch

from ..dispatch import checks, native, triton
from ..dispatch.registry import DOUBLES, FLOATS, Impl, define
from ..reference.projected_step import projected_step as reference
from ..reference.projected_step import projected_step_ as reference_
from ..support import messages


def _samples(device, dtype):
    gen = torch.Generator().manual_seed(7)

    def make(*shape):
        image = torch.rand(shape, generator=gen)
        image.view(-1)[::5] = 0
        image.view(-1)[1::5] = 1
        grad = torch.randn(shape, generator=gen)
        grad.view(-1)[::7] = 0
        grad.view(-1)[3::11] = torch.nan
        delta = (torch.rand(shape, generator=gen) - 0.5) / 8
        return tuple(x.to(dtype).to(device) for x in (delta, grad, image))

    for shape in [(0,), (1,), (7,), (3, 5, 1), (2, 3, 32, 32), (5, 3, 17, 13)]:
        yield *make(*shape), 0.8 / 255, 8 / 255
    yield *make(33), 0.0, 8 / 255
    yield *make(33), 0.1, 0.0
    delta, grad, image = make(4, 3, 8, 8)
    yield delta, grad.to(memory_format=torch.channels_last), image, 0.002, 0.03


define(
    (
        "projected_step(Tensor delta, Tensor grad, Tensor image, float alpha, float eps, "
        "str backend) -> Tensor"
    ),
    reference=reference,
    fake=lambda delta, *args: torch.empty_like(delta, memory_format=torch.contiguous_format),
    samples=_samples,
    dtypes=DOUBLES,
    exact=True,
    impls=[
        Impl("triton", triton.lazy("projected_step"), triton.DEVICES, FLOATS, triton.missing),
        Impl("cuda", native.projected_step, frozenset({"cuda"}), FLOATS, native.cuda_missing),
        Impl("cpu", native.projected_step, frozenset({"cpu"}), DOUBLES, native.cpu_missing),
    ],
)

STORES = frozenset({torch.float32, torch.float16, torch.int8})


def store_samples(device, dtype, eps=8 / 255):
    """(delta store, index, batch shape, images, flip): dtype is the store's; images uint8 and
    float, with and without index and flip.
    """
    gen = torch.Generator().manual_seed(7)
    for count, batch, c, h, w in [
        (1, 1, 1, 1, 1),
        (5, 3, 3, 5, 7),
        (6, 6, 3, 32, 32),
        (4, 2, 1, 3, 18),
        (9, 4, 4, 8, 64),
        (3, 0, 3, 4, 4),
    ]:
        images = torch.randint(256, (count, c, h, w), generator=gen, dtype=torch.uint8)
        images[0] = 0
        images[-1, :, 0] = 255
        delta = (torch.rand(images.shape, generator=gen) * 2 - 1) * eps
        delta = (delta * (127 / eps)).round().to(dtype) if dtype == torch.int8 else delta.to(dtype)
        order = torch.randperm(count, generator=gen)[:batch]
        flip = torch.rand(batch, generator=gen) < 0.5
        yield (
            delta.to(device),
            order.to(device),
            (batch, c, h, w),
            images.to(device),
            flip.to(device),
        )
        whole = torch.rand(images.shape, generator=gen)
        mirror = torch.arange(count) % 2 == 0 if batch % 2 else None
        yield (
            delta.clone().to(device),
            None,
            (count, c, h, w),
            whole.to(device),
            mirror if mirror is None else mirror.to(device),
        )


def _store_step_samples(device, dtype):
    gen = torch.Generator().manual_seed(11)
    grads = [torch.float32, torch.float16, torch.bfloat16]
    for k, (delta, index, shape, images, flip) in enumerate(store_samples(device, dtype)):
        grad = torch.randn(shape, generator=gen)
        grad.view(-1)[::7] = 0
        grad.view(-1)[2::13] = torch.nan
        grad.view(-1)[5::17] = torch.inf
        grad = grad.to(grads[k % 3]).to(device)
        if k % 2:
            grad = grad.contiguous(memory_format=torch.channels_last)
        count = torch.zeros(1, dtype=torch.int64, device=device) if k % 4 < 2 else None
        yield delta, index, grad, images, flip, 0.8 / 255, 8 / 255, count
    yield (
        delta,
        index,
        grad[:, :, ::1, ::1].transpose(2, 3),
        images.transpose(2, 3).contiguous(),
        flip,
        0.001,
        0.03,
        None,
    )


define(
    (
        "projected_step_(Tensor(a!) delta, Tensor? index, Tensor grad, Tensor images, "
        "Tensor? flip, float alpha, float eps, Tensor(b!)? nonfinite, str backend) -> ()"
    ),
    reference=reference_,
    fake=lambda *args: None,
    samples=_store_step_samples,
    dtypes=STORES,
    exact=True,
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


def check_step(op, delta, index, images, flip, alpha, eps, nonfinite):
    """Everything but the gradient; returns the flip mask, contiguous, and both numbers as
    floats.
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


def projected_step(delta, grad, image, alpha, eps, *, backend="auto"):
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
    delta, index, grad, images, flip=None, *, alpha, eps, nonfinite=None, backend="auto"
):
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
        flip: bool [B] or None: rows whose image was mirrored along W. delta is not mirrored
            (docs/method.md).
        alpha, eps: step size and L-inf budget on the [0, 1] scale; eps > 0 for int8.
        nonfinite: int64 [1] or None: incremented by the number of NaN and Inf in grad (they count
            as sign 0, or +-1 for Inf).

    Bitwise the same on every backend. Errors: ValueError, BackendError.
    """
    op = "projected_step_"
    flip, alpha, eps = check_step(op, delta, index, images, flip, alpha, eps, nonfinite)
    checks.gradient(
        op, grad, (len(delta) if index is None else len(index), *delta.shape[1:]), delta.device
    )
    torch.ops.miue_fast.projected_step_(
        delta, index, grad, images, flip, alpha, eps, nonfinite, backend
    )
