"""What the poisons of the presets withstand: 3,000 images, several generation seeds, defences.

    python -m benchmarks.studies.strength --data CIFAR [--work WORK] [--only NAME ...]
    python -m benchmarks.studies.strength --notes      # put the table into the docs

CIFAR has train/CLASS/*; the test images are not looked at. The first 300 images of each class are
poisoned with a small_resnet of width 16, and the next 200 judge. Victims are small_resnets that
train for 12 epochs with crops and flips, three of each poison as it is and one behind each defence.
Each row is in benchmarks/results/strength.json as soon as it is there; the same command goes on. An
hour and a half on two cores."""

import argparse
import signal
import statistics
import sys
from pathlib import Path

import torch

from benchmarks.harness import machine, tables
from benchmarks.studies.cifar10_settings import split
from benchmarks.studies.full_size import KEPT_OF_MACHINE, save
from miue_fast import data, generate
from miue_fast.evaluation import run_cell
from miue_fast.generation import Interrupted, presets
from miue_fast.generation.objectives.em import Em

RESULT, PAGE = tables.RESULTS / "strength.json", tables.ROOT / "docs/benchmarks.md"
BEGIN, END = "<!-- strength:begin -->\n", "<!-- strength:end -->"
MODEL, WIDTH, VICTIM_EPOCHS, VICTIMS, SEEDS = "small_resnet", 16, 12, (0, 1, 2), (7, 11, 3)
CLEAN = "clean"
POISONS = {
    "fast": {"preset": "fast"},
    "publish": {"preset": "publish"},
    "em": {"preset": "fast", "objective": Em.name},
    "em-publish": {"preset": "publish", "objective": Em.name},
}
DEFENCES = {
    "none": "as it is",
    "jpeg:90": "JPEG 90",
    "jpeg:60": "JPEG 60",
    "jpeg:30": "JPEG 30",
    "jpeg:10": "JPEG 10",
    "resize:24": "24 x 24",
    "resize:16": "16 x 16",
    "grayscale": "grey",
}


class Study:
    """The rows that are recorded, and how the others are made."""

    def __init__(self, folder: Path, work: Path, path: Path) -> None:
        self.images, self.held_out = split(folder)
        self.work, self.path = work, path
        self.record = {"format": tables.FORMAT, "kind": "strength", "rows": []}
        if path.exists():
            self.record = tables.load(path)

    def has(self, key: dict) -> bool:
        """Whether a row with these settings is recorded."""
        return any(key.items() <= row.items() for row in self.record["rows"])

    def poisoned(self, poison: str, seed: int) -> tuple[torch.Tensor, dict]:
        """(uint8 images [N, C, H, W], what of the generation is recorded)."""
        if poison == CLEAN:
            return self.images.images, {"options": None}
        result = generate(
            self.images,
            self.work / f"{poison}-seed{seed}",
            model=MODEL,
            width=WIDTH,
            seed=seed,
            **POISONS[poison],
        )
        told = {
            "options": result.options.as_dict(),
            "generation_s": sum(row["seconds"] for row in result.history),
        }
        return data.apply_poison(self.images.images, result.delta, result.options.eps), told

    def run(self, poison: str, seed: int) -> None:
        """Judges one poison behind every defence that is not recorded."""
        options = None
        if poison != CLEAN:
            preset, *changes = POISONS[poison].items()
            options = presets.choose(preset[1], {**dict(changes), "width": WIDTH, "seed": seed})
            options = options.resolved(len(self.images)).as_dict()
        key = {"poison": poison, "seed": seed, "options": options}
        missing = [name for name in DEFENCES if not self.has({**key, "defence": name})]
        if not missing:
            return
        images, told = self.poisoned(poison, seed)
        for defence in missing:
            victims = [
                self.victim(images, defence, seed if poison == CLEAN else number)
                for number in (VICTIMS if defence == "none" and poison != CLEAN else VICTIMS[:1])
            ]
            row = {
                **{**key, **told, "options": options},
                "defence": defence,
                "tests": [run.test for run in victims],
                "train": statistics.fmean(run.train for run in victims),
                "machine": {k: machine.environment()[k] for k in KEPT_OF_MACHINE},
            }
            self.record["rows"].append(row)
            save(self.record, self.path)
            shown = ", ".join(f"{100 * test:.1f} %" for test in row["tests"])
            print(f"{poison}, seed {seed}, {defence}: {shown}", file=sys.stderr, flush=True)

    def victim(self, images, defence, seed):
        return run_cell(
            *(images, self.images.labels, self.held_out.images, self.held_out.labels),
            len(self.images.classes),
            victim=MODEL,
            defence=defence,
            epochs=VICTIM_EPOCHS,
            seed=seed,
        )


