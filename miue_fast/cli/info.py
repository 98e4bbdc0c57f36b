"""`python -m miue_fast info`: versions, devices, build flags, and which backend serves which op
here, or why not.
"""

from typing import TextIO

import torch

from ..dispatch import native
from ..dispatch.environment import build_flags, cpu_level, versions
from ..dispatch.precision import compute_dtype
from ..dispatch.registry import OPS


def served() -> dict[str, dict[str, list[str]]]:
    """{what holds: {backend: the ops for which it holds}}: "runs on cpu", or why the backend is not
    available; each said once, in the order of the registry.
    """
    found: dict[str, dict[str, list[str]]] = {}
    for name, op in OPS.items():
        for impl in op.impls:
            here = "runs on " + " and ".join(sorted(impl.devices - {"meta"}))
            reason = impl.missing()
            outcome = f"not available: {reason}" if reason else here
            found.setdefault(outcome, {}).setdefault(impl.backend, []).append(name)
    return found


def _which(backend: str, names: list[str]) -> str:
    """The backend, with its ops if they are not all."""
    others = [name for name in OPS if name not in names]
    if not others:
        return backend
    short = "only " + ", ".join(names) if len(names) < len(others) else ""
    return f"{backend} ({short or 'all but ' + ', '.join(others)})"


def convolutions() -> str:
    """Which convolutions of a frozen or training network are this library's own on this CPU."""
    level, missing = cpu_level(), native.matrix_missing()
    packed = "on packed weights, layer by layer" if level in ("avx2", "avx512") else "PyTorch's"
    tiles = f"PyTorch's ({missing})" if missing else "on matrix tiles"
    auto = compute_dtype("auto", torch.device("cpu"))
    return f"float32 {packed}; bfloat16 {tiles}; --dtype auto is {auto}"


def main(out: TextIO | None = None) -> None:
    """Prints everything to `out`, or to the standard output."""
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
    print(f"convolutions on the CPU: {convolutions()}", file=out)
    print("ops:", ", ".join(OPS), file=out)
    for outcome, backends in served().items():
        which = ", ".join(_which(*entry) for entry in backends.items())
        print(f"  {which}: {outcome}", file=out)
