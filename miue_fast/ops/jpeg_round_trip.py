"""What JPEG leaves of images, in one pass, and the straight-through gradient."""

import torch

from ..dispatch import checks, native
from ..dispatch.registry import LIB, Impl, define
from ..reference import jpeg_round_trip as reference
from ..support import messages

OP, GRAD = "jpeg_round_trip", "jpeg_round_trip_grad"
CPU, FLOAT = frozenset({"cpu"}), frozenset({torch.float32})
WIDE = frozenset({torch.float32, torch.float64})


def _fake(x, *args):
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _native(images, quality, chroma):
    steps = reference.quantisation(quality)
    return native.jpeg_round_trip(images, reference.COSINES, steps, chroma == "4:2:0")


define(
    f"{OP}(Tensor images, int quality, str chroma, str backend) -> Tensor",
    reference=reference.jpeg_round_trip,
    fake=_fake,
    kind="pointwise",
    dtypes=WIDE,
    impls=[Impl("cpu", _native, CPU, FLOAT, native.cpu_missing)],
)
define(
    f"{GRAD}(Tensor grad, str backend) -> Tensor",
    reference=reference.jpeg_round_trip_grad,
    fake=_fake,
    kind="pointwise",
    dtypes=WIDE,
    impls=[Impl("cpu", native.jpeg_round_trip_grad, CPU, FLOAT, native.cpu_missing)],
)


def _setup(ctx, inputs, output):
    _, _, ctx.chroma, ctx.backend = inputs


def _backward(ctx, grad):
    if ctx.chroma == "4:2:0":
        grad = torch.ops.miue_fast.jpeg_round_trip_grad(grad, ctx.backend)
    return grad, None, None, None


def _no_second_derivative(ctx, grad):
    raise RuntimeError("miue_fast: jpeg_round_trip can be differentiated once only")


torch.library.register_autograd(f"miue_fast::{OP}", _backward, setup_context=_setup, lib=LIB)
torch.library.register_autograd(f"miue_fast::{GRAD}", _no_second_derivative, lib=LIB)


def _check(op, name, tensor):
    right = isinstance(tensor, torch.Tensor) and tensor.dim() == 4 and tensor.dtype in WIDE
    if not right or tensor.shape[1] != 3 or 0 in tensor.shape[2:]:
        expected = "a float32 or float64 tensor [B, 3, H, W], H and W at least 1"
        messages.fail(op, name, expected, messages.describe(tensor))


def jpeg_round_trip(
    images: torch.Tensor, quality: int, *, chroma: str = "4:2:0", backend: str = "auto"
) -> torch.Tensor:
    """What a JPEG encoder and decoder leave of images [B, 3, H, W], as new memory of their shape
    and dtype; differentiable in `images`, straight through the roundings.

    Args:
        images: [B, 3, H, W] RGB on the [0, 1] scale (values outside are clamped), float32 (float64
            in the reference), any strides, sides of at least 1.
        quality: a whole number from 1 to 100, which scales the standard tables as libjpeg does.
        chroma: "4:2:0" (means of 2 x 2 pixels, interpolated again by libjpeg's "fancy" triangle
            filter) or "4:4:4" (one value per pixel).
        backend: "auto", "cpu" or "reference"; a GPU has the reference only.

    Colours are those of JFIF, edges are repeated as libjpeg repeats them, and coefficients are
    rounded to multiples of the table, halves to even ones. Nothing else is rounded: libjpeg holds
    samples, coefficients and pixels in integers, so its pixels differ by 1 to 2 levels of 255 in
    the mean.
    Gradient: that of the linear parts. Every rounding and clamp has the derivative 1, so that it
        does not depend on the images or the quality. "4:4:4" passes it on as it is, "4:2:0" applies
        the transpose of the chroma filter (`jpeg_round_trip_grad`). Once, backward,
        by autograd: a second derivative and torch.func raise RuntimeError.
    A NaN spreads over its block. Bitwise the same on every backend, for any number of threads.
    Errors: ValueError (shape, dtype, quality, chroma, a derivative in forward mode), BackendError
        (the backend cannot serve this here).
    """
    _check(OP, "images", images)
    if checks.forward(images):
        messages.fail(OP, "images", "no derivative in forward mode", "a tensor that carries one")
    if isinstance(quality, bool) or not isinstance(quality, int) or not 1 <= quality <= 100:
        messages.fail(OP, "quality", "a whole number from 1 to 100", messages.short(quality))
    if chroma not in ("4:2:0", "4:4:4"):
        messages.fail(OP, "chroma", "'4:2:0' or '4:4:4'", messages.short(chroma))
    return torch.ops.miue_fast.jpeg_round_trip(images, quality, chroma, backend)


def jpeg_round_trip_grad(grad: torch.Tensor, *, backend: str = "auto") -> torch.Tensor:
    """The gradient of the images from that of `jpeg_round_trip` with chroma "4:2:0": the exact
    transpose of what JPEG does without its roundings and clamps.

    Args:
        grad: [B, 3, H, W] float32 (float64 in the reference), any strides, sides of at least 1.

    Returns: new memory of the same shape and dtype. Not differentiable.
    Bitwise the same on every backend, for any number of threads. Errors: ValueError, BackendError.
    """
    _check(GRAD, "grad", grad)
    checks.no_gradient(GRAD, grad=grad)
    return torch.ops.miue_fast.jpeg_round_trip_grad(grad, backend)
