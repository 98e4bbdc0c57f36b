"""The packed convolutions of the CPU, layer by layer, beside the library's convolution and its
epilogue pass: the table from which `packed.worth` is a rule.

python -m benchmarks.studies.packed --out benchmarks/results/packed.json
python -m benchmarks.studies.packed --notes     # put it into docs/performance-notes.md

One thread and processor time, interleaved rounds, medians; about two minutes. The library runs at
the instruction level of the row, too (ONEDNN_MAX_CPU_ISA in a process of its own).
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import torch

from benchmarks.harness import machine, tables
from miue_fast.dispatch import native
from miue_fast.frozen.packed import PackedConv, family_of, worth

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


def markdown(record):
    head = ("layer, 64 images", "direction", *(f"{level}: library, packed" for level in ISA))
    found = {}
    for row in record["rows"]:
        times = f"{tables.seconds(row['library_s'])}, {tables.seconds(row['packed_s'])}: "
        shown = times + tables.ratio(row["times"]) + (" *" if row["taken"] else "")
        found.setdefault((row["layer"], row["direction"]), {})[row["level"]] = shown
    lines = [(*key, *(levels.get(level, "") for level in ISA)) for key, levels in found.items()]
    return (
        f"{tables.environment_line(record['environment'])}. One thread; * where `auto` takes the "
        f"packed form.\n\n{tables.table(head, lines)}\n"
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
        print(json.dumps(list(rows(2 if args.quick else 64, 5 if args.quick else 7))))
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
    print(markdown(record))
    if args.out:
        tables.save(record, args.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
