"""The ops' kernels on a GPU under compute-sanitizer: out-of-bounds accesses, races in shared
memory, reads of what nobody wrote.

    python -m benchmarks.studies.sanitizer [--tools memcheck racecheck initcheck] [--minutes 9]
    [--out FILE]

Every op, backend (triton, cuda, wgmma) and dtype runs on a few samples of up to 65,536 values, in
one process per tool, op and backend. PyTorch's allocator is told to keep no memory, so that an
access past a tensor's end is one past an allocation. Without a GPU or the tool each row says so.
Its report is docs/gpu-sanitizer.md: `--page` writes it from the JSON.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import torch

from benchmarks.harness import machine, measure, tables
from miue_fast.dispatch.registry import OPS

TOOLS = ("memcheck", "racecheck", "initcheck")
SAMPLES, LIMIT = 4, 1 << 16  # of each dtype; values in all arguments of one
BACKENDS = ("triton", "cuda", "wgmma")
RESULT = tables.RESULTS / "gpu_sanitizer.json"
PAGE = tables.ROOT / "docs" / "gpu-sanitizer.md"
FOUND = 86  # exit code of a process in which the tool found something


def elements(args):
    return sum(a.numel() for a in args if isinstance(a, torch.Tensor))


def exercise(op, backend, device):
    """Runs samples of every dtype, the largest that LIMIT allows and smaller ones; prints how
    many.
    """
    from tests import _support, samples

    impl = next(i for i in OPS[op].impls if i.backend == backend)
    count = 0
    for dtype in sorted(impl.dtypes, key=str):
        if OPS[op].why_not(impl, device, dtype):
            continue
        found = sorted(
            (args for args in samples.taken(op, impl, device, dtype) if elements(args) <= LIMIT),
            key=elements,
            reverse=True,
        )
        found = found[:: -(-len(found) // SAMPLES) or 1]
        if op == "nt_xent" and backend in _support.LARGE_ROWS:
            # Its kernels for large batches take only more values than LIMIT allows.
            labels = torch.arange(_support.LARGE_ROWS[backend] + 1, device=device) % 7
            features = torch.randn(len(labels), 200, device=device).to(dtype)
            found.append((features, labels, 0.1, "all", True))
        for args in found:
            measure.results(OPS[op], impl.fn, args)
            count += 1
    if device == "cuda":
        torch.cuda.synchronize()
    print(f"samples: {count}")


def missing():
    if not torch.cuda.is_available():
        return "no CUDA device"
    return None if shutil.which("compute-sanitizer") else "no compute-sanitizer on the PATH"


def blanks(tools):
    for tool in tools:
        for op in OPS.values():
            for impl in op.impls:
                if impl.backend in BACKENDS:
                    yield {
                        "tool": tool,
                        "op": op.name,
                        "implementation": impl.backend,
                        "samples": 0,
                        "outcome": None,
                    }


def checked(row, seconds, device="cuda"):
    """The row with what the tool said."""
    command = [
        "compute-sanitizer",
        "--tool",
        row["tool"],
        "--error-exitcode",
        str(FOUND),
        "--print-limit",
        "3",
        sys.executable,
        "-m",
        "benchmarks.studies.sanitizer",
        "--exercise",
        row["op"],
        row["implementation"],
        device,
    ]
    env = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=seconds, env=env, cwd=tables.ROOT
        )
    except subprocess.TimeoutExpired:
        return row | {"outcome": f"not run: not ready after {seconds:.0f} s"}
    lines = (done.stdout + done.stderr).splitlines()
    summary = next(
        (line.split("ERROR SUMMARY:")[1].strip() for line in lines if "ERROR SUMMARY:" in line),
        None,
    )
    samples = next((int(line.split(":")[1]) for line in lines if line.startswith("samples: ")), 0)
    told = [
        line.lstrip("= ") for line in lines if line.startswith("=========") and line.strip("= ")
    ]
    if done.returncode == 0 and samples and summary and summary.startswith("0 errors"):
        return row | {"samples": samples, "outcome": "clean"}
    if done.returncode == FOUND:
        first = next(
            (line for line in told if not line.startswith(("COMPUTE-SANITIZER", "ERROR SUMMARY"))),
            "",
        )
        return row | {"samples": samples, "outcome": f"failed: {summary}: {first}"}
    last = next(
        (line for line in reversed(lines) if line.strip() and not line.startswith("=========")),
        f"exit code {done.returncode}",
    )
    return row | {
        "samples": samples,
        "outcome": f"failed: ended with {done.returncode}: {last.strip()}",
    }


def markdown(record):
    tools = list(dict.fromkeys(row["tool"] for row in record["rows"]))
    found = {(row["op"], row["implementation"], row["tool"]): row for row in record["rows"]}
    names = dict.fromkeys(key[:2] for key in found)
    cells = {key: f"{row['outcome']} ({row['samples']} samples)" for key, row in found.items()}
    rows = [(op, backend, *(cells[op, backend, tool] for tool in tools)) for op, backend in names]
    head = (
        "# compute-sanitizer\n\n"
        "Made by `python -m benchmarks.studies.sanitizer`. "
        f"{tables.environment_line(record['environment'])}."
    )
    return f"{head}\n\n{tables.table(('op', 'backend', *tools), rows)}\n"


def main(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tools", nargs="+", choices=TOOLS, default=TOOLS)
    parser.add_argument("--minutes", type=float, default=9)
    parser.add_argument(
        "--out",
        type=Path,
        help="the JSON file; else results/gpu_sanitizer.json on a GPU, none without",
    )
    parser.add_argument(
        "--page", action="store_true", help="write docs/gpu-sanitizer.md from the JSON and stop"
    )
    parser.add_argument(
        "--exercise", nargs=3, metavar=("OP", "BACKEND", "DEVICE"), help=argparse.SUPPRESS
    )
    options = parser.parse_args(argv)
    if options.exercise:
        exercise(*options.exercise)
        return 0
    if options.page:
        PAGE.write_text(markdown(tables.load(options.out or RESULT)))
        return 0
    reason, deadline = missing(), time.monotonic() + 60 * options.minutes
    rows = []
    for row in blanks(options.tools):
        left = deadline - time.monotonic()
        if reason or left < 10:
            rows.append(row | {"outcome": f"not run: {reason or 'the time was over'}"})
        else:
            print(
                f"{row['tool']}: {row['op']}, {row['implementation']} ...",
                file=sys.stderr,
                flush=True,
            )
            rows.append(checked(row, left))
    record = {
        "format": tables.FORMAT,
        "kind": "sanitizer",
        "environment": machine.environment(),
        "rows": rows,
    }
    out = options.out or (None if reason else RESULT)
    if out:
        tables.save(record, out)
    print(markdown(record))
    failed = [row for row in rows if row["outcome"].startswith("failed")]
    print(
        json.dumps(
            {
                "clean": sum(row["outcome"] == "clean" for row in rows),
                "failed": len(failed),
                "rows": len(rows),
            }
        )
    )
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
