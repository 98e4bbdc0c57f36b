"""Compiles csrc/cuda and its Python bindings as host C++ against tests/shim, and loads the
result.
"""

import importlib.util
import os
import shutil
import subprocess
import sysconfig
from pathlib import Path

ROOT = Path(__file__).parents[2]
LARGE_ROWS = 8  # more rows take the loss of csrc/cuda/hopper
# Small chunks, few spans and few blocks, so that small inputs reach every loop. No contraction, as
# in setup.py.
FLAGS = (
    "-std=c++20 -O2 -g1 -fPIC -ffp-contract=off -fno-strict-aliasing -Wall -Wextra -Werror "
    "-Wno-unknown-pragmas -DMIUE_HOPPER"
)
DEFINES = [
    "-DMIUE_CHUNK=128",
    "-DMIUE_SPANS=6",
    "-DMIUE_MEMBERS=2",
    "-DMIUE_BLOCKS=3",
    "-DMIUE_MULTIPROCESSORS=4",
    f"-DMIUE_LARGE_ROWS={LARGE_ROWS}",
]


def missing():
    """Why the host build is impossible here, or None."""
    if compiler() is None:
        return "no C++ compiler (g++ or $CXX) to run the CUDA kernels on the host"
    if importlib.util.find_spec("pybind11") is None:
        return "pybind11 is not installed"
    if not Path(sysconfig.get_paths()["include"], "Python.h").exists():
        return "Python.h is not installed"
    return None


def compiler():
    return os.environ.get("CXX") or shutil.which("g++")


def load(folder, sources=ROOT / "csrc"):
    """The module, with the functions of miue_fast._cuda; its `stream` argument is ignored."""
    import pybind11

    python = [f"-I{pybind11.get_include()}", f"-I{sysconfig.get_paths()['include']}"]
    jobs = {}
    for source in [*sorted((sources / "cuda").rglob("*.cu")), sources / "bindings_cuda.cpp"]:
        output = Path(folder, source.stem + ".o")
        special = (
            [*python, '-DMIUE_BUILD_FLAGS="host shim"', "-O0"]
            if source.suffix == ".cpp"
            else [*DEFINES, "-include", "shim.h"]
        )
        jobs[output] = subprocess.Popen(
            [
                compiler(),
                *FLAGS.split(),
                f"-I{ROOT / 'tests/shim'}",
                f"-I{sources}",
                *special,
                "-x",
                "c++",
                "-c",
                source,
                "-o",
                output,
            ]
        )
    failed = [output.name for output, job in jobs.items() if job.wait()]
    if failed:
        raise RuntimeError(
            f"the host build of {', '.join(failed)} failed; the compiler's message is above"
        )
    module = Path(folder, "_cuda.so")
    subprocess.run([compiler(), "-shared", "-pthread", *jobs, "-o", module], check=True)
    spec = importlib.util.spec_from_file_location("_cuda", module)
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    return loaded
