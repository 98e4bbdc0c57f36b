"""A whole op in one file, as docs/adding-an-op.md describes it: reference, Triton kernel, contract,
samples. A plugin for pytest (`-p toy_op`), which tests/dispatch/test_toy_op.py loads; no test sees
it otherwise.

MIUE_TOY=wrong makes the kernel wrong in one value of a thousand.
"""

import os

import torch
import triton
import triton.language as tl

import miue_fast  # the registry knows its own ops before this one
from miue_fast.dispatch import triton as backend
from miue_fast.dispatch.registry import FLOATS, Impl, define
from tests.samples import FLOATS as DTYPES
from tests.samples import Samples, add, shuffled, special

assert miue_fast
WRONG = os.environ.get("MIUE_TOY") == "wrong"


# What reference/<op>.py would hold.
def reference(x, threshold):
    """x, moved towards 0 by the threshold, and 0 where it does not reach that far; NaN stays."""
    wide = x.float()
    moved = torch.where(wide > 0, wide - threshold, wide + threshold)
    return torch.where(wide.abs() <= threshold, 0, moved).to(x.dtype).contiguous()


# What kernels/triton/<op>.py would hold.
@triton.jit
def _kernel(x, out, count, threshold, WRONG: tl.constexpr, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    value = tl.load(x + i, i < count).to(tl.float32)
    moved = tl.where(value > 0, value - threshold, value + threshold)
    moved = tl.where(tl.abs(value) <= threshold, 0.0, moved)
    if WRONG:
        moved = tl.where(i % 1000 == 3, value, moved)
    tl.store(out + i, moved.to(out.dtype.element_ty), i < count)


def kernel(x, threshold):
    x = x.contiguous()
    out = torch.empty_like(x)
    if x.numel():
        _kernel[(triton.cdiv(x.numel(), 256),)](x, out, x.numel(), threshold, WRONG, BLOCK=256)
    return out


# What ops/<op>.py would hold.
define(
    "shrunk(Tensor x, float threshold, str backend) -> Tensor",
    kind="pointwise",
    reference=reference,
    fake=lambda x, *args: torch.empty_like(x, memory_format=torch.contiguous_format),
    dtypes=FLOATS,
    impls=[Impl("triton", kernel, backend.DEVICES, FLOATS, backend.missing)],
)


def shrunk(x, threshold, *, backend="auto"):
    return torch.ops.miue_fast.shrunk(x, threshold, backend)


# What tests/samples/<op>.py would hold.
def make(device, dtype):
    gen = torch.Generator().manual_seed(7)
    for shape in [(0,), (1,), (7,), (256,), (257,), (3, 5, 1), (4, 30), (2, 3, 32, 32)]:
        x = special(torch.randn(shape, generator=gen), gen, 0, -0.0, 0.5, torch.inf)
        yield x.to(dtype).to(device), 0.5
        if len(shape) > 1:
            yield x.to(dtype).to(device).mT, 0.0


def case(choose):
    gen, shape = choose.generator(), [choose.integer(0, 40) for _ in range(2)]
    x = torch.randn(shape, generator=gen) * 10.0 ** choose.number(-30, 30)
    x = special(x, gen, 0, -0.0, torch.nan, -torch.inf).to(choose.one_of(*DTYPES))
    return shuffled(x, choose.order(2)), 10 ** choose.number(-9, 9)


add(
    "shrunk",
    Samples(
        make,
        case,
        empty=lambda args: (args[0][:0], *args[1:]),
        public=lambda backend, batch: shrunk(batch["features"] * 2, 0.5, backend=backend) + 1,
        strided=(0,),
    ),
)
