"""pgd_step.py's paths on a GPU: bf16, CUDA graphs, torch.compile, and a PGD loop as attack
libraries write it.

Everything is PyTorch's best but for "eager" (the published path) and "attack library", which run in
float32 (convolutions in TF32, as is PyTorch's default) and call by call. strong and ours are
captured in a CUDA graph."""

import sys
import time
from functools import partial

import torch

from benchmarks.baselines import eager, strong
from benchmarks.harness import layers, measure, workloads
from benchmarks.harness.pgd_step import (
    AttackLibrary,
    ByAutograd,
    Ours,
    agreeing,
    blank,
    case,
    folded,
    names,
)

BATCH, WIDTH, SIDE = 512, 64, 32
STEPS = 10  # of a batch, in one call of the paths that run them together
PYTORCH = "folded, bf16, channels-last"
COMPILED = {
    f"{PYTORCH}, compiled": "default",
    f"{PYTORCH}, max-autotune": "max-autotune-no-cudagraphs",
}
BACKENDS = ("auto", "triton", "cuda")
# not judged by its signs: e4m3 is an option whose poison is to be judged by victims
FP8 = "auto, fp8"
FIRST = {
    "eager": "eager",
    "attack library": "library",
    PYTORCH: "strong",
    **dict.fromkeys(BACKENDS, "ours"),
    FP8: "e4m3",
}
ROUNDS = (
    FIRST,
    dict.fromkeys(COMPILED, "strong"),
)  # what is ready is timed before the compiler starts
NEEDED = 20  # seconds: with less, nothing is compiled


def parts():
    network, step = names(BATCH)
    return network, f"loss of the step B={BATCH} D=512", f"update of the step B={BATCH}", step


def blanks(quick, reason=None):
    for workload in parts():
        for name, role in {**ROUNDS[0], **ROUNDS[1]}.items():
            compiling = (
                "left out by --quick: compiling takes a minute"
                if quick and name in COMPILED
                else None
            )
            yield blank(workload, name, role) | {"reason": reason or compiling, "launch": None}


def make(name, c):
    """The path of that name."""
    form = strong.PATHS["mi_ue_value_and_grad"]
    if name == "eager":
        return ByAutograd(c.model, eager.mi_ue_value_and_grad, eager._gather, eager.projected_step_)
    if name == "attack library":
        return AttackLibrary(c.model, form["autograd"], eager._gather, eager.projected_step_)
    if name in (*BACKENDS, FP8):
        return Ours(c.model, dtype=torch.bfloat16, backend=name.split(",")[0], fp8=name == FP8)
    own = folded(c.model, torch.bfloat16)
    return ByAutograd(
        own,
        form["closed form and cdist"],
        strong._gather,
        strong._step_in_store,
        channels_last=True,
        compiled=COMPILED.get(name),
        graphs=True,
    )


def exact_signs(c, index):
    """delta after one step in float32 without TF32."""
    delta = torch.zeros_like(c.delta)
    with measure.true_float32(), layers.cudnn(search=False):
        loss = strong.PATHS["mi_ue_value_and_grad"]["autograd"]
        ByAutograd(c.model, loss, eager._gather, eager.projected_step_).step(c, index, delta)
    return delta


def run(quick, deadline, emit):
    """Emits the rows of `blanks`."""
    c = case(BATCH, WIDTH, SIDE, measure.GPU)
    index = torch.arange(BATCH, device=measure.GPU)
    reference, allowed, kept = exact_signs(c, index), None, {}
    torch.backends.cuda.matmul.allow_tf32 = True  # as a user of PyTorch who wants speed sets it
    rows = list(blanks(quick))
    for paths in ROUNDS:
        calls = {}
        for name, role in paths.items():
            mine = [row for row in rows if row["implementation"] == name]
            limit = deadline - time.monotonic() - (NEEDED / 2 if name in COMPILED else 0)
            if limit < (NEEDED if name in COMPILED else 1):
                reason = measure.LATE
            else:
                print(f"{name} ...", file=sys.stderr, flush=True)
                reason = mine[0]["reason"] or _prepare(
                    name, role, c, index, reference, allowed, mine, calls, limit
                )
            for row in mine:
                row["reason"] = reason or row["reason"]
            if name == PYTORCH and not reason:
                allowed = 2 * (1 - mine[-1]["agreement"])
        if calls:
            _time(calls, kept, rows, quick)
        kept = kept or {key: call for key, call in calls.items() if key[1] == "auto"}
        for row in rows:
            if row["implementation"] in paths:
                emit(row)


def _prepare(name, role, c, index, reference, allowed, mine, calls, limit):
    """Checks a path, and puts what is to be timed of it into `calls`; returns why not, or None."""
    network, loss, update, step = mine
    works = {}
    try:
        with (
            layers.cudnn(search=role not in ("ours", "e4m3")),
            measure.time_limit(max(1, int(limit))),
        ):
            path, delta = make(name, c), torch.zeros_like(c.delta)
            path.step(c, index, delta)
            one = partial(path.step, c, index, delta)
            if role == "strong":
                one = measure.captured(one)
            delta.zero_()
            one()  # ours replays its graph here
            step["agreement"] = agreeing(delta, reference)
            if role == "ours" and (allowed is None or 1 - step["agreement"] > allowed):
                bound = (
                    "there is no PyTorch in bf16 to compare with"
                    if allowed is None
                    else f"{1 - allowed:.4%} needed"
                )
                return (
                    f"refused: {step['agreement']:.4%} of the signs of delta agree with float32 "
                    f"autograd, {bound}"
                )
            if role in ("ours", "e4m3", "library"):
                path.steps = STEPS
            works[step["workload"]] = one
            x, width = c.images / 255, c.model.fc.in_features
            d = (
                torch.randn(
                    BATCH, width, generator=workloads.random(measure.GPU, 2), device=measure.GPU
                )
                / BATCH
            )
            features, image_grad = path.network(x, d)
            network["extra_bytes"] = measure.cuda_extra_bytes(lambda: path.network(x, d))
            inner = {network["workload"]: partial(path.network, x, d)}
            if role == "library":
                loss["reason"] = update["reason"] = "not apart from its loop"
            else:
                inner[loss["workload"]] = partial(path.value_and_grad, features, c.labels)
                inner[update["workload"]] = partial(
                    path.move, c, index, torch.zeros_like(c.delta), image_grad
                )
            for workload, work in inner.items():
                work()
                works[workload] = measure.captured(work) if path.graphs else work
    except (RuntimeError, TimeoutError, ValueError) as error:
        return f"failed: {measure.first_line(error)}"
    for row in mine:
        if not row["reason"]:
            row["launch"] = "graph" if path.graphs else "calls"
    calls |= {
        (workload, name): (work, path.steps if workload == step["workload"] else 1)
        for workload, work in works.items()
    }
    return None


def _time(calls, kept, rows, quick):
    """kept: of the first round, timed again so that every comparison can be made within one
    round.
    """
    for workload in parts():
        group = {name: call for (of, name), call in (kept | calls).items() if of == workload}
        with layers.cudnn(search=True):  # for what is not captured
            timed = measure.interleaved(
                {name: work for name, (work, _) in group.items()},
                measure.gpu_clock,
                0.1 if quick else 0.3,
                50,
            )
        mine = [row for row in rows if row["workload"] == workload]
        measure.enter(
            mine,
            {
                name: [sample / group[name][1] for sample in samples]
                for name, samples in timed.items()
            },
        )
        for row in mine:
            row["rate"] = row["median_s"] and BATCH / row["median_s"]
