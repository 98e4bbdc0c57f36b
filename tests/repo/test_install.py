"""Installs anywhere: without compiler, without nvcc, without triton a working package says what is
missing and why.
"""

import importlib.machinery
import os
import shutil
import subprocess
import sys
import sysconfig
import zipfile

import pytest

SUFFIX = importlib.machinery.EXTENSION_SUFFIXES[0]
SITE = list(dict.fromkeys(sysconfig.get_paths()[key] for key in ("purelib", "platlib")))
USE = (
    "import torch, miue_fast; print(miue_fast.__file__, "
    "float(miue_fast.nt_xent(torch.eye(3), torch.tensor([0, 0, 1]))))"
)


def python(code, *, path, **env):
    """Runs code with `path` before site-packages, and -S: the finder of an editable install would
    lend its binaries.
    """
    command = [sys.executable, "-S", *(["-c", code] if isinstance(code, str) else code)]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(path), *SITE]), **env}
    return subprocess.run(command, capture_output=True, text=True, env=env, cwd=path, check=False)


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory):
    """The pure wheel, unpacked as `pip install --target` does."""
    target = tmp_path_factory.mktemp("site")
    zipfile.ZipFile(wheel).extractall(target)
    return target


def test_pure_wheel_works_and_says_what_is_missing(installed):
    code = (
        USE
        + """
for backend in ("cpu", "cuda", "triton"):
    try:
        miue_fast.nt_xent(torch.eye(3), torch.tensor([0, 0, 1]), backend=backend)
    except miue_fast.BackendError as error:
        print(error)
try:
    import kernels
except ModuleNotFoundError as error:
    print(error)
"""
    )
    result = python(code, path=installed, TRITON_INTERPRET="0")
    assert result.returncode == 0, result.stderr
    lines = result.stdout.splitlines()
    assert lines[0].startswith(str(installed))
    for backend, line in zip(("cpu", "cuda", "triton"), lines[1:4]):
        assert line.startswith(f"nt_xent: backend {backend!r} cannot serve torch.float32 on cpu")
        assert (
            "miue_fast._cpu was not built on this machine" in line
            and "reference: available" in line
        )
    assert lines[4] == "No module named 'kernels'"
    assert "nt_xent on cpu runs in plain PyTorch" in result.stderr  # never silently


def test_info_works_when_half_is_missing(installed):
    result = python(["-m", "miue_fast", "info"], path=installed)
    assert result.returncode == 0, result.stderr
    assert "miue_fast._cpu was not built" in result.stdout and "projected_step_" in result.stdout


def test_without_triton(installed):
    code = "import sys; sys.modules['triton'] = None; " + USE
    code += (
        "; from miue_fast.dispatch.registry import OPS; "
        "print(*{op.impls[0].missing() for op in OPS.values() if op.impls[0].backend == 'triton'})"
    )
    result = python(code, path=installed)
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines()[1] == "triton is not installed"


def test_broken_binary_is_an_error_not_a_fallback(installed, tmp_path):
    shutil.copytree(installed, tmp_path, dirs_exist_ok=True)
    (tmp_path / "miue_fast" / f"_cpu{SUFFIX}").write_bytes(b"this is not a shared object")
    result = python(USE, path=tmp_path)
    assert result.returncode != 0 and "ImportError" in result.stderr and "_cpu" in result.stderr


def test_checkout_that_is_not_installed_says_so(checkout, tmp_path):
    shutil.copytree(checkout / "miue_fast", tmp_path / "miue_fast")
    command = [sys.executable, "-S", "-c", "import miue_fast"]
    result = subprocess.run(
        command,
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": ""},
        check=False,
    )
    assert (
        "ImportError: miue_fast is imported from a checkout that is not installed: "
        "run `pip install -e .` in it"
    ) in result.stderr


@pytest.fixture
def build(checkout, tmp_path):
    """Runs setup.py's build in a copy of the checkout, with a PATH that holds nothing."""
    tree, nothing = tmp_path / "tree", tmp_path / "nothing"
    shutil.copytree(checkout, tree)
    nothing.mkdir()

    def run(**env):
        base = {k: v for k, v in os.environ.items() if k not in ("CXX", "CUDA_HOME", "MIUE_BUILD")}
        env = {**base, "PATH": str(nothing), "CUDA_HOME": str(nothing), **env}
        command = [sys.executable, "setup.py", "build", "--build-base", str(tmp_path / "build")]
        result = subprocess.run(
            command, capture_output=True, text=True, cwd=tree, env=env, check=False
        )
        return (
            result,
            sorted(p.name for p in (tmp_path / "build").rglob("*.so")),
            list((tmp_path / "build").rglob("dispatch/registry.py")),
        )

    return run


@pytest.mark.parametrize(
    "want, message",
    [
        ("cpu", "MIUE_BUILD=cpu: no C++ compiler found (g++, clang++ or $CXX)"),
        ("fast", "MIUE_BUILD: expected auto, cpu, cuda or none, got 'fast'"),
    ],
)
def test_impossible_builds_fail_with_the_reason(build, want, message):
    result, binaries, _ = build(MIUE_BUILD=want)
    assert (
        result.returncode != 0
        and result.stderr.strip().splitlines()[-1] == message
        and not binaries
    )


def test_cuda_without_nvcc_fails_with_the_reason(build):
    result, binaries, _ = build(MIUE_BUILD="cuda", CXX="/usr/bin/false")
    assert result.returncode != 0 and not binaries
    assert (
        result.stderr.strip().splitlines()[-1]
        == "MIUE_BUILD=cuda: no nvcc found on PATH or in $CUDA_HOME/bin"
    )


def test_auto_without_compiler_builds_a_pure_package(build):
    result, binaries, modules = build(MIUE_BUILD="auto")
    assert result.returncode == 0 and not binaries and modules, result.stderr


def test_broken_compiler_is_survived_by_auto_only(build):
    false = shutil.which("false")
    result, binaries, modules = build(MIUE_BUILD="auto", CXX=false)
    assert result.returncode == 0 and not binaries and modules, result.stderr
    assert "ninja failed" in result.stdout + result.stderr
    result, binaries, _ = build(MIUE_BUILD="cpu", CXX=false)
    assert result.returncode != 0 and not binaries and "ninja failed" in result.stderr
