"""The packed convolutions of the CPU, layer by layer, beside the library's convolution and its
epilogue pass: the table from which `packed.worth` is a rule.

python -m benchmarks.studies.packed --out benchmarks/results/packed.json
python -m benchmarks.studies.packed --notes     # put it into docs/performance-notes.md

One thread and processor time, interleaved rounds, medians; about two minutes. Then ResNet-18: signs
of its image gradient, refolding, and the model step. The library runs at
the instruction level of the row, too (ONEDNN_MAX_CPU_ISA in a process of its own).
"""

import argparse
import contextlib
import copy
import json
import os
import statistics
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from unittest import mock

import torch
import torch.nn.functional as F

from benchmarks.harness import machine, tables
from miue_fast import freeze, models
from miue_fast.dispatch import native
from miue_fast.frozen import convolution
from miue_fast.frozen.packed import PackedConv, family_of, worth
from miue_fast.frozen.training import packed_training

NOTES, RESULT = tables.ROOT / "docs" / "performance-notes.md", tables.RESULTS / "packed.json"
BEGIN, END = "<!-- packed:begin -->\n", "<!-- packed:end -->"
NHWC = torch.channels_last
ISA = {"avx512": "AVX512_CORE", "avx2": "AVX2"}
# (channels, results, side of the input, taps, stride) of ResNet-18 and of narrow networks
LAYERS = [
    (3, 64, 32, 3, 1),
    (16, 16, 32, 3, 1),
    (32, 32, 16, 3, 1),
    (64, 64, 32, 3, 1),
    (128, 128, 16, 3, 1),
    (256, 256, 8, 3, 1),
    (512, 512, 4, 3, 1),
    (64, 128, 32, 3, 2),
    (128, 256, 16, 3, 2),
    (256, 512, 8, 3, 2),
    (64, 128, 32, 1, 2),
    (256, 512, 8, 1, 2),
    (256, 64, 32, 1, 1),
]


def drawn(*shape):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    return x.contiguous(memory_format=NHWC)


def timed(forms, rounds):
    """The median processor seconds of each form, and of the ratio of the first to the second."""
    for form in forms:
        form()
    found = []
    for _ in range(rounds):
        each = []
        for form in forms:
            start = time.thread_time()
            form()
            each.append(time.thread_time() - start)
        found.append(each)
    medians = [statistics.median(column) for column in zip(*found)]
    return medians, statistics.median(first / second for first, second in found)


