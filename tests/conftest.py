"""Fixtures of every test: fresh memory is NaN, temporary wheels and sdists are built once."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

os.environ.setdefault(
    "OMP_WAIT_POLICY", "PASSIVE"
)  # before libgomp loads: spinning threads cost 100x on a busy machine

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [
    str(ROOT / "tests"),
    str(ROOT),
]  # --import-mode=importlib leaves it out; the tests share _support.py and run benchmarks
torch.set_num_threads(min(2, torch.get_num_threads()))


def pytest_configure(config):
    config.addinivalue_line("markers", "plain_memory: fresh memory is not NaN-filled in this test")


@pytest.fixture(autouse=True)
def nan_filled_memory(request):
    """torch fills what torch.empty and its relatives return with NaN (floats) or the largest value
    (integers).
    """
    if request.node.get_closest_marker("plain_memory"):
        yield
        return
    before = (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
    )
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(before[0], warn_only=before[1])


@pytest.fixture(scope="session")
def checkout(tmp_path_factory):
    """A copy of the sources as a fresh clone has them: nothing built, nothing ignored by git."""
    copy = tmp_path_factory.mktemp("checkout") / "miue"
    ignored = shutil.ignore_patterns(
        ".*",
        "build",
        "dist",
        "*.egg-info",
        "__pycache__",
        "*.so",
        "demo-output",
        "scratch",
        "results",
    )
    shutil.copytree(ROOT, copy, ignore=ignored)
    return copy


@pytest.fixture(scope="session")
def wheel(checkout, tmp_path_factory):
    """The pure-Python wheel of the checkout."""
    out = tmp_path_factory.mktemp("wheel")
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "-q",
        "--no-deps",
        "--no-build-isolation",
        "--no-index",
        "-w",
        out,
        checkout,
    ]
    subprocess.run(
        command, check=True, env={**os.environ, "MIUE_BUILD": "none"}, stdout=subprocess.PIPE
    )
    (path,) = out.glob("*.whl")
    return path


@pytest.fixture(scope="session")
def sdist(checkout, tmp_path_factory):
    out = tmp_path_factory.mktemp("sdist")
    command = [sys.executable, "setup.py", "-q", "sdist", "-d", out]
    subprocess.run(
        command,
        check=True,
        cwd=checkout,
        env={**os.environ, "MIUE_BUILD": "none"},
        stdout=subprocess.PIPE,
    )
    (path,) = out.glob("*.tar.gz")
    return path


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Folders train/ and test/ of small shapes, a poison with its PNG files, and a data set of
    other images.
    """
    from _commands import TINY, run

    from miue_fast import data

    root = tmp_path_factory.mktemp("cli")
    for name, count, seed in (("train", 60, 0), ("test", 30, 1), ("other", 60, 2)):
        shapes = data.shapes(count, seed=seed, size=16, classes=3, difficulty=0)
        data.export_folder(shapes, shapes.images * 0.0, root / name, eps=0)
    generate = ["generate", "--data", root / "train", "--out", root / "out", "--export", "png"]
    assert run(*generate, *TINY) == 0
    return root
