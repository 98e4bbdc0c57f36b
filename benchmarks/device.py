"""Every GPU number in one command, in under eight minutes: correctness first, then ceilings,
layers, ops, the PGD step and an epoch.

    python -m benchmarks.device [--quick] [--stages STAGE ...] [--minutes 8] [--write-table] [--out
    FILE]

Stages: parity (every op, backend and dtype), ceilings, layers (each convolution of ResNet-18),
loss, update, input, step, epoch. Each stage runs in a process of its own and has a share of the
time; parity runs as many small processes. What crashes, hangs or is late says so in its own rows,
and the command goes on. Without a GPU it runs to its end and says per row why it has no number. The
step and the epoch run with the per-layer table that the layers stage of the same run measured.

On a machine without network, where a command may take ten minutes and the package is built first:
`python3 -m pip install -q --no-build-isolation --no-deps -e . && python3 -m benchmarks.device
--minutes 7 --out $OUT/device.json`; the stages that were late: `--stages step epoch`. Then here:
`python -m benchmarks.pages.readme FILE --write-table --plot PNG` and `python -m
benchmarks.harness.roofline`."""

import argparse
import concurrent.futures
import json
import math
import os
import sys
import tempfile
import time
import warnings
from pathlib import Path

import torch

from benchmarks.harness import (
    ceilings,
    children,
    epoch,
    gpu_step,
    layers,
    machine,
    measure,
    tables,
    targets,
    workloads,
)
from benchmarks.pages import readme
from miue_fast.dispatch import measured
from miue_fast.dispatch.registry import OPS

# seconds of eight minutes
SHARES = {
    "parity": 85,
    "ceilings": 20,
    "layers": 110,
    "loss": 85,
    "update": 20,
    "input": 20,
    "step": 90,
    "epoch": 45,
}
STAGES = tuple(SHARES)
TOGETHER = ("loss", "update", "input")  # one process
END = 3  # seconds before it is killed that a stage begins nothing new
METHOD = {
    "time": (
        "CUDA events, implementations interleaved, each after an untimed call of its own, "
        "arguments rotating through more than the L2"
    ),
    "launch": (
        "graph: one CUDA graph over all argument sets; "
        "calls: back to back as Python makes them, with its time between launches"
    ),
    "extra_bytes": "peak of torch's allocator over one call outside a graph, results included",
    "parity": ("the checks of tests/_support.py on tests/samples, on fresh memory full of NaN"),
    "error_of_allowed": (
        "largest error against float64 as a fraction of: "
        "twice the reference's error plus four roundings"
    ),
    "of_ceiling": (
        "the larger of FLOP / bf16 ceiling and bytes / copy ceiling, "
        "both of this run, over the time"
    ),
    "agreement": (
        "share of delta's signs that are as in float32 autograd without TF32, "
        "after one step from zero; of this library's steps as replayed by the graph. "
        "This library may disagree twice as often as PyTorch in bf16"
    ),
    "pgd_step": "the step of this library and of the attack library's loop: a tenth of ten steps",
}


def no_gpu():
    return None if torch.cuda.is_available() else "no CUDA device"


def parity(seconds, reason):
    """(rows, refused): every op, backend and dtype of the registry on its own samples, in a process
    for each but that the dtypes of CUDA C++, which compiles nothing, share one; and what
    `layers.check` found wrong."""
    deadline = time.monotonic() + seconds
    rows, todo = [], {}
    for op in OPS.values():
        for impl in op.impls[:-1]:
            if "cuda" not in impl.devices and "cpu" in impl.devices:
                continue  # an implementation for the CPU
            for dtype in sorted(impl.dtypes, key=str):
                row = {
                    "op": op.name,
                    "implementation": impl.backend,
                    "dtype": str(dtype)[6:],
                    "samples": 0,
                    "outcome": None,
                }
                rows.append(row)
                why = reason or op.why_not(impl, "cuda", dtype)
                if why:
                    row["outcome"] = f"not run: {why}"
                else:
                    todo.setdefault(
                        (op.name, impl.backend, row["dtype"] if impl.backend == "triton" else None),
                        [],
                    ).append(row)
    refused = {}
    if not reason:
        jobs = [{"job": "parity", "cases": cases} for cases in todo.values()]
        jobs += [{"job": "layer", "number": k} for k in range(len(layers.distinct()))]
        jobs.sort(key=lambda job: "conv_" not in json.dumps(job))  # the long ones first
        with concurrent.futures.ThreadPoolExecutor(
            max(1, min(14, (os.cpu_count() or 1) - 2))
        ) as pool:
            done = list(pool.map(lambda job: _job(job, deadline), jobs))
        for job, (found, ended) in zip(jobs, done):
            if job["job"] == "parity":
                _parity_outcome(job["cases"], found, ended)
            else:
                refused |= _layer_outcome(job["number"], found, ended)
    return rows, refused


