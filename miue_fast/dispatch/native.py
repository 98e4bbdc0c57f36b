"""The only importer of `_cpu` and `_cuda`: gives each op of the native modules the signature of its
reference.

Both modules take raw pointers and the same arguments; only the last one differs (threads or the
current stream)."""

import importlib
import importlib.util
from collections.abc import Sequence

import torch

from . import architectures
from .checks import row_numbers
from .library import convolve, convolve_back
from .masks import mask_bytes
from .registry import BackendError

_CODES = {
    torch.float32: 0,
    torch.float16: 1,
    torch.bfloat16: 2,
    torch.float64: 3,
    torch.uint8: 4,
    torch.int8: 5,
    None: -1,
}


def _load(name):
    """(module, None), or (None, reason) where it was not built. A module that exists and does not
    load is an exception.
    """
    if importlib.util.find_spec(f"miue_fast.{name}") is None:
        return (
            None,
            f"miue_fast.{name} was not built on this machine (no compiler, no nvcc, or MIUE_BUILD)",
        )
    return importlib.import_module(f"miue_fast.{name}"), None


_cpu, _cpu_reason = _load("_cpu")
_cuda, _cuda_reason = _load("_cuda")
_built = architectures.built(_cuda.build) if _cuda else ()


def cpu_missing():
    return _cpu_reason


def cuda_missing() -> str | None:
    """Why the CUDA C++ code for every GPU does not run here, or None."""
    return _code_missing(architectures.EVERY_GPU)


def wgmma_missing() -> str | None:
    """Why the CUDA C++ code for Hopper does not run here, or None."""
    return _code_missing(architectures.HOPPER)


def _code_missing(folder: str) -> str | None:
    if _cuda_reason:
        return _cuda_reason
    if not torch.cuda.is_available():
        return "no CUDA device"
    capability = torch.cuda.get_device_capability()
    return architectures.missing(folder, _built, capability)


def build_flags():
    return {"cpu": _cpu.build if _cpu else None, "cuda": _cuda.build if _cuda else None}


def cpu_level():
    """The instruction set in use, or None without `_cpu`."""
    return _cpu.level() if _cpu else None


def set_cpu_level(name):
    """Forces 'generic', 'avx2' or 'avx512' for tests; ValueError where the processor lacks it."""
    _cpu.set_level(name)


def _call(device, op, *args):
    if device.type == "cpu":
        return getattr(_cpu, op)(*args, torch.get_num_threads())
    if _cuda is None:
        raise BackendError(f"{op}: {_cuda_reason}")
    try:
        if device.type != "cuda":
            return getattr(_cuda, op)(*args, 0)
        with torch.cuda.device(device):
            return getattr(_cuda, op)(*args, torch.cuda.current_stream(device).cuda_stream)
    except _cuda.BackendFailure as error:
        raise BackendError(f"{op}: {error}") from None


def _ptr(tensor):
    return 0 if tensor is None else tensor.data_ptr()


def _typed(tensor):
    return (0, _CODES[None]) if tensor is None else (tensor.data_ptr(), _CODES[tensor.dtype])


def _accumulated(dtype):
    return torch.float64 if dtype == torch.float64 else torch.float32


def _rows(features):
    return features if features.stride(1) == 1 or features.shape[1] <= 1 else features.contiguous()


def _workspace(op, features, option):
    module = _cpu if features.device.type == "cpu" else _cuda
    size = getattr(module, f"{op}_workspace")(*features.shape, _CODES[features.dtype], option)
    return torch.empty(size, dtype=torch.uint8, device=features.device)


def _outputs(features, want_grad):
    options = {"dtype": _accumulated(features.dtype), "device": features.device}
    return torch.empty((), **options), torch.empty(features.shape if want_grad else (0,), **options)


def nt_xent(features, labels, temperature, denominator, want_grad):
    features = _rows(features)
    loss, grad = _outputs(features, want_grad)
    workspace = _workspace("nt_xent", features, want_grad)
    _call(
        features.device,
        "nt_xent",
        features.data_ptr(),
        _CODES[features.dtype],
        features.stride(0),
        labels.data_ptr(),
        *features.shape,
        temperature,
        denominator == "negatives",
        loss.data_ptr(),
        grad.data_ptr() if want_grad else 0,
        workspace.data_ptr(),
    )
    return loss, grad


