"""What this GPU reaches at best: copy, matrix products as PyTorch has them, and reading from L2.
Every ratio to a ceiling uses these.
"""

import functools
import time

import torch

from benchmarks.harness import measure

try:
    import triton
    import triton.language as tl
except ImportError:
    triton = None

UNITS = {"copy": "TB/s", "L2 read": "TB/s"}
PRODUCTS = {
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "tf32": torch.float32,
    "fp32": torch.float32,
    "fp8": torch.float8_e4m3fn,
}
COPIED = 1 << 28  # float32 values
L2_BYTES, BLOCK, PROGRAMS, READS = (
    16 << 20,
    2048,
    1056,
    256,
)  # a buffer that stays in every L2 of interest; 8 programs on each of 132 SMs

if triton:

    @triton.jit
    def read_kernel(x, out, blocks, READS: tl.constexpr, BLOCK: tl.constexpr):
        """Every program sums READS blocks of x, each somewhere else; past L1."""
        total = tl.zeros((BLOCK,), tl.float32)
        for k in range(READS):
            block = (tl.program_id(0) * READS + k) * 61 % blocks
            total += tl.load(x + block * BLOCK + tl.arange(0, BLOCK), cache_modifier=".cg")
        tl.store(out + tl.program_id(0) * BLOCK + tl.arange(0, BLOCK), total)


def names(quick):
    side = 4096 if quick else 8192
    return ["copy", *(f"GEMM {kind} {side}" for kind in PRODUCTS), "L2 read"]


def blanks(quick, reason=None):
    for name in names(quick):
        yield {
            "name": name,
            "unit": UNITS.get(name, "TFLOP/s"),
            "rate": None,
            "p10": None,
            "p90": None,
            "reason": reason,
        }


def run(quick, deadline, emit):
    generator = torch.Generator(measure.GPU).manual_seed(1)
    for row in blanks(quick):
        if time.monotonic() > deadline:
            emit(row | {"reason": measure.LATE})
            continue
        try:
            call, work = _call(row["name"], generator)
            call()
            with measure.true_float32():
                torch.backends.cuda.matmul.allow_tf32 = "tf32" in row["name"]
                samples = measure.interleaved({"": call}, measure.gpu_clock, 0.3 if quick else 0.8)[
                    ""
                ]
        except (
            RuntimeError,
            ValueError,
            ImportError,
        ) as error:  # a product this torch or GPU does not have
            row["reason"] = f"failed: {measure.first_line(error)}"
        else:
            found = measure.spread(samples)
            row |= {
                "rate": work / found["median_s"],
                "p10": work / found["p90_s"],
                "p90": work / found["p10_s"],
            }
        emit(row)
        measure.free()


def _call(name, generator):
    """(call, bytes or FLOP of one call)."""
    if name == "copy":
        source = torch.randn(COPIED, device=measure.GPU, generator=generator)
        target = torch.empty_like(source)
        return functools.partial(target.copy_, source), 2 * source.nbytes
    if name == "L2 read":
        if not triton:
            raise ImportError("triton is not installed")
        x = torch.randn(L2_BYTES // 4, device=measure.GPU, generator=generator)
        out = torch.empty(PROGRAMS * BLOCK, device=measure.GPU)
        launch = functools.partial(
            read_kernel[(PROGRAMS,)], x, out, len(x) // BLOCK, READS=READS, BLOCK=BLOCK, num_warps=8
        )
        return launch, PROGRAMS * READS * BLOCK * 4
    _, kind, side = name.split()
    a, b = (
        torch.randn(int(side), int(side), device=measure.GPU, generator=generator).to(
            PRODUCTS[kind]
        )
        for _ in range(2)
    )
    work = 2 * int(side) ** 3
    if kind == "fp8":
        one = torch.ones((), device=measure.GPU)
        return functools.partial(
            torch._scaled_mm, a, b.t(), one, one, out_dtype=torch.bfloat16, use_fast_accum=True
        ), work
    return functools.partial(torch.mm, a, b, out=torch.empty_like(a)), work
