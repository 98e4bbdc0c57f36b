"""Every distinct convolution of the frozen CIFAR ResNet-18 on a GPU in bf16, with the epilogue it
really has, forward and input gradient.

cudnn: the convolution alone, in the setting `generate` runs in (deterministic); "cudnn, any": with
cuDNN's own search and no such limit. cuda: that convolution and this library's epilogue kernel.
triton: one kernel. wgmma: one kernel, for the layers that it takes. For the stem also the input
gradient with the projected step: triton in one kernel, "triton, two steps" and cuda through memory.
Each is timed as a CUDA graph over operands larger than the L2."""

import contextlib
import functools
import math
import time

import torch

from benchmarks.harness import measure, roofline, workloads
from miue_fast.dispatch import measured
from miue_fast.dispatch.library import convolve, convolve_back
from miue_fast.dispatch.masks import mask_bytes
from miue_fast.dispatch.registry import OPS
from miue_fast.ops.convolution import why_not_wgmma

BATCHES = (512, 2048)
PASSES = {
    "forward": "conv_forward",
    "input gradient": "conv_input_grad",
    "step": "conv_input_grad_step_",
}
OURS = ("cuda", "triton", "wgmma")  # what `auto` chooses from
LIBRARY = ("cudnn", "cudnn, any")
MOST_SETS = 16


@functools.cache
def distinct():
    """[(Row, how often it occurs)], in the network's order."""
    found = {}
    for row in roofline.rows():
        found.setdefault(row.key, [row, 0])[1] += 1
    return [tuple(entry) for entry in found.values()]


def passes(row):
    return [p for p in PASSES if p != "step" or row.key[0] == 3]


def implementations(row, name):
    if name == "step":
        return "cuda", "triton", "triton, two steps"
    return (
        *LIBRARY,
        "cuda",
        "triton",
        *["wgmma"] * (why_not_wgmma(*_layer(row.key), [1, 1], 1) is None),
    )


def checked(row):
    """(pass, backend) of the kernels that `check` runs alone."""
    return [
        (name, backend)
        for name in passes(row)
        for backend in ("triton", "wgmma")
        if backend in implementations(row, name)
    ]


def case(layer, name, implementation):
    """The key of a pass of a layer with a backend."""
    return f"{layer}/{name}/{implementation.split(',')[0]}"


def _missing(implementation):
    """Why `wgmma` does not run on this GPU. (Where Triton and cuDNN do not run, that is a
    failure.)
    """
    return impl_of("conv_forward", "wgmma").missing() if implementation == "wgmma" else None


def impl_of(op, backend):
    return next(impl for impl in OPS[op].impls if impl.backend == backend)


def blanks(quick, reason=None):
    """A row for everything that is to be timed; what matters most comes first."""
    for batch in BATCHES[:1] if quick else BATCHES:
        for row, count in distinct():
            for name in passes(row):
                moved = batch * _bytes(row, name)
                for implementation in implementations(row, name):
                    yield {
                        "layer": row.layer,
                        "layers": count,
                        "key": list(row.key),
                        "batch": batch,
                        "pass": name,
                        "table_key": table_key(row.key, name),
                        "implementation": implementation,
                        "reason": reason or _missing(implementation),
                        "error_of_allowed": None,
                        "median_s": None,
                        "p10_s": None,
                        "p90_s": None,
                        "samples": 0,
                        "flop": row.flop * batch,
                        "bytes": moved,
                        "of_ceiling": None,
                    }


def _bytes(row, name):
    """Per image. The step reads an image in bytes and moves delta in float32 instead of writing a
    gradient in bf16.
    """
    c, _, _, _, h, w = row.key[:6]
    return (
        row.forward
        if name == "forward"
        else row.backward + (c * h * w * (1 + 8 - 2) if name == "step" else 0)
    )


def identity(row):
    return row["layer"], row["batch"], row["pass"], row["implementation"]


