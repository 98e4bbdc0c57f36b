"""The launches of every Triton kernel without a GPU, and what the compiler makes of them: for
tests/ops/test_triton_aot.py and benchmarks/pages/aot.py.

The launchers themselves are called, with Triton's launch replaced by a recorder that specialises
the arguments as Triton would."""

import re
from dataclasses import dataclass
from unittest import mock

import torch
import triton
from _machine_code import mix, output
from miue_fast.kernels.triton import (
    _common,
    class_covariance,
    conv_epilogue,
    convolution,
    intra_class_distance,
    mi_ue_value_and_grad,
    nt_xent,
    perturbed_input,
    projected_step,
)
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction
from triton.tools.tensor_descriptor import TensorDescriptor

POINTER = {
    torch.float32: "*fp32",
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.float8_e4m3fn: "*fp8e4nv",
    torch.uint8: "*u8",
    torch.int8: "*i8",
    torch.int16: "*i16",
    torch.int32: "*i32",
    torch.int64: "*i64",
}
FLOATS = [torch.float32, torch.float16, torch.bfloat16]


def specialise(kernel, args, kwargs):
    """(signature, constexprs, attrs, options) of a launch: None and 1 are constants, multiples of
    16 are known to be. A tuple has a tuple of kinds; constants and attributes of its elements have
    the path to them as their key.
    """
    given = dict(zip(kernel.arg_names, args)) | {
        k: v for k, v in kwargs.items() if k in kernel.arg_names
    }
    constants, attrs = {}, {}

    def kind(value, path, constant):
        if constant or value is None or (type(value) is int and value == 1):
            constants[path] = value
            return "constexpr"
        if isinstance(value, tuple):
            return type(value)(*(kind(v, (*path, k), False) for k, v in enumerate(value)))
        if isinstance(value, TensorDescriptor):
            return f"tensordesc<{POINTER[value.base.dtype][1:]}{list(value.block_shape)}>"
        if isinstance(value, float):
            return "fp32"
        if isinstance(value, torch.Tensor):
            found, aligned = POINTER[value.dtype], value.data_ptr() % 16 == 0
        else:
            found, aligned = "i32" if -(2**31) <= value < 2**31 else "i64", value % 16 == 0
        if aligned:
            attrs[path] = [["tt.divisibility", 16]]
        return found

    signature = {
        parameter.name: kind(given[parameter.name], (position,), parameter.is_constexpr)
        for position, parameter in enumerate(kernel.params)
    }
    return (
        signature,
        constants,
        attrs,
        {k: v for k, v in kwargs.items() if k not in kernel.arg_names},
    )


def named_constants(case):
    """{name: value} of a launch's constants, those of a tuple by the names of its fields."""
    kernel, signature, constants, *_ = case
    found = {}
    for (position, *rest), value in constants.items():
        name = kernel.arg_names[position]
        if rest:
            found[signature[name]._fields[rest[0]]] = value
        elif isinstance(value, tuple):
            found |= value._asdict()
        else:
            found[name] = value
    return found


def kinds(signature):
    """The kinds of all arguments, those in tuples too."""
    for kind in signature.values():
        yield from kind if isinstance(kind, tuple) else (kind,)


def recorded(*calls):
    """{text: (kernel, *specialisation)} of every launch of the calls."""
    found = {}

    def record(kernel, *args, grid, warmup, **kwargs):
        case = specialise(kernel, args, kwargs)
        found[f"{kernel.fn.__name__} {case}"] = (kernel, *case)

    with mock.patch.object(JITFunction, "run", record):
        for call in calls:
            call()
    return found


def launches():
    """{capability: launches}; large blocks take other tiles and kernels."""
    same = recorded(statistics, pointwise)
    found = {90: same | recorded(losses, convolutions, convolutions_in_fp8)}
    older = {"capability": lambda tensor: (8, 0)}
    with mock.patch.multiple(_common, **older), mock.patch.multiple(nt_xent, **older):
        return found | {80: same | recorded(losses, convolutions)}


def losses():
    for dtype in FLOATS:
        for batch, width in ((512, 512), (nt_xent.STORED_ROWS + 192, 512), (64, 70)):
            features, labels = torch.zeros(batch, width, dtype=dtype), torch.arange(batch) % 10
            nt_xent.nt_xent(features, labels, 0.1, "all", True)
            if dtype != torch.float16:
                nt_xent.nt_xent(features, labels, 0.1, "negatives", True)
        for width in (
            (40, 100, 200, 600) if dtype == torch.bfloat16 else ()
        ):  # the widths of the resident form, and one that is too wide
            wide = torch.zeros(nt_xent.STORED_ROWS + 192, width, dtype=dtype)
            nt_xent.nt_xent(wide, torch.arange(len(wide)) % 10, 0.1, "all", True)
        nt_xent.nt_xent(features[:, ::2], labels, 0.1, "all", False)
        for width in (70, 512, 2048, 2304):
            intra_class_distance.intra_class_distance(
                torch.zeros(48, width, dtype=dtype), torch.arange(48) % 3, True, True
            )
        mi_ue_value_and_grad.mi_ue_value_and_grad(
            torch.zeros(512, 512, dtype=dtype), torch.arange(512) % 10, 0.1, 0.1, "all", True
        )


def statistics():
    for dtype in FLOATS:
        for width in (512, 70):
            class_covariance.class_covariance(
                torch.zeros(64, width, dtype=dtype), torch.arange(64) % 10, 10
            )


