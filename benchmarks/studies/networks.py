"""Whole networks on the CPU beside the strongest PyTorch, at the processor's best instruction level
and held to AVX2, and what the convolution engine gives a generation with a small network.

python -m benchmarks.studies.networks --out benchmarks/results/networks.json
python -m benchmarks.pages.readme --readme     # put the table into docs/performance-notes.md

Two threads, interleaved rounds in one process per level, medians of at least five; about fifteen
minutes on an idle machine. PyTorch is held to the level, too (ONEDNN_MAX_CPU_ISA, and the vectors
that torch.compile writes). A form whose image gradient has other signs than float64's is not timed.
"""

import argparse
import contextlib
import copy
import json
import os
import statistics
import subprocess
import sys
from functools import partial
from pathlib import Path
from unittest import mock

import torch
import torch._inductor.config as inductor
from torch.fx.experimental.optimization import fuse

from benchmarks.harness import machine, measure, pgd_step, tables
from benchmarks.pages.networks import text
from miue_fast import data, freeze, generate, models
from miue_fast.dispatch import native
from miue_fast.dispatch.precision import compute_dtype
from miue_fast.frozen import convolution, matrix

NHWC = torch.channels_last
ISA = {"best": "DEFAULT", "avx2": "AVX2"}
NETWORKS = "resnet18", "resnet50", "vgg16"
# Least share of equal signs, by compute type: PyTorch's own bfloat16 flips a fifth of those of an
# untrained ResNet-50.
AGREEING = {"float32": 0.999, "bfloat16": 0.75}


class Compared:
    """The gradient of the images [B, 3, 32, 32] from that of the logits, by PyTorch's autograd."""

    def __init__(self, network, dtype=torch.float32, layout=torch.contiguous_format):
        self.network, self.dtype, self.layout = network, dtype, layout

    def __call__(self, x, d):
        x = x.detach().to(self.dtype, memory_format=self.layout).requires_grad_()
        logits = self.network(x)
        return torch.autograd.grad(logits, x, d.to(logits.dtype))[0]


class Own:
    """The same by `freeze`."""

    def __init__(self, network, dtype=torch.float32):
        self.network = freeze(network, "fc", dtype=dtype)

    def __call__(self, x, d):
        self.network.forward(x)
        return self.network.input_grad(d)


def folded(network, dtype):
    """Batch norms folded into the convolutions, frozen, channels-last: PyTorch's own tools."""
    made = fuse(copy.deepcopy(network)).requires_grad_(False)
    return made.to(dtype=dtype, memory_format=NHWC)


def forms(network, half):
    """{name: (role, form)}."""
    made = {"eager": ("eager", Compared(network))}
    for dtype in (torch.float32, *[torch.bfloat16] * half):
        name, plain = str(dtype)[6:], folded(network, dtype)
        made[f"folded, channels-last, {name}"] = "strong", Compared(plain, dtype, NHWC)
        compiled = torch.compile(plain, dynamic=False)
        made[f"compiled, {name}"] = "strong", Compared(compiled, dtype, NHWC)
        made[f"own, {name}"] = "ours", Own(network, dtype)
    return made


def trained_looking(name, width=None):
    torch.manual_seed(1)
    network = models.build(name, 10, normalize=False, **({} if width is None else {"width": width}))
    with torch.no_grad():
        for _ in range(2):  # running statistics
            network.train()(torch.rand(32, 3, 32, 32))
    return network.eval().requires_grad_(False)


def rows_of(level, what, calls, roles, **more):
    """A row for each call, with the median of at least five interleaved rounds."""
    timed = measure.interleaved(calls, measure.cpu_clock, 0)
    for form, samples in timed.items():
        yield {
            "level": level,
            "what": what,
            "form": form,
            "role": roles[form],
            "seconds": statistics.median(samples),
            **{name: found[form] for name, found in more.items()},
        }


