"""An op whose reference, contract, Triton kernel and samples are one file (tests/toy_op.py) is seen
by everything that reads the registry, and no other file names it.

Each test is a process of its own, because an op cannot be taken out of the registry again; Triton
runs in its interpreter, without bfloat16, which the interpreter truncates."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
TESTS = Path(__file__).resolve().parents[1]
PARITY, FUZZ = "tests/ops/test_parity.py", "tests/ops/test_fuzz.py"
OTHERS = [
    f"tests/{name}.py"
    for name in (
        "dispatch/test_registry",
        "ops/test_opcheck",
        "ops/test_repeatable",
        "ops/test_compile",
        "ops/test_transforms",
    )
]


def run(*words, toy="right"):
    paths = os.pathsep.join([str(TESTS), str(TESTS.parent)])
    more = {"PYTHONPATH": paths, "TRITON_INTERPRET": "1", "MIUE_TOY": toy, "MIUE_FUZZ": "50"}
    return subprocess.run(
        [sys.executable, *words],
        capture_output=True,
        text=True,
        env=os.environ | more,
        cwd=TESTS.parent,
        timeout=600,
    )


def outcomes(files, toy="right"):
    """{outcome: [the tests of the toy op that ended so]}."""
    words = ["-p", "toy_op", "-p", "no:cacheprovider", "-rA", "-k", "shrunk and not bfloat16"]
    words += ["-W", "ignore::RuntimeWarning"]
    done = run("-m", "pytest", *words, *files, toy=toy)
    found = {}
    lines = r"^(PASSED|FAILED|ERROR) (\S+?)(?: - .*)?$"
    for outcome, test in re.findall(lines, done.stdout, re.M):
        found.setdefault(outcome, []).append(test.split("/")[-1])
    assert found, done.stdout + done.stderr
    return found


def test_the_page_shows_this_file():
    """The snippets of docs/adding-an-op.md are parts of tests/toy_op.py; the paths that it names
    are there.
    """
    page = (TESTS.parent / "docs" / "adding-an-op.md").read_text()
    snippets = re.findall(r"```python\n(.*?)```", page, re.S)
    text = (TESTS / "toy_op.py").read_text()
    assert len(snippets) == 3 and all(snippet in text for snippet in snippets)
    paths = re.findall(r"`((?:miue_fast|kernels|csrc|tests|benchmarks)/[\w/.<>]+)`", page)
    assert len(paths) >= 12
    for path in paths:
        assert (TESTS.parent / path.replace("<op>", "class_covariance")).exists(), path


def test_the_contract_is_tested():
    found = outcomes([PARITY, FUZZ, *OTHERS])
    assert set(found) == {"PASSED"}, found
    assert sorted(found["PASSED"]) == [
        "test_compile.py::test_compiled_equals_eager[shrunk-reference-cpu]",
        "test_compile.py::test_compiled_equals_eager[shrunk-triton-cpu]",
        "test_fuzz.py::test_fuzz[shrunk-cpu]",
        "test_opcheck.py::test_opcheck[shrunk-reference-cpu]",
        "test_opcheck.py::test_opcheck[shrunk-triton-cpu]",
        *(
            f"test_parity.py::test_parity[shrunk-{backend}-cpu-{dtype}]"
            for backend in ("reference", "triton")
            for dtype in ("float16", "float32")
        ),
        "test_registry.py::test_a_backend_asked_for_is_the_one_that_runs[shrunk-reference-cpu]",
        "test_registry.py::test_a_backend_asked_for_is_the_one_that_runs[shrunk-triton-cpu]",
        "test_registry.py::test_implementations[shrunk]",
        "test_registry.py::test_samples_cover_the_input[shrunk]",
        "test_registry.py::test_schema[shrunk]",
        *(
            f"test_repeatable.py::test_repeatable[shrunk-{backend}-cpu-{dtype}]"
            for backend in ("reference", "triton")
            for dtype in ("float16", "float32")
        ),
        "test_transforms.py::test_autocast_changes_nothing[shrunk-reference-cpu]",
        "test_transforms.py::test_autocast_changes_nothing[shrunk-triton-cpu]",
    ]


def test_a_wrong_kernel_fails():
    found = outcomes([PARITY, FUZZ], toy="wrong")
    assert sorted(found["FAILED"]) == [
        "test_fuzz.py::test_fuzz[shrunk-cpu]",
        "test_parity.py::test_parity[shrunk-triton-cpu-float16]",
        "test_parity.py::test_parity[shrunk-triton-cpu-float32]",
    ]


def test_info_and_the_table_of_the_readme_have_it():
    code = (
        "import toy_op; from benchmarks.pages import readme; from miue_fast.cli import info; "
        "info.main(); print(readme.matrix())"
    )
    shown = run("-c", code).stdout.splitlines()
    assert any(line.startswith("ops: ") and line.endswith(", shrunk") for line in shown)
    assert any(re.match(r"  triton\b.*: runs on cpu$", line) for line in shown)
    assert "| `shrunk` | f32 f16 bf16 |  | f32 f16 bf16 |  |  |" in shown


def test_it_is_served_as_any_op():
    code = (
        "import torch, toy_op; from miue_fast.dispatch.registry import OPS; "
        "print(OPS['shrunk'].choose('auto', 'cpu', torch.float32).backend, "
        "toy_op.shrunk(torch.tensor([-2.0, 0.1, 3.0]), 1.0, backend='triton').tolist())"
    )
    done = run("-c", code)
    assert done.stdout.splitlines() == ["triton [-1.0, 0.0, 2.0]"], done.stderr
