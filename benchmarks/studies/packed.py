"""This library's convolutions on the CPU, layer by layer, beside PyTorch's convolution and an
epilogue pass: the table from which `packed.worth` and `matrix.worth` are rules.

python -m benchmarks.studies.packed --out benchmarks/results/packed.json
python -m benchmarks.studies.packed --victims FOLDER --out benchmarks/results/packed.json
python -m benchmarks.studies.packed --notes     # put both into docs/performance-notes.md; a picture

One thread and processor time, interleaved rounds, medians; about four minutes. PyTorch's library
runs at the instruction level of the row, too (ONEDNN_MAX_CPU_ISA in a process of its own); the
level amx is bfloat16 on both sides. Then ResNet-18: signs of its image gradient, refolding, and the
model step beside eager and compiled PyTorch. --victims trains ResNet-18 (width 32) on 3,000 images
of a folder, three seeds with each form, and judges it on held-out training images.
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
from miue_fast import data, freeze, models
from miue_fast.dispatch import native
from miue_fast.evaluation import run_cell
from miue_fast.evaluation import victims as evaluation_victims
from miue_fast.frozen import convolution, matrix
from miue_fast.frozen.matrix import MatrixConv
from miue_fast.frozen.packed import PackedConv, family_of, worth
from miue_fast.frozen.training import packed_training

NOTES, RESULT = tables.ROOT / "docs" / "performance-notes.md", tables.RESULTS / "packed.json"
BEGIN, END = "<!-- packed:begin -->\n", "<!-- packed:end -->"
NHWC = torch.channels_last
ISA = {"avx512": "AVX512_CORE", "avx2": "AVX2", "amx": "DEFAULT"}
HALF = "amx"  # the level of bfloat16
PICTURE = tables.ROOT / "docs" / "packed-roofline.png"
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


def drawn(*shape, dtype=torch.float32):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(dtype)
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


def rows(images, rounds, level):
    """Both directions of every layer."""
    dtype = torch.bfloat16 if level == HALF else torch.float32
    for channels, count, side, taps, stride in LAYERS:
        weight = drawn(count, channels, taps, taps) / (channels * taps * taps) ** 0.5
        weight = weight.to(dtype).contiguous(memory_format=NHWC)
        conv = [stride] * 2, [taps // 2] * 2, [1, 1], 1
        x, small = drawn(images, channels, side, side, dtype=dtype), -(-side // stride)
        y = drawn(images, count, small, small, dtype=dtype)
        bias, mask = torch.zeros(count), torch.zeros(-(-x.numel() // 64) * 8, dtype=torch.uint8)
        for back in (False, True):
            sides = (count, channels) if back else (channels, count)
            if level == HALF:
                family, packed, taken = "matrix", MatrixConv(back), matrix.worth(*sides)
            else:
                family = family_of(weight, *conv, back)
                packed, taken = PackedConv(family, back), worth(family, back, *sides, level)
            packed.refold(weight)
            if back:
                args = (y, weight, x, mask, list(x.shape), *conv)
                forms = partial(native.conv_input_grad, *args), partial(packed.input_grad, *args)
            else:
                args = (x, weight, bias, y, *conv, True, True)
                forms = partial(native.conv_forward, *args), partial(packed.forward, *args)
            (library, ours), ratio = timed(forms, rounds)
            moved = x.nbytes + y.nbytes * (1 if back else 2) + mask.nbytes + weight.nbytes
            yield {
                "level": level,
                "bytes": moved,
                "layer": f"{channels} -> {count} @{side}, {taps}x{taps}/{stride}",
                "direction": "input gradient" if back else "forward",
                "family": family,
                "library_s": library,
                "packed_s": ours,
                "times": ratio,
                "taken": taken,
                "flops": 2 * images * small * small * channels * count * taps * taps,
                "weights_bytes": packed.weights.nbytes,
            }


def weight_rows(images, rounds, level):
    """The weight gradients that this library has at the level."""
    half = level == HALF
    dtype = torch.bfloat16 if half else torch.float32
    for channels, count, side, taps, stride in LAYERS:
        if not half and (taps != 3 or stride != 1 or min(channels, count) < 16):
            continue
        weight = drawn(count, channels, taps, taps, dtype=dtype)
        x, small = drawn(images, channels, side, side, dtype=dtype), -(-side // stride)
        grad, back = drawn(images, count, small, small, dtype=dtype), torch.ops.aten
        conv = [stride] * 2, [taps // 2] * 2, [1, 1]
        library = partial(
            back.convolution_backward,
            *(grad, x, weight, None, *conv, False, [0, 0], 1, [False, True, False]),
        )
        own = (
            partial(native.matrix_weight_grad, x, grad, (taps, taps), conv)
            if half
            else partial(native.conv_weight_grad, x, grad)
        )
        (theirs, ours), ratio = timed((library, own), rounds)
        yield {
            "level": level,
            "bytes": x.nbytes + grad.nbytes + weight.nbytes,
            "layer": f"{channels} -> {count} @{side}, {taps}x{taps}/{stride}",
            "direction": "weight gradient",
            "family": "matrix" if half else "three4",
            "library_s": theirs,
            "packed_s": ours,
            "times": ratio,
            "taken": (
                matrix.worth_weight_grad(channels, count, taps * taps)
                if half
                else min(channels, count) >= 32
            ),
            "flops": 2 * images * small * small * channels * count * taps * taps,
            "weights_bytes": 0,
        }


def ceilings(rounds, level, side):
    """FLOP/s of PyTorch's product of two matrices, and bytes/s read and written by a copy: the
    fastest of the rounds, because nothing is to be faster.
    """
    dtype = torch.bfloat16 if level == HALF else torch.float32
    a, b = torch.rand(side, side).to(dtype), torch.rand(side, side).to(dtype)
    source = torch.rand(16 * side * side)
    to = torch.empty_like(source)

    def best(form):
        form()
        found = []
        for _ in range(3 * rounds):
            start = time.thread_time()
            form()
            found.append(time.thread_time() - start)
        return min(found)

    product, copied = best(partial(torch.mm, a, b)), best(partial(to.copy_, source))
    return {"product": 2 * side**3 / product, "copy": 2 * source.nbytes / copied}


def network(images):
    """ResNet-18 with untrained weights: signs of the image gradient against float64, and the cost
    of a refold, of every form that runs here.
    """
    torch.manual_seed(0)
    model = models.build("resnet18", 10).eval()
    x, d = torch.rand(images, 3, 32, 32), torch.randn(images, 512) / images
    exact = freeze(copy.deepcopy(model).double(), dtype=torch.float64)
    exact.forward(x)
    truth, found = exact.input_grad(d.double()), {}
    kinds = [torch.float32] + [torch.bfloat16] * (native.matrix_missing() is None)
    for dtype in kinds:
        for name in ("own", "library"):
            with contextlib.ExitStack() as held:
                if name == "library":
                    for place, rule in ((convolution, "chosen"), (matrix, "chosen")):
                        held.enter_context(mock.patch.object(place, rule, lambda *args: None))
                net = freeze(model, dtype=dtype)
                net.forward(x)
                flipped = net.input_grad(d).sign() != truth.sign()
                start = time.process_time()
                net.refold()
                found[f"{name}, {str(dtype)[6:]}"] = {
                    "flipped": float(flipped.double().mean()),
                    "of_magnitude": float((truth.abs() * flipped).sum() / truth.abs().sum()),
                    "refold_cpu_s": time.process_time() - start,
                    "packed_bytes": net.packed_bytes,
                }
    return found


class Training:
    """The model step of ResNet-18: forward, backward, SGD. form: "library", "compiled" or "own"."""

    def __init__(self, form, half, batch):
        torch.manual_seed(0)
        self.network = models.in_format(models.build("resnet18", 10), NHWC).train()
        self.optimizer = torch.optim.SGD(self.network.parameters(), 1e-3, momentum=0.9)
        self.call = torch.compile(self.network) if form == "compiled" else self.network
        own, cpu = form == "own", torch.device("cpu")
        self.context = packed_training(self.network, "auto" if own else "reference", cpu)
        self.half, self.labels = half, torch.arange(batch) % 10
        self.x = torch.rand(batch, 3, 32, 32).contiguous(memory_format=NHWC)

    def __call__(self):
        half = torch.autocast("cpu", torch.bfloat16, enabled=self.half, cache_enabled=False)
        with self.context, half:
            logits = self.call(self.x)
        loss = F.cross_entropy(logits.float(), self.labels)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self.optimizer.step()


def model_step(batch, rounds):
    """Seconds of every form, interleaved, and how many times those of ours."""
    made = {
        f"{form}, {'bfloat16' if half else 'float32'}": Training(form, half, batch)
        for half in (False, True)
        for form in ("library", "compiled", "own")
    }
    times = {name: [] for name in made}
    for round_ in range(rounds + 1):
        for name, step in made.items():
            start = time.perf_counter()
            step()
            if round_:
                times[name].append(time.perf_counter() - start)
    return {"batch": batch, "seconds": {k: statistics.median(v) for k, v in times.items()}}


def victims(folder, epochs):
    """Accuracy on held-out training images of networks that train with each form, three seeds."""
    images = data.load(folder, per_class=500)
    rows = [torch.nonzero(images.labels == k)[:, 0] for k in range(len(images.classes))]
    seen, held = (
        images.select(torch.cat([r[part] for r in rows])) for part in (slice(300), slice(300, 500))
    )
    forms = {"library": ("reference", "float32"), "own": ("auto", "float32")}
    if native.matrix_missing() is None:
        forms["own, bfloat16"] = "auto", "bfloat16"
    found = {}
    for seed in (0, 1, 2):
        for name, (backend, dtype) in forms.items():
            with mock.patch.object(
                evaluation_victims,
                "packed_training",
                lambda network, _, device, dtype, backend=backend: packed_training(
                    network, backend, device, dtype
                ),
            ):
                run = run_cell(
                    *(seen.images, seen.labels, held.images, held.labels, len(images.classes)),
                    victim=partial(models.build, "resnet18", width=32, normalize=False),
                    epochs=epochs,
                    lr=0.1,
                    seed=seed,
                    dtype=dtype,
                )
            print(f"{name}, seed {seed}: {100 * run.test:.1f} %, {run.seconds:.0f} s", flush=True)
            found.setdefault(name, []).append({"test": run.test, "seconds": run.seconds})
    return {"epochs": epochs, "images": len(seen.labels), "runs": found}


def markdown(record):
    names = {level: "amx, bfloat16" if level == HALF else level for level in ISA}
    head = ("layer, 64 images", "direction", *(f"{n}: library, own" for n in names.values()))
    found = {}
    for row in record["rows"]:
        times = f"{tables.seconds(row['library_s'])}, {tables.seconds(row['packed_s'])}: "
        shown = times + tables.ratio(row["times"]) + (" *" if row["taken"] else "")
        found.setdefault((row["layer"], row["direction"]), {})[row["level"]] = shown
    lines = [(*key, *(levels.get(level, "") for level in ISA)) for key, levels in found.items()]
    signs = [
        (
            name,
            f"{100 * told['flipped']:.4f} %",
            f"{told['of_magnitude']:.1e}",
            tables.seconds(told["refold_cpu_s"]),
            tables.size(told["packed_bytes"]),
        )
        for name, told in record["network"].items()
    ]
    step = record["model_step"]
    best = {kind: step["seconds"][f"own, {kind}"] for kind in ("float32", "bfloat16")}
    steps = [
        (name, tables.seconds(s), *(tables.ratio(s / own) for own in best.values()))
        for name, s in step["seconds"].items()
    ]
    text = (
        f"{tables.environment_line(record['environment'])}. One thread; * where `auto` takes this "
        f"library's form.\n\n{tables.table(head, lines)}\n\n"
        "Image gradient of ResNet-18 (64 images, untrained weights) against float64's:\n\n"
    )
    text += tables.table(
        ("form", "signs flipped", "their share of the magnitude", "refold", "packed weights"), signs
    )
    text += f"\n\nModel step of ResNet-18, batch {step['batch']}, two threads:\n\n"
    text += tables.table(("form", "time", "of own, float32", "of own, bfloat16"), steps) + "\n"
    if told := record.get("victims"):
        text += (
            f"\nResNet-18 (width 32) trained on {told['images']:,} images for {told['epochs']} "
            "epochs, accuracy on held-out training images:\n\n"
        )
        text += tables.table(
            ("form", "seeds 0, 1, 2", "mean", "mean time"),
            [
                (
                    name,
                    ", ".join(f"{100 * run['test']:.1f} %" for run in runs),
                    f"{100 * statistics.mean(run['test'] for run in runs):.1f} %",
                    tables.seconds(statistics.mean(run["seconds"] for run in runs)),
                )
                for name, runs in told["runs"].items()
            ],
        )
        text += "\n"
    return text


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
    parser.add_argument("--victims", type=Path, metavar="FOLDER", help="only add the victims")
    parser.add_argument("--epochs", type=int, default=12, help="of the victims")
    parser.add_argument("--notes", action="store_true", help="only put the table into the notes")
    parser.add_argument("--level", choices=list(ISA), help=argparse.SUPPRESS)  # one process each
    args = parser.parse_args(argv)
    if args.notes:
        from benchmarks.pages import packed_plot

        NOTES.write_text(with_table(NOTES.read_text(), tables.load(RESULT)))
        packed_plot.draw(tables.load(RESULT), PICTURE)
        return 0
    if args.victims:
        torch.set_num_threads(2)
        record = tables.load(args.out) | {"victims": victims(args.victims, args.epochs)}
        tables.save(record, args.out)
        return 0
    torch.set_num_threads(1)
    if args.level:
        if args.level != HALF:
            native.set_cpu_level(args.level)
        elif reason := native.matrix_missing():
            print(reason, file=sys.stderr)
            return 1
        images, rounds = (2, 5) if args.quick else (64, 7)
        found = rows(images, rounds, args.level), weight_rows(images, rounds, args.level)
        peaks = ceilings(rounds, args.level, 128 if args.quick else 1536)
        print(json.dumps([[row for part in found for row in part], peaks]))
        return 0
    environment, found, peaks = machine.environment(), [], {}
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
            made, peaks[level] = json.loads(done.stdout)
            found += made
    record = {
        "format": tables.FORMAT,
        "kind": "packed",
        "quick": args.quick,
        "environment": environment,
        "rows": found,
        "ceilings": peaks,
    }
    torch.set_num_threads(2)
    record["network"] = network(2 if args.quick else 64)
    record["model_step"] = model_step(4 if args.quick else 128, 5)
    print(markdown(record))
    if args.out:
        tables.save(record, args.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