def network_rows(level, batch, width):
    """Forward and input gradient of whole networks."""
    half = level == "best" and compute_dtype("auto", torch.device("cpu")) == "bfloat16"
    for name in NETWORKS:
        network = trained_looking(name, width)
        x, d = torch.rand(batch, 3, 32, 32), torch.randn(batch, 10) / batch
        few = min(batch, 16)
        truth = Compared(copy.deepcopy(network).double(), torch.float64)(x[:few], d[:few].double())
        made, calls, agreement = forms(network, half), {}, {}
        for form, (_, call) in made.items():
            agreement[form] = pgd_step.agreeing(call(x, d)[:few], truth)
            needed = AGREEING["bfloat16" if "bfloat16" in form else "float32"]
            shown = f"{name}, {form}: {agreement[form]:.4%} of the signs"
            print(shown, file=sys.stderr, flush=True)
            if agreement[form] >= needed:
                calls[form] = lambda call=call, x=x, d=d: call(x, d)
        yield from rows_of(
            level,
            f"{name}, forward and input gradient, B = {batch}",
            calls,
            {form: role for form, (role, _) in made.items()},
            agreement=agreement,
        )


def step_rows(batch, width):
    """The whole PGD step of ResNet-18 in float32, at the level in use. A form whose perturbation
    has other signs than the first one's is not timed.
    """
    c = pgd_step.case(batch, width)
    index, calls, roles, first = torch.arange(batch), {}, {}, None
    for form, (role, path) in pgd_step.paths(c, False).items():
        if role == "eager" or "bfloat16" in form:
            continue
        delta = torch.zeros_like(c.delta)
        path.step(c, index, delta)
        first = delta.clone() if first is None else first
        if pgd_step.agreeing(delta, first) >= AGREEING["float32"]:
            calls[form] = lambda path=path, delta=delta: path.step(c, index, delta)
            roles[form] = role
    yield from rows_of("avx2", f"PGD step of resnet18, B = {batch}", calls, roles)


def generation_rows(count):
    """One epoch of `generate` with small_resnet of width 16 on random images, with this library's
    convolutions and without, everything else being the same.
    """
    images = torch.randint(256, (count, 3, 32, 32), dtype=torch.uint8)
    labels, classes = torch.arange(count) % 10, [f"class{k}" for k in range(10)]
    dataset = data.Dataset(images, labels, classes, [str(i) for i in range(count)])

    def epoch(dtype, off):
        with contextlib.ExitStack() as held:
            if off:
                for place in (convolution, matrix):
                    held.enter_context(mock.patch.object(place, "chosen", lambda *args: None))
            generate(
                dataset,
                None,
                model="small_resnet",
                preset="fast",
                epochs=1,
                width=16,
                dtype=dtype,
                progress=False,
            )

    kinds = ["float32"] + ["bfloat16"] * (native.matrix_missing() is None)
    calls, roles = {}, {}
    for dtype in kinds:
        for form, off in (("PyTorch", True), ("own", False)):
            name = f"{dtype}, {form} convolutions"
            calls[name], roles[name] = partial(epoch, dtype, off), "strong" if off else "ours"
    what = f"an epoch of generate, small_resnet of width 16, {count:,} images"
    yield from rows_of("best", what, calls, roles)


def at_level(level, quick):
    """All rows of one level, in this process."""
    if level == "avx2":
        native.set_cpu_level("avx2")
        inductor.cpp.simdlen = 256
    torch.set_num_threads(2)
    batch, width = (4, 8) if quick else (128, None)
    found = list(network_rows(level, batch, width))
    if level == "avx2":
        found += step_rows(*((8, 8) if quick else (512, 64)))
    else:
        found += generation_rows(40 if quick else 3000)
    return found


def main(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="small networks, to try it")
    parser.add_argument("--out", type=Path, help="JSON file")
    parser.add_argument("--level", choices=list(ISA), help=argparse.SUPPRESS)  # one process each
    args = parser.parse_args(argv)
    if args.level:
        print(json.dumps(at_level(args.level, args.quick)))
        return 0
    environment, found = machine.environment(), []
    for level, isa in ISA.items():
        command = [sys.executable, "-m", "benchmarks.studies.networks", "--level", level]
        done = subprocess.run(
            [*command, *["--quick"] * args.quick],
            env={**os.environ, "ONEDNN_MAX_CPU_ISA": isa},
            cwd=tables.ROOT,
            stdout=subprocess.PIPE,
            text=True,
            check=True,
        )
        found += json.loads(done.stdout)
    record = {
        "format": tables.FORMAT,
        "kind": "networks",
        "quick": args.quick,
        "environment": environment,
        "rows": found,
    }
    print(text(record))
    if args.out:
        tables.save(record, args.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
