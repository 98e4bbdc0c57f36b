"""Samples of the frozen convolutions."""

import torch

from miue_fast import ops
from miue_fast.dispatch import triton
from miue_fast.ops.geometry import FP8, quantised
from miue_fast.reference.conv_epilogue import conv_epilogue_, mask_bytes

from . import DOUBLES, FLOATS, Samples, add
from .conv_epilogue import bits_of

NHWC, HALVES = torch.channels_last, (torch.float16, torch.bfloat16)
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


def forward_samples(device, dtype):
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


def grad_samples(device, dtype):
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


def step_samples(device, dtype):
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


def geometry(choose, stem=False):
    """(gen, tensor, batch, in, out, height, width, kernel, stride): a layer that every backend
    takes; `tensor(*size)` gives channels-last values of the case's dtype.
    """
    gen = choose.generator()
    dtype = choose.one_of(*(FLOATS if stem else DOUBLES))
    kernel, stride = choose.one_of(1, 3), choose.one_of(1, 2)
    channels = choose.integer(1, 4) if stem else 16 * choose.integer(1, 3)
    height, width = (stride * choose.integer(1, 6) for _ in range(2))

    def tensor(*size):
        return torch.randn(size, generator=gen).to(dtype).contiguous(memory_format=NHWC)

    out = 16 * choose.integer(1, 3)
    return gen, tensor, choose.integer(1, 4), channels, out, height, width, kernel, stride


def forward_case(choose):
    gen, tensor, b, c, k, h, w, r, stride = geometry(choose)
    weight, bias = tensor(k, c, r, r) / (c * r * r) ** 0.5, torch.randn(k, generator=gen)
    bias = bias.to(torch.promote_types(weight.dtype, torch.float32)) if choose.flag() else None
    residual = tensor(b, k, h // stride, w // stride) if choose.flag() else None
    relu = choose.flag()
    conv = [stride] * 2, [r // 2] * 2, [1, 1], 1
    return tensor(b, c, h, w), weight, bias, residual, *conv, relu, relu and choose.flag(), None


def grad_case(choose):
    gen, tensor, b, c, k, h, w, r, stride = geometry(choose)
    grad, weight = tensor(b, k, h // stride, w // stride), tensor(k, c, r, r) / (k * r * r) ** 0.5
    addend = tensor(b, c, h, w) if choose.flag() else None
    mask = torch.randint(256, (mask_bytes(b * c * h * w),), generator=gen, dtype=torch.uint8)
    conv = [stride] * 2, [r // 2] * 2, [1, 1], 1
    return grad, weight, addend, mask if choose.flag() else None, [b, c, h, w], *conv, None


def step_case(choose):
    gen, tensor, b, c, k, h, w, r, stride = geometry(choose, stem=True)
    store = b + choose.integer(0, 2), c, h, w
    images = torch.randint(256, store, generator=gen, dtype=torch.uint8)
    images = images if choose.flag() else images / 255
    kind = choose.one_of(torch.float32, torch.float16, torch.int8)
    delta = torch.randint(-127, 128, store, generator=gen)
    delta = delta.to(kind) if kind == torch.int8 else (delta / 4000).to(kind)
    index = torch.randperm(store[0], generator=gen)[:b].contiguous()
    flip = torch.rand(b, generator=gen) < 0.5 if choose.flag() else None
    count = torch.zeros(1, dtype=torch.int64) if choose.flag() else None
    grad, weight = tensor(b, k, h // stride, w // stride), tensor(k, c, r, r)
    conv = [stride] * 2, [r // 2] * 2, [1, 1], 1
    return delta, index, grad, weight, images, flip, *conv, 0.3 / 255, 8 / 255, count


def forward_public(backend, batch):
    y, mask = ops.conv_forward(
        batch["x"] + 1, batch["weight"], batch["bias"], batch["x"], padding=1, backend=backend
    )
    return y * 2, mask


def grad_public(backend, batch):
    x = batch["x"]
    return 2 * ops.conv_input_grad(
        x, batch["weight"], x.shape, x, bits_of(x) + 0x5A, padding=1, backend=backend
    )


def step_public(backend, batch):
    delta = batch["delta"].clone()
    count = torch.zeros(1, dtype=torch.int64, device=delta.device)
    grad = batch["x"][:, :, :, :1].expand(-1, -1, 4, 5).contiguous(memory_format=NHWC)
    ops.conv_input_grad_step_(
        delta,
        batch["index"],
        grad,
        batch["stem"],
        batch["images"],
        batch["flip"],
        alpha=0.01,
        eps=0.03,
        padding=1,
        nonfinite=count,
        backend=backend,
    )
    return delta * 1, count


def no_rows(args):
    x, weight, bias, residual, *rest = args
    return x[:0], weight, bias, residual if residual is None else residual[:0], *rest


def no_rows_of_grad(args):
    grad, weight, addend, mask, size, *rest = args
    addend, mask = (a if a is None else a[:0] for a in (addend, mask))
    return grad[:0], weight, addend, mask, [0, *size[1:]], *rest


def no_rows_of_step(args):
    none = torch.empty(0, dtype=torch.int64, device=args[0].device)
    return args[0], none, args[2][:0], *args[3:5], None, *args[6:]


add("conv_forward", Samples(forward_samples, forward_case, no_rows, forward_public))
add("conv_input_grad", Samples(grad_samples, grad_case, no_rows_of_grad, grad_public))
add("conv_input_grad_step_", Samples(step_samples, step_case, no_rows_of_step, step_public))
