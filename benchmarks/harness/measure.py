"""The protocol of every table: gate against float64 first, then time the implementations
interleaved in one process.
"""

import itertools
import math
import os
import signal
import statistics
import time
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks.baselines import eager, other, strong
from benchmarks.harness import machine
from miue_fast.dispatch.registry import OPS
from miue_fast.reference.conv_epilogue import unpack

COMPILE_LIMIT = 120  # seconds for one torch.compile
SAMPLE = 1e-3  # seconds: faster calls are timed several at once
ROUNDS = 5  # of every implementation, however slow
GPU = "cuda"  # where the stages of device.py put their tensors; tests run them on "cpu"
LATE = "left out: the time of its stage was over"
PUBLISHED = {
    name: 2**-25 for name in ("projected_step", "projected_step_", "conv_input_grad_step_")
}  # of a rival: no last clamp to eps
# op.truth is B x B x D for some ops; larger batches use the float64 reference, itself checked on so
# many rows
ORACLE_ROWS = 128


class WrongResult(RuntimeError):
    """An implementation left its tolerance; it is not timed."""


@dataclass(frozen=True)
class Candidate:
    """One implementation of a workload's op, or the reason why it takes no part."""

    name: str
    role: str  # "ours", "reference", "eager", "strong" or "other"
    fn: Callable
    reason: str | None
    oracle: Callable | None = None  # of what computes another function


def candidates(workload, device, args, quick):
    """Every backend of the registry, then the baselines."""
    op = OPS[workload.op]
    dtype = op.dtype_of(*args)
    for impl in op.impls:
        if device == "cuda" and impl.devices == {"cpu"}:
            continue
        reason = impl.missing() or op.why_not(impl, device, dtype)
        if impl.backend == "triton" and os.environ.get("TRITON_INTERPRET") == "1":
            reason = "runs in Triton's interpreter, whose time says nothing"
        yield Candidate(
            impl.backend, "reference" if impl is op.reference else "ours", impl.fn, reason
        )
    baselines = [("eager", "eager", getattr(eager, workload.op))]
    baselines += [(name, "strong", fn) for name, fn in strong.PATHS[workload.op].items()]
    for name, role, fn in baselines:
        reason = workload.skip.get(name)
        if quick and strong.COMPILED in name:
            reason = reason or "left out by --quick: compiling takes seconds"
        yield Candidate(name, role, fn, reason)
    for name, (fn, oracle) in other.PATHS.get(workload.op, {}).items():
        yield Candidate(name, "other", fn, workload.skip.get(name) or other.missing(name), oracle)


def in_double(args):
    return tuple(
        a.double() if isinstance(a, torch.Tensor) and a.is_floating_point() else a for a in args
    )


def fresh(op, args):
    """The arguments with private copies of what the op writes."""
    return tuple(a.clone() if i in op.mutates and a is not None else a for i, a in enumerate(args))


def results(op, fn, args):
    """Everything the call produced: what it returned and what it wrote in place."""
    args = fresh(op, args)
    out = fn(*args)
    out = () if out is None else out if isinstance(out, tuple) else (out,)
    return (*out, *(args[i] for i in op.mutates if args[i] is not None))


def truth(op, args):
    """What a right implementation gives: the reference itself for pointwise ops, else float64."""
    if op.exact:
        return results(op, op.reference.fn, args)
    if len(args[0]) <= ORACLE_ROWS or op.truth is op.reference.fn:
        return results(op, op.truth, in_double(args))
    head = in_double(tuple(a[:ORACLE_ROWS] if isinstance(a, torch.Tensor) else a for a in args))
    for got, want in zip(
        results(op, op.reference.fn, head), results(op, op.truth, head), strict=True
    ):
        if (
            got.numel()
            and not (got - want).abs().max()
            <= torch.finfo(torch.float32).eps / 1024 * want.abs().max()
        ):
            raise WrongResult(f"{op.name}: the float64 reference differs from op.truth")
    return results(op, op.reference.fn, in_double(args))