def _job(spec, deadline):
    left = children.left(deadline)
    return children.run(spec, left) if left > 2 * END else ([], measure.LATE)


def _parity_outcome(rows, found, ended):
    """Writes what a process found into its rows. The first one without an answer is the one that
    crashed it.
    """
    for row, answer in zip(rows, found):
        row |= answer
    for k, row in enumerate(rows[len(found) :]):
        row["outcome"] = (
            f"not run: {ended or 'no answer'}" if k or not _crashed(ended) else f"failed: {ended}"
        )


def _crashed(ended):
    return "ended with" in (ended or "")


def _layer_outcome(number, found, ended):
    """{layer/pass/backend: why} of what went wrong; what was not reached because of the time is not
    refused.
    """
    layer, _ = layers.distinct()[number]
    seen = {
        layers.case(row["layer"], row["pass"], row["implementation"]): row["reason"]
        for row in found
    }
    out = {key: reason for key, reason in seen.items() if reason}
    missing = [
        key
        for key in (layers.case(layer.layer, *c) for c in layers.checked(layer))
        if key not in seen
    ]
    if missing and _crashed(ended):
        out[missing[0]] = f"failed: alone, {ended}"
    return out


def parity_of(case, emit):
    """One op, backend and dtype by the contract's own checks; fresh memory is full of NaN, as in
    the tests.
    """
    from tests import _support, samples
    from tests.samples.losses import large_losses

    torch.use_deterministic_algorithms(True, warn_only=True)
    warnings.filterwarnings("ignore", message=".*deterministic")
    torch.utils.deterministic.fill_uninitialized_memory = True
    op, count = OPS[case["op"]], 0
    impl = next(i for i in op.impls if i.backend == case["implementation"])
    dtype = getattr(torch, case["dtype"])
    found = list(samples.taken(op.name, impl, measure.GPU, dtype))
    if op.name == "nt_xent":
        found += large_losses(measure.GPU, dtype, big=measure.GPU != "cpu")
    for args in found:
        try:
            with measure.true_float32():
                if op.name == "nt_xent":
                    rounding = _support.rounding_of_weights(impl, args[0])
                    _support.check_losses(op, args, [impl], rounding)
                else:
                    _support.check(op, args, [impl])
        except (
            RuntimeError,
            AssertionError,
        ) as error:  # BackendError and launch failures among them
            emit(
                {
                    "samples": count,
                    "outcome": f"failed: sample {count + 1}: {measure.first_line(error)}",
                }
            )
            return
        count += 1
    emit({"samples": count, "outcome": "same bits" if op.exact else "right"})


def chosen(stage, quick):
    if stage == "loss":
        return list(workloads.gpu_loss(quick))
    return [
        w
        for w in workloads.gpu_pixels(quick)
        if w.op == ("projected_step_" if stage == "update" else "perturbed_input")
    ]


def timed(stage, quick, deadline, emit):
    for workload in chosen(stage, quick):
        if time.monotonic() > deadline:
            rows = measure.left_out(workload, "cuda", measure.LATE)
        else:
            moved = workload.moved or sum(
                a.nbytes
                for a in workload.make(workload.batch, measure.GPU, 1)
                if isinstance(a, torch.Tensor)
            )
            copies = min(256, math.ceil(3 * measure.l2_bytes() / moved))
            rows = measure.run(
                workload, measure.GPU, quick=quick, budget=0.1 if quick else 0.3, copies=copies
            )
            measure.free()
        for row in rows:
            emit(row)


def blanks(stage, quick, reason):
    """The rows that a stage is to make, without numbers."""
    if stage in TOGETHER:
        return [
            row
            for workload in chosen(stage, quick)
            for row in measure.left_out(workload, "cuda", reason)
        ]
    return list(
        {"ceilings": ceilings, "layers": layers, "step": gpu_step, "epoch": epoch}[stage].blanks(
            quick, reason
        )
    )


def identity(stage, row):
    fields = {
        "ceilings": ("name",),
        "layers": ("layer", "batch", "pass", "implementation"),
        "epoch": ("name",),
    }
    return tuple(row[field] for field in fields.get(stage, ("workload", "implementation")))


def child(spec):
    """What one process of this command does: a stage, a parity case, or the check of one layer."""
    emit, quick = children.emitter(spec["rows"]), spec.get("quick")
    deadline = time.monotonic() + spec.get("seconds", 0)
    if "table" in spec:
        measured.TABLE = Path(spec["table"])
        measured.forget()
    if spec.get("job") == "parity":
        for case in spec["cases"]:
            parity_of(case, emit)
    elif spec.get("job") == "layer":
        layers.check(spec["number"], emit)
    elif spec["stages"] == ["layers"]:
        layers.run(quick, deadline, emit, spec["refused"])
    elif set(spec["stages"]) <= set(TOGETHER):
        for stage in spec["stages"]:
            timed(stage, quick, deadline, emit)
    else:
        {"ceilings": ceilings, "step": gpu_step, "epoch": epoch}[spec["stages"][0]].run(
            quick, deadline, emit
        )