def rows(images, rounds):
    """Both directions of every layer at the level in use."""
    level = native.cpu_level()
    for channels, count, side, taps, stride in LAYERS:
        weight = (drawn(count, channels, taps, taps) / (channels * taps * taps) ** 0.5).contiguous(
            memory_format=NHWC
        )
        conv = [stride] * 2, [taps // 2] * 2, [1, 1], 1
        x, small = drawn(images, channels, side, side), -(-side // stride)
        y = drawn(images, count, small, small)
        bias, mask = torch.zeros(count), torch.zeros(-(-x.numel() // 64) * 8, dtype=torch.uint8)
        for back in (False, True):
            family = family_of(weight, *conv, back)
            packed = PackedConv(family, back)
            packed.refold(weight)
            if back:
                args = (y, weight, x, mask, list(x.shape), *conv)
                forms = partial(native.conv_input_grad, *args), partial(packed.input_grad, *args)
            else:
                args = (x, weight, bias, y, *conv, True, True)
                forms = partial(native.conv_forward, *args), partial(packed.forward, *args)
            (library, ours), ratio = timed(forms, rounds)
            sides = (count, channels) if back else (channels, count)
            yield {
                "level": level,
                "layer": f"{channels} -> {count} @{side}, {taps}x{taps}/{stride}",
                "direction": "input gradient" if back else "forward",
                "family": family,
                "library_s": library,
                "packed_s": ours,
                "times": ratio,
                "taken": worth(family, back, *sides, level),
                "weights_bytes": packed.weights.numel() * 4,
            }


def weight_rows(images, rounds):
    """The weight gradient of the 3x3 layers at stride 1, at the level in use."""
    for channels, count, side, taps, stride in LAYERS:
        if taps != 3 or stride != 1 or min(channels, count) < 16:
            continue
        weight, x = drawn(count, channels, 3, 3), drawn(images, channels, side, side)
        grad, back = drawn(images, count, side, side), torch.ops.aten.convolution_backward
        conv = [1, 1], [1, 1], [1, 1], False, [0, 0], 1, [False, True, False]
        forms = (
            partial(back, grad, x, weight, None, *conv),
            partial(native.conv_weight_grad, x, grad),
        )
        (library, ours), ratio = timed(forms, rounds)
        yield {
            "level": native.cpu_level(),
            "layer": f"{channels} -> {count} @{side}, 3x3/1",
            "direction": "weight gradient",
            "family": "three4",
            "library_s": library,
            "packed_s": ours,
            "times": ratio,
            "taken": min(channels, count) >= 32,
            "weights_bytes": 0,
        }


def network(images, rounds):
    """ResNet-18 with untrained weights: signs of the image gradient against float64, the cost of a
    refold, and the model step against eager PyTorch in channels-last memory (two threads).
    """
    torch.manual_seed(0)
    model = models.build("resnet18", 10).eval()
    x, d = torch.rand(images, 3, 32, 32), torch.randn(images, 512) / images
    exact = freeze(copy.deepcopy(model).double(), dtype=torch.float64)
    exact.forward(x)
    truth, found = exact.input_grad(d.double()), {}
    for name in ("packed", "library"):
        with contextlib.ExitStack() as held:
            if name == "library":
                held.enter_context(mock.patch.object(convolution, "chosen", lambda *args: None))
            net = freeze(model)
            net.forward(x)
            flipped = net.input_grad(d).sign() != truth.sign()
            start = time.process_time()
            net.refold()
            found[name] = {
                "flipped": float(flipped.double().mean()),
                "of_magnitude": float((truth.abs() * flipped).sum() / truth.abs().sum()),
                "refold_cpu_s": time.process_time() - start,
                "packed_bytes": net.packed_bytes,
            }
    labels, times = torch.arange(2 * images) % 10, []
    x = torch.rand(2 * images, 3, 32, 32).contiguous(memory_format=NHWC)
    network = models.in_format(model, NHWC).train()
    optimizer = torch.optim.SGD(network.parameters(), 1e-3, momentum=0.9)
    contexts = contextlib.nullcontext(), packed_training(network, "auto", torch.device("cpu"))
    for _ in range(rounds + 1):
        each = []
        for context in contexts:
            start = time.perf_counter()
            with context:
                loss = F.cross_entropy(network(x), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            each.append(time.perf_counter() - start)
        times.append(each)
    library, ours = (statistics.median(column) for column in zip(*times[1:]))
    ratio = statistics.median(a / b for a, b in times[1:])
    step = {"batch": 2 * images, "library_s": library, "packed_s": ours, "times": ratio}
    return found | {"model_step": step}


def markdown(record):
    head = ("layer, 64 images", "direction", *(f"{level}: library, packed" for level in ISA))
    found = {}
    for row in record["rows"]:
        times = f"{tables.seconds(row['library_s'])}, {tables.seconds(row['packed_s'])}: "
        shown = times + tables.ratio(row["times"]) + (" *" if row["taken"] else "")
        found.setdefault((row["layer"], row["direction"]), {})[row["level"]] = shown
    lines = [(*key, *(levels.get(level, "") for level in ISA)) for key, levels in found.items()]
    told, step = record["network"], record["network"]["model_step"]
    signs = "; ".join(
        f"{name} {100 * told[name]['flipped']:.4f} % of the signs with "
        f"{told[name]['of_magnitude']:.1e} of the magnitude, refold "
        f"{tables.seconds(told[name]['refold_cpu_s'])} of processor time"
        for name in ("packed", "library")
    )
    return (
        f"{tables.environment_line(record['environment'])}. One thread; * where `auto` takes the "
        f"packed form.\n\n{tables.table(head, lines)}\n\n"
        f"ResNet-18, image gradient against float64's: {signs}. "
        f"Packed weights: {tables.size(told['packed']['packed_bytes'])}. Model step, batch "
        f"{step['batch']}, two threads: {tables.seconds(step['library_s'])} in eager channels-last "
        f"PyTorch, {tables.seconds(step['packed_s'])} packed, {tables.ratio(step['times'])}.\n"
    )


def with_table(text, record):
    """The page with the record's table between its markers."""
    before, rest = text.split(BEGIN)
    return before + BEGIN + markdown(record) + END + rest.split(END)[1]


def main(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="two images, five rounds")
    parser.add_argument("--out", type=Path, help="JSON file")
    parser.add_argument("--notes", action="store_true", help="only put the table into the notes")
    parser.add_argument("--level", choices=list(ISA), help=argparse.SUPPRESS)  # one process each
    args = parser.parse_args(argv)
    if args.notes:
        NOTES.write_text(with_table(NOTES.read_text(), tables.load(RESULT)))
        return 0
    torch.set_num_threads(1)
    if args.level:
        native.set_cpu_level(args.level)
        images, rounds = (2, 5) if args.quick else (64, 7)
        print(json.dumps([*rows(images, rounds), *weight_rows(images, rounds)]))
        return 0
    environment, found = machine.environment(), []
    for level, isa in ISA.items():
        command = [sys.executable, "-m", "benchmarks.studies.packed", "--level", level]
        done = subprocess.run(
            [*command, *["--quick"] * args.quick],
            env={**os.environ, "ONEDNN_MAX_CPU_ISA": isa},
            cwd=tables.ROOT,
            capture_output=True,
            text=True,
        )
        if done.returncode:
            print(f"{level}: {done.stderr.strip().splitlines()[-1]}", file=sys.stderr)
        else:
            found += json.loads(done.stdout)
    record = {
        "format": tables.FORMAT,
        "kind": "packed",
        "quick": args.quick,
        "environment": environment,
        "rows": found,
    }
    torch.set_num_threads(2)
    record["network"] = network(2 if args.quick else 64, 5)
    print(markdown(record))
    if args.out:
        tables.save(record, args.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
