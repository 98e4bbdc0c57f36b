"""Every op passes torch.library.opcheck on contiguous, permuted, sliced and empty input."""

import pytest
import torch
from _support import cases_of, clone

from tests import samples

ALL = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")


def variants(op, args):
    """The sample as it is, with every tensor that may have strides permuted in memory, and sliced
    out of a larger one.
    """
    yield args
    for position in samples.of(op.name).strided:
        tensor = args[position]
        if tensor.dim() > 1:
            permuted = tensor.mT.contiguous().mT
            sliced = torch.stack([tensor, tensor], -1).flatten(-2)[..., ::2]
            for other in (permuted, sliced):
                yield (*args[:position], other, *args[position + 1 :])


@pytest.mark.parametrize("op, impl, device", cases_of(dtypes=False))
def test_opcheck(op, impl, device):
    dtype = torch.float32 if torch.float32 in impl.dtypes else next(iter(impl.dtypes))
    small = [
        args
        for args in samples.taken(op.name, impl, device, dtype)
        if args[0].numel() and max(args[0].shape) < 40
    ]
    small = [small[0], next(args for args in small if args[0].numel() > 20), small[-1]]
    cases = [(case, ALL) for args in small for case in variants(op, args)]
    # The AOT check takes NaN for a difference, and a mean over nothing is NaN.
    empty = samples.of(op.name).empty(small[1])
    cases.append((empty, ALL[:-1] if op.kind == "loss" else ALL))
    for args, utils in cases:
        args = clone(args)
        if "want_grad" in op.schema and args[-1]:
            args = (args[0].requires_grad_(), *args[1:])
        torch.library.opcheck(
            getattr(torch.ops.miue_fast, op.name).default, (*args, impl.backend), test_utils=utils
        )


@pytest.mark.parametrize(
    "op, impl, device", cases_of("conv_forward", "conv_input_grad", dtypes=False)
)
def test_opcheck_in_e4m3(op, impl, device):
    """Without test_schema, which multiplies its arguments: PyTorch has no product of e4m3
    values.
    """
    if reason := op.why_not(impl, device, torch.float8_e4m3fn):
        pytest.skip(reason)
    args = next(iter(samples.make(op.name, device, torch.float8_e4m3fn)))
    torch.library.opcheck(
        getattr(torch.ops.miue_fast, op.name).default, (*args, impl.backend), test_utils=ALL[1:]
    )


def test_opcheck_of_the_backward():
    for dtype in (torch.float32, torch.float16):
        args = (
            torch.randn(5, 3),
            torch.tensor(2.0),
            torch.randn(5, 3).to(dtype),
        )  # none requires a gradient: a second derivative is refused
        torch.library.opcheck(torch.ops.miue_fast.scaled_gradient.default, args)