def _layer(key):
    """(weight, size, stride, padding) of a key."""
    c, k, r, stride, h, w = key[:6]
    return (
        torch.empty(k, c, r, r, dtype=torch.bfloat16, device="meta"),
        (1, c, h, w),
        [stride, stride],
        [r // 2, r // 2],
    )


def table_key(key, name):
    return measured.key(PASSES[name], *_layer(key)[:3])


def operands(key, name, batch, seed):
    """The arguments of `Impl.fn`."""
    c, k, r, stride, h, w, relu, residual, masked, second = key
    gen, device = workloads.random(measure.GPU, seed), measure.GPU

    def make(channels, height, width):
        values = torch.randn(
            batch, height, width, channels, generator=gen, device=device, dtype=torch.bfloat16
        )
        return values.permute(0, 3, 1, 2)

    weight = (
        torch.randn(k, r, r, c, generator=workloads.random(device, 0), device=device).permute(
            0, 3, 1, 2
        )
        / (c * r * r) ** 0.5
    )
    weight, conv = weight.bfloat16(), ([stride] * 2, [r // 2] * 2, [1, 1], 1)
    p, q = -(-h // stride), -(-w // stride)
    if name == "forward":
        bias = torch.randn(k, generator=gen, device=device)
        return make(c, h, w), weight, bias, make(k, p, q) if residual else None, *conv, relu, relu
    if name == "input gradient":
        mask = (
            torch.randint(
                256,
                (mask_bytes(batch * c * h * w),),
                generator=gen,
                device=device,
                dtype=torch.uint8,
            )
            if masked
            else None
        )
        return (
            make(k, p, q),
            weight,
            make(c, h, w) if second else None,
            mask,
            [batch, c, h, w],
            *conv,
        )
    images, delta, index, flip = workloads.store(batch, device, seed, side=h)
    count = torch.zeros(1, dtype=torch.int64, device=device)
    return (
        delta,
        index,
        make(k, p, q),
        weight,
        images,
        flip,
        *conv,
        workloads.ALPHA,
        workloads.EPS,
        count,
    )


@contextlib.contextmanager
def cudnn(*, search):
    """search: whatever is fastest; else what `generate` allows."""
    before = torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark
    torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = not search, search
    try:
        yield
    finally:
        torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = before


def function(implementation, name):
    """The implementation with the arguments of `operands`."""
    if implementation in LIBRARY:
        if name == "forward":

            def forward(
                x, weight, bias, residual, stride, padding, dilation, groups, relu, want_mask
            ):
                return convolve(x, weight, stride, padding, dilation, groups)

            return forward
        return lambda grad, weight, addend, mask, size, *conv: convolve_back(
            grad, weight, size, *conv
        )
    if implementation != "triton, two steps":
        return impl_of(PASSES[name], implementation).fn
    kernel = {op: impl_of(op, "triton").fn for op in ("conv_input_grad", "projected_step_")}

    def two_steps(
        delta,
        index,
        grad,
        weight,
        images,
        flip,
        stride,
        padding,
        dilation,
        groups,
        alpha,
        eps,
        nonfinite,
    ):
        size = [len(grad), *images.shape[1:]]
        image_grad = kernel["conv_input_grad"](
            grad, weight, None, None, size, stride, padding, dilation, groups
        )
        kernel["projected_step_"](delta, index, image_grad, images, flip, alpha, eps, nonfinite)

    return two_steps


def check(number, emit):
    """The kernels of one distinct layer against float64, at the smaller batch: in a process of its
    own, which may crash. It also leaves the compiled ones in Triton's cache for the timing."""
    row, _ = distinct()[number]
    for name, backend in checked(row):
        reason = (
            None
            if _missing(backend)
            else _gate(operands(row.key, name, BATCHES[0], 1), name, backend)[1]
        )
        emit({"layer": row.layer, "pass": name, "implementation": backend, "reason": reason})


def _gate(args, name, implementation, known=None):
    """(error as a fraction of what is allowed, None), or (None, why it is not timed)."""
    op = OPS[PASSES[name]]
    want, plain = known or (measure.truth(op, args), measure.results(op, op.reference.fn, args))
    try:
        return measure.gate(
            op, args, want, plain, function(implementation, name), exact=False
        ), None
    except measure.WrongResult as error:
        return None, f"refused: {error}"
    except RuntimeError as error:
        return None, f"failed: {measure.first_line(error)}"


def run(quick, deadline, emit, refused):
    """refused: {`case`: why} of kernels that `check` found wrong, or that crashed there."""
    rows = list(blanks(quick))
    groups = {}
    for row in rows:
        groups.setdefault((row["layer"], row["batch"], row["pass"]), []).append(row)
    for (layer, batch, name), group in groups.items():
        for row in group:
            row["reason"] = row["reason"] or refused.get(case(layer, name, row["implementation"]))
        if time.monotonic() > deadline:
            for row in group:
                row["reason"] = row["reason"] or measure.LATE
        elif any(not row["reason"] for row in group):
            _time(group, tuple(group[0]["key"]), batch, name, quick)
        for row in group:
            emit(row)
        measure.free()


def _time(group, key, batch, name, quick):
    op = OPS[PASSES[name]]
    sets = [operands(key, name, batch, 1)]
    known = measure.truth(op, sets[0]), measure.results(op, op.reference.fn, sets[0])
    with cudnn(search=False):
        for row in group:
            if not row["reason"] and row["implementation"] not in LIBRARY:
                row["error_of_allowed"], row["reason"] = _gate(
                    sets[0], name, row["implementation"], known
                )
    del known
    copies = min(MOST_SETS, math.ceil(3 * measure.l2_bytes() / group[0]["bytes"]))
    sets += [operands(key, name, batch, seed) for seed in range(2, copies + 1)]
    calls = {}
    for row in group:
        if row["reason"]:
            continue
        own, fn = [measure.fresh(op, args) for args in sets], function(row["implementation"], name)
        with cudnn(search=row["implementation"] == "cudnn, any"):
            try:
                fn(*own[0])
                calls[row["implementation"]] = measure.captured(
                    lambda fn=fn, own=own: [fn(*args) for args in own]
                )
            except RuntimeError as error:
                row["reason"] = f"failed: {measure.first_line(error)}"
    timed = measure.interleaved(calls, measure.gpu_clock, 0.03 if quick else 0.1, 40)
    for row in group:
        if row["implementation"] in timed:
            row |= measure.spread([sample / len(sets) for sample in timed[row["implementation"]]])


def with_ceilings(rows, ceilings):
    """of_ceiling: the floor of each row from this run's own ceilings, as a fraction of its time."""
    rate = {
        c["name"].split()[1] if c["name"].startswith("GEMM") else c["name"]: c["rate"]
        for c in ceilings
    }
    for row in rows:
        if row["median_s"] and rate.get("bf16") and rate.get("copy"):
            row["of_ceiling"] = (
                roofline.floor(row["flop"], row["bytes"], rate["bf16"], rate["copy"])
                / row["median_s"]
            )
    return rows


def fastest(rows):
    """One row per distinct convolution: what the faster backend takes at B = 512, for
    docs/roofline.md. Seconds, or None.
    """
    for row, count in distinct():
        out = {"layer": row.layer, "key": list(row.key), "layers": count}
        for name, field in (("forward", "forward"), ("input gradient", "backward")):
            mine = [
                r
                for r in rows
                if r["key"] == out["key"]
                and r["batch"] == BATCHES[0]
                and r["pass"] == name
                and r["median_s"]
                and r["implementation"] in OURS
            ]
            best = min(mine, key=lambda r: r["median_s"], default=None)
            out |= {f"{field}_s": best and best["median_s"], field: best and best["implementation"]}
        yield out


def table(rows):
    """{key of dispatch/measured.py: one of OURS}: who needs less time for all layers of that
    shape together at B = 512.
    """
    found = {}
    for row in rows:
        if row["batch"] == BATCHES[0] and row["implementation"] in OURS:
            sums, name = found.setdefault(row["table_key"], {}), row["implementation"]
            sums[name] = sums.get(name, 0.0) + row["layers"] * (row["median_s"] or math.inf)
    return {
        key: min(sums, key=sums.get)
        for key, sums in sorted(found.items())
        if min(sums.values()) < math.inf
    }
