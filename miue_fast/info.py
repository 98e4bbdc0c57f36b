"""`python -m miue_fast.info`: which backend serves which op here, or why not; versions, build flags, devices."""

import importlib
import platform
import sys

import torch

from . import __version__, _native
from ._registry import OPS

MODULES = ("numpy", "triton", "safetensors", "PIL", "tqdm", "matplotlib")


def versions():
    """{name: version} of everything whose version can matter; None where it is not installed."""
    found = {"miue_fast": __version__, "python": platform.python_version(), "torch": torch.__version__, "cuda": torch.version.cuda}
    for name in MODULES:
        try:
            found[name] = importlib.import_module(name).__version__
        except ImportError:
            found[name] = None
    return found


def matrix():
    """{op: {backend: (devices, reason or None)}}, straight from the registry."""
    return {name: {impl.backend: (sorted(impl.devices), impl.missing()) for impl in op.impls} for name, op in OPS.items()}


def main(out=sys.stdout):
    print("versions:", ", ".join(f"{name} {version or 'not installed'}" for name, version in versions().items()), file=out)
    devices = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    print(f"devices: cpu ({torch.get_num_threads()} threads, {_native.cpu_level() or 'no native level'}),", ", ".join(devices) or "no CUDA device", file=out)
    for name, flags in _native.build_flags().items():
        print(f"build _{name}: {flags or 'not built'}", file=out)
    for name, backends in matrix().items():
        print(name, file=out)
        for backend, (on, reason) in backends.items():
            print(f"  {backend:<10}{'no: ' + reason if reason else 'available on ' + ', '.join(d for d in on if d != 'meta')}", file=out)


if __name__ == "__main__":
    main()
