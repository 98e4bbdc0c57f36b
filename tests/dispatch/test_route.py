"""Which backend `auto` takes for a convolution or a loss on a GPU, from what the machine has and
what was measured.
"""

import logging

import pytest
import torch

from miue_fast.dispatch import measured
from miue_fast.dispatch.registry import OPS
from miue_fast.ops import _loss, conv_epilogue_, conv_grad_epilogue_, conv_input_grad, convolution
from miue_fast.ops.convolution import FP8

SIZE, CONV = [2, 32, 8, 8], ([1, 1], [1, 1], [1, 1], 1)


@pytest.fixture
def machine(monkeypatch):
    """make(triton=reason, cuda=reason, wgmma=reason, measured=backend) makes a machine."""

    def make(triton=None, cuda=None, wgmma=None, measured="cuda"):
        monkeypatch.setattr(convolution.triton, "missing", lambda: triton)
        monkeypatch.setattr(convolution.native, "cuda_missing", lambda: cuda)
        monkeypatch.setattr(convolution.native, "wgmma_missing", lambda: cuda or wgmma)
        monkeypatch.setattr(convolution, "faster", lambda *args: measured)
        monkeypatch.setattr(convolution, "_told", set())

    return make


def weight(k=32, c=32, r=3, dtype=torch.bfloat16):
    return torch.zeros(k, c, r, r, dtype=dtype)


@pytest.mark.parametrize(
    "have, layer, expected",
    [
        ({}, weight(), "cuda"),
        ({"measured": "triton"}, weight(), "triton"),
        ({"measured": "triton"}, weight(k=20), "cuda"),  # Triton has no kernel for it
        ({"triton": "not installed", "measured": "triton"}, weight(), "cuda"),
        ({"cuda": "not built"}, weight(), "triton"),
        ({"cuda": "not built"}, weight(k=20), "reference"),
        ({}, weight(dtype=torch.float32).to(FP8), "triton"),
        ({"triton": "not installed"}, weight(dtype=torch.float32).to(FP8), "reference"),
        ({}, weight(c=0), "cuda"),
        ({}, weight(k=64, c=64), "cuda"),  # not where nobody measured it
        ({"measured": "wgmma"}, weight(k=64, c=64), "wgmma"),
        ({"measured": "wgmma"}, weight(k=64, c=32), "cuda"),  # wgmma has no kernel for it
        ({"measured": "wgmma", "wgmma": "capability 8.0"}, weight(k=64, c=64), "cuda"),
        ({"measured": "wgmma", "triton": "not installed"}, weight(k=64, c=64), "wgmma"),
        ({"measured": "wgmma", "cuda": "not built"}, weight(k=64, c=64), "triton"),
    ],
)
def test_route(machine, have, layer, expected, caplog):
    machine(**have)
    with caplog.at_level(logging.WARNING, "miue_fast"):
        for _ in range(2):
            assert convolution._route("conv_forward", layer, SIZE, *CONV) == expected
    assert len(caplog.records) == (expected == "reference"), "said once"
    assert "runs in plain PyTorch" in caplog.text or expected != "reference"


def test_each_schema_hands_over_its_own_arguments(monkeypatch):
    """x, weight, ... -> (weight, size of x, stride, padding, dilation, groups)"""
    seen = []
    monkeypatch.setattr(
        convolution,
        "_route",
        lambda op, weight, size, *conv: seen.append((op, weight, list(size), *conv)),
    )
    w, x = weight(), torch.zeros(SIZE)
    OPS["conv_forward"].route(x, w, None, None, [2, 2], [1, 1], [3, 3], 4, True, True, None)
    OPS["conv_input_grad"].route(x, w, None, None, [2, 5, 7, 9], [2, 2], [1, 1], [3, 3], 4, None)
    images = torch.zeros(9, 3, 16, 16)
    OPS["conv_input_grad_step_"].route(
        images, None, x, w, images, None, [2, 2], [1, 1], [3, 3], 4, 0.1, 0.2, None
    )
    sizes = {
        "conv_forward": SIZE,
        "conv_input_grad": [2, 5, 7, 9],
        "conv_input_grad_step_": [2, 3, 16, 16],
    }
    assert seen == [(op, w, size, [2, 2], [1, 1], [3, 3], 4) for op, size in sizes.items()]


@pytest.mark.parametrize(
    "rows, width, dtype, missing, expected",
    [
        (512, 512, torch.bfloat16, None, "auto"),
        (2048, 512, torch.bfloat16, None, "cuda"),  # measured
        (1100, 64, torch.bfloat16, None, "cuda"),  # nearer to 2,048
        (8192, 512, torch.bfloat16, None, "cuda"),  # four times as many
        (8193, 512, torch.bfloat16, None, "auto"),
        (2048, 513, torch.bfloat16, None, "auto"),
        (2048, 512, torch.float16, None, "auto"),  # nobody measured it
        (2048, 512, torch.bfloat16, "not built", "auto"),
        (0, 512, torch.bfloat16, None, "auto"),
    ],
)
def test_route_of_a_loss(monkeypatch, rows, width, dtype, missing, expected):
    table = {
        "nt_xent 512 bfloat16": "triton",
        "nt_xent 2048 bfloat16": "cuda",
        "mi_ue_value_and_grad 512 bfloat16": "cuda",
        "conv_forward 64->64 3x3/1 @32x32 bfloat16": "cuda",
    }
    monkeypatch.setattr(measured, "_table", lambda: {"some GPU": table})
    monkeypatch.setattr(measured, "_name", lambda device: "some GPU")
    monkeypatch.setattr(_loss.native, "cuda_missing", lambda: missing)
    measured._batches.cache_clear()
    try:
        features = torch.empty(rows, width, dtype=dtype, device="meta")
        assert OPS["nt_xent"].route(features, None, 0.1, "all", True) == expected
        assert OPS["mi_ue_value_and_grad"].route(
            torch.empty(500, 8, dtype=torch.bfloat16), None
        ) == ("auto" if missing else "cuda")
    finally:
        measured._batches.cache_clear()


def test_masks_start_at_a_multiple_of_eight():
    y = torch.ones(4, 16)
    whole = torch.zeros(16, dtype=torch.uint8)
    conv_epilogue_(y, mask=whole[8:])
    with pytest.raises(
        ValueError, match="mask: expected memory that starts at a multiple of 8 bytes"
    ):
        conv_epilogue_(y, mask=whole[3:11])
    with pytest.raises(
        ValueError,
        match="conv_grad_epilogue_: mask: expected memory that starts at a multiple of 8 bytes",
    ):
        conv_grad_epilogue_(y, mask=whole[3:11])
    x, w = (
        torch.ones(size).contiguous(memory_format=torch.channels_last)
        for size in ((1, 16, 2, 2), (16, 16, 1, 1))
    )
    for backend in ("auto", "reference"):
        conv_input_grad(x, w, x.shape, mask=whole[8:16], backend=backend)
        with pytest.raises(
            ValueError,
            match="conv_input_grad: mask: expected memory that starts at a multiple of 8 bytes",
        ):
            conv_input_grad(x, w, x.shape, mask=whole[3:11], backend=backend)
