"""The only importer of `miue_fast.kernels`. Triton serves CUDA tensors, or CPU tensors under
TRITON_INTERPRET=1.
"""

import importlib
import importlib.util
import os
from collections.abc import Callable

import torch

INTERPRET = os.environ.get("TRITON_INTERPRET") == "1"
DEVICES = frozenset({"cpu" if INTERPRET else "cuda"})
FOUND = importlib.util.find_spec("triton") is not None


def missing() -> str | None:
    if not FOUND:
        return "triton is not installed"
    return (
        None
        if INTERPRET or torch.cuda.is_available()
        else "no CUDA device (TRITON_INTERPRET=1 runs it on the CPU)"
    )


def lazy(op: str, module: str | None = None) -> Callable:
    """The launcher `op` of kernels/triton/<module>.py, imported at its first call."""
    launcher = None

    def call(*args):
        nonlocal launcher
        if launcher is None:
            launcher = getattr(
                importlib.import_module(f"miue_fast.kernels.triton.{module or op}"), op
            )
        return launcher(*args)

    return call
