"""What is in machine code: registers, stack, shared memory and the mix of instructions, by the
tools on PATH or in Triton's wheel.
"""

import importlib.util
import re
import shutil
import subprocess
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

# Products and waits for them; tensor copies; copies into shared memory; global, shared and
# matrix-wise shared memory; exp2, 1/x and their like; barriers.
KINDS = (
    "HGMMA",
    "QGMMA",
    "HMMA",
    "WARPGROUP.DEPBAR",
    "UTMALDG",
    "UTMASTG",
    "LDGSTS",
    "LDG",
    "STG",
    "LDSM",
    "STSM",
    "LDS",
    "STS",
    "MUFU",
    "BAR",
)


def tool(name):
    """Its path, or None."""
    if found := shutil.which(name):
        return found
    triton = importlib.util.find_spec("triton")
    found = triton and Path(triton.origin).parent / "backends/nvidia/bin" / name
    return str(found) if found and found.exists() else None


def output(name, *arguments):
    return subprocess.run(
        [tool(name), *arguments], capture_output=True, text=True, check=True
    ).stdout


def mix(assembly):
    """{kind: how many of its instructions}, in the order of KINDS."""
    count = Counter(
        re.findall(rf"(?<![\w.])({'|'.join(map(re.escape, KINDS))})(?=[.\s])", assembly)
    )
    return {kind: count[kind] for kind in KINDS if count[kind]}


@dataclass
class Kernel:
    """registers per thread; stack: bytes of its local memory, where spills go; shared: bytes of a
    block, dynamic ones not included.
    """

    registers: int
    stack: int
    shared: int
    mix: dict


def kernels(binary):
    """{(architecture, mangled name): Kernel} of a module built by nvcc."""
    found, parts = {}, {}
    for line in output("cuobjdump", "-res-usage", binary).splitlines():
        if line.startswith("arch ="):
            arch = line.split()[-1]
            if arch not in parts:
                sass = output("cuobjdump", "-sass", "-arch", arch, binary)
                parts[arch] = {part.split()[0]: mix(part) for part in sass.split("Function : ")[1:]}
        elif "Function" in line:
            name = line.split()[1].rstrip(":")
        elif "REG:" in line:
            used = {key: int(value) for key, value in re.findall(r"(\w+):(\d+)", line)}
            found[arch, name] = Kernel(
                used["REG"], used["STACK"] + used["LOCAL"], used["SHARED"], parts[arch][name]
            )
    return found


def readable(names):
    """The names without their arguments and namespaces; needs c++filt."""
    plain = subprocess.run(
        ["c++filt"], input="\n".join(names), capture_output=True, text=True, check=True
    ).stdout.splitlines()
    plain = [re.sub(r"\(anonymous namespace\)::|miue::|^void ", "", name) for name in plain]
    return [name[: name.rindex(">(") + 1] if ">(" in name else name.split("(")[0] for name in plain]
