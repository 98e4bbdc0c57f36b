"""What the poisons of the presets withstand: 3,000 images, several generation seeds, defences.

    python -m benchmarks.studies.strength --data CIFAR [--work WORK] [--only NAME ...]
    python -m benchmarks.pages.readme --readme      # put the tables into the pages

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
from benchmarks.pages.strength import CLEAN, DEFENCES, text
from benchmarks.studies.cifar10_settings import split
from benchmarks.studies.full_size import KEPT_OF_MACHINE, save
from miue_fast import data, generate
from miue_fast.evaluation import run_cell
from miue_fast.generation import Interrupted, presets
from miue_fast.generation.objectives.em import Em

RESULT = tables.RESULTS / "strength.json"
MODEL, WIDTH, VICTIM_EPOCHS, VICTIMS, SEEDS = "small_resnet", 16, 12, (0, 1, 2), (7, 11, 3)
POISONS = {
    "fast": {"preset": "fast"},
    "publish": {"preset": "publish"},
    "em": {"preset": "fast", "objective": Em.name},
    "em-publish": {"preset": "publish", "objective": Em.name},
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
        """(uint8 images [N, C, H, W], what a row says of the generation)."""
        if poison == CLEAN:
            return self.images.images, {}
        folder = self.work / f"{poison}-seed{seed}"
        made = {**POISONS[poison], "model": MODEL, "width": WIDTH, "seed": seed}
        result = generate(self.images, folder, **made)
        images = data.apply_poison(self.images.images, result.delta, result.options.eps)
        return images, {"generation_s": sum(row["seconds"] for row in result.history)}

    def options(self, poison: str, seed: int) -> dict | None:
        """All options of a poison; None for clean images."""
        if poison == CLEAN:
            return None
        changes = {**POISONS[poison], "width": WIDTH, "seed": seed}
        options = presets.choose(changes.pop("preset"), changes)
        return options.resolved(len(self.images)).as_dict()

    def run(self, poison: str, seed: int) -> None:
        """Judges one poison behind every defence that is not recorded."""
        key = {"poison": poison, "seed": seed, "options": self.options(poison, seed)}
        missing = [name for name in DEFENCES if not self.has({**key, "defence": name})]
        if not missing:
            return
        images, told = self.poisoned(poison, seed)
        for defence in missing:
            # Of a clean set the seed is that of its one victim.
            seeds = [seed] if poison == CLEAN else VICTIMS if defence == "none" else VICTIMS[:1]
            victims = [self.victim(images, defence, number) for number in seeds]
            row = {
                **key,
                **told,
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


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    names = [CLEAN, *POISONS]
    parser.add_argument("--data", type=Path, required=True, metavar="CIFAR")
    parser.add_argument("--work", type=Path, default=Path("scratch/strength"), metavar="WORK")
    parser.add_argument("--only", nargs="+", default=names, choices=names, metavar="NAME")
    parser.add_argument("--seeds", type=int, nargs="+", default=list(SEEDS), help="of generations")
    parser.add_argument("--record", type=Path, default=RESULT, help="the JSON file")
    args = parser.parse_args(argv)
    try:
        with data.only_writer(data.check_writable(args.work)):
            study = Study(args.data, args.work, args.record)
            for seed in args.seeds:
                for poison in args.only:
                    study.run(poison, seed)
    except (Interrupted, KeyboardInterrupt):
        print("interrupted: rows are recorded; run the same command again", file=sys.stderr)
        return 130
    print(text(study.record))
    return 0


if __name__ == "__main__":
    # A shell starts background commands deaf to Ctrl-C; both signals end this one in good order.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.default_int_handler)
    sys.exit(main())