def run_stages(stages, seconds, options, reason, **spec):
    """The rows of stages that share a process: what it emitted, and why the others are missing."""
    rows = {
        (stage, identity(stage, row)): row
        for stage in stages
        for row in blanks(stage, options.quick, reason)
    }
    if reason:
        return list(rows.values())
    found, ended = [], measure.LATE
    if seconds > 2 * END:
        print(f"{', '.join(stages)}: {seconds:.0f} s ...", file=sys.stderr, flush=True)
        found, ended = children.run(
            {"stages": stages, "seconds": seconds - END, "quick": options.quick, **spec}, seconds
        )
    for row in rows.values():
        row["reason"] = (
            ended
            if ended == measure.LATE
            else f"left out: {ended or 'its stage did not come to it'}"
        )
    for row in found:
        stage = next((s for s in stages if (s, identity(s, row)) in rows), stages[0])
        rows[stage, identity(stage, row)] = row
    return list(rows.values())


def main(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="one size per stage, no torch.compile")
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=STAGES)
    parser.add_argument(
        "--minutes",
        type=float,
        default=8,
        help="for all of the chosen stages together, shared out between them",
    )
    parser.add_argument(
        "--write-table",
        action="store_true",
        help="put the faster backend of each layer and loss into the package",
    )
    parser.add_argument(
        "--out",
        type=Path,
        help="the JSON file (default: results/device.json where there is a GPU, else none)",
    )
    parser.add_argument("--child", type=json.loads, help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if options.child:
        return child(options.child)
    stages = [stage for stage in STAGES if stage in options.stages]
    begin, reason = time.monotonic(), no_gpu()
    per_share = (60 * options.minutes - 10) / sum(SHARES[stage] for stage in stages)

    def seconds_until_end_of(stage):
        share = sum(SHARES[s] for s in stages[: stages.index(stage) + 1])
        return children.left(begin + share * per_share)

    record = {
        "format": tables.FORMAT,
        "kind": "device",
        "quick": options.quick,
        "environment": machine.environment(),
        "method": METHOD,
    }
    record |= {
        "stages": stages,
        "parity": [],
        "ceilings": [],
        "layer_times": [],
        "layers": [],
        "rows": [],
        "pgd_step": {"rows": []},
        "epoch": [],
        "overhead": [],
        "targets": [],
    }
    out = options.out or (None if reason else tables.RESULTS / "device.json")
    spec, refused, scratch = {}, {}, tempfile.TemporaryDirectory()
    try:
        if "parity" in stages:
            record["parity"], refused = parity(seconds_until_end_of("parity"), reason)
        if "ceilings" in stages:
            record["ceilings"] = run_stages(
                ["ceilings"], seconds_until_end_of("ceilings"), options, reason
            )
        if "layers" in stages:
            rows = run_stages(
                ["layers"], seconds_until_end_of("layers"), options, reason, refused=refused
            )
            record["layer_times"] = layers.with_ceilings(rows, record["ceilings"])
            record["layers"] = list(layers.fastest(rows))
            if not reason:
                record["environment"]["device"]["state_after_layers"] = machine.gpu_state()
        ops = [stage for stage in TOGETHER if stage in stages]
        if ops:
            record["rows"] = run_stages(ops, seconds_until_end_of(ops[-1]), options, reason)
        if not reason:
            name, spec = (
                torch.cuda.get_device_name(),
                {"table": str(Path(scratch.name, "table.json"))},
            )
            fastest = layers.table(record["layer_times"]) | workloads.loss_table(record["rows"])
            Path(spec["table"]).write_text(
                json.dumps({name: measured._table().get(name, {}) | fastest})
            )
            if options.write_table:
                readme.write_table(record)
        if "step" in stages:
            record["pgd_step"]["rows"] = run_stages(
                ["step"], seconds_until_end_of("step"), options, reason, **spec
            )
        if "epoch" in stages:
            record["epoch"] = run_stages(
                ["epoch"], seconds_until_end_of("epoch"), options, reason, **spec
            )
    finally:  # also of a run that is interrupted
        record["seconds"] = round(time.monotonic() - begin, 1)
        record["targets"] = [] if options.quick or reason else list(targets.device(record))
        if out:
            tables.save(record, out)
        scratch.cleanup()
    print(tables.markdown(record), tables.closing(record, wrong(record)), sep="\n\n")
    return 1 if wrong(record) else 0


def wrong(record):
    """What of this library failed or was refused."""
    rows = [
        row for row in record["layer_times"] if row["implementation"] not in layers.LIBRARY
    ] + record["epoch"]
    failed = [row for row in rows if (row["reason"] or "").startswith(("refused", "failed"))]
    failed += [row for row in record["parity"] if row["outcome"].startswith("failed")]
    return failed + measure.broken(record["rows"] + record["pgd_step"]["rows"])


if __name__ == "__main__":
    sys.exit(main())
