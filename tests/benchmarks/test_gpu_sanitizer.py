"""benchmarks/studies/sanitizer.py, with a stand-in for compute-sanitizer: what it reports is what
the tool said.
"""

import stat

import pytest
from _schema import BENCHMARKS, nameless

from benchmarks.harness import tables
from benchmarks.studies import sanitizer
from miue_fast.dispatch.registry import OPS

ROW = {
    "tool": "memcheck",
    "op": "projected_step",
    "implementation": "cpu",
    "samples": 0,
    "outcome": None,
}
RUN = 'while [ "$1" != --print-limit ]; do shift; done; shift 2\n'


@pytest.fixture
def tool(tmp_path, monkeypatch):
    """tool(script): a compute-sanitizer on the PATH; the script finds the program and its arguments
    in "$@".
    """

    def write(script):
        path = tmp_path / "compute-sanitizer"
        path.write_text("#!/bin/sh\n" + RUN + script)
        path.chmod(path.stat().st_mode | stat.S_IXUSR)
        monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")

    return write


def test_clean(tool):
    tool('echo "========= COMPUTE-SANITIZER"; "$@"; echo "========= ERROR SUMMARY: 0 errors"')
    row = sanitizer.checked(ROW, 60, "cpu")
    assert row["outcome"] == "clean" and row["samples"] > sanitizer.SAMPLES


def test_no_op_is_left_with_empty_samples(capsys, monkeypatch):
    """Every op runs on something of hundreds of values at least: an empty tensor starts no
    kernel.
    """
    seen = []
    monkeypatch.setattr(
        sanitizer.measure, "results", lambda op, fn, args: seen.append(sanitizer.elements(args))
    )
    for op in OPS:
        seen.clear()
        sanitizer.exercise(op, "cpu", "cpu")
        assert seen and 200 < max(seen) <= sanitizer.LIMIT, (op, seen)


def test_what_the_tool_found(tool):
    tool(
        '"$@"; echo "========= COMPUTE-SANITIZER"; '
        'echo "========= Invalid __global__ read of size 4 bytes"; '
        'echo "========= ERROR SUMMARY: 2 errors"; exit 86'
    )
    row = sanitizer.checked(ROW, 60, "cpu")
    assert row["outcome"] == "failed: 2 errors: Invalid __global__ read of size 4 bytes"


@pytest.mark.parametrize(
    "script, part",
    [
        ("exit 3", "failed: ended with 3: exit code 3"),
        ('echo "========= ERROR SUMMARY: 0 errors"', "failed: ended with 0"),  # nothing ran
        (
            '"$@" | grep -v samples; echo "========= ERROR SUMMARY: 0 errors"',
            "failed: ended with 0",
        ),
        ("sleep 20", "not run: not ready after 1 s"),
    ],
)
def test_nothing_is_clean_that_did_not_run(tool, script, part):
    tool(script)
    assert sanitizer.checked(ROW, 60 if "$@" in script else 1, "cpu")["outcome"].startswith(part)


def test_without_a_gpu(tmp_path, capsys):
    assert sanitizer.missing() == "no CUDA device"
    assert sanitizer.main(["--out", str(tmp_path / "s.json")]) == 0
    record = tables.load(tmp_path / "s.json")
    kernels = [i for op in OPS.values() for i in op.impls if i.backend in sanitizer.BACKENDS]
    assert len(record["rows"]) == 3 * len(kernels)
    assert {row["outcome"] for row in record["rows"]} == {"not run: no CUDA device"}
    nameless(record)
    assert "| nt_xent | triton | not run: no CUDA device (0 samples) |" in capsys.readouterr().out


@pytest.mark.parametrize("path", sorted((BENCHMARKS / "results").glob("gpu_sanitizer.json")))
def test_committed_results(path):
    record = tables.load(path)
    nameless(record)
    assert not [row for row in record["rows"] if row["outcome"].startswith("failed")]
    assert sanitizer.PAGE.read_text() == sanitizer.markdown(record)