def _distance(features, labels, normalize_dim, want_grad, weight=1.0, addend=(None, None)):
    """Adds to the addend in place, where there is one."""
    features = _rows(features)
    loss, grad = _outputs(features, want_grad) if addend[0] is None else addend
    workspace = _workspace("intra_class_distance", features, want_grad)
    _call(
        features.device,
        "intra_class_distance",
        features.data_ptr(),
        _CODES[features.dtype],
        features.stride(0),
        labels.data_ptr(),
        *features.shape,
        normalize_dim,
        weight,
        _ptr(addend[0]),
        _ptr(addend[1]),
        loss.data_ptr(),
        grad.data_ptr() if want_grad else 0,
        workspace.data_ptr(),
    )
    return loss, grad


def intra_class_distance(features, labels, normalize_dim, want_grad):
    return _distance(features, labels, normalize_dim, want_grad)


def mi_ue_value_and_grad(features, labels, temperature, zeta, denominator, normalize_dim):
    similarity = nt_xent(features, labels, temperature, denominator, True)
    return (
        similarity
        if zeta == 0
        else _distance(features, labels, normalize_dim, True, zeta, similarity)
    )


def class_covariance(features, labels, num_classes):
    features = _rows(features)
    width = features.shape[1]
    counts = labels.new_empty(num_classes)
    means = features.new_empty((num_classes, width), dtype=_accumulated(features.dtype))
    covariances = means.new_empty((num_classes, width, width))
    workspace = _workspace("class_covariance", features, num_classes)
    _call(
        features.device,
        "class_covariance",
        features.data_ptr(),
        _CODES[features.dtype],
        features.stride(0),
        labels.data_ptr(),
        *features.shape,
        num_classes,
        counts.data_ptr(),
        means.data_ptr(),
        covariances.data_ptr(),
        workspace.data_ptr(),
    )
    return counts, means, covariances


def projected_step(delta, grad, image, alpha, eps):
    delta, grad, image = delta.contiguous(), grad.contiguous(), image.contiguous()
    out = torch.empty_like(delta)
    _call(
        delta.device,
        "projected_step",
        out.data_ptr(),
        delta.data_ptr(),
        grad.data_ptr(),
        image.data_ptr(),
        _CODES[delta.dtype],
        delta.numel(),
        alpha,
        eps,
    )
    return out


def projected_step_(delta, index, grad, images, flip, alpha, eps, nonfinite, view=None, grid=1):
    _call(
        delta.device,
        "projected_step_inplace",
        _typed(delta),
        _ptr(index),
        _typed(grad),
        grad.stride(),
        _typed(images),
        _ptr(flip),
        grad.shape,
        delta.shape[0],
        alpha,
        eps,
        _ptr(nonfinite),
        _ptr(view),
        grid,
    )


def perturbed_input(images, delta, index, flip, mean, std, eps, dtype, channels_last, view=None):
    n, c, h, w = images.shape
    layout = torch.channels_last if channels_last else torch.contiguous_format
    b = n if index is None else index.shape[0]
    out = torch.empty((b, c, h, w), dtype=dtype, device=images.device, memory_format=layout)
    _call(
        images.device,
        "perturbed_input",
        _typed(out),
        channels_last,
        _typed(images),
        _typed(delta),
        eps,
        _ptr(index),
        _ptr(flip),
        mean,
        [1 / s for s in std],
        (b, c, h, w),
        n,
        _ptr(view),
    )
    return out


def jpeg_round_trip(images, cosines, steps, halved):
    """cosines: 8 lists of 8. steps: of luma and of chroma, 8 lists of 8 each."""
    images = images.contiguous()
    out = torch.empty_like(images)
    batch, _, height, width = images.shape
    _call(
        images.device,
        "jpeg_round_trip",
        out.data_ptr(),
        images.data_ptr(),
        batch,
        height,
        width,
        [value for row in cosines for value in row],
        [value for column in zip(*cosines) for value in column],
        [step for table in steps for row in table for step in row],
        halved,
    )
    return out


def jpeg_round_trip_grad(grad):
    grad = grad.contiguous()
    out = torch.empty_like(grad)
    batch, _, height, width = grad.shape
    sizes = batch, height, width
    _call(grad.device, "jpeg_round_trip_grad", out.data_ptr(), grad.data_ptr(), *sizes)
    return out


def conv_epilogue_(y, bias, residual, relu, mask):
    _call(
        y.device,
        "conv_epilogue",
        y.data_ptr(),
        _CODES[y.dtype],
        0 if bias is None else bias.data_ptr(),
        0 if residual is None else residual.data_ptr(),
        relu,
        0 if mask is None else mask.data_ptr(),
        y.shape[1],
        y.numel(),
    )