def markdown(record: dict) -> str:
    """Mean over the generation seeds, the worst in brackets."""
    newest = {(r["poison"], r["seed"], r["defence"]): r for r in record["rows"]}

    def cell(poison, defence):
        found = [
            statistics.fmean(row["tests"])
            for (name, _, behind), row in newest.items()
            if (name, behind) == (poison, defence)
        ]
        if not found:
            return ""
        worst = min(found) if poison == CLEAN else max(found)
        return f"{100 * statistics.fmean(found):.1f} ({100 * worst:.1f})"

    def of(poison, name):
        return [row for key, row in newest.items() if key[0] == poison and row.get(name)]

    lines = []
    for poison in (CLEAN, *POISONS):
        rows = [row for row in of(poison, "machine") if row["defence"] == "none"]
        seeds = ", ".join(str(row["seed"]) for row in rows)
        times = [row["generation_s"] for row in rows if "generation_s" in row]
        time = tables.seconds(statistics.median(times)) if times else ""
        lines.append((poison, seeds, *(cell(poison, name) for name in DEFENCES), time))
    machines = sorted(
        {f"{r['machine']['cpu']}, {r['machine']['threads']} threads" for r in record["rows"]}
    )
    return (
        "Accuracy on held-out training images in percent: the mean over the generation seeds, in "
        f"brackets the worst. {'; '.join(machines)}; the machine did other work meanwhile.\n\n"
        + tables.table(("trained on", "seeds", *DEFENCES.values(), "generation"), lines)
        + "\n"
    )


def with_table(text: str, record: dict) -> str:
    """The page with the record's table between its markers."""
    before, rest = text.split(BEGIN)
    return before + BEGIN + markdown(record) + END + rest.split(END)[1]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    names = [CLEAN, *POISONS]
    parser.add_argument("--data", type=Path, metavar="CIFAR")
    parser.add_argument("--work", type=Path, default=Path("scratch/strength"), metavar="WORK")
    parser.add_argument("--only", nargs="+", default=names, choices=names, metavar="NAME")
    parser.add_argument("--seeds", type=int, nargs="+", default=list(SEEDS), help="of generations")
    parser.add_argument("--record", type=Path, default=RESULT, help="the JSON file")
    parser.add_argument("--notes", action="store_true", help="only put the table into the page")
    args = parser.parse_args(argv)
    if args.notes:
        PAGE.write_text(with_table(PAGE.read_text(), tables.load(args.record)))
        return 0
    if args.data is None:
        parser.error("--data is needed, but for --notes")
    try:
        with data.only_writer(data.check_writable(args.work)):
            study = Study(args.data, args.work, args.record)
            for seed in args.seeds:
                for poison in args.only:
                    study.run(poison, seed)
    except (Interrupted, KeyboardInterrupt):
        print("interrupted: rows are recorded; run the same command again", file=sys.stderr)
        return 130
    print(markdown(study.record))
    return 0


if __name__ == "__main__":
    # A shell starts background commands deaf to Ctrl-C; both signals end this one in good order.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.default_int_handler)
    sys.exit(main())
