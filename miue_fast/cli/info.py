"""`python -m miue_fast info`: which backend serves which op here, or why it does not; versions,
build flags and devices.
"""

from typing import TextIO

import torch

from ..dispatch.environment import build_flags, cpu_level, versions
from ..dispatch.registry import OPS

# Where the kernels of each backend have really run; changed by hand when that changes, printed into
# the README.
RUN_ON = {
    "reference": "CPU",
    "cpu": "CPU (generic, AVX2 and AVX-512)",
    "triton": "interpreter on the CPU; compiled for sm_80 and sm_90; **never on a GPU**",
    "cuda": "host shim on the CPU; compiled for sm_80 and sm_90a; **never on a GPU**",
    "wgmma": "host shim on the CPU; compiled for sm_90a; **never on a GPU**",
}


def matrix() -> dict[str, dict[str, tuple[list[str], str | None]]]:
    """{op: {backend: (devices, reason or None)}}, straight from the registry."""
    return {
        name: {impl.backend: (sorted(impl.devices), impl.missing()) for impl in op.impls}
        for name, op in OPS.items()
    }


def markdown() -> str:
    """The table of ops and backends in docs/backends.md: the dtypes that each implementation takes,
    and where that backend has really run.
    """
    backends = ("reference", "cpu", "triton", "cuda", "wgmma")
    short = {
        "float64": "f64",
        "float32": "f32",
        "float16": "f16",
        "bfloat16": "bf16",
        "float8_e4m3fn": "e4m3",
        "int8": "int8",
    }
    lines = ["| op | " + " | ".join(backends) + " |", "|---" * (len(backends) + 1) + "|"]
    for name, op in OPS.items():
        taken = {impl.backend: {str(d)[6:] for d in impl.dtypes} for impl in op.impls}
        cells = [" ".join(v for k, v in short.items() if k in taken.get(b, ())) for b in backends]
        lines.append(f"| `{name}` | " + " | ".join(cells) + " |")
    lines.append("| *has run on* | " + " | ".join(RUN_ON[b] for b in backends) + " |")
    return "\n".join(lines)


def main(out: TextIO | None = None) -> None:
    """Prints what this machine has. out: a text stream; None is stdout."""
    print(
        "versions:",
        ", ".join(f"{name} {version or 'not installed'}" for name, version in versions().items()),
        file=out,
    )
    devices = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    cpu = f"cpu ({torch.get_num_threads()} threads, {cpu_level() or 'no native level'})"
    print(
        f"devices: {', '.join([cpu, *devices])}" + ("" if devices else ", no CUDA device"), file=out
    )
    for name, flags in build_flags().items():
        print(f"build _{name}: {flags or 'not built'}", file=out)
    for name, backends in matrix().items():
        print(name, file=out)
        for backend, (on, reason) in backends.items():
            there = "available on " + ", ".join(d for d in on if d != "meta")
            print(f"  {backend:<10}{'no: ' + reason if reason else there}", file=out)