def conv_grad_epilogue_(grad, addend, mask):
    _call(
        grad.device,
        "conv_grad_epilogue",
        grad.data_ptr(),
        _CODES[grad.dtype],
        0 if addend is None else addend.data_ptr(),
        0 if mask is None else mask.data_ptr(),
        grad.numel(),
    )


def conv_forward(
    x, weight, bias, residual, stride, padding, dilation, groups, relu, want_mask, scale=None
):  # no e4m3: scale is None
    y = convolve(x, weight, stride, padding, dilation, groups)
    mask = torch.empty(
        mask_bytes(y.numel()) if want_mask else 0, dtype=torch.uint8, device=y.device
    )
    if relu or bias is not None or residual is not None:
        conv_epilogue_(y, bias, residual, relu, mask if want_mask else None)
    return y, mask


def conv_input_grad(
    grad, weight, addend, mask, size, stride, padding, dilation, groups, scale=None
):
    out = convolve_back(grad, weight, size, stride, padding, dilation, groups)
    if addend is not None or mask is not None:
        conv_grad_epilogue_(out, addend, mask)
    return out


def why_not_conv64(weight, size, stride, padding, dilation, groups):
    """Why `conv64` does not take this layer, or None."""
    if weight.dtype not in (torch.float16, torch.bfloat16):
        return f"{str(weight.dtype)[6:]} (float16 or bfloat16)"
    if list(weight.shape) != [64, 64, 3, 3] or groups != 1:
        return f"a weight {list(weight.shape)}, groups {groups} ([64, 64, 3, 3], 1)"
    if not list(stride) == list(padding) == list(dilation) == [1, 1]:
        return f"stride {list(stride)}, padding {list(padding)}, dilation {list(dilation)} (1 each)"
    if size[2] < 1 or not 4 <= size[3] <= 64 or size[0] * size[2] >= 1 << 31:
        return f"images {list(size)} (4 to 64 columns, fewer than 2^31 rows in all)"
    return None


def _sixteen(tensor):
    """The tensor, or a copy of it that starts at a multiple of 16 bytes."""
    return (
        tensor
        if tensor is None or tensor.data_ptr() % 16 == 0
        else tensor.clone(memory_format=torch.preserve_format)
    )


def _conv64(op, x, weight, bias, residual, relu, mask_out, mask_in, size, conv, back=False):
    if reason := why_not_conv64(weight, size, *conv):
        raise BackendError(f"{op}: wgmma does not take {reason}")
    direct = (
        back and weight.permute(1, 2, 3, 0).is_contiguous()
    )  # the summed channels are innermost in memory
    weight = weight if direct else weight.contiguous(memory_format=torch.channels_last)
    y = torch.empty(size, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)
    x, weight, residual = _sixteen(x), _sixteen(weight), _sixteen(residual)
    _call(
        x.device,
        "conv64",
        y.data_ptr(),
        _CODES[x.dtype],
        x.data_ptr(),
        weight.data_ptr(),
        back and not direct,
        back,
        _ptr(bias),
        _ptr(residual),
        relu,
        _ptr(mask_out),
        _ptr(mask_in),
        size[0],
        size[2],
        size[3],
    )
    return y


def conv64_forward(
    x, weight, bias, residual, stride, padding, dilation, groups, relu, want_mask, scale=None
):
    mask = torch.empty(
        mask_bytes(x.numel()) if want_mask else 0, dtype=torch.uint8, device=x.device
    )
    conv = stride, padding, dilation, groups
    y = _conv64(
        "conv_forward",
        x,
        weight,
        bias,
        residual,
        relu,
        mask if want_mask else None,
        None,
        list(x.shape),
        conv,
    )
    return y, mask


def conv64_input_grad(
    grad, weight, addend, mask, size, stride, padding, dilation, groups, scale=None
):
    conv = stride, padding, dilation, groups
    return _conv64(
        "conv_input_grad", grad, weight, None, addend, False, None, mask, size, conv, back=True
    )


def conv_input_grad_step_(
    delta,
    index,
    grad,
    weight,
    images,
    flip,
    stride,
    padding,
    dilation,
    groups,
    alpha,
    eps,
    nonfinite,
):
    row_numbers("conv_input_grad_step_", index, len(delta))
    image_grad = convolve_back(
        grad, weight, [len(grad), *images.shape[1:]], stride, padding, dilation, groups
    )
    projected_step_(delta, index, image_grad, images, flip, alpha, eps, nonfinite)