def comparable(op, args, outputs):
    """Outputs of which every value has a tolerance: a ReLU bit must be that of the call's own
    value, and the sign step counts where the gradient is more than its rounding."""
    if op.name == "conv_forward" and outputs[1].numel():
        return outputs[0], unpack(outputs[1], outputs[0]) ^ (outputs[0] <= 0)
    if op.name == "conv_input_grad_step_":
        delta, index, grad, weight, images, _, *conv = args[:10]
        back, rest = (
            OPS["conv_input_grad"].reference.fn,
            (None, None, [len(grad), *images.shape[1:]], *conv),
        )
        plain, exact = (
            back(*pair, *rest).double() for pair in ((grad, weight), in_double((grad, weight)))
        )
        allowed = (
            2 * (plain - exact).abs().max() + 4 * torch.finfo(grad.dtype).eps * exact.abs().max()
        )
        doubtful = torch.zeros_like(delta, dtype=torch.bool)
        doubtful[slice(None) if index is None else index] = exact.abs() <= allowed
        return outputs[0].masked_fill(doubtful, 0), *outputs[1:]
    return outputs


def same_bits(a, b):
    """Any NaN is as good as any other."""
    if not a.is_floating_point():
        return torch.equal(a, b)
    integers = {2: torch.int16, 4: torch.int32, 8: torch.int64}[a.dtype.itemsize]
    nan = a.isnan()
    return torch.equal(nan, b.isnan()) and bool(
        ((a.contiguous().view(integers) == b.contiguous().view(integers)) | nan).all()
    )


def gate(op, args, want, plain, fn, *, exact, more=0.0):
    """The largest error as a fraction of what is allowed (0 to 1); WrongResult beyond it.

    Allowed: twice the reference's own error against float64 plus four roundings of the largest
        value; with `exact`: nothing.
    more: what a rival is allowed beside, whose definition lacks a rounding of ours (`PUBLISHED`).
    """
    worst = 0.0
    for got, true, ref in zip(
        *(comparable(op, args, x) for x in (results(op, fn, args), want, plain)), strict=True
    ):
        kind = op.dtype_of(*args)
        if got.shape != true.shape or got.dtype not in (
            ref.dtype,
            kind,
        ):  # autograd gives half-precision features such a gradient
            raise WrongResult(
                f"expected {ref.dtype} {list(true.shape)}, got {got.dtype} {list(got.shape)}"
            )
        if exact or not true.numel():
            if not same_bits(got, ref):
                raise WrongResult("differs from the reference; expected the same bits")
            continue
        rounding = torch.finfo(
            ref.dtype if kind.itemsize == 1 else kind
        ).eps  # e4m3 operands give bfloat16
        allowed = (
            2 * (ref.double() - true.double()).abs().max()
            + 4 * rounding * true.double().abs().max()
            + more
        )
        error = (got.double() - true.double()).abs().max()
        if not error <= allowed:
            raise WrongResult(f"error {error.item():.2e} where {allowed.item():.2e} is allowed")
        worst = max(worst, (error / allowed).item() if allowed else 0.0)
    return worst


@contextmanager
def time_limit(seconds):
    def stop(*_):
        raise TimeoutError(f"not ready after {seconds} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def cpu_clock(call, number):
    start = time.perf_counter()
    for _ in range(number):
        call()
    return (time.perf_counter() - start) / number


def cuda_clock(call, number):
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    for _ in range(number):
        call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) * 1e-3 / number


@contextmanager
def true_float32():
    """No TF32 in PyTorch's matrix products and convolutions."""
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    before = matmul.allow_tf32, cudnn.allow_tf32
    matmul.allow_tf32 = cudnn.allow_tf32 = False
    try:
        yield
    finally:
        matmul.allow_tf32, cudnn.allow_tf32 = before


