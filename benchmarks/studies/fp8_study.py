"""What e4m3 convolutions do to a poison, emulated on a CPU: flipped signs of the input gradient in
each epoch, and the victims' accuracy.

python -m benchmarks.studies.fp8_study --out benchmarks/results/fp8_study.json
python -m benchmarks.studies.fp8_study --notes
python -m benchmarks.studies.fp8_study --data CIFAR

The first takes about ten minutes of one thread; the second puts the tables of that file into
docs/performance-notes.md; the third takes CIFAR/train/CLASS/* and CIFAR/test/CLASS/* instead of
drawn shapes.

Each seed generates three poisons from the same images: in float32, in bfloat16, and in bfloat16
with e4m3 convolutions (fp8). During the float32 run, before each poison step, the gradient of one
contrastive batch is computed in all three forms at the same weights and the same perturbation. Then
one victim is trained on each poison and one on the clean images."""

import argparse
import sys
import time
from pathlib import Path
from unittest import mock

import torch

from benchmarks.harness import machine, tables
from miue_fast import data, freeze, generate, mi_ue_value_and_grad, perturbed_input
from miue_fast.evaluation.victims import recipe, train
from miue_fast.generation import batches
from miue_fast.generation.run import BiLevelRun

NOTES, RESULT = tables.ROOT / "docs" / "performance-notes.md", tables.RESULTS / "fp8_study.json"
BEGIN, END = "<!-- fp8:begin -->\n", "<!-- fp8:end -->"
EPS = 8 / 255
FORMS = {
    "float32": {},
    "bfloat16": {"dtype": "bfloat16"},
    "fp8": {"dtype": "bfloat16", "fp8": True},
}
SOURCE = {
    "preset": "paper",
    "model": "small_resnet",
    "width": 8,
    "epochs": 8,
    "steps": 5,
    "train_batch": 16,
    "eps": EPS,
    "device": "cpu",
}
VICTIM = {
    "victim": "small_resnet",
    "epochs": 12,
    "lr": 0.1,
    "batch": 32,
    "crop": 0,
}  # flips only, as in the demo
SIZES = {"train": 2000, "test": 1000, "seeds": 2}
QUICK = {"train": 60, "test": 40, "seeds": 1}


def gradient(run, epoch, dtype="float32", fp8=False):
    """d loss / d image of the epoch's first contrastive batch, at the run's present weights and
    perturbation.
    """
    o = run.options
    order, flips = batches.order_and_flips(len(run.images), o.flip, o.seed, epoch, "poison step")
    index, flips = order[: o.batch], flips[: o.batch]
    net = freeze(run.network.eval(), run.feature, dtype=getattr(torch, dtype), fp8=fp8)
    features = net.forward(
        perturbed_input(run.images, run.delta, index, flips, eps=o.eps, channels_last=False)
    )
    _, grad = mi_ue_value_and_grad(
        features,
        run.labels[index],
        o.temperature,
        o.zeta,
        denominator=o.denominator,
        normalize_dim=o.normalize_dim,
    )
    return net.input_grad(grad).float()


def compared(run, epoch):
    """For each form: the share of values whose sign is another one than in float32, and their share
    of the sum of magnitudes.
    """
    exact = gradient(run, epoch)
    found = {}
    for form in ("bfloat16", "fp8"):
        flipped = gradient(run, epoch, **FORMS[form]).sign() != exact.sign()
        found[form] = {
            "flipped": flipped.double().mean().item(),
            "of_magnitude": (exact.abs() * flipped).sum().item() / exact.abs().sum().item(),
        }
    return found


def generation(clean, seed, form, options):
    """(delta, one row of `compared` per epoch of the float32 run)"""
    rows, step = [], BiLevelRun.poison_step

    def watched(run, epoch, tick):
        if form == "float32":
            rows.append({"seed": seed, "epoch": epoch, **compared(run, epoch)})
        return step(run, epoch, tick)

    with mock.patch.object(BiLevelRun, "poison_step", watched):
        result = generate(clean, seed=seed, progress=False, **options, **FORMS[form])
    return result.delta, rows


