"""Package map and the two extension modules. Metadata and tool settings are in pyproject.toml.

MIUE_BUILD=auto (default) builds what this machine can; cpu, cuda and none ask for exactly that and
fail if it is impossible. MIUE_CUDA_ARCHS="80 90a" names the GPU architectures that CUDA C++ is
compiled for, rows of miue_fast/dispatch/architectures.py (default: all of them)."""

import os
import runpy
import shutil
import subprocess
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent
WANT = os.environ.get("MIUE_BUILD", "auto")
CXX = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")
CUDA_HOME = os.environ.get("CUDA_HOME", "/usr/local/cuda")
NVCC = shutil.which("nvcc") or shutil.which(f"{CUDA_HOME}/bin/nvcc")
TABLE = runpy.run_path(str(ROOT / "miue_fast/dispatch/architectures.py"))


def architectures():
    try:
        return TABLE["chosen"](os.environ.get("MIUE_CUDA_ARCHS"))
    except ValueError as error:
        raise SystemExit(str(error)) from None


ARCHITECTURES = architectures()


def rows_of(source):
    """The architectures that this file of csrc/cuda is compiled for."""
    folder = str(Path(source).parent)
    return [row for row in ARCHITECTURES if folder in row.folders]


def gencode(rows):
    return " ".join(f"-gencode={row.gencode}" for row in rows)


def _compiled(path):
    return path.suffix == ".cpp" or (path.suffix == ".cu" and rows_of(path))


def extensions():
    if WANT not in ("auto", "cpu", "cuda", "none"):
        raise SystemExit(f"MIUE_BUILD: expected auto, cpu, cuda or none, got {WANT!r}")
    if WANT in ("cpu", "cuda") and not CXX:
        raise SystemExit(f"MIUE_BUILD={WANT}: no C++ compiler found (g++, clang++ or $CXX)")
    if WANT == "cuda" and not NVCC:
        raise SystemExit("MIUE_BUILD=cuda: no nvcc found on PATH or in $CUDA_HOME/bin")
    want_cpu = CXX and WANT != "none"
    want_cuda = CXX and NVCC and WANT in ("auto", "cuda")
    modules = [m for m, on in (("cpu", want_cpu), ("cuda", want_cuda)) if on]
    found = []
    for m in modules:
        kernels = sorted(str(p) for p in Path("csrc", m).rglob("*.c*") if _compiled(p))
        headers = [str(p) for p in Path("csrc").rglob("*.*")]
        found.append(
            Extension(
                f"miue_fast._{m}",
                [f"csrc/bindings_{m}.cpp", *kernels],
                depends=headers,
                optional=WANT == "auto",
            )
        )
    return found


class NinjaBuild(build_ext):
    """Writes one build.ninja per module (parallel, incremental) and runs it."""

    def build_extension(self, ext):
        import ninja
        import pybind11

        cuda = ext.name.endswith("_cuda")
        folder = (ROOT / self.build_temp / ext.name).resolve()
        folder.mkdir(parents=True, exist_ok=True)
        output = Path(self.get_ext_fullpath(ext.name)).resolve()
        flags = "-O3 -ffp-contract=off -fno-math-errno -fPIC -fvisibility=hidden" + (
            "" if cuda else " -fopenmp"
        )
        hopper = "-DMIUE_HOPPER" if any(TABLE["HOPPER"] in a.folders for a in ARCHITECTURES) else ""
        include = (
            f"-I{ROOT / 'csrc'} -I{pybind11.get_include()} -I{sysconfig.get_paths()['include']}"
        )
        nvcc_flags = (
            "-std=c++17 -O3 -fmad=false --threads 2 -cudart static -Xcompiler "
            "-fPIC,-fvisibility=hidden"
        )
        define = f"-DMIUE_BUILD_FLAGS='\"{flags}{' ' + gencode(ARCHITECTURES) if cuda else ''}\"'"
        text = f"""
rule cxx
  command = {CXX} -std=c++17 {flags} {hopper} {include} {define} -MMD -MF $out.d -c $in -o $out
  depfile = $out.d
rule nvcc
  command = {NVCC} {nvcc_flags} {hopper} $gencode -I{ROOT / "csrc"} -MMD -MF $out.d -c $in -o $out
  depfile = $out.d
rule link
  command = {NVCC + " -cudart static -Xcompiler" if cuda else CXX} \
{"-fPIC" if cuda else "-fopenmp"} -shared $in -o $out
"""
        objects = []
        for source in ext.sources:
            objects.append(f"{folder / source.replace('/', '_')}.o")
            rule = "nvcc" if source.endswith(".cu") else "cxx"
            text += f"build {objects[-1]}: {rule} {ROOT.resolve() / source}\n"
            text += f"  gencode = {gencode(rows_of(source))}\n" if rule == "nvcc" else ""
        text += f"build {output}: link {' '.join(objects)}\n"
        (folder / "build.ninja").write_text(text)
        output.parent.mkdir(parents=True, exist_ok=True)
        result = subprocess.run([Path(ninja.BIN_DIR, "ninja"), "-C", folder, output])
        if result.returncode:
            from setuptools.errors import CompileError

            raise CompileError(
                f"{ext.name}: ninja failed in {folder}; the compiler's message is above"
            )


setup(ext_modules=extensions(), cmdclass={"build_ext": NinjaBuild})
