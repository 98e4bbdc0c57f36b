"""The GPU tables in one command: parity first, then ceilings, losses with peak memory, update and input in bytes per second.

    python benchmarks/device.py [--quick] [--stages parity ceilings loss update input] [--minutes 8] [--out FILE]

Written on a machine without a GPU and not yet run on one. Without a GPU it runs to its end and says per row why it has no number.
Times are CUDA events around back-to-back calls as Python makes them (no CUDA graph), so small ops include their launch cost.
"""

import argparse
import math
import sys
import time
from pathlib import Path

import measure
import report
import torch
import workloads

from miue_fast._registry import OPS

STAGES = ("parity", "ceilings", "loss", "update", "input")
METHOD = {
    "time": "CUDA events, implementations interleaved, each after an untimed call of its own, arguments rotating through more than the L2",
    "extra_bytes": "peak of torch's allocator over one call, results included",
    "error_of_allowed": "largest error against float64 as a fraction of: twice the reference's error plus four roundings",
}


def parity(reason):
    """Every op, backend and dtype of the registry on its own samples."""
    for op in OPS.values():
        for impl in op.impls[:-1]:
            if "cuda" not in impl.devices and "cpu" in impl.devices:
                continue  # an implementation for the CPU
            for dtype in sorted(impl.dtypes, key=str):
                row = {"op": op.name, "implementation": impl.backend, "dtype": str(dtype)[6:], "samples": 0, "outcome": None}
                why = reason or op.why_not(impl, "cuda", dtype)
                yield row | ({"outcome": f"not run: {why}"} if why else _parity(op, impl, dtype))


def _parity(op, impl, dtype):
    worst = count = 0
    for args in op.samples("cuda", dtype):
        try:
            plain = measure.results(op, op.reference.fn, args)
            worst = max(worst, measure.gate(op, args, measure.truth(op, args), plain, impl.fn, exact=op.exact))
        except RuntimeError as error:  # WrongResult, BackendError, a launch failure
            return {"samples": count, "outcome": f"failed: {type(error).__name__}: {str(error).strip().splitlines()[0]}"}
        count += 1
    return {"samples": count, "outcome": "same bits" if op.exact else f"right, {worst:.2f} of the allowed error"}


def ceilings(reason, quick):
    """Copy and matrix product as PyTorch reaches them: what the other rates are compared with."""
    side = 2048 if quick else 8192
    kinds = {"bf16": torch.bfloat16, "fp16": torch.float16, "tf32": torch.float32, "fp32": torch.float32}
    for name in ("copy", *kinds):
        row = {"name": name if name == "copy" else f"GEMM {name} {side}", "unit": "TB/s" if name == "copy" else "TFLOP/s",
               "rate": None, "p10": None, "p90": None, "reason": reason}  # fmt: skip
        if reason:
            yield row
            continue
        if name == "copy":
            source = torch.randn(side * side * 4, device="cuda")
            target, work = torch.empty_like(source), 2 * source.nbytes
            times = measure.interleaved({name: lambda t=target, s=source: t.copy_(s)}, measure.cuda_clock, 0.5)[name]
        else:
            a, b = (torch.randn(side, side, device="cuda").to(kinds[name]) for _ in range(2))
            work, before = 2 * side**3, torch.backends.cuda.matmul.allow_tf32
            torch.backends.cuda.matmul.allow_tf32 = name == "tf32"
            times = measure.interleaved({name: lambda a=a, b=b: a @ b}, measure.cuda_clock, 0.5)[name]
            torch.backends.cuda.matmul.allow_tf32 = before
        found = measure.spread(times)
        yield row | {"rate": work / found["median_s"], "p10": work / found["p90_s"], "p90": work / found["p10_s"]}


def timed(chosen, reason, options, deadline):
    for workload in chosen:
        print(f"{workload.name} ...", file=sys.stderr, flush=True)
        late = f"left out: the {options.minutes:g} minutes of the run were over" if time.monotonic() > deadline else None
        if reason or late:
            yield from measure.left_out(workload, "cuda", reason or late)
            continue
        held = sum(a.nbytes for a in workload.make(workload.batch, "cuda", 1) if isinstance(a, torch.Tensor))
        copies = min(256, math.ceil(2 * torch.cuda.get_device_properties(0).L2_cache_size / held))
        yield from measure.run(workload, "cuda", quick=options.quick, budget=0.1 if options.quick else 1.0, copies=copies)
        torch.cuda.empty_cache()


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one size per stage, no torch.compile")
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=STAGES)
    parser.add_argument("--minutes", type=float, default=8, help="no new table row is begun after this long")
    parser.add_argument("--out", type=Path, help="the JSON file (default: results/device.json where there is a GPU, else none)")
    options = parser.parse_args(argv)
    deadline = time.monotonic() + 60 * options.minutes
    reason = None if torch.cuda.is_available() else "no CUDA device"
    pixels = list(workloads.gpu_pixels(options.quick))
    chosen = {"loss": list(workloads.gpu_loss(options.quick)), "update": [w for w in pixels if w.op == "projected_step_"],
              "input": [w for w in pixels if w.op == "perturbed_input"]}  # fmt: skip
    record = {"format": report.FORMAT, "kind": "device", "quick": options.quick, "environment": measure.environment(), "method": METHOD}
    record["parity"] = list(parity(reason)) if "parity" in options.stages else []
    record["ceilings"] = list(ceilings(reason, options.quick)) if "ceilings" in options.stages else []
    record["rows"] = [row for stage in STAGES if stage in chosen and stage in options.stages
                      for row in timed(chosen[stage], reason, options, deadline)]  # fmt: skip
    record |= {"overhead": [], "targets": []}
    out = options.out or (None if reason else report.RESULTS / "device.json")
    if out:
        report.save(record, out)
    print(report.markdown(record))
    wrong = [p for p in record["parity"] if p["outcome"].startswith("failed")]
    return 1 if wrong or measure.broken(record["rows"]) else 0


if __name__ == "__main__":
    sys.exit(main())
