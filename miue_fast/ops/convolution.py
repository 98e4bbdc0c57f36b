"""Frozen convolutions: forward with a fused epilogue, input gradient with a fused epilogue, and the
stem's with the projected step.

The backends `cpu` and `cuda` take PyTorch's library (oneDNN, cuDNN) for the convolution and this
package's C++ for what follows; `triton` is one kernel; `wgmma` is one CUDA C++ kernel for Hopper
and the 3x3 layers of 64 channels in float16 and bfloat16 (csrc/cuda/hopper/conv64.cu). `auto` on a
GPU takes, per layer, what `measured.json` says is faster; unmeasured: cuDNN. Operands in e4m3
(float8_e4m3fn) have `triton` and the reference, which widens them to float32."""

from collections.abc import Callable, Sequence

import torch

from ..dispatch import checks, native, triton
from ..dispatch.library import out_size
from ..dispatch.masks import mask_bytes
from ..dispatch.measured import faster
from ..dispatch.registry import DOUBLES, FLOATS, OPS, Impl, define, log
from ..reference.convolution import conv_forward as reference
from ..reference.convolution import conv_input_grad as reference_grad
from ..reference.convolution import conv_input_grad_step_ as reference_step
from ..support import messages
from .conv_epilogue import aligned, check_bias, check_mask, dense
from .geometry import FP8, OPERANDS, check_like, check_scale, geometry, result_dtype
from .projected_step import check_step

NHWC, HALVES = torch.channels_last, frozenset({torch.float16, torch.bfloat16})