def captured(work):
    """replay() of what work() launches, as one CUDA graph. work() must have run before; what it
    returns stays alive.

    RuntimeError where it cannot be captured.
    """
    if GPU == "cpu":
        return work
    graph = torch.cuda.CUDAGraph()
    with (
        torch.cuda.stream(torch.cuda.current_stream()),
        torch.cuda.graph(graph),
    ):  # the first: a failed capture leaves its stream behind
        kept = work()

    def replay(kept=kept):
        graph.replay()

    replay()
    torch.cuda.synchronize()
    return replay


def gpu_clock(call, number):
    return (cuda_clock if GPU == "cuda" else cpu_clock)(call, number)


def free():
    """Cached memory goes back to the GPU."""
    if GPU == "cuda":
        torch.cuda.empty_cache()


def l2_bytes():
    return torch.cuda.get_device_properties(0).L2_cache_size if GPU == "cuda" else 1


def first_line(error):
    return f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}"


def interleaved(calls, clock, budget, most=100):
    """Seconds per call of each entry, sampled in turn, one sample of each in a round.

    budget: seconds for each entry, which ends the sampling after ROUNDS rounds at the earliest;
        most: rounds at most. A call of a second and more has no untimed call before each sample.
    """
    samples, number, rounds, slow = {}, {}, {}, set()
    for name, call in calls.items():
        once = clock(call, 1)
        if once > 1:
            slow.add(name)
        samples[name] = []
        number[name] = max(1, math.ceil(SAMPLE / once))
        rounds[name] = min(most, max(ROUNDS, int(budget / (2 * number[name] * once))))
    names = list(calls)
    until = time.monotonic() + 2 * budget * len(
        names
    )  # a machine that slows down meanwhile ends the sampling early
    for turn in range(max(rounds.values(), default=0)):
        if turn >= ROUNDS and time.monotonic() > until:
            break
        shift = turn % len(names)
        for name in names[shift:] + names[:shift]:
            if turn < rounds[name]:
                if name not in slow:
                    calls[
                        name
                    ]()  # caches as this implementation leaves them, not as the one before did
                samples[name].append(clock(calls[name], number[name]))
    return samples


def spread(samples):
    """The median, the 10th and the 90th percentile, and the number of the samples."""
    several = samples if len(samples) > 1 else samples * 2  # `quantiles` refuses a single one
    low, *_, high = statistics.quantiles(several, n=10, method="inclusive")
    return {
        "median_s": statistics.median(samples),
        "p10_s": low,
        "p90_s": high,
        "samples": len(samples),
    }


def enter(rows, timed):
    """Writes the samples of one workload into its rows; `times_ours`: how many times each of this
    library's implementations a row took, as the median over the rounds, in which both had the same
    machine: what else ran there then is in both and not in their ratio."""
    ours = [
        row["implementation"]
        for row in rows
        if row["role"] == "ours" and row["implementation"] in timed
    ]
    for row in rows:
        if own := timed.get(row["implementation"]):
            row |= spread(own)
            if row["role"] != "ours":
                row["times_ours"] = {
                    name: statistics.median(a / b for a, b in zip(own, timed[name]))
                    for name in ours
                }


def cuda_extra_bytes(call):
    if GPU == "cpu":
        call()
        return 0
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    return torch.cuda.max_memory_allocated() - before


def cpu_extra_bytes(workload, name):
    """Growth of the peak resident memory over one call, results included. For a fresh process (see
    bench.py), after a tiny first call.
    """
    args, small = (workload.make(batch, "cpu", 1) for batch in (workload.batch, 8))
    fn = next(c.fn for c in candidates(workload, "cpu", args, False) if c.name == name)
    fn(*small)
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew at the present size
    before = status("VmHWM")
    kept = fn(*args)
    grown = status("VmHWM") - before
    del kept
    return grown


def status(field):
    return (
        next(
            int(line.split()[1])
            for line in machine.lines("/proc/self/status")
            if line.startswith(field)
        )
        * 1024
    )


