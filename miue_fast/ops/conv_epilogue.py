"""What follows a frozen convolution and what follows its input gradient, in place on the result;
ReLU leaves one bit per value.
"""

from collections.abc import Callable, Collection

import torch

from ..dispatch import checks, native, triton
from ..dispatch.masks import mask_bytes
from ..dispatch.registry import DOUBLES, FLOATS, Impl, define
from ..reference.conv_epilogue import conv_epilogue_ as reference
from ..reference.conv_epilogue import conv_grad_epilogue_ as reference_grad
from ..support import messages

NHWC = torch.channels_last


def _impls(name):
    return [
        Impl("triton", triton.lazy(name, "conv_epilogue"), triton.DEVICES, FLOATS, triton.missing),
        Impl("cuda", getattr(native, name), frozenset({"cuda"}), FLOATS, native.cuda_missing),
        Impl("cpu", getattr(native, name), frozenset({"cpu"}), DOUBLES, native.cpu_missing),
    ]


def aligned(op: str, position: int) -> Callable[..., None]:
    """A check for `define` of the mask at this position of the arguments: kernels read and write it
    in words of up to 8 bytes.
    """

    def check(*args):
        mask = args[position]
        if mask is not None and mask.data_ptr() % 8:
            got = f"an address {mask.data_ptr() % 8} bytes past one"
            messages.fail(
                op,
                "mask",
                "memory that starts at a multiple of 8 bytes (a tensor of its own does)",
                got,
            )

    return check


define(
    (
        "conv_epilogue_(Tensor(a!) y, Tensor? bias, Tensor? residual, bool relu, Tensor(b!)? mask, "
        "str backend) -> ()"
    ),
    reference=reference,
    fake=lambda *args: None,
    kind="pointwise",
    dtypes=DOUBLES,
    mutates=(0, 4),
    check=aligned("conv_epilogue_", 4),
    impls=_impls("conv_epilogue_"),
)
define(
    "conv_grad_epilogue_(Tensor(a!) grad, Tensor? addend, Tensor? mask, str backend) -> ()",
    reference=reference_grad,
    fake=lambda *args: None,
    kind="pointwise",
    dtypes=DOUBLES,
    mutates=(0,),
    check=aligned("conv_grad_epilogue_", 2),
    impls=_impls("conv_grad_epilogue_"),
)


def dense(
    op: str,
    name: str,
    tensor: torch.Tensor,
    like: torch.Tensor | None = None,
    dtypes: Collection[torch.dtype] = DOUBLES,
) -> None:
    """ValueError unless this is a channels-last [B, C, H, W] or contiguous [B, C] tensor of one of
    the dtypes; with `like`, of that tensor's shape, dtype and device.
    """
    if (
        not isinstance(tensor, torch.Tensor)
        or tensor.dtype not in dtypes
        or (rank := tensor.dim()) not in (2, 4)
    ):
        messages.fail(op, name, "a float tensor [B, C, H, W] or [B, C]", messages.describe(tensor))
    if not tensor.is_contiguous(memory_format=NHWC if rank == 4 else torch.contiguous_format):
        messages.fail(
            op,
            name,
            "dense channels-last (or contiguous [B, C]) memory",
            f"strides {tuple(tensor.stride())}",
        )
    if like is not None and (
        tensor.shape != like.shape or tensor.dtype != like.dtype or tensor.device != like.device
    ):
        messages.fail(op, name, messages.describe(like), messages.describe(tensor))


def check_mask(op: str, mask: torch.Tensor, count: int, device: torch.device) -> None:
    """ValueError unless this is a contiguous uint8 tensor for the bits of `count` values."""
    expected = mask_bytes(count)
    if (
        mask.dtype != torch.uint8
        or mask.shape != (expected,)
        or mask.device != device
        or not mask.is_contiguous()
    ):
        messages.fail(
            op,
            "mask",
            f"a contiguous uint8 tensor [{expected}] on {device}",
            messages.describe(mask),
        )


def check_bias(op: str, bias: torch.Tensor, channels: int, like: torch.Tensor) -> None:
    """ValueError unless this is a contiguous [channels] of the type that sums have for `like`."""
    wide = torch.float64 if like.dtype == torch.float64 else torch.float32
    if (
        bias.shape != (channels,)
        or bias.dtype != wide
        or bias.device != like.device
        or not bias.is_contiguous()
    ):
        messages.fail(
            op,
            "bias",
            f"a contiguous {str(wide)[6:]} tensor [{channels}] on {like.device}",
            messages.describe(bias),
        )


def conv_epilogue_(
    y: torch.Tensor,
    bias: torch.Tensor | None = None,
    residual: torch.Tensor | None = None,
    *,
    relu: bool = True,
    mask: torch.Tensor | None = None,
    backend: str = "auto",
) -> None:
    """y = relu(y + bias + residual) in place, and the ReLU's bits.

    Args:
        y: the result of a convolution, [B, C, H, W] channels-last, or of a product, [B, C]
            contiguous; float32, float16, bfloat16 (float64 on the CPU).
        bias: [C] float32 (float64 for float64) or None. residual: like y, or None.
        relu: False leaves the sum as it is.
        mask: uint8 [mask_bytes(y.numel())] or None. Bit k of byte b is set to 1 where value 8 b + k
            of y, in memory order, is not <= 0 after rounding (NaN counts as 1, as in PyTorch's
            ReLU). Bits past the end are set to 0.

    Sums in float32 (float64), rounded once. Bitwise the same on every backend. Errors: ValueError,
    BackendError."""
    op = "conv_epilogue_"
    dense(op, "y", y)
    if bias is not None:
        check_bias(op, bias, y.shape[1], y)
    if residual is not None:
        dense(op, "residual", residual, y)
    checks.no_gradient(op, y=y, bias=bias, residual=residual)
    if mask is not None:
        check_mask(op, mask, y.numel(), y.device)
    torch.ops.miue_fast.conv_epilogue_.default(y, bias, residual, relu, mask, backend)


def conv_grad_epilogue_(
    grad: torch.Tensor,
    addend: torch.Tensor | None = None,
    mask: torch.Tensor | None = None,
    *,
    backend: str = "auto",
) -> None:
    """grad = (grad + addend) where the mask's bit is set, else 0; in place. The counterpart of
    `conv_epilogue_`.

    Args:
        grad: [B, C, H, W] channels-last or [B, C] contiguous, of the dtypes that `conv_epilogue_`
            takes.
        addend: like grad, or None. mask: what `conv_epilogue_` wrote, or None.

    Bitwise the same on every backend. Errors: ValueError, BackendError.
    """
    op = "conv_grad_epilogue_"
    dense(op, "grad", grad)
    if addend is not None:
        dense(op, "addend", addend, grad)
    checks.no_gradient(op, grad=grad, addend=addend)
    if mask is not None:
        check_mask(op, mask, grad.numel(), grad.device)
    torch.ops.miue_fast.conv_grad_epilogue_.default(grad, addend, mask, backend)