def pointwise():
    x, index, flip, count = (
        torch.zeros(4, 3, 32, 32),
        torch.arange(4),
        torch.zeros(4, dtype=torch.bool),
        torch.zeros(1, dtype=torch.int64),
    )
    odd = torch.zeros(3, 1, 7, 5)
    for k, store in enumerate((torch.float32, torch.float16, torch.int8)):
        for dtype in FLOATS:
            grad = x.to(
                dtype, memory_format=torch.channels_last if k % 2 else torch.contiguous_format
            )
            projected_step.projected_step_(
                x.to(store), index, grad, x.byte(), flip, 0.1, 0.1, count
            )
            perturbed_input.perturbed_input(
                x.byte(),
                x.to(store),
                index,
                flip,
                [0.5] * 3,
                [0.5] * 3,
                0.1,
                dtype,
                dtype != torch.float32,
            )
        view = torch.zeros(4, 3, dtype=torch.int32)
        for grid in (1, 4):
            projected_step.projected_step_(
                x.to(store), index, grad, x.byte(), None, 0.1, 0.1, count, view, grid
            )
        perturbed_input.perturbed_input(
            x.byte(), x.to(store), index, None, [0.5] * 3, [0.5] * 3, 0.1, dtype, k > 0, view
        )
        projected_step.projected_step_(
            odd.to(store), None, odd.to(FLOATS[k]), odd, None, 0.1, 0.1, None
        )
        perturbed_input.perturbed_input(
            odd, odd.to(store) if k else None, None, None, [], [], 0.1, FLOATS[k], k == 1
        )
        projected_step.projected_step(x.to(FLOATS[k]), x.to(FLOATS[k]), x.to(FLOATS[k]), 0.1, 0.1)
        y, bits = x.to(FLOATS[k]), torch.zeros(x.numel() // 8, dtype=torch.uint8)
        conv_epilogue.conv_epilogue_(y, torch.zeros(3), y, True, bits)
        conv_epilogue.conv_grad_epilogue_(y, y, bits)


# in, out, size of the input, kernel, stride: every layer of CIFAR ResNet-18
RESNET18 = [
    (3, 64, 32, 3, 1),
    (64, 64, 32, 3, 1),
    (64, 128, 32, 3, 2),
    (128, 128, 16, 3, 1),
    (128, 256, 16, 3, 2),
    (256, 256, 8, 3, 1),
    (256, 512, 8, 3, 2),
    (512, 512, 4, 3, 1),
    (64, 128, 32, 1, 2),
    (128, 256, 16, 1, 2),
    (256, 512, 8, 1, 2),
]
FEW = [
    (3, 64, 32, 3, 1),
    (64, 128, 32, 3, 2),
    (48, 32, 6, 3, 2),
]  # the last: tiles of 16 channels, and images of an odd width


def convolutions():
    for dtype, layers in (
        (torch.bfloat16, [*RESNET18, FEW[2]]),
        (torch.float16, FEW[1:2]),
        (torch.float32, FEW),
    ):
        for layer in layers:
            convolve(dtype, *layer)


def convolutions_in_fp8():
    """Without TMA and wgmma there is none, see test_e4m3_is_refused_before_it_exists."""
    for layer in (RESNET18[1], RESNET18[2], RESNET18[7], RESNET18[8]):
        convolve(torch.float8_e4m3fn, *layer)


def convolve(dtype, c, k, size, r, stride, b=512):
    """The launches of a frozen network for one layer, on tensors of one element: only their sizes
    matter.
    """
    fp8 = dtype == torch.float8_e4m3fn
    between, scale = (torch.bfloat16, torch.ones(())) if fp8 else (dtype, None)

    def make(*shape, dtype=dtype):
        return (
            torch.zeros(1, dtype=dtype)
            .expand(shape[0], shape[2], shape[3], shape[1])
            .permute(0, 3, 1, 2)
        )

    x, y, weight = (
        make(b, c, size, size),
        make(b, k, size // stride, size // stride),
        torch.zeros(k, c, r, r, dtype=dtype),
    )
    conv, shortcut = ([stride] * 2, [r // 2] * 2, [1, 1], 1), r == 1
    residual = make(*y.shape, dtype=between) if stride == 1 and c == k else None
    convolution.conv_forward(
        x, weight, torch.zeros(k), residual, *conv, not shortcut, not shortcut, scale
    )
    if c == 3:
        rest = torch.zeros(b, dtype=torch.bool), *conv, 0.1, 0.1, torch.zeros(1, dtype=torch.int64)
        images = torch.zeros(b, c, size, size, dtype=torch.uint8)
        convolution.conv_input_grad_step_(images.half(), torch.arange(b), y, weight, images, *rest)
    else:
        mask = (
            None
            if shortcut
            else torch.zeros(conv_epilogue.mask_bytes(x.numel()), dtype=torch.uint8)
        )
        addend = None if shortcut else make(*x.shape, dtype=between)
        convolution.conv_input_grad(y, weight, addend, mask, list(x.shape), *conv, scale)


@dataclass
class Compiled:
    """stack: bytes of a thread's local memory, where spills go. shared: bytes of a block. mix: see
    _machine_code.
    """

    registers: int
    stack: int
    shared: int
    mix: dict
    ptx: str


def compiled(capability, name, case, folder):
    kernel, signature, constants, attrs, options = case
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attrs)
    made = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    cubin = folder / f"{abs(hash(name))}.cubin"
    cubin.write_bytes(made.asm["cubin"])
    usage = re.search(r"REG:(\d+) STACK:(\d+)", output("cuobjdump", "-res-usage", cubin))
    return Compiled(
        int(usage[1]),
        int(usage[2]),
        made.metadata.shared,
        mix(output("nvdisasm", "-c", cubin)),
        made.asm["ptx"],
    )
