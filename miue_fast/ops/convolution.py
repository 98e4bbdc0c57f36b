"""Frozen convolutions: forward with a fused epilogue, input gradient with a fused epilogue, and the
stem's with the projected step.

The backends `cpu` and `cuda` take PyTorch's library (oneDNN, cuDNN) for the convolution and this
package's C++ for what follows; `triton` is one kernel; `wgmma` is one CUDA C++ kernel for Hopper
and the 3x3 layers of 64 channels in float16 and bfloat16 (csrc/cuda/hopper/conv64.cu). `auto` on a
GPU takes, per layer, what `measured.json` says is faster; unmeasured: cuDNN. Operands in e4m3
(float8_e4m3fn) have `triton` and the reference, which widens them to float32."""

import torch

from ..dispatch import checks, native, triton
from ..dispatch.measured import faster
from ..dispatch.registry import DOUBLES, FLOATS, Impl, define, log
from ..reference.conv_epilogue import conv_epilogue_, mask_bytes
from ..reference.convolution import FP8, result_dtype
from ..reference.convolution import conv_forward as reference
from ..reference.convolution import conv_input_grad as reference_grad
from ..reference.convolution import conv_input_grad_step_ as reference_step
from ..support import messages
from .conv_epilogue import aligned, check_bias, check_mask, dense
from .projected_step import check_step

NHWC, HALVES = torch.channels_last, frozenset({torch.float16, torch.bfloat16})
# (batch, in, out, height, width, kernel, stride, padding, dilation, groups)
SHAPES = [
    (2, 16, 16, 6, 6, 3, 1, 1, 1, 1),
    (3, 16, 32, 8, 4, 3, 2, 1, 1, 1),
    (1, 32, 16, 4, 6, 1, 1, 0, 1, 1),
    (2, 48, 32, 4, 4, 1, 2, 0, 1, 1),
    (2, 3, 16, 8, 8, 3, 1, 1, 1, 1),  # a stem
]
WIDE = [  # what `wgmma` takes: whole images in a tile, one and several; rows of one, with a rest
    (1, 64, 64, 5, 8, 3, 1, 1, 1, 1),
    (3, 64, 64, 2, 5, 3, 1, 1, 1, 1),
    (3, 64, 64, 7, 33, 3, 1, 1, 1, 1),
    (1, 64, 64, 5, 64, 3, 1, 1, 1, 1),
    (3, 64, 64, 13, 12, 3, 1, 1, 1, 1),
]
ODD = [  # what the library takes and the Triton kernels refuse
    (1, 3, 5, 7, 6, 3, 1, 1, 1, 1),
    (2, 3, 8, 9, 9, 7, 2, 3, 1, 1),
    (2, 8, 8, 7, 5, 3, 2, 1, 1, 1),
    (2, 8, 12, 6, 6, 3, 1, 2, 2, 4),
    (2, 6, 4, 5, 5, 2, 2, 0, 1, 1),
]


def why_not_triton(weight, size, stride, padding, dilation, groups):
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


def quantised(x):
    """(x / scale in e4m3, scale): one float32 for the whole tensor, its largest magnitude becomes
    e4m3's. NaN and Inf end as NaN.

    Never waits for the device. A tensor of zeros has scale 1.
    """
    low, high = x.aminmax()
    largest = torch.maximum(-low, high).float()
    scale = torch.where(largest == 0, 1, largest / torch.finfo(FP8).max)
    return (x.float() / scale).to(FP8), scale


