"""What a result depends on besides its options: versions, build flags and the C++ level. Read by
info, evaluate and the benchmarks.
"""

import importlib
import platform

import torch

from ..support.version import __version__
from . import native

MODULES = ("numpy", "triton", "safetensors", "PIL", "tqdm", "matplotlib")
cpu_level, build_flags = native.cpu_level, native.build_flags


def versions() -> dict[str, str | None]:
    """{name: version} of everything whose version can matter; None where it is not installed."""
    found = {
        "miue_fast": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
    }
    for name in MODULES:
        try:
            found[name] = importlib.import_module(name).__version__
        except ImportError:
            found[name] = None
    return found