def study(clean, test, seeds, source, victim, tell=print):
    signs, victims, agreement, plan = [], [], [], recipe(**victim)
    for seed in range(seeds):
        deltas = {}
        for form in FORMS:
            deltas[form], rows = generation(clean, seed, form, source)
            signs += rows
            tell(f"seed {seed}: poison in {form}")
        for form in ("bfloat16", "fp8"):
            same = (deltas[form].sign() == deltas["float32"].sign()).double().mean().item()
            agreement.append({"seed": seed, "poison": form, "same_sign_of_delta": same})
        for form in ("none", *FORMS):
            images = (
                clean.images
                if form == "none"
                else data.apply_poison(clean.images, deltas[form], EPS)
            )
            run = train(
                victim["victim"],
                plan,
                images,
                clean.labels,
                test.images,
                test.labels,
                len(clean.classes),
                seed,
            )
            victims.append({"seed": seed, "poison": form, "train": run.train, "test": run.test})
            tell(f"seed {seed}: victim of {form}: {100 * run.test:.1f} %")
    return {"signs": signs, "deltas": agreement, "victims": victims}


def percent(values):
    return f"{100 * sum(values) / len(values):.1f} %"


def markdown(record):
    signs, epochs = record["signs"], sorted({row["epoch"] for row in record["signs"]})

    def cell(epoch, form, what):
        return percent([row[form][what] for row in signs if row["epoch"] == epoch])

    columns = [
        ("bfloat16", "flipped"),
        ("fp8", "flipped"),
        ("bfloat16", "of_magnitude"),
        ("fp8", "of_magnitude"),
    ]
    head = (
        "epoch",
        "flipped in bfloat16",
        "flipped in fp8",
        "their share of the magnitude, bfloat16",
        "fp8",
    )
    table = tables.table(
        head, [(epoch, *(cell(epoch, *column) for column in columns)) for epoch in epochs]
    )
    rows = []
    for form in ("none", *FORMS):
        of_form = [row for row in record["victims"] if row["poison"] == form]
        same = [row["same_sign_of_delta"] for row in record["deltas"] if row["poison"] == form]
        tests = ", ".join(f"{100 * row['test']:.1f}" for row in of_form)
        rows.append(
            (
                form,
                percent([row["train"] for row in of_form]),
                percent([row["test"] for row in of_form]),
                tests,
                percent(same) if same else "",
            )
        )
    head = (
        "poison generated in",
        "victim, train",
        "victim, clean test",
        "of each seed",
        "signs of delta as in float32",
    )
    return f"{table}\n\n{tables.table(head, rows)}\n"


def with_tables(text, record):
    """The page with the record's tables between its markers."""
    if text.count(BEGIN) != 1 or text.count(END) != 1:
        raise ValueError(
            f"{NOTES.name}: expected the markers {BEGIN.strip()} and {END}, got none or several"
        )
    before, rest = text.split(BEGIN)
    return before + BEGIN + markdown(record) + END + rest.split(END)[1]


def main(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--data", type=Path, help="folder with train and test images instead of the drawn shapes"
    )
    parser.add_argument(
        "--quick", action="store_true", help="a few images, one epoch: whether it runs"
    )
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, help="JSON file")
    parser.add_argument(
        "--notes",
        action="store_true",
        help="only put the tables of the committed result into docs/performance-notes.md",
    )
    args = parser.parse_args(argv)
    if args.notes:
        NOTES.write_text(with_tables(NOTES.read_text(), tables.load(RESULT)))
        return 0
    torch.set_num_threads(args.threads)
    environment = machine.environment()
    sizes, source, victim = (
        (QUICK, {**SOURCE, "epochs": 1, "steps": 1}, {**VICTIM, "epochs": 1})
        if args.quick
        else (SIZES, SOURCE, VICTIM)
    )
    if args.data:
        clean, test = (
            data.load(args.data, split=part, per_class=sizes[part] // 10)
            for part in ("train", "test")
        )
    else:
        clean, test = (
            data.shapes(sizes[part], seed=k, difficulty=1.0)
            for k, part in ((1, "train"), (2, "test"))
        )
    found = study(clean, test, sizes["seeds"], source, victim)
    seconds = time.process_time()
    record = {
        "format": tables.FORMAT,
        "kind": "fp8",
        "quick": args.quick,
        "environment": environment,
        "source": source,
        "victim": victim,
        "data": "files" if args.data else "shapes",
        "images": {"train": len(clean), "test": len(test)},
        **found,
        "cpu_seconds": round(seconds, 1),
    }
    print(markdown(record), f"{seconds:.0f} s of processor time", sep="\n")
    if args.out:
        tables.save(record, args.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