def _operands(device, dtype, shape):
    b, c, k, h, w, r, stride, padding, dilation, groups = shape
    gen = torch.Generator().manual_seed(sum(shape))

    def make(*size, spread=1.0, kind=torch.bfloat16 if dtype == FP8 else dtype):
        return (
            (spread * torch.randn(size, generator=gen, dtype=torch.float64))
            .to(kind)
            .to(device)
            .contiguous(memory_format=NHWC)
        )

    x, weight = make(b, c, h, w), make(k, c // groups, r, r, spread=(c * r * r / groups) ** -0.5)
    p, q = (((n + 2 * padding - dilation * (r - 1) - 1) // stride + 1) for n in (h, w))
    bias = (
        torch.randn(k, generator=gen, dtype=torch.float64)
        .to(torch.float64 if dtype == torch.float64 else torch.float32)
        .to(device)
    )
    pairs = [[v, v] for v in (stride, padding, dilation)]
    return make, x, weight, bias, (b, k, p, q), (*pairs, groups)


def _products(dtype, a, b):
    """Both operands in dtype, and the scale of their product."""
    if dtype != FP8:
        return a, b, None
    (a, first), (b, second) = quantised(a), quantised(b)
    return a, b, first * second


def _shapes(device, dtype):
    shapes = SHAPES if triton.INTERPRET or device == "cuda" else [*SHAPES, *ODD]
    if dtype == FP8:
        shapes = [(b, 2 * c, 2 * k, *rest) for b, c, k, *rest in shapes if c != 3]
    return [*shapes, *WIDE] if dtype in HALVES else shapes


def _samples(device, dtype):
    for n, shape in enumerate(_shapes(device, dtype)):
        make, x, weight, bias, out, conv = _operands(device, dtype, shape)
        x, weight, scale = _products(dtype, x, weight)
        for k, (with_bias, with_residual, relu) in enumerate(
            [(1, 1, 1), (1, 0, 1), (0, 1, 0), (0, 0, 0), (0, 0, 1), (1, 1, 0)]
        ):
            if n < 2 or k % 3 == n % 3:
                yield (
                    x,
                    weight,
                    bias if with_bias else None,
                    make(*out) if with_residual else None,
                    *conv,
                    bool(relu),
                    bool(relu) and k != 4,
                    scale,
                )


def _bits(x):
    mask = torch.empty(mask_bytes(x.numel()), dtype=torch.uint8, device=x.device)
    conv_epilogue_(x.clone(memory_format=torch.preserve_format), None, None, True, mask)
    return mask


def _grad_samples(device, dtype):
    for n, shape in enumerate(_shapes(device, dtype)):
        make, x, weight, _, out, conv = _operands(device, dtype, shape)
        grad, weight, scale = _products(dtype, make(*out), weight)
        for k, (with_addend, with_mask) in enumerate([(1, 1), (0, 1), (1, 0), (0, 0)]):
            if n < 2 or k % 2 == n % 2:
                addend, mask = (
                    make(*x.shape) if with_addend else None,
                    _bits(x) if with_mask else None,
                )
                yield grad, weight, addend, mask, list(x.shape), *conv, scale


def _step_samples(device, dtype):
    for n, shape in enumerate(s for s in _shapes(device, dtype) if s[1] == 3):
        make, x, weight, _, out, conv = _operands(device, dtype, shape)
        gen = torch.Generator().manual_seed(n)
        store = (x.shape[0] + 2, *x.shape[1:])
        images = torch.randint(256, store, generator=gen, dtype=torch.uint8)
        index = torch.randperm(store[0], generator=gen)[: x.shape[0]]
        flip = torch.rand(x.shape[0], generator=gen) < 0.5
        start = (torch.rand(store, generator=gen) - 0.5) / 16
        for k, delta in enumerate(
            [start, start.half(), torch.randint(-127, 128, store, generator=gen, dtype=torch.int8)]
        ):
            used = images if k % 2 else images / 255
            count = torch.zeros(1, dtype=torch.int64, device=device) if k else None
            rest = (flip if k != 1 else None, *conv, 0.3 / 255, 8 / 255)
            args = (delta, index, make(*out), weight, used, *rest, count)
            yield tuple(a.to(device) if isinstance(a, torch.Tensor) else a for a in args)


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


def out_size(size, weight, stride, padding, dilation, groups=1):
    """[B, K, P, Q] of a convolution of [B, C, H, W]."""
    (b, _, h, w), (k, _, r, s) = size, weight.shape
    return [
        b,
        k,
        (h + 2 * padding[0] - dilation[0] * (r - 1) - 1) // stride[0] + 1,
        (w + 2 * padding[1] - dilation[1] * (s - 1) - 1) // stride[1] + 1,
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
    samples=_samples,
    dtypes=DOUBLES | {FP8},
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
    samples=_grad_samples,
    dtypes=DOUBLES | {FP8},
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
    reference=reference_step,
    fake=lambda *args: None,
    samples=_step_samples,
    dtypes=FLOATS,
    dtype_of=lambda *args: args[2].dtype,
    mutates=(0, 12),
    impls=_impls("conv_input_grad_step_", native.conv_input_grad_step_, FLOATS, FLOATS),
    route=lambda delta, index, grad, weight, images, flip, *conv: _route(
        "conv_input_grad_step_", weight, [len(grad), *images.shape[1:]], *conv[:4]
    ),
)


def _pair(op, name, value, least):
    value = list(value) if isinstance(value, (list, tuple)) else [value, value]
    if (
        len(value) != 2
        or type(value[0]) is not int
        or type(value[1]) is not int
        or min(value) < least
    ):
        messages.fail(op, name, f"a whole number >= {least}, or two", value)
    return value


def _conv(op, weight, size, stride, padding, dilation, groups):
    """The checked geometry, and the size of the forward result."""
    if not isinstance(weight, torch.Tensor) or weight.dim() != 4:
        messages.fail(op, "weight", "a tensor [K, C / groups, R, S]", messages.describe(weight))
    conv = (
        _pair(op, "stride", stride, 1),
        _pair(op, "padding", padding, 0),
        _pair(op, "dilation", dilation, 1),
    )
    if (
        not isinstance(groups, int)
        or isinstance(groups, bool)
        or groups < 1
        or weight.shape[0] % groups
        or weight.shape[1] * groups != size[1]
    ):
        messages.fail(
            op,
            "weight",
            f"[K, {size[1]} / groups, R, S] with K a multiple of groups",
            f"{list(weight.shape)}, groups {groups}",
        )
    out = out_size(size, weight, *conv)
    if min(out[2:]) < 1:
        messages.fail(
            op,
            "weight",
            f"a kernel that fits into {list(size[2:])} with padding {conv[1]}",
            list(weight.shape),
        )
    return (*conv, groups), out


def _alike(op, name, tensor, like, dtype=None):
    dtype = dtype or like.dtype
    if tensor.dtype != dtype or tensor.device != like.device:
        messages.fail(op, name, f"{str(dtype)[6:]} on {like.device}", messages.describe(tensor))


def _check_scale(op, scale, like):
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


def conv_forward(
    x,
    weight,
    bias=None,
    residual=None,
    *,
    stride=1,
    padding=0,
    dilation=1,
    groups=1,
    relu=True,
    want_mask=True,
    scale=None,
    backend="auto",
):
    """relu(conv2d(x, weight) + bias + residual), and the ReLU's bits. Frozen weights: not
    differentiable, see `conv_input_grad`.

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

    Returns: (y [B, K, P, Q] channels-last in x's dtype, mask uint8). Sums in float32 at least (e4m3
        on a GPU: in the tensor core's
    accumulator, which is a little narrower). Deterministic on one machine, backend and
    thread count. Triton takes 1x1 and 3x3, stride 1 and 2, padding R // 2, channels in multiples of
    16 (a stem: at most 16); wgmma 3x3, stride and padding 1, 64 to 64 channels, 4 to 64 columns.
    Errors: ValueError, BackendError.
    """
    op = "conv_forward"
    dense(op, "x", x, dtypes=DOUBLES | {FP8})
    conv, out = _conv(op, weight, x.shape, stride, padding, dilation, groups)
    _alike(op, "weight", weight, x)
    _check_scale(op, scale, x)
    if bias is not None:
        check_bias(op, bias, weight.shape[0], x)
    if residual is not None:
        dense(op, "residual", residual)
        _alike(op, "residual", residual, x, result_dtype(x))
        if list(residual.shape) != out:
            messages.fail(op, "residual", out, list(residual.shape))
    checks.no_gradient(op, x=x, weight=weight, bias=bias, residual=residual)
    if want_mask and not relu:
        messages.fail(op, "want_mask", "False without relu", True)
    return torch.ops.miue_fast.conv_forward(
        x, weight, bias, residual, *conv, relu, want_mask, scale, backend
    )


def conv_input_grad(
    grad,
    weight,
    size,
    addend=None,
    mask=None,
    *,
    stride=1,
    padding=0,
    dilation=1,
    groups=1,
    scale=None,
    backend="auto",
):
    """(d conv2d / d x applied to grad + addend) where the mask's bit is set, else 0: the gradient
    that reaches the layer before.

    Args:
        grad: [B, K, P, Q] channels-last, d loss / d y. weight, stride, padding, dilation, groups:
            of the forward.
        size: [B, C, H, W] of x. addend: like the result, or None (a residual branch's gradient).
            mask: x's own ReLU bits, or None.
        scale: as there, for float8_e4m3fn grad and weight. (Weights with K innermost in memory need
            no copy in Triton then.)

    Returns: [B, C, H, W] channels-last. Errors and determinism as in `conv_forward`.
    """
    op = "conv_input_grad"
    dense(op, "grad", grad, dtypes=DOUBLES | {FP8})
    conv, out = _conv(op, weight, size, stride, padding, dilation, groups)
    _alike(op, "weight", weight, grad)
    _check_scale(op, scale, grad)
    if list(grad.shape) != out:
        messages.fail(op, "grad", out, list(grad.shape))
    if addend is not None:
        dense(op, "addend", addend)
        _alike(op, "addend", addend, grad, result_dtype(grad))
        if list(addend.shape) != list(size):
            messages.fail(op, "addend", list(size), list(addend.shape))
    checks.no_gradient(op, grad=grad, weight=weight, addend=addend)
    if mask is not None:
        check_mask(op, mask, size[0] * size[1] * size[2] * size[3], grad.device)
    return torch.ops.miue_fast.conv_input_grad(
        grad, weight, addend, mask, list(size), *conv, scale, backend
    )


def conv_input_grad_step_(
    delta,
    index,
    grad,
    weight,
    images,
    flip=None,
    *,
    alpha,
    eps,
    stride=1,
    padding=0,
    dilation=1,
    groups=1,
    nonfinite=None,
    backend="auto",
):
    """`projected_step_` with the gradient `conv_input_grad(grad, weight)` of the first layer: in
    Triton the image gradient never leaves the kernel; the libraries (oneDNN, cuDNN) write it once.

    Args: grad: [B, K, P, Q] channels-last; weight, stride, padding, dilation, groups: of the first
            convolution; the others as in `projected_step_`.
    The step looks at signs only: positive factors per channel (1/std of a normalisation) need not
        be applied.
    """
    op = "conv_input_grad_step_"
    dense(op, "grad", grad)
    flip, alpha, eps = check_step(op, delta, index, images, flip, alpha, eps, nonfinite)
    size = [len(delta) if index is None else len(index), *images.shape[1:]]
    conv, out = _conv(op, weight, size, stride, padding, dilation, groups)
    _alike(op, "weight", weight, grad)
    if list(grad.shape) != out or grad.dtype not in FLOATS or grad.device != delta.device:
        messages.fail(
            op,
            "grad",
            f"a float32, float16 or bfloat16 tensor {out} on {delta.device}",
            messages.describe(grad),
        )
    checks.no_gradient(op, grad=grad, weight=weight)
    torch.ops.miue_fast.conv_input_grad_step_(
        delta, index, grad, weight, images, flip, *conv, alpha, eps, nonfinite, backend
    )