def why_not_triton(
    weight: torch.Tensor,
    size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> str | None:
    """Why the Triton convolutions do not take this layer, or None."""
    (k, c, r, s), (_, _, h, w) = weight.shape, size
    if not c:
        return "no channels"
    if groups != 1 or list(dilation) != [1, 1]:
        return "groups or dilation"
    if (r, s) not in ((1, 1), (3, 3)) or list(padding) != [r // 2, s // 2]:
        return f"a {r}x{s} kernel with padding {list(padding)}"
    if list(stride) not in ([1, 1], [2, 2]) or (stride[0] == 2 and (h % 2 or w % 2)):
        return f"stride {list(stride)} on {h}x{w}"
    if weight.dtype == FP8 and (k % 32 or c % 32):
        return f"{c} -> {k} channels (multiples of 32 in e4m3)"
    if k % 16 or (c % 16 and c > 16):
        return f"{c} -> {k} channels (multiples of 16, or a stem of at most 16)"
    return None


why_not_wgmma = native.why_not_conv64  # why `wgmma` does not take a layer, or None


def _impls(name, device_fn, on_cpu=DOUBLES, on_triton=FLOATS | {FP8}, wgmma=()):
    return [
        Impl("triton", triton.lazy(name, "convolution"), triton.DEVICES, on_triton, triton.missing),
        Impl("cuda", device_fn, frozenset({"cuda"}), FLOATS, native.cuda_missing),
        *(
            Impl("wgmma", fn, frozenset({"cuda"}), HALVES, native.wgmma_missing, refuses)
            for fn, refuses in wgmma
        ),
        Impl("cpu", device_fn, frozenset({"cpu"}), on_cpu, native.cpu_missing),
    ]


def _fake(
    x, weight, bias, residual, stride, padding, dilation, groups, relu, want_mask, scale, backend
):
    y = x.new_empty(
        out_size(x.shape, weight, stride, padding, dilation), dtype=result_dtype(x)
    ).contiguous(memory_format=NHWC)
    return y, torch.empty(
        mask_bytes(y.numel()) if want_mask else 0, dtype=torch.uint8, device=x.device
    )


def _fake_grad(grad, weight, addend, mask, size, stride, padding, dilation, groups, scale, backend):
    return grad.new_empty(size, dtype=result_dtype(grad)).contiguous(memory_format=NHWC)


_told = set()  # ops whose way to the reference was logged


def _route(op, weight, size, *conv):
    """The backend that "auto" takes on a GPU."""
    no_triton = why_not_triton(weight, size, *conv) or triton.missing()
    no_cuda = "does not take e4m3" if weight.dtype == FP8 else native.cuda_missing()
    if no_triton and no_cuda:
        if op not in _told:
            _told.add(op)
            log.warning(
                "%s on cuda runs in plain PyTorch (triton: %s; cuda: %s)", op, no_triton, no_cuda
            )
        return "reference"
    best = "triton" if no_cuda else faster(op, weight, size, conv[0])
    if best == "wgmma" and (why_not_wgmma(weight, size, *conv) or native.wgmma_missing()):
        best = "cuda"
    return "cuda" if no_triton and best == "triton" else best


define(
    (
        "conv_forward(Tensor x, Tensor weight, Tensor? bias, Tensor? residual, int[] stride, "
        "int[] padding, int[] dilation, int groups, bool relu, bool want_mask, Tensor? scale, "
        "str backend) -> (Tensor, Tensor)"
    ),
    reference=reference,
    fake=_fake,
    kind="convolution",
    dtypes=OPERANDS,
    impls=_impls(
        "conv_forward",
        native.conv_forward,
        wgmma=[
            (
                native.conv64_forward,
                lambda x, weight, bias, residual, *conv: why_not_wgmma(weight, x.shape, *conv[:4]),
            )
        ],
    ),
    route=lambda x, weight, bias, residual, *conv: _route(
        "conv_forward", weight, x.shape, *conv[:4]
    ),
)
define(
    (
        "conv_input_grad(Tensor grad, Tensor weight, Tensor? addend, Tensor? mask, "
        "int[] size, int[] stride, int[] padding, int[] dilation, int groups, Tensor? scale, "
        "str backend) -> Tensor"
    ),
    reference=reference_grad,
    fake=_fake_grad,
    kind="convolution",
    dtypes=OPERANDS,
    check=aligned("conv_input_grad", 3),
    impls=_impls(
        "conv_input_grad",
        native.conv_input_grad,
        wgmma=[
            (
                native.conv64_input_grad,
                lambda grad, weight, addend, mask, size, *conv: why_not_wgmma(
                    weight, size, *conv[:4]
                ),
            )
        ],
    ),
    route=lambda grad, weight, addend, mask, size, *conv: _route(
        "conv_input_grad", weight, size, *conv[:4]
    ),
)
define(
    (
        "conv_input_grad_step_(Tensor(a!) delta, Tensor? index, Tensor grad, Tensor weight, "
        "Tensor images, Tensor? flip, int[] stride, int[] padding, int[] dilation, int groups, "
        "float alpha, float eps, Tensor(b!)? nonfinite, str backend) -> ()"
    ),
    reference=checks.with_row_numbers("conv_input_grad_step_", reference_step, store=0, index=1),
    fake=lambda *args: None,
    kind="convolution",
    dtypes=FLOATS,
    dtype_of=lambda *args: args[2].dtype,
    mutates=(0, 12),
    impls=_impls("conv_input_grad_step_", native.conv_input_grad_step_, FLOATS, FLOATS),
    route=lambda delta, index, grad, weight, images, flip, *conv: _route(
        "conv_input_grad_step_", weight, [len(grad), *images.shape[1:]], *conv[:4]
    ),
)


def resolve(
    name: str,
    backend: str,
    weight: torch.Tensor,
    size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> Callable:
    """What the op `name` would call for this layer and images of `size` [B, C, H, W], to be kept
    and called without asking again (`Op.resolve`). Errors: BackendError.
    """
    if backend == "auto" and weight.device.type == "cuda":
        backend = _route(name, weight, size, stride, padding, dilation, groups)
    return OPS[name].resolve(backend, weight.device.type, weight.dtype)


Pair = int | Sequence[int]


def conv_forward(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    residual: torch.Tensor | None = None,
    *,
    stride: Pair = 1,
    padding: Pair = 0,
    dilation: Pair = 1,
    groups: int = 1,
    relu: bool = True,
    want_mask: bool = True,
    scale: torch.Tensor | None = None,
    backend: str = "auto",
) -> tuple[torch.Tensor, torch.Tensor]:
    """relu(conv2d(x, weight) + bias + residual), and the ReLU's bits. The weights are frozen: this
    has no derivative, and `conv_input_grad` gives the gradient with respect to x.

    Args:
        x: [B, C, H, W] channels-last; float32, float16, bfloat16 (float64 on the CPU), or
            float8_e4m3fn: see `scale`.
        weight: [K, C / groups, R, S] like x. bias: [K] float32 (float64 for float64) or None.
            residual: [B, K, P, Q] channels-last or None.
        scale: for float8_e4m3fn x and weight, and only there: one float32 on the device that their
            convolution is multiplied with (the product of the two tensors' scales, see
            `quantised`). Result and residual are bfloat16 then. In Triton from compute capability
            8.9 on, for channels in multiples of 32; elsewhere the reference widens to float32.
        stride, padding, dilation: a number or two; groups: as in torch.nn.functional.conv2d.
        want_mask: with relu: also return the mask of `conv_epilogue_`; else it is empty.

    Returns: y [B, K, P, Q] channels-last in the dtype of x, and the mask, uint8. Sums are taken in
        float32 at least (for e4m3 on a GPU in the tensor core's accumulator, which is a little
        narrower). The result is deterministic on one machine, backend and thread count.

    Triton takes 1x1 and 3x3 kernels, stride 1 and 2, padding R // 2 and channels in multiples of 16
    (a stem: at most 16); wgmma takes 3x3 kernels, stride and padding 1, 64 to 64 channels and 4 to
    64 columns. Errors: ValueError, BackendError.
    """
    op = "conv_forward"
    dense(op, "x", x, dtypes=OPERANDS)
    conv, out = geometry(op, weight, x.shape, stride, padding, dilation, groups)
    check_like(op, "weight", weight, x)
    check_scale(op, scale, x)
    if bias is not None:
        check_bias(op, bias, weight.shape[0], x)
    if residual is not None:
        dense(op, "residual", residual)
        check_like(op, "residual", residual, x, result_dtype(x))
        if list(residual.shape) != out:
            messages.fail(op, "residual", out, list(residual.shape))
    checks.no_gradient(op, x=x, weight=weight, bias=bias, residual=residual)
    if want_mask and not relu:
        messages.fail(op, "want_mask", "False without relu", True)
    return torch.ops.miue_fast.conv_forward.default(
        x, weight, bias, residual, *conv, relu, want_mask, scale, backend
    )


def conv_input_grad(
    grad: torch.Tensor,
    weight: torch.Tensor,
    size: Sequence[int],
    addend: torch.Tensor | None = None,
    mask: torch.Tensor | None = None,
    *,
    stride: Pair = 1,
    padding: Pair = 0,
    dilation: Pair = 1,
    groups: int = 1,
    scale: torch.Tensor | None = None,
    backend: str = "auto",
) -> torch.Tensor:
    """The gradient that reaches the layer before: grad through the convolution, plus addend, where
    the mask's bit is set, and 0 elsewhere.

    Args:
        grad: [B, K, P, Q] channels-last, d loss / d y.
        weight, stride, padding, dilation, groups: those of `conv_forward`.
        size: [B, C, H, W] of x.
        addend: like the result (the gradient of a residual branch), or None.
        mask: the bits of the ReLU that made x, or None.
        scale: as in `conv_forward`, for float8_e4m3fn grad and weight. Triton then needs no copy of
            weights that have K innermost in memory.

    Returns: [B, C, H, W] channels-last. Errors and determinism are those of `conv_forward`.
    """
    op = "conv_input_grad"
    dense(op, "grad", grad, dtypes=OPERANDS)
    conv, out = geometry(op, weight, size, stride, padding, dilation, groups)
    check_like(op, "weight", weight, grad)
    check_scale(op, scale, grad)
    if list(grad.shape) != out:
        messages.fail(op, "grad", out, list(grad.shape))
    if addend is not None:
        dense(op, "addend", addend)
        check_like(op, "addend", addend, grad, result_dtype(grad))
        if list(addend.shape) != list(size):
            messages.fail(op, "addend", list(size), list(addend.shape))
    checks.no_gradient(op, grad=grad, weight=weight, addend=addend)
    if mask is not None:
        check_mask(op, mask, size[0] * size[1] * size[2] * size[3], grad.device)
    return torch.ops.miue_fast.conv_input_grad.default(
        grad, weight, addend, mask, list(size), *conv, scale, backend
    )


def conv_input_grad_step_(
    delta: torch.Tensor,
    index: torch.Tensor | None,
    grad: torch.Tensor,
    weight: torch.Tensor,
    images: torch.Tensor,
    flip: torch.Tensor | None = None,
    *,
    alpha: float,
    eps: float,
    stride: Pair = 1,
    padding: Pair = 0,
    dilation: Pair = 1,
    groups: int = 1,
    nonfinite: torch.Tensor | None = None,
    backend: str = "auto",
) -> None:
    """`projected_step_` with the gradient `conv_input_grad(grad, weight)` of the first layer. In
    Triton the image gradient never leaves the kernel; the libraries (oneDNN, cuDNN) write it once.

    Args:
        grad: [B, K, P, Q] channels-last; float32, float16 or bfloat16.
        weight, stride, padding, dilation, groups: those of the first convolution.
        The other arguments are those of `projected_step_`.

    The step looks at signs only, so that positive factors per channel (1 / std of a normalisation)
    need not be applied. Errors: ValueError, BackendError.
    """
    op = "conv_input_grad_step_"
    dense(op, "grad", grad)
    flip, alpha, eps = check_step(op, delta, index, images, flip, alpha, eps, nonfinite)
    size = [len(delta) if index is None else len(index), *images.shape[1:]]
    conv, out = geometry(op, weight, size, stride, padding, dilation, groups)
    check_like(op, "weight", weight, grad)
    if list(grad.shape) != out or grad.dtype not in FLOATS or grad.device != delta.device:
        messages.fail(
            op,
            "grad",
            f"a float32, float16 or bfloat16 tensor {out} on {delta.device}",
            messages.describe(grad),
        )
    checks.no_gradient(op, grad=grad, weight=weight)
    torch.ops.miue_fast.conv_input_grad_step_.default(
        delta, index, grad, weight, images, flip, *conv, alpha, eps, nonfinite, backend
    )