# csrc/ops.h, ConvFamily
_FAMILIES = {
    name: number
    for number, name in enumerate(
        ("three4", "three2", "strided", "strided_back", "one", "one_strided", "one_back")
    )
}


def packed_weights_size(family: str, channels: int, results: int) -> int:
    """How many float32 values the packed weights take at the instruction level in use."""
    return _cpu.packed_weights_floats(_FAMILIES[family], channels, results)


def pack_weights(
    family: str, back: bool, weight: torch.Tensor, channels: int, results: int, packed: torch.Tensor
) -> None:
    """Transforms weights [K, C, R, S] in float64, and writes them as `packed_conv` reads them."""
    _cpu.pack_weights(
        _FAMILIES[family],
        back,
        weight.data_ptr(),
        list(weight.stride()),
        channels,
        results,
        packed.data_ptr(),
        torch.get_num_threads(),
    )


def packed_conv(
    family: str,
    x: torch.Tensor,
    packed: torch.Tensor,
    bias: torch.Tensor | None,
    residual: torch.Tensor | None,
    relu: bool,
    mask: torch.Tensor | None,
    keep: torch.Tensor | None,
    y: torch.Tensor,
) -> None:
    """Writes a frozen convolution and its epilogue into y: csrc/ops.h, PackedConvArgs."""
    batch, channels, height, width = x.shape
    _, results, rows, columns = y.shape
    number, threads = _FAMILIES[family], torch.get_num_threads()
    size = _cpu.packed_conv_workspace(number, batch, rows, columns, channels, results, threads)
    workspace = torch.empty(size, dtype=torch.uint8)
    epilogue = [
        0 if tensor is None else tensor.data_ptr() for tensor in (bias, residual, mask, keep)
    ]
    _cpu.packed_conv(
        number,
        x.data_ptr(),
        packed.data_ptr(),
        *epilogue[:2],
        relu,
        *epilogue[2:],
        y.data_ptr(),
        [batch, height, width, channels, rows, columns, results],
        workspace.data_ptr(),
        threads,
    )


