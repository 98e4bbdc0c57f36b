"""Every op passes torch.library.opcheck on contiguous, permuted, sliced and empty input."""

import inspect

import pytest
import torch
from _support import LOSSES, STATISTICS, cases_of, clone

ALL = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")


def variants(op, args):
    """The sample as it is, with every tensor that may have strides permuted in memory, and sliced
    out of a larger one.
    """
    yield args
    for position, tensor in enumerate(args):
        strided = op.name in (*LOSSES, *STATISTICS, "projected_step") or (
            op.name == "projected_step_" and position == 2
        )
        if strided and isinstance(tensor, torch.Tensor) and tensor.dim() > 1:
            permuted = tensor.mT.contiguous().mT
            sliced = torch.stack([tensor, tensor], -1).flatten(-2)[..., ::2]
            for other in (permuted, sliced):
                yield (*args[:position], other, *args[position + 1 :])


def empty(op, args):
    """The sample with a batch of none."""
    if op.name in (*LOSSES, *STATISTICS):
        return args[0][:0], args[1][:0], *args[2:]
    if op.name == "projected_step":
        return *(a[:0] for a in args[:3]), *args[3:]
    if op.name in ("conv_epilogue_", "conv_grad_epilogue_", "conv_forward", "conv_input_grad"):
        batched = ("y", "x", "grad", "residual", "addend", "mask")
        names = inspect.signature(op.reference.fn).parameters
        values = [a[:0] if name in batched and a is not None else a for name, a in zip(names, args)]
        return tuple([0, *a[1:]] if name == "size" else a for name, a in zip(names, values))
    none = torch.empty(0, dtype=torch.int64, device=args[0].device)
    if op.name == "perturbed_input":
        return *args[:2], none, None, *args[4:]
    if op.name == "conv_input_grad_step_":
        return args[0], none, args[2][:0], *args[3:5], None, *args[6:]
    return args[0], none, args[2][:0], args[3], None, *args[5:]


@pytest.mark.parametrize("op, impl, device", cases_of(dtypes=False))
def test_opcheck(op, impl, device):
    dtype = torch.float32 if torch.float32 in impl.dtypes else next(iter(impl.dtypes))
    samples = [
        args
        for args in op.samples_of(impl, device, dtype)
        if args[0].numel() and max(args[0].shape) < 40
    ]
    samples = [samples[0], next(args for args in samples if args[0].numel() > 20), samples[-1]]
    cases = [(case, ALL) for args in samples for case in variants(op, args)]
    # The AOT check takes NaN for a difference, and a mean over nothing is NaN.
    cases.append((empty(op, samples[1]), ALL[:-1] if op.name in LOSSES else ALL))
    for args, utils in cases:
        args = clone(args)
        if op.name in ("nt_xent", "intra_class_distance") and args[-1]:
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
    args = next(iter(op.samples(device, torch.float8_e4m3fn)))
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
