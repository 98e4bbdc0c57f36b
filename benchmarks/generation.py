"""The main job at full size: CIFAR-10 (JPEG), ResNet-18, 100 epochs, and ResNet-18 victims; in
pieces that fit the time at hand.

    python -m benchmarks.generation CIFAR WORK [--preset NAME] [--minutes 9] [--out FILE]

CIFAR has train/CLASS/* and test/CLASS/*; WORK is a folder for the checkpoint, the poison and the
finished victims. The command stops after --minutes (exit code 130: at most the epoch or the victim
at work is lost); the same command goes on. Seconds are those of the epochs. Made for a GPU:
bfloat16, images and perturbation on the device; on a CPU it would take days (but for --width,
--epochs, --per-class)."""

import argparse
import contextlib
import json
import signal
import statistics
import sys
from pathlib import Path

from benchmarks.harness import machine, tables
from miue_fast import data, generate
from miue_fast.evaluation import run_cell
from miue_fast.generation import PRESETS, Interrupted
from miue_fast.generation.presets import DEFAULT

SETS = ("poisoned", "clean", "random")
NEEDED = {"seconds": 600, "accuracy": 0.12}


def parse(argv):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("cifar", type=Path, metavar="CIFAR")
    parser.add_argument("work", type=Path, metavar="WORK")
    parser.add_argument("--preset", default=DEFAULT.name, choices=list(PRESETS))
    parser.add_argument("--minutes", type=float, default=9, help="of this command")
    parser.add_argument("--epochs", type=int, default=100, help="of the generation")
    parser.add_argument("--model", default="resnet18", help="source and victim")
    parser.add_argument("--width", type=int, help="of the source's first stage")
    parser.add_argument("--dtype", default="bfloat16", help="of the generation's networks")
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--per-class", type=int, help="only the first images of each class")
    parser.add_argument(
        "--sets", nargs="+", default=["poisoned"], choices=SETS, help="what victims are trained on"
    )
    parser.add_argument("--victims", type=int, default=1, help="seeds of each")
    parser.add_argument(
        "--victim-epochs", type=int, default=60, help="the paper's 200 do not fit into ten minutes"
    )
    parser.add_argument(
        "--out",
        type=Path,
        help="the JSON file; else results/generation_PRESET.json on a GPU, none on a CPU",
    )
    return parser.parse_args(argv)


@contextlib.contextmanager
def stopping_after(seconds):
    """Ctrl-C after some time."""

    def stop(*_):
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def main(argv=None):
    args = parse(argv)
    environment = machine.environment()
    clean = data.load(args.cifar / "train", per_class=args.per_class)
    test = data.load_test(args.cifar / "test", per_class=args.per_class)
    try:
        with stopping_after(60 * args.minutes):
            result = generate(
                clean,
                args.work,
                preset=args.preset,
                model=args.model,
                width=args.width,
                epochs=args.epochs,
                seed=args.seed,
                dtype=args.dtype,
            )
            images = {
                "clean": clean.images,
                "poisoned": data.apply_poison(clean.images, result.delta, result.options.eps),
            }
            images["random"] = data.apply_poison(
                clean.images,
                data.random_noise(clean, result.options.eps, args.seed),
                result.options.eps,
            )
            victims = finished(args, clean, test, images)
    except (Interrupted, KeyboardInterrupt) as stopped:
        print(
            f"{stopped or 'interrupted: finished victims are kept'}; run the same command again",
            file=sys.stderr,
        )
        return 130
    record = recorded(args, result, images, test, victims, environment)
    out = args.out or (
        tables.RESULTS / f"generation_{args.preset}.json" if environment["gpu"] else None
    )
    if out:
        tables.save(record, out)
    print(tables.generation(record))
    return 0


def finished(args, clean, test, images):
    """One row per training set and seed; those of an earlier command are taken from
    WORK/victims.json.
    """
    path = args.work / "victims.json"
    rows = json.loads(path.read_text()) if path.exists() else []
    for name in args.sets:
        for seed in range(args.victims):
            wanted = {
                "trained_on": name,
                "victim": args.model,
                "epochs": args.victim_epochs,
                "seed": seed,
            }
            if any(wanted.items() <= row.items() for row in rows):
                continue
            run = run_cell(
                images[name],
                clean.labels,
                test.images,
                test.labels,
                len(clean.classes),
                victim=args.model,
                epochs=args.victim_epochs,
                seed=seed,
            )
            rows.append({**wanted, "train": run.train, "test": run.test, "seconds": run.seconds})
            data.write_file(
                path, lambda file: file.write((json.dumps(rows, indent=1) + "\n").encode())
            )
    return rows


def recorded(args, result, images, test, victims, environment):
    """What was asked for and what came of it."""
    history, count = result.history, len(images["clean"])
    seconds = sum(row["seconds"] for row in history)
    accuracy = [row["test"] for row in victims if row["trained_on"] == "poisoned"]
    record = {
        "format": tables.FORMAT,
        "kind": "generation",
        "environment": environment,
        "preset": args.preset,
        "model": args.model,
        "options": result.options.as_dict(),
        "train_images": count,
        "test_images": len(test.images),
        "epochs": len(history),
        "seconds": seconds,
        "image_steps_per_s": statistics.median(row["image_steps_per_s"] for row in history),
        "linf": int((images["poisoned"].short() - images["clean"].short()).abs().max()),
        "history": history,
        "victims": victims,
    }
    whole = (
        args.epochs >= 100 and count == 50_000 and args.model == "resnet18" and args.width is None
    )
    measured = {"seconds": seconds, "accuracy": statistics.fmean(accuracy) if accuracy else None}
    record["targets"] = [
        {
            "name": name,
            "needed": NEEDED[name],
            "measured": value,
            "met": None if value is None else value <= NEEDED[name],
        }
        for name, value in measured.items()
        if whole
    ]
    return record


if __name__ == "__main__":
    sys.exit(main())
