"""64-bit offsets: numel past 2^31. Needs about 14 GB; runs with MIUE_HUGE=1 (`make fuzz`)."""

import os

import pytest
import torch
from _support import cases_of

import miue_fast
from miue_fast.reference.conv_epilogue import mask_bytes

pytestmark = [
    pytest.mark.skipif(
        os.environ.get("MIUE_HUGE") != "1", reason="needs 14 GB and minutes: MIUE_HUGE=1 runs it"
    ),
    pytest.mark.plain_memory,
]
SHAPE = (2**31 // (3 * 64 * 64) + 2, 3, 64, 64)  # the last rows lie past element 2^31
EPS = 8 / 255


@pytest.fixture(scope="module")
def store():
    """(delta, images) on the CPU: int8 levels and uint8 images, each more than 2^31 values."""
    images, delta = torch.empty(SHAPE, dtype=torch.uint8), torch.empty(SHAPE, dtype=torch.int8)
    assert images.numel() > 2**31 + 17
    for k in range(0, SHAPE[0], 8192):
        images[k : k + 8192].random_(256)
        delta[k : k + 8192].random_(-127, 128)
    return delta, images


@pytest.mark.parametrize("op, impl, device", cases_of("projected_step_", dtypes=False))
def test_rows_past_2_31(op, impl, device, store):
    delta, images = (x.to(device) for x in store)
    rows = torch.tensor([SHAPE[0] - 1, 0, SHAPE[0] - 2, SHAPE[0] // 2], device=device)
    grad, flip = (
        torch.randn(4, *SHAPE[1:], device=device),
        torch.tensor([True, False, False, True], device=device),
    )
    expected, before = delta[rows].clone(), delta[-4:-2].clone()
    miue_fast.projected_step_(
        expected,
        None,
        grad,
        images[rows].contiguous(),
        flip,
        alpha=0.01,
        eps=EPS,
        backend="reference",
    )
    wanted = miue_fast.perturbed_input(
        images[rows], expected, None, flip, eps=EPS, backend="reference"
    )
    miue_fast.projected_step_(
        delta, rows, grad, images, flip, alpha=0.01, eps=EPS, backend=impl.backend
    )
    assert torch.equal(delta[rows], expected) and torch.equal(delta[-4:-2], before)
    got = miue_fast.perturbed_input(images, delta, rows, flip, eps=EPS, backend=impl.backend)
    assert torch.equal(got, wanted)


@pytest.mark.parametrize(
    "op, impl, device", cases_of("conv_epilogue_", "conv_grad_epilogue_", dtypes=False)
)
def test_activations_past_2_31(op, impl, device):
    if impl is op.reference:
        pytest.skip("the reference's fp32 temporaries need 30 GB")
    rows, channels, last = 2**31 // 96 + 3, 96, slice(-62, None)
    y = torch.ones(rows, channels, dtype=torch.float16, device=device)
    assert (rows - 62) * channels % 64 == 0 and y[:-1].numel() > 2**31
    y[last].normal_()
    mask = torch.zeros(mask_bytes(y.numel()), dtype=torch.uint8, device=device)
    tail, bits = y[last].clone(), mask[-mask_bytes(62 * channels) :].clone()
    if op.name == "conv_epilogue_":
        rest = torch.linspace(-0.5, 0.5, channels, device=device), None, True
    else:
        mask[-mask_bytes(62 * channels) :] = bits.random_(256)
        rest = (None,)
    impl.fn(y, *rest, mask)
    op.reference.fn(tail, *rest, bits)
    assert torch.equal(y[last], tail) and torch.equal(mask[-len(bits) :], bits)
    assert (mask[: -len(bits)] == (255 if op.name == "conv_epilogue_" else 0)).all() and (
        y[0] > 0
    ).all() == (op.name == "conv_epilogue_")


@pytest.mark.parametrize("op, impl, device", cases_of("perturbed_input", dtypes=False))
def test_outputs_past_2_31(op, impl, device, store):
    if impl is op.reference:
        pytest.skip("the reference's fp32 temporaries need 30 GB")
    delta, images = (x.to(device) for x in store)
    out = miue_fast.perturbed_input(
        images, delta, eps=EPS, dtype=torch.float16, channels_last=False, backend=impl.backend
    )
    rows = torch.tensor([0, SHAPE[0] // 2, SHAPE[0] - 2, SHAPE[0] - 1], device=device)
    wanted = miue_fast.perturbed_input(
        images, delta, rows, eps=EPS, dtype=torch.float16, channels_last=False, backend="reference"
    )
    assert torch.equal(out[rows], wanted)
