"""`miue-fast info` says who serves what, and every reason once."""

import io
from dataclasses import replace

import pytest
import torch

from miue_fast.cli import info
from miue_fast.dispatch.registry import OPS


def shown():
    out = io.StringIO()
    info.main(out)
    return out.getvalue().splitlines()


@pytest.fixture
def change(monkeypatch):
    """change(op, backend, reason) says why the backend of an op, or of every op, is missing."""

    def make(op, backend, reason):
        for name in [op] if op else list(OPS):
            there = [
                replace(impl, missing=lambda: reason) if impl.backend == backend else impl
                for impl in OPS[name].impls
            ]
            monkeypatch.setitem(OPS, name, replace(OPS[name], impls=tuple(there)))

    return make


def test_a_reason_is_said_once(change):
    for backend in ("triton", "cuda", "wgmma"):
        change(None, backend, "no CUDA device")
    change(None, "cpu", None)
    lines = shown()
    few = "(all but jpeg_round_trip, jpeg_round_trip_grad)"
    assert [line for line in lines if "no CUDA device" in line and "devices:" not in line] == [
        f"  triton {few}, cuda {few}, wgmma (only conv_forward, conv_input_grad): "
        "not available: no CUDA device"
    ]
    assert "  cpu: runs on cpu" in lines and "  reference: runs on cpu and cuda" in lines
    assert lines[-4].startswith("ops: ") and all(name in lines[-4] for name in OPS)


def test_an_op_that_differs_is_named(change):
    change(None, "cpu", None)
    change("nt_xent", "cpu", "not built")
    lines = shown()
    assert "  cpu (all but nt_xent): runs on cpu" in lines
    assert "  cpu (only nt_xent): not available: not built" in lines


def test_the_versions_are_there():
    assert f"torch {torch.__version__}" in shown()[0]
