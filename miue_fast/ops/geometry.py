"""Sizes and types of a convolution: what its arguments have to be, and what follows from them."""

from collections.abc import Sequence

import torch

from ..dispatch.library import out_size
from ..dispatch.registry import DOUBLES
from ..support import messages

FP8 = torch.float8_e4m3fn
OPERANDS = DOUBLES | {FP8}  # the types that a convolution multiplies


def result_dtype(operand: torch.Tensor) -> torch.dtype:
    """The type of a convolution's result: products of e4m3 values leave as bfloat16."""
    return torch.bfloat16 if operand.dtype == FP8 else operand.dtype


def quantised(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """x as e4m3 values and one float32 scale: their product is x, rounded. The largest magnitude
    becomes e4m3's largest, a tensor of zeros has scale 1, and NaN and Inf end as NaN. It never
    waits for the device.
    """
    low, high = x.aminmax()
    largest = torch.maximum(-low, high).float()
    scale = torch.where(largest == 0, 1, largest / torch.finfo(FP8).max)
    return (x.float() / scale).to(FP8), scale


def _pair(op, name, value, least):
    pair = list(value) if isinstance(value, (list, tuple)) else [value, value]
    if (
        len(pair) != 2
        or type(pair[0]) is not int
        or type(pair[1]) is not int
        or pair[0] < least
        or pair[1] < least
    ):
        messages.fail(op, name, f"a whole number >= {least}, or two", pair)
    return pair


def geometry(
    op: str,
    weight: torch.Tensor,
    size: Sequence[int],
    stride: int | Sequence[int],
    padding: int | Sequence[int],
    dilation: int | Sequence[int],
    groups: int,
) -> tuple[tuple[list[int], list[int], list[int], int], list[int]]:
    """The checked (stride, padding, dilation, groups) of a convolution of `size` [B, C, H, W], and
    the size [B, K, P, Q] of its result. Errors: ValueError.
    """
    if not isinstance(weight, torch.Tensor) or weight.dim() != 4:
        messages.fail(op, "weight", "a tensor [K, C / groups, R, S]", messages.describe(weight))
    stride = _pair(op, "stride", stride, 1)
    padding = _pair(op, "padding", padding, 0)
    dilation = _pair(op, "dilation", dilation, 1)
    shape = weight.shape
    if type(groups) is not int or groups < 1 or shape[0] % groups or shape[1] * groups != size[1]:
        messages.fail(
            op,
            "weight",
            f"[K, {size[1]} / groups, R, S] with K a multiple of groups",
            f"{list(shape)}, groups {groups}",
        )
    out = out_size(size, weight, stride, padding, dilation)
    if out[2] < 1 or out[3] < 1:
        messages.fail(
            op,
            "weight",
            f"a kernel that fits into {list(size[2:])} with padding {padding}",
            list(shape),
        )
    return (stride, padding, dilation, groups), out


def check_like(
    op: str, name: str, tensor: torch.Tensor, like: torch.Tensor, dtype: torch.dtype | None = None
) -> None:
    """ValueError unless the tensor has the device of `like` and this dtype (None: its dtype)."""
    dtype = dtype or like.dtype
    if tensor.dtype != dtype or tensor.device != like.device:
        messages.fail(op, name, f"{str(dtype)[6:]} on {like.device}", messages.describe(tensor))


def check_scale(op: str, scale: torch.Tensor | None, like: torch.Tensor) -> None:
    """ValueError unless `scale` is one float32 for e4m3 operands, and None for others."""
    if like.dtype != FP8:
        if scale is not None:
            messages.fail(
                op, "scale", f"None for {str(like.dtype)[6:]} operands", messages.describe(scale)
            )
    elif (
        not isinstance(scale, torch.Tensor)
        or scale.dtype != torch.float32
        or scale.numel() != 1
        or scale.device != like.device
    ):
        messages.fail(
            op,
            "scale",
            f"one float32 on {like.device} for float8_e4m3fn operands",
            messages.describe(scale),
        )
