"""The GPU architectures that `_cuda` can be built for: the one table that setup.py, `native` and
the tests read.

setup.py runs this file by itself, before torch is there, so it imports the standard library only.
"""

from typing import NamedTuple

EVERY_GPU = "csrc/cuda"  # the folder of the kernels that every architecture here can run
HOPPER = "csrc/cuda/hopper"  # those that use wgmma and setmaxnreg, which only sm_90a has


class Architecture(NamedTuple):
    """One row: its name in MIUE_CUDA_ARCHS, nvcc's -gencode, the first and the last compute
    capability that run it, and the folders of csrc that are compiled for it.
    """

    name: str
    gencode: str
    first: tuple[int, int]
    last: tuple[int, int]
    folders: tuple[str, ...]


LATER = (99, 99)
ARCHITECTURES = (
    Architecture("80", "arch=compute_80,code=sm_80", (8, 0), (8, 99), (EVERY_GPU,)),
    Architecture("90a", "arch=compute_90a,code=sm_90a", (9, 0), (9, 0), (EVERY_GPU, HOPPER)),
    # PTX, which the driver compiles for GPUs that are newer than the table
    Architecture("90+ptx", "arch=compute_90,code=compute_90", (9, 0), LATER, (EVERY_GPU,)),
)


def chosen(names: str | None) -> tuple[Architecture, ...]:
    """The rows that MIUE_CUDA_ARCHS names, separated by spaces or commas; all of them where it is
    None or empty. ValueError for a name that is not in the table.
    """
    wanted = (names or "").replace(",", " ").split()
    table = {row.name: row for row in ARCHITECTURES}
    for name in wanted:
        if name not in table:
            raise ValueError(f"MIUE_CUDA_ARCHS: expected some of {', '.join(table)}, got {name!r}")
    return tuple(row for row in ARCHITECTURES if not wanted or row.name in wanted)


def built(flags: str) -> tuple[Architecture, ...]:
    """The rows that a module was built for, from its build flags (`_cuda.build`)."""
    return tuple(row for row in ARCHITECTURES if row.gencode in flags)


def missing(folder: str, rows: tuple[Architecture, ...], capability: tuple[int, int]) -> str | None:
    """Why a GPU of this compute capability cannot run the folder's kernels as they were built for
    `rows`, or None.
    """
    having = [row for row in rows if folder in row.folders]
    if any(row.first <= capability <= row.last for row in having):
        return None
    needed = ", ".join(row.name for row in having or ARCHITECTURES if folder in row.folders)
    if not having:
        return f"its GPU code for {needed} was left out (MIUE_CUDA_ARCHS)"
    gpu = "this GPU has compute capability {}.{}".format(*capability)
    return f"its GPU code is for {needed}; {gpu}"
