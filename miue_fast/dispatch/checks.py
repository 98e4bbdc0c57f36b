"""What the arguments of an op have to be; the wording is in `support/messages.py`."""

import functools
import numbers
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch._C import _functorch
from torch.autograd import forward_ad

from ..support.messages import describe, fail, short
from .registry import DOUBLES, FLOATS

INTEGERS = frozenset({torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64})


def features_and_labels(op: str, features: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Features [B, D] of a float type and integer labels [B] of the same device; the labels come
    back as contiguous int64.
    """
    if (
        not isinstance(features, torch.Tensor)
        or features.dim() != 2
        or features.dtype not in DOUBLES
    ):
        fail(op, "features", "a float tensor [B, D]", describe(features))
    if (
        not isinstance(labels, torch.Tensor)
        or labels.shape != features.shape[:1]
        or labels.dtype not in INTEGERS
    ):
        fail(op, "labels", f"an integer tensor [{features.shape[0]}]", describe(labels))
    if labels.device != features.device:
        fail(op, "labels", f"device {features.device}", labels.device)
    if labels.dtype is torch.int64 and labels.is_contiguous():
        return labels
    return labels.to(torch.int64).contiguous()


def seed(op: str, value: int, name: str = "seed") -> None:
    """PyTorch's generators take no more."""
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < 2**63:
        fail(op, name, "a whole number from 0 to 2^63 - 1", short(value))


def number(op: str, name: str, value: Any, expected: str, low: float, high: float) -> float:
    """A real number from low to high, as a float. Tensors are none: the op would not know of their
    derivatives.
    """
    if (
        type(value) is float and low <= value <= high
    ):  # isinstance(value, torch.Tensor) costs more than all of this
        return value
    if isinstance(value, torch.Tensor):
        fail(
            op,
            name,
            expected,
            f"a tensor, {describe(value)}; give tensor.item(), which has no gradient",
        )
    if type(value) is not float and (
        isinstance(value, bool) or not isinstance(value, numbers.Real)
    ):
        fail(op, name, expected, "None" if value is None else f"{type(value).__name__} {value!r}")
    if not low <= value <= high:
        fail(op, name, expected, value)
    return float(value)


def temperature(op: str, value: Any) -> float:
    return number(op, "temperature", value, "a number from 1e-3 to 10", 1e-3, 10)


def transformed() -> bool:
    """Whether a transformation of torch.func other than functionalize, or a level of forward-mode
    derivatives, is active.
    """
    if forward_ad._current_level >= 0:
        return True
    top = _functorch.peek_interpreter_stack()
    return top is not None and top.key() != _functorch.TransformType.Functionalize


# torch.compile guards on both states, and cannot trace the second. This is
# torch.compiler.assume_constant_result without its import of sympy, which changes the caller's
# warnings.
vars(transformed)["_dynamo_marked_constant"] = True


def differentiated(tensor: torch.Tensor | None) -> str | None:
    """How somebody takes derivatives with respect to this tensor (or None), backward or in forward
    mode; None if nobody does.
    """
    if tensor is None:
        return None
    if tensor.requires_grad and torch.is_grad_enabled():
        return "a tensor that requires one"
    return "a tensor that carries a forward derivative" if forward(tensor) else None


def forward(tensor: torch.Tensor) -> bool:
    """Whether this tensor carries a derivative in forward mode."""
    return forward_ad._current_level >= 0 and forward_ad.unpack_dual(tensor).tangent is not None


def no_gradient(op: str, **tensors: torch.Tensor | None) -> None:
    """For ops without a derivative: nobody takes one with respect to these tensors (or None)."""
    duals = forward_ad._current_level >= 0
    for name, tensor in tensors.items():
        if (
            tensor is not None
            and (duals or tensor.requires_grad)
            and (how := differentiated(tensor))
        ):
            fail(op, name, "no gradient required (detach them)", how)


def denominator(op: str, value: str) -> None:
    if value not in ("all", "negatives"):
        fail(op, "denominator", "'all' or 'negatives'", short(value))


def step_sizes(op: str, alpha: Any, eps: Any) -> tuple[float, float]:
    """Both as floats."""
    scale = "a number from 0 to 1 ([0, 1] image scale)"
    return number(op, "alpha", alpha, scale, 0, 1), number(op, "eps", eps, scale, 0, 1)


def images(
    op: str,
    tensor: torch.Tensor,
    name: str = "images",
    dtypes: frozenset[torch.dtype] = frozenset({torch.uint8, torch.float32}),
) -> None:
    """A contiguous image store [N, C, H, W]."""
    if not isinstance(tensor, torch.Tensor) or tensor.dim() != 4 or tensor.dtype not in dtypes:
        wanted = " or ".join(sorted(str(d)[6:] for d in dtypes))
        fail(op, name, f"a {wanted} tensor [N, C, H, W]", describe(tensor))
    if not tensor.is_contiguous():
        fail(
            op,
            name,
            "a contiguous store (call .contiguous() once, outside the loop)",
            f"strides {tuple(tensor.stride())}",
        )


def same_store(op: str, delta: torch.Tensor, images: torch.Tensor) -> None:
    """The poison store that belongs to `images`: fp32, fp16 or int8 levels, same shape, contiguous,
    same device.
    """
    if (
        not isinstance(delta, torch.Tensor)
        or delta.shape != images.shape
        or delta.device != images.device
    ):
        fail(op, "delta", f"shape {list(images.shape)} on {images.device}", describe(delta))
    if delta.dtype not in (torch.float32, torch.float16, torch.int8):
        fail(op, "delta", "float32, float16 or int8 levels", describe(delta))
    if not delta.is_contiguous():
        fail(op, "delta", "a contiguous store", f"strides {tuple(delta.stride())}")


def selection(
    op: str, index: torch.Tensor | None, flip: torch.Tensor | None, rows: int, device: torch.device
) -> torch.Tensor | None:
    """Optional int64 index [B] into `rows` rows and optional flip mask [B] (bool or uint8); the
    mask comes back contiguous.
    """
    batch = rows
    if index is not None:
        right = (
            isinstance(index, torch.Tensor)
            and index.dtype == torch.int64
            and index.dim() == 1
            and index.is_contiguous()
        )
        if not right or index.device != device:
            fail(op, "index", f"a contiguous int64 tensor [B] on {device}", describe(index))
        batch = index.shape[0]
    if flip is None:
        return None
    if (
        not isinstance(flip, torch.Tensor)
        or flip.shape != (batch,)
        or flip.dtype not in (torch.bool, torch.uint8)
        or flip.device != device
    ):
        fail(op, "flip", f"a bool tensor [{batch}] on {device}", describe(flip))
    return flip.contiguous()


def view(
    op: str, value: torch.Tensor | None, batch: int, device: torch.device
) -> torch.Tensor | None:
    """An optional view int32 [B, 3] of each row of a batch; it comes back contiguous."""
    if value is None:
        return None
    if (
        not isinstance(value, torch.Tensor)
        or value.shape != (batch, 3)
        or value.dtype != torch.int32
        or value.device != device
    ):
        fail(op, "view", f"an int32 tensor [{batch}, 3] on {device}", describe(value))
    return value.contiguous()


def row_numbers(op: str, index: torch.Tensor | None, count: int) -> None:
    """ValueError if an int64 index [B] on the CPU names rows outside a store of `count` rows. On a
    GPU the check would wait for the device: there the result of such an index is undefined.
    """
    if index is not None and index.device.type == "cpu":
        bad = torch.nonzero((index < 0) | (index >= count))[:, 0].tolist()
        if bad:
            fail(op, "index", f"rows in [0, {count})", f"{index[bad[0]]} at position {bad[0]}")


def with_row_numbers(op: str, fn: Callable, *, store: int, index: int) -> Callable:
    """`fn`, the reference of an op, after `row_numbers`: PyTorch's indexing takes negative numbers,
    which the kernels refuse. store, index: the positions of these two arguments.
    """

    @functools.wraps(fn)
    def checked(*args):
        row_numbers(op, args[index], len(args[store]))
        return fn(*args)

    return checked


def gradient(op: str, grad: torch.Tensor, shape: Sequence[int], device: torch.device) -> None:
    if (
        not isinstance(grad, torch.Tensor)
        or grad.shape != torch.Size(shape)
        or grad.dtype not in FLOATS
        or grad.device != device
    ):
        fail(
            op,
            "grad",
            f"a float32, float16 or bfloat16 tensor {list(shape)} on {device}",
            describe(grad),
        )
    no_gradient(op, grad=grad)


def device(op: str, value: Any) -> str | None:
    """ "cpu", "cuda" or "cuda:N" of a device that is here, as text; None stays None."""
    if value is None:
        return None
    try:
        found = torch.device(value)
    except (RuntimeError, TypeError, ValueError):
        found = None
    if found is None or found.type not in ("cpu", "cuda"):
        fail(op, "device", "'cpu', 'cuda' or 'cuda:N'", short(value))
    if found.type == "cuda" and (found.index or 0) >= torch.cuda.device_count():
        fail(op, "device", f"one of the {torch.cuda.device_count()} CUDA devices here", repr(value))
    return str(found)