def blank(workload, candidate, reason=None):
    """The row of a candidate before, or without, its numbers."""
    return {
        "workload": workload.name,
        "op": workload.op,
        "implementation": candidate.name,
        "role": candidate.role,
        "reason": reason or candidate.reason,
        "error_of_allowed": None,
        "median_s": None,
        "p10_s": None,
        "p90_s": None,
        "samples": 0,
        "times_ours": {},
        "rate": None,
        "extra_bytes": None,
        "extra_bytes_reason": None if workload.memory else "not measured for this workload",
    }


def left_out(workload, device, reason):
    """The rows of a workload that is not run at all."""
    return [
        blank(workload, c, reason)
        for c in candidates(workload, device, workload.make(8, "cpu", 1), True)
    ]


def run(workload, device, *, quick, budget, copies=1):
    """The rows of one workload. `copies`: how many argument sets each implementation walks through
    (GPU: more than the L2 holds).

    On a GPU a row also says how it was timed: as one CUDA graph over all argument sets ("graph"),
        or call by call with the time that
    Python takes between launches ("calls"): the published path, and what cannot be captured.
    """
    op = OPS[workload.op]
    sets = [workload.make(workload.batch, device, seed) for seed in range(1, copies + 1)]
    args = sets[0]
    want, plain = truth(op, args), results(op, op.reference.fn, args)
    rows, calls, inside = [], {}, {}
    for candidate in candidates(workload, device, args, quick):
        row = blank(workload, candidate) | ({"launch": None} if device == GPU else {})
        rows.append(row)
        if row["reason"]:
            continue
        own = candidate.oracle and [
            results(op, candidate.oracle, a) for a in (in_double(args), args)
        ]
        try:
            with time_limit(COMPILE_LIMIT):
                ours = candidate.role == "ours"
                more = 0.0 if ours else PUBLISHED.get(op.name, 0.0)
                row["error_of_allowed"] = gate(
                    op,
                    args,
                    *(own or (want, plain)),
                    candidate.fn,
                    exact=op.exact and ours,
                    more=more,
                )
        except WrongResult as error:
            row["reason"] = f"refused: {error}"
        except (RuntimeError, TimeoutError) as error:
            row["reason"] = f"failed: {first_line(error)}"
        else:
            own = [fresh(op, a) for a in sets]
            each = itertools.cycle(own)
            calls[candidate.name] = lambda fn=candidate.fn, each=each: fn(*next(each))
            if device == GPU and workload.memory:
                row["extra_bytes"] = cuda_extra_bytes(calls[candidate.name])
            if device == GPU:
                row["launch"] = "calls"
                if ours or candidate.name in strong.CAPTURABLE.get(workload.op, ()):
                    try:
                        calls[candidate.name] = captured(
                            lambda fn=candidate.fn, own=own: [fn(*a) for a in own]
                        )
                        row["launch"], inside[candidate.name] = "graph", len(own)
                    except RuntimeError as error:
                        if ours:
                            row |= {
                                "reason": f"failed: not captured: {first_line(error)}",
                                "launch": None,
                                "extra_bytes": None,
                            }
                            del calls[candidate.name]
    del want, plain
    timed = interleaved(
        calls, gpu_clock if device == GPU else cpu_clock, budget, 3 if quick else 100
    )
    enter(
        rows,
        {
            name: [sample / inside.get(name, 1) for sample in samples]
            for name, samples in timed.items()
        },
    )
    for row in rows:
        if row["median_s"]:
            row["rate"] = (workload.flops or workload.moved) / row["median_s"] or None
    return rows


def broken(rows):
    """Rows of the library itself that failed or were refused: no benchmark run may end well with
    one.
    """
    return [
        r
        for r in rows
        if r["role"] in ("ours", "reference")
        and (r["reason"] or "").startswith(("refused", "failed"))
    ]