def batch_norm(
    x: torch.Tensor, weight: torch.Tensor | None, bias: torch.Tensor | None, eps: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """(result, mean, variance, 1 / sqrt(variance + eps)) of batch norm in training: csrc/ops.h,
    BatchNormArgs. x: channels-last [B, C, H, W], float32 or bfloat16, C a multiple of 16; the
    rest float32 [C], the variance without Bessel's correction.
    """
    channels = x.shape[1]
    size, out = [x.numel() // channels, channels], torch.empty_like(x)
    mean, variance, inverse = torch.empty((3, channels), dtype=torch.float32).unbind()
    workspace = torch.empty(_cpu.batch_norm_workspace(*size), dtype=torch.uint8)
    tensors = [tensor.data_ptr() for tensor in (x, out)]
    _cpu.batch_norm(
        _CODES[x.dtype],
        *tensors,
        size,
        _ptr(weight),
        _ptr(bias),
        eps,
        [tensor.data_ptr() for tensor in (mean, variance, inverse)],
        workspace.data_ptr(),
        torch.get_num_threads(),
    )
    return out, mean, variance, inverse


def batch_norm_grad(
    grad: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    mean: torch.Tensor,
    inverse: torch.Tensor,
    relu: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The gradients of x, weight and bias of `batch_norm`, from its mean and 1 / sqrt(variance +
    eps). grad: channels-last, like x; with relu it is the gradient of the result's ReLU.
    """
    channels = x.shape[1]
    size, out = [x.numel() // channels, channels], torch.empty_like(x)
    of_weight, of_bias = torch.empty((2, channels), dtype=torch.float32).unbind()
    workspace = torch.empty(_cpu.batch_norm_workspace(*size), dtype=torch.uint8)
    _cpu.batch_norm_grad(
        _CODES[x.dtype],
        *(tensor.data_ptr() for tensor in (x, grad, out)),
        size,
        _ptr(weight),
        _ptr(bias),
        relu,
        [tensor.data_ptr() for tensor in (mean, inverse, of_weight, of_bias)],
        workspace.data_ptr(),
        torch.get_num_threads(),
    )
    return out, of_weight, of_bias


def conv_weight_grad(x: torch.Tensor, grad: torch.Tensor) -> torch.Tensor:
    """The gradient [K, C, 3, 3] (channels-last) of the weights of a 3x3 convolution with stride 1
    and padding 1, from channels-last float32 x [B, C, H, W] and grad [B, K, H, W] on the CPU.
    """
    (batch, channels, height, width), results = x.shape, grad.shape[1]
    shape = results, channels, 3, 3
    out = torch.empty(shape, dtype=torch.float32, memory_format=torch.channels_last)
    size = _cpu.conv_weight_grad_workspace(channels, results)
    workspace = torch.empty(size, dtype=torch.uint8)
    _cpu.conv_weight_grad(
        x.data_ptr(),
        grad.data_ptr(),
        out.data_ptr(),
        [batch, height, width, channels, results],
        workspace.data_ptr(),
        torch.get_num_threads(),
    )
    return out


def matrix_missing() -> str | None:
    """Why `matrix_conv` does not run on this processor, or None."""
    if _cpu_reason:
        return _cpu_reason
    if _cpu.level() != "avx512":
        return f"the instruction level in use is {_cpu.level()}"
    return _cpu.matrix_missing()


def pack_matrix_weights(
    weight: torch.Tensor, back: bool, packed: torch.Tensor | None = None
) -> torch.Tensor:
    """The weights [K, C, R, S] bfloat16 of a convolution as `matrix_conv` reads them, in the memory
    of `packed` where it is given; back: for its input gradient.
    """
    results, channels, rows, columns = weight.shape
    along, across = weight.stride(1), weight.stride(0)
    if back:
        results, channels, along, across = channels, results, across, along
    size = channels, results, rows, columns
    if packed is None:
        packed = torch.empty(_cpu.matrix_weights_values(*size), dtype=torch.bfloat16)
    stride = [along, across, weight.stride(2), weight.stride(3)]
    threads = torch.get_num_threads()
    _cpu.pack_matrix_weights(weight.data_ptr(), stride, list(size), packed.data_ptr(), threads)
    return packed


def matrix_conv(
    x: torch.Tensor,
    packed: torch.Tensor,
    bias: torch.Tensor | None,
    residual: torch.Tensor | None,
    relu: bool,
    mask: torch.Tensor | None,
    keep: torch.Tensor | None,
    y: torch.Tensor,
    taps: Sequence[int],
    conv: tuple[Sequence[int], Sequence[int], Sequence[int]],
    back: bool,
    plain: bool = False,
) -> None:
    """Writes a convolution of channels-last bfloat16 tensors, or with `back` an input gradient, and
    its epilogue into y: csrc/ops.h, MatrixConvArgs. conv: the forward's stride, padding, dilation.
    """
    batch, channels, height, width = x.shape
    _, results, rows, columns = y.shape
    size = [batch, height, width, channels, rows, columns, results]
    made = _cpu.MatrixConvShape(size, list(taps), *map(list, conv), back, plain)
    threads = torch.get_num_threads()
    workspace = torch.empty(_cpu.matrix_conv_workspace(made, threads), dtype=torch.uint8)
    pointers = [_ptr(tensor) for tensor in (x, packed, bias, residual)]
    masks = [_ptr(tensor) for tensor in (mask, keep, y, workspace)]
    _cpu.matrix_conv(made, *pointers, relu, *masks, threads)


def matrix_weight_grad(
    x: torch.Tensor,
    grad: torch.Tensor,
    taps: Sequence[int],
    conv: tuple[Sequence[int], Sequence[int], Sequence[int]],
    plain: bool = False,
) -> torch.Tensor:
    """The gradient [K, C, R, S] (channels-last, float32) of the weights of a convolution, from
    channels-last bfloat16 x [B, C, H, W] and grad [B, K, P, Q]: csrc/ops.h, MatrixWeightGradArgs.
    """
    batch, channels, height, width = x.shape
    _, results, rows, columns = grad.shape
    size = [batch, height, width, channels, rows, columns, results]
    made = _cpu.MatrixConvShape(size, list(taps), *map(list, conv), False, plain)
    shape = results, channels, *taps
    out = torch.empty(shape, dtype=torch.float32, memory_format=torch.channels_last)
    workspace = torch.empty(_cpu.matrix_weight_grad_workspace(made), dtype=torch.uint8)
    pointers = [_ptr(tensor) for tensor in (x, grad, out, workspace)]
    _cpu.matrix_weight_grad(made, *pointers, torch.get_num_threads())
    return out
