"""Times every op that has a workload on the CPU beside the published path and the best of plain
PyTorch: `make bench`.

Each implementation is checked against float64 first; a wrong one is not timed. A run of all ops
writes results/cpu.json."""

import argparse
import functools
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks.harness import machine, measure, pgd_step, tables, workloads
from miue_fast.dispatch.registry import OPS

RESULTS = Path(__file__).parent / "results"
TIMED = sorted({workload.op for workload in workloads.cpu()})
METHOD = {
    "time": (
        "implementations interleaved in one process on the same random data, "
        "each sample after an untimed call of the same implementation (none for calls of seconds); "
        f"median, 10th and 90th percentile of at least {measure.ROUNDS} rounds, samples says how "
        "many; times_ours, and so every ratio: the median over the rounds of one sample over the "
        "other; against strong: against the fastest PyTorch form, this library's reference included"
    ),
    "extra_bytes": (
        "growth of the peak resident memory (VmHWM, reset before) over one call in a fresh process "
        "after a tiny first call; the results count, the inputs do not"
    ),
    "overhead": (
        "public call less `Impl.fn` of the implementation it chooses, on tiny inputs, "
        "in alternating blocks of calls"
    ),
    "error_of_allowed": (
        "largest error against float64 as a fraction of: "
        "twice the reference's error plus four roundings"
    ),
}


@dataclass(frozen=True)
class Target:
    """`speed`: times faster than `against`; `memory`: bytes; `smaller`: times less memory than
    `against`; `overhead`: seconds.
    """

    kind: str
    workload: str
    needed: float
    against: str | None = None


TARGETS = (
    Target("speed", "nt_xent B=512 D=512", 300, "eager"),
    Target("speed", "nt_xent B=512 D=512", 1.3, "strong"),
    Target("memory", "nt_xent B=512 D=512", 8e6),
    Target("memory", "nt_xent B=8192 D=512", 200e6),
    Target("speed", "intra_class_distance B=512 D=512", 50, "eager"),
    Target("speed", "class_covariance B=8192 D=512 K=10", 1.5, "strong"),
    Target("speed", "projected_step 512x3x32x32", 8, "eager"),
    Target("speed", "perturbed_input 512x3x32x32 channels-last", 4, "eager"),
    Target("overhead", "every op, tiny inputs", 15e-6),
    Target("speed", "PGD step ResNet-18 B=512", 8, "eager"),
    Target("speed", "PGD step ResNet-18 B=512", 2.8, "strong"),
    Target("smaller", "network ResNet-18 B=512", 8, "eager"),
)


def judged(rows, overhead):
    """Every target with what was measured and whether it is met (None: nothing was measured)."""
    for target in TARGETS:
        if target.kind == "overhead":
            found = (o["overhead_s"] for o in overhead if o["overhead_s"] is not None)
            measured = max(found, default=None)
        else:
            mine = [r for r in rows if r["workload"] == target.workload]
            ours, other = tables.fastest(mine, "ours"), tables.fastest(mine, target.against)
            if target.kind == "memory":
                measured = ours and ours["extra_bytes"]
            elif target.kind == "smaller":
                measured = (
                    other["extra_bytes"] / ours["extra_bytes"]
                    if ours and other and ours["extra_bytes"] and other["extra_bytes"]
                    else None
                )
            else:
                measured = tables.times(other, ours) if ours and other else None
        met = (
            None
            if measured is None
            else measured >= target.needed
            if target.kind in ("speed", "smaller")
            else measured < target.needed
        )
        yield {**vars(target), "measured": measured, "met": met}


def overhead(op, *, quick):
    """Median extra time of the public call, from alternating blocks."""
    args = workloads.tiny(op.name)
    chosen = next(i for i in op.impls if op.why_not(i, "cpu", op.dtype_of(*args)) is None)
    row = {
        "op": op.name,
        "implementation": chosen.backend,
        "reason": None,
        "public_s": None,
        "kernel_s": None,
        "overhead_s": None,
        "p10_s": None,
        "p90_s": None,
    }
    if chosen is op.reference:
        return row | {"reason": "served by the reference: no kernel here"}
    public, kernel = (functools.partial(fn, *args) for fn in (workloads.PUBLIC[op.name], chosen.fn))
    blocks, calls = (20, 20) if quick else (300, 200)
    pairs = [
        (measure.cpu_clock(public, calls), measure.cpu_clock(kernel, calls)) for _ in range(blocks)
    ]
    difference = measure.spread([a - b for a, b in pairs])
    middle = [measure.spread(side)["median_s"] for side in zip(*pairs)]
    return row | {
        "public_s": middle[0],
        "kernel_s": middle[1],
        "overhead_s": difference["median_s"],
        "p10_s": difference["p10_s"],
        "p90_s": difference["p90_s"],
    }


