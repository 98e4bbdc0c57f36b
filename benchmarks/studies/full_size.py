"""All of CIFAR-10 (JPEG): poisons of 50,000 images and the victims that judge them, in pieces.

    python -m benchmarks.studies.full_size --data CIFAR --out WORK [--only TEXT ...] [--list]

CIFAR has train/CLASS/* and test/CLASS/*; WORK keeps the poisons. A piece is one poison or one
victim, and its row goes into benchmarks/results/full_size.json as soon as it is finished. The same
command goes on where the last one stopped: Ctrl-C or a kill costs the epoch of a generation, or one
victim. Pieces run in the order of --list, the most wanted first; all of them take days on two
cores. OMP_WAIT_POLICY=PASSIVE (`make full-size` sets it) keeps waiting threads out of the
processor time.

The source is a ResNet-18 of width 32. Victims train with crops and flips; they are tested once,
after their last epoch. No setting was chosen on test images: those of the poisons come from 3,000
training images, judged on other training images, and the victims' recipe from the literature."""

import argparse
import dataclasses
import functools
import json
import signal
import sys
import time
from pathlib import Path

import torch

from benchmarks.harness import machine, tables
from miue_fast import data, generate, models
from miue_fast.evaluation import run_cell
from miue_fast.generation import Interrupted
from miue_fast.generation.objectives.em import Em
from miue_fast.generation.objectives.random import Random

RESULT = tables.RESULTS / "full_size.json"
IMAGES, WIDTH, VICTIM_WIDTH, EPOCHS = 50_000, 32, 64, 15
SOURCE = {"model": "resnet18", "batch": 512, "train_batch": 128, "seed": 7}
POISONS = {
    "fast": {"preset": "fast"},
    "publish": {"preset": "publish"},
    "em": {"preset": "fast", "objective": Em.name},
    "em-publish": {"preset": "publish", "objective": Em.name},
    "random": {"objective": Random.name},
}
CLEAN = "clean"
SHORT = models.Recipe(EPOCHS, 0.1, 128, weight_decay=5e-4, schedule="one-cycle")
RECIPES = {"resnet18": SHORT, "vgg16": dataclasses.replace(SHORT, lr=0.05)}  # others: their own
ATTACKED = "adversarial:8:steps=3:step=4"
KEPT_OF_MACHINE = ("cpu", "cores", "threads", "torch", "cpu_level", "commit", "uncommitted_changes")


@dataclasses.dataclass(frozen=True)
class Generation:
    """A poison of `POISONS`."""

    poison: str

    @property
    def name(self) -> str:
        return f"generation {self.poison}"


@dataclasses.dataclass(frozen=True)
class Victim:
    """A network trained on clean images or on a poison. defence: as `evaluation.defence` reads it;
    width: None for the network's own.
    """

    trained_on: str
    defence: str = "none"
    seed: int = 0
    network: str = "resnet18"
    width: int | None = VICTIM_WIDTH

    @property
    def name(self) -> str:
        return f"victim {self.network} {self.trained_on} {self.defence} seed {self.seed}"


Piece = Generation | Victim


