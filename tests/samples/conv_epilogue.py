"""Samples of the two epilogues of a convolution."""

import numpy as np
import torch

from miue_fast import ops
from miue_fast.reference.conv_epilogue import conv_epilogue_ as reference
from miue_fast.reference.conv_epilogue import mask_bytes

from . import DOUBLES, Samples, add, special, values

NHWC = torch.channels_last


def activations(device, dtype, *shape, seed=7):
    """Channels-last values with exact zeros, both signs of zero, NaN and Inf among them."""
    gen = torch.Generator().manual_seed(seed)
    y = torch.randn(shape, generator=gen, dtype=torch.float64)
    y[torch.rand(shape, generator=gen) < 0.1] = 0
    y[torch.rand(shape, generator=gen) < 0.05] = -0.0
    for k, number in enumerate((torch.nan, torch.inf, -torch.inf)):
        y.view(-1)[k : k + 1] = number
    y = y.to(dtype).to(device)
    return y.contiguous(memory_format=NHWC) if y.dim() == 4 else y


SHAPES = [
    (0, 16, 2, 2),
    (1, 1, 1, 1),
    (2, 3, 5, 7),
    (3, 16, 4, 4),
    (1, 33, 3, 3),
    (2, 64, 8, 8),
    (5, 10),
    (4, 130),
    (1, 8, 17, 1),
]


def _bias(device, dtype, count):
    """Among them numbers that, added to a zero, round to zero in float16 and in bfloat16."""
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    bias = torch.linspace(-1, 1, count, dtype=wide, device=device)
    bias[1::4], bias[2::4] = 1e-9, 1e-41
    return bias


def _mask(y):
    return torch.full((mask_bytes(y.numel()),), 0xA5, dtype=torch.uint8, device=y.device)


def forward_samples(device, dtype):
    for k, shape in enumerate(SHAPES):
        y = activations(device, dtype, *shape)
        other = activations(device, dtype, *shape, seed=8)
        bias = _bias(device, dtype, shape[1])
        yield y, bias, None, True, _mask(y)
        yield y, bias, other, True, _mask(y)
        yield y, (None, bias)[k % 2], (other, None)[k // 2 % 2], k % 3 == 0, None


def grad_samples(device, dtype):
    for shape in SHAPES:
        y = activations(device, dtype, *shape)
        mask = _mask(y)
        reference(y.clone(memory_format=torch.preserve_format), None, None, True, mask)
        grad, other = (
            activations(device, dtype, *shape, seed=9),
            activations(device, dtype, *shape, seed=10),
        )
        yield grad, None, mask
        yield grad, other, mask
        yield grad, other, None


def dense_case(choose):
    """(gen, tensor): `tensor()` gives dense values of one shape and dtype, full of what a ReLU
    bends at.
    """
    gen = choose.generator()
    if choose.flag():
        shape = choose.integer(0, 9), choose.integer(1, 200)
    else:
        shape = choose.integer(0, 3), choose.integer(1, 140), choose.integer(1, 6)
        shape = (*shape, choose.integer(1, 7))
    dtype, power, offset = choose.one_of(*DOUBLES), choose.integer(-9, 5), choose.flag()

    def tensor():
        x = torch.randn(shape, generator=gen) * 10.0**power
        x = special(x, gen, 0, -0.0, torch.nan, torch.inf, -torch.inf, 1e-40).to(dtype)
        x = x.contiguous(memory_format=NHWC) if len(shape) == 4 else x
        if offset:
            wide = torch.empty(x.numel() + 1, dtype=dtype)[1:]
            x = torch.as_strided(wide, x.shape, x.stride()).copy_(x)
        return x

    return gen, tensor


def forward_case(choose):
    gen, tensor = dense_case(choose)
    y = tensor()
    bias = special(torch.randn(y.shape[1], generator=gen, dtype=torch.float64), gen, 0, 1e-9, 1e-41)
    bias = bias.to(torch.promote_types(y.dtype, torch.float32)) if choose.flag() else None
    residual, relu = tensor() if choose.flag() else None, choose.flag()
    return y, bias, residual, relu, _mask(y) if choose.flag() else None


def grad_case(choose):
    gen, tensor = dense_case(choose)
    grad = tensor()
    mask = torch.randint(256, (mask_bytes(grad.numel()),), generator=gen, dtype=torch.uint8)
    return grad, tensor() if choose.flag() else None, mask if choose.flag() else None


def in_memory_order(tensor):
    """The values of a channels-last [B, C, H, W] or contiguous [B, C] tensor, channels fastest."""
    x = values(tensor)
    return (np.moveaxis(x, 1, -1) if x.ndim == 4 else x).reshape(-1)


def mask_by_numpy(y):
    """The ReLU bits of y's own values, least significant first, in whole words of 64."""
    with np.errstate(invalid="ignore"):
        bits = np.packbits(~(in_memory_order(y) <= 0), bitorder="little")
    return torch.from_numpy(np.pad(bits, (0, -len(bits) % 8)))


def back_in_shape(flat, like):
    b, c, *space = like.shape
    x = torch.from_numpy(np.ascontiguousarray(flat)).view(b, *space, c)
    return (x.permute(0, 3, 1, 2) if space else x).to(like.dtype)


def forward_formula(y, bias, residual, relu, mask):
    v = in_memory_order(y)
    with np.errstate(invalid="ignore", over="ignore"):
        if bias is not None:
            v = v + np.tile(values(bias), len(v) // max(len(bias), 1))
        if residual is not None:
            v = v + in_memory_order(residual)
        rounded = back_in_shape(v, y)
        if relu:
            flat = in_memory_order(rounded)
            rounded = back_in_shape(np.where(flat <= 0, np.float32(0), flat), y)
    return [rounded] if mask is None else [rounded, mask_by_numpy(rounded)]


def grad_formula(grad, addend, mask):
    g = in_memory_order(grad)
    with np.errstate(invalid="ignore", over="ignore"):
        g = g if addend is None else g + in_memory_order(addend)
    if mask is not None:
        bits = np.unpackbits(mask.cpu().numpy(), bitorder="little")[: len(g)]
        g = np.where(bits, g, np.zeros_like(g))
    return [back_in_shape(g, grad)]


def bits_of(y):
    """A mask of y's size, all zero."""
    return torch.zeros(mask_bytes(y.numel()), dtype=torch.uint8, device=y.device)


def forward_public(backend, batch):
    y = batch["x"].clone()
    mask = bits_of(y)
    ops.conv_epilogue_(y, batch["bias"], batch["x"], mask=mask, backend=backend)
    return y * 2, mask


def grad_public(backend, batch):
    grad = batch["x"].clone()
    ops.conv_grad_epilogue_(grad, batch["x"], bits_of(grad) + 0x5A, backend=backend)
    return grad * 2


def no_rows(args):
    return tuple(a[:0] if isinstance(a, torch.Tensor) and k != 1 else a for k, a in enumerate(args))


def no_rows_of_grad(args):
    return tuple(a if a is None else a[:0] for a in args)


add(
    "conv_epilogue_",
    Samples(forward_samples, forward_case, no_rows, forward_public, formula=forward_formula),
)
add(
    "conv_grad_epilogue_",
    Samples(grad_samples, grad_case, no_rows_of_grad, grad_public, formula=grad_formula),
)