def add_memory(rows, options):
    """Extra memory of every timed row, each in its own process with malloc returning freed blocks
    at once.
    """
    for row in rows:
        large = row["workload"] == pgd_step.names(pgd_step.LARGE)[0]
        if row["workload"].startswith("PGD"):
            row["extra_bytes_reason"] = "measured for the network alone"
        if (row["median_s"] is None and not large) or row["extra_bytes_reason"]:
            continue
        if options.quick and row["role"] not in ("ours", "eager"):
            row["extra_bytes_reason"] = "left out by --quick"
            continue
        if not Path("/proc/self/clear_refs").exists():
            row["extra_bytes_reason"] = "needs Linux's /proc"
        elif "compiled" in row["implementation"]:
            row["extra_bytes_reason"] = "the compiler's own memory would be counted"
        else:
            command = [
                sys.executable,
                "-m",
                "benchmarks.bench",
                "--memory",
                row["workload"],
                row["implementation"],
                "--threads",
                str(options.threads),
            ]
            limits = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
            done = subprocess.run(
                [*command, *["--quick"] * options.quick],
                cwd=tables.ROOT,
                env=os.environ | limits,
                capture_output=True,
                text=True,
            )
            if done.returncode:
                row["extra_bytes_reason"] = (
                    "failed: "
                    f"{(done.stderr.strip().splitlines() or [f'exit code {done.returncode}'])[-1]}"
                )
            else:
                taken, *once = done.stdout.split()
                row["extra_bytes"] = int(taken)
                if large:  # too long to repeat: the one call of the memory measurement is the time
                    row |= measure.spread([float(once[0])])


def parse(argv):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--quick",
        action="store_true",
        help="tiny sizes, no torch.compile, seconds: shows that it runs, not how fast",
    )
    parser.add_argument(
        "--ops", nargs="+", choices=TIMED, default=TIMED, metavar="OP", help="only these ops"
    )
    parser.add_argument(
        "--out",
        type=Path,
        help="the JSON file (default: results/cpu.json for a full run, else none)",
    )
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument(
        "--no-step", action="store_true", help="leave out the PGD step of ResNet-18 (some minutes)"
    )
    parser.add_argument(
        "--memory",
        nargs=2,
        metavar=("WORKLOAD", "IMPLEMENTATION"),
        help="print the extra bytes of one call and stop",
    )
    return parser.parse_args(argv)


def main(argv=None):
    options = parse(argv)
    torch.set_num_threads(options.threads)
    # Inductor's pool of compiler processes starts with the first workload and works beside its
    # timing.
    os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")
    some = set(options.ops) != set(TIMED)
    chosen = [w for w in workloads.cpu(options.quick) if w.op in options.ops]
    if options.memory:
        name, implementation = options.memory
        if name.startswith("network"):
            print(*pgd_step.memory(implementation, int(name.split("=")[1])))
        else:
            print(
                measure.cpu_extra_bytes(next(w for w in chosen if w.name == name), implementation)
            )
        return 0
    record = {
        "format": tables.FORMAT,
        "kind": "cpu",
        "quick": options.quick,
        "environment": machine.environment(),
        "method": METHOD,
    }
    rows = []
    for workload in chosen:
        print(f"{workload.name} ...", file=sys.stderr, flush=True)
        rows += measure.run(
            workload, "cpu", quick=options.quick, budget=0.05 if options.quick else 3.0
        )
    step = {"rows": []}
    if not options.no_step and not some:
        step = pgd_step.run(quick=options.quick, budget=0.05 if options.quick else 20.0)
        if not options.quick:
            step["rows"].append(pgd_step.blank(pgd_step.names(pgd_step.LARGE)[0], "cpu", "ours"))
    extra = [overhead(OPS[name], quick=options.quick) for name in options.ops]
    add_memory(rows + step["rows"], options)
    record |= {
        "rows": rows,
        "pgd_step": step,
        "overhead": extra,
        "targets": [] if options.quick else list(judged(rows + step["rows"], extra)),
    }
    if some:
        record["targets"] = [
            target
            for target in record["targets"]
            if target["workload"] in {workload.name for workload in chosen}
        ]
    out = options.out or (RESULTS / "cpu.json" if not some and not options.quick else None)
    if out:
        tables.save(record, out)
    print(tables.markdown(record))
    for row in measure.broken(rows + step["rows"]):
        print(f"{row['workload']}: {row['implementation']}: {row['reason']}", file=sys.stderr)
    return 1 if measure.broken(rows + step["rows"]) else 0


if __name__ == "__main__":
    sys.exit(main())