def pieces(victim_width: int = VICTIM_WIDTH) -> list[Piece]:
    """Every piece, the most wanted first."""

    def victims(poisons, defences=("none",), seeds=(0,), network="resnet18", width=victim_width):
        return [Victim(p, d, s, network, width) for d in defences for s in seeds for p in poisons]

    published, smaller = ("none", "jpeg:60", "resize:24"), ("jpeg:60", "resize:24")
    made = ("fast", "publish", "em", "em-publish")
    return [
        *victims([CLEAN]),
        Generation("fast"),
        *victims(["fast"]),
        Generation("publish"),
        *victims(["publish"], published),
        Generation("em"),
        *victims(["em"]),
        Generation("em-publish"),
        *victims(["em-publish"], published),
        *victims([CLEAN, "fast", "em"], smaller),
        *victims([CLEAN, *made], seeds=(1,)),
        *victims(["publish", "em-publish"], smaller, (1,)),
        *victims(["publish", "fast", "em-publish"], ("jpeg:90", "jpeg:75", "jpeg:30")),
        *victims(["publish", CLEAN], ("jpeg:10", "resize:16", "grayscale")),
        *victims(["fast", "em-publish"], ("resize:16", "grayscale")),
        *victims([CLEAN, "fast", "publish"], network="vgg16"),
        Generation("random"),
        *victims([CLEAN, "random", *made], network="lenet5", width=None),
        *victims([CLEAN, "random", *made], network="mlp3", width=None),
        *victims(["random"]),
        *victims(["fast", CLEAN], [ATTACKED], width=victim_width // 2),
    ]


def save(values: dict, path: Path) -> None:
    """Writes a JSON file, whole or not at all."""
    content = json.dumps(values, indent=1, allow_nan=False) + "\n"
    data.write_file(path, lambda file: file.write(content.encode()))


class Study:
    """The pieces that are recorded, and how the others are made."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args, self.record = args, args.record
        self.rows = json.loads(self.record.read_text())["pieces"] if self.record.exists() else []

    def settings(self, piece: Piece) -> dict:
        """What a piece is, whatever the machine: a row with these settings is not made again."""
        args = self.args
        if isinstance(piece, Generation):
            found = {**SOURCE, "width": args.width, **POISONS[piece.poison], "images": args.images}
            longer = {} if args.epochs is None else {"epochs": args.epochs}
            return {"piece": "generation", "poison": piece.poison, **found, **longer}
        made = None if piece.trained_on == CLEAN else self.settings(Generation(piece.trained_on))
        return {
            "piece": "victim",
            **dataclasses.asdict(piece),
            "poison": made,
            "images": args.images,
            "recipe": dataclasses.asdict(self.recipe(piece)),
        }

    def recipe(self, victim: Victim) -> models.Recipe:
        """How a victim is trained, before its defence changes anything."""
        short = RECIPES.get(victim.network)
        if short is None:
            return models.NETWORKS[victim.network].recipe
        return dataclasses.replace(short, epochs=self.args.victim_epochs)

    def found(self, piece: Piece) -> dict | None:
        """The recorded row of a piece, or None."""
        settings = self.settings(piece)
        return next((row for row in self.rows if row["settings"] == settings), None)

    def make(self, piece: Piece) -> None:
        """Makes a piece and records it."""
        print(f"{piece.name} ...", file=sys.stderr, flush=True)
        before = machine.environment()
        result = self.generation(piece) if isinstance(piece, Generation) else self.victim(piece)
        row = {"name": piece.name, "settings": self.settings(piece), **result}
        row["machine"] = {name: before[name] for name in KEPT_OF_MACHINE}
        self.rows.append(row)
        record = {"format": tables.FORMAT, "kind": "full_size", "classes": self.clean.classes}
        save({**record, "pieces": self.rows}, self.record)
        shown = f"test {row['test']:.1%}, " if "test" in row else ""
        print(f"{piece.name}: {shown}{row['seconds']:,.0f} s", file=sys.stderr, flush=True)

    @functools.cached_property
    def clean(self) -> data.Dataset:
        """The training images."""
        classes = sum(folder.is_dir() for folder in (self.args.data / "train").iterdir())
        found = data.load(self.args.data / "train", per_class=self.args.images // classes)
        if len(found.images) != self.args.images:
            raise SystemExit(f"full_size: expected {self.args.images} images, got {len(found)}")
        return found

    @functools.cached_property
    def test(self) -> data.Dataset:
        """The clean test images."""
        return data.load_test(self.args.data / "test")

    def folder(self, poison: str) -> Path:
        """Where a poison is kept."""
        return self.args.out / f"{poison}-width{self.args.width}-{self.args.images}"

    def generation(self, piece: Generation) -> dict:
        """Goes on with a generation to its end. Seconds are those of its epochs. Processor seconds
        are measured while the command runs; what a kill takes is estimated from the rest.
        """
        folder, options = self.folder(piece.poison), self.settings(piece)
        clock = folder.with_suffix(".clock.json")
        known = json.loads(clock.read_text()) if clock.exists() else {"wall": 0, "processor": 0}
        wall, processor = time.perf_counter(), time.process_time()
        try:
            named = {k: v for k, v in options.items() if k not in ("piece", "poison", "images")}
            result = generate(self.clean, folder, **named, dtype=self.args.dtype)
        finally:
            known["wall"] += time.perf_counter() - wall
            known["processor"] += time.process_time() - processor
            save(known, clock)
        history = result.history
        seconds = sum(row["seconds"] for row in history) if history else known["wall"]
        return {
            "seconds": seconds,
            "processor_seconds": seconds * known["processor"] / known["wall"],
            "epochs": len(history),
            "source_accuracy": history[-1]["train_accuracy"] / 100 if history else None,
            "options": result.options.as_dict(),
            "dtype": result.options.dtype,
        }

    @functools.lru_cache(1)  # noqa: B019  (one study per process)
    def images(self, poison: str) -> torch.Tensor:
        """What victims of a poison train on: uint8 [N, C, H, W]."""
        if poison == CLEAN:
            return self.clean.images
        piece, folder = Generation(poison), self.folder(poison)
        if self.found(piece) is None:
            self.make(piece)
        if not (folder / data.POISON_FILES[0]).exists():  # recorded on another machine
            self.generation(piece)
        delta, manifest = data.load_poison(folder, self.clean)
        assert manifest is not None, "a folder of generate has one"
        return data.apply_poison(self.clean.images, delta, manifest["eps"])

    def victim(self, piece: Victim) -> dict:
        """Trains a victim and tests it once."""
        network, side = piece.network, self.clean.images.shape[-1]
        if piece.width not in (None, models.NETWORKS[network].width):
            network = functools.partial(
                models.build, network, width=piece.width, normalize=False, size=side
            )
        images, processor = self.images(piece.trained_on), time.process_time()
        run = run_cell(
            images,
            self.clean.labels,
            self.test.images,
            self.test.labels,
            len(self.clean.classes),
            victim=network,
            defence=piece.defence,
            seed=piece.seed,
            recipe=self.recipe(piece),
            dtype=self.args.dtype,
        )
        return {
            "train": run.train,
            "test": run.test,
            "test_classes": run.test_classes,
            "robust": run.robust,
            "test_images": len(self.test.images),
            "seconds": run.seconds,
            "processor_seconds": time.process_time() - processor,
            "dtype": run.dtype,
        }


def listed(study: Study, chosen: list[Piece]) -> str:
    """Which pieces are done, and what they took."""
    rows = []
    for piece in chosen:
        row = study.found(piece)
        test = f"{row['test']:.1%}" if row and "test" in row else ""
        cells = ("done", f"{row['seconds']:,.0f}", test) if row else ("missing", "", "")
        rows.append((piece.name, *cells))
    return tables.table(("piece", "", "seconds", "test"), rows)


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, metavar="CIFAR")
    parser.add_argument("--out", type=Path, metavar="WORK", help="where poisons are kept")
    parser.add_argument(
        "--only", nargs="+", default=[""], metavar="TEXT", help="pieces with one of these in a name"
    )
    parser.add_argument("--list", action="store_true", help="say what is done, and do nothing")
    parser.add_argument("--record", type=Path, default=RESULT, help="the JSON file")
    parser.add_argument("--images", type=int, default=IMAGES, help="the first of each class")
    parser.add_argument("--width", type=int, default=WIDTH, help="of the source")
    parser.add_argument("--epochs", type=int, help="of a generation; default: its preset's")
    parser.add_argument("--victim-width", type=int, default=VICTIM_WIDTH)
    parser.add_argument("--victim-epochs", type=int, default=EPOCHS)
    parser.add_argument("--dtype", default="auto", help="of all networks")
    args = parser.parse_args(argv)
    if not args.list and (args.data is None or args.out is None):
        parser.error("--data and --out are needed, but for --list")
    return args


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    study = Study(args)
    chosen = [
        piece
        for piece in pieces(args.victim_width)
        if any(text in piece.name for text in args.only)
    ]
    if args.list:
        print(listed(study, chosen))
        return 0
    try:
        with data.only_writer(data.check_writable(args.out)):
            for piece in chosen:
                if study.found(piece) is None:
                    study.make(piece)
    except (Interrupted, KeyboardInterrupt) as stopped:
        told = str(stopped) or "interrupted: finished pieces are recorded"
        print(f"{told}; run the same command again", file=sys.stderr)
        return 130
    print(listed(study, chosen))
    return 0


if __name__ == "__main__":
    # A shell starts background commands deaf to Ctrl-C; both signals end this one in good order.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.default_int_handler)
    sys.exit(main())
