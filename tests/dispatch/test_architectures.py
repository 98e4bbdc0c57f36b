"""miue_fast/dispatch/architectures.py: what MIUE_CUDA_ARCHS chooses, and which GPUs run it."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from miue_fast.dispatch import architectures, native

ROOT = Path(__file__).parents[2]


def names(rows):
    return [row.name for row in rows]


@pytest.mark.parametrize(
    "wanted, rows",
    [
        (None, ["80", "90a", "90+ptx"]),
        (" ", ["80", "90a", "90+ptx"]),
        ("90a 80", ["80", "90a"]),
        ("80,90+ptx", ["80", "90+ptx"]),
    ],
)
def test_chosen(wanted, rows):
    assert names(architectures.chosen(wanted)) == rows


def test_an_unknown_architecture_is_one_line_of_setup_py():
    done = subprocess.run(
        [sys.executable, "setup.py", "--version"],
        cwd=ROOT,
        env=os.environ | {"MIUE_CUDA_ARCHS": "80 75"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1
    assert done.stderr == "MIUE_CUDA_ARCHS: expected some of 80, 90a, 90+ptx, got '75'\n"


def test_the_build_flags_say_what_was_built():
    for row in architectures.ARCHITECTURES:
        flags = f"-O3 -gencode={row.gencode} -fPIC"
        assert names(architectures.built(flags)) == [row.name]
    assert architectures.built("-O3") == ()


HOPPER_BUILT = "its GPU code is for 90a; this GPU has compute capability {}"


@pytest.mark.parametrize(
    "built, capability, every, hopper",
    [
        ("80 90a 90+ptx", (8, 0), None, HOPPER_BUILT.format("8.0")),
        ("80 90a 90+ptx", (8, 9), None, HOPPER_BUILT.format("8.9")),
        ("80 90a 90+ptx", (9, 0), None, None),
        ("80 90a 90+ptx", (10, 0), None, HOPPER_BUILT.format("10.0")),
        ("80", (8, 6), None, "its GPU code for 90a was left out (MIUE_CUDA_ARCHS)"),
        (
            "80 90a",
            (12, 0),
            "its GPU code is for 80, 90a; this GPU has compute capability 12.0",
            HOPPER_BUILT.format("12.0"),
        ),
        (
            "90+ptx",
            (7, 5),
            "its GPU code is for 90+ptx; this GPU has compute capability 7.5",
            "its GPU code for 90a was left out (MIUE_CUDA_ARCHS)",
        ),
    ],
)
def test_which_gpus_run_what(monkeypatch, built, capability, every, hopper):
    monkeypatch.setattr(native, "_cuda_reason", None)
    monkeypatch.setattr(native, "_built", architectures.chosen(built))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    assert native.cuda_missing() == every
    assert native.wgmma_missing() == hopper


def test_every_folder_of_kernels_is_compiled_for_something():
    folders = {str(path.parent.relative_to(ROOT)) for path in ROOT.glob("csrc/cuda/**/*.cu")}
    assert folders == {f for row in architectures.ARCHITECTURES for f in row.folders}
