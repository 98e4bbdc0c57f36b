"""Time to protection: from images to a poison whose victims are at most 15 % right.

    python -m benchmarks.protection --data CIFAR [--work WORK] [--only NAME ...] [--seeds 7 11]
    python -m benchmarks.protection --plot docs/protection.svg

CIFAR has train/CLASS/*; the test images are not looked at. The first 300 images of each class are
poisoned, with a small_resnet of width 16, and the next 200 judge. After 1, 2, 4, ... epochs of each
method three victims (small_resnet, crops and flips, 12 epochs) learn the perturbation as it then
is; the first time that their mean is at most 15 % is the method's time to protection. Only the
epochs count, in wall seconds and in processor seconds; a method runs to the end of its schedule.

Every method but the eager ones is `generate`'s own loop. What is finished is in
benchmarks/results/protection.json at once; the same command goes on, and loses at most what came
after the last checkpoint. Run it on a machine that does nothing else, with OMP_WAIT_POLICY=PASSIVE
(`make protection`)."""

import argparse
import io
import signal
import statistics
import sys
import time
from dataclasses import replace
from pathlib import Path

import torch

from benchmarks.baselines.loop import EagerLoop
from benchmarks.harness import machine, tables
from benchmarks.studies.cifar10_settings import split
from benchmarks.studies.full_size import save
from miue_fast import data
from miue_fast.evaluation import run_cell
from miue_fast.generation import batches, prepare, presets
from miue_fast.generation.objectives.em import Em
from miue_fast.generation.run import BiLevelRun
from miue_fast.support.draws import Draws

RESULT = tables.RESULTS / "protection.json"
MODEL, WIDTH, VICTIM_EPOCHS, VICTIMS, NEEDED = "small_resnet", 16, 12, (0, 1, 2), 0.15
CHECKPOINTS = (1, 2, 4, 6, 8, 10, 12, 16, 20, 24, 28, 32, 40, 48, 64, 80, 100)
# name: (whether it is the eager loop, preset, options). The published settings are for ten times as
# many images: with their training batch an epoch of 3,000 has 24 model steps, so they are also run
# with a small one.
METHODS = {
    "fast": (False, "fast", {}),
    "publish": (False, "publish", {}),
    "em": (False, "fast", {"objective": Em.name}),
    "em-publish": (False, "publish", {"objective": Em.name}),
    "published": (False, "published", {}),
    "published-batch8": (False, "published", {"train_batch": 8}),
    "eager": (True, "published", {}),
    "eager-batch8": (True, "published", {"train_batch": 8}),
}


def made(method: str, images: data.Dataset, seed: int) -> EagerLoop | BiLevelRun:
    """The loop of a method before its first epoch; all methods with one seed start from the same
    weights.
    """
    eager, preset, changes = METHODS[method]
    options = presets.choose(preset, {**changes, "width": WIDTH, "seed": seed})
    options = options.resolved(len(images))
    draws = Draws("generate", batches.derive(seed, 0, "network"))
    network = prepare.source_network(MODEL, images, options, draws).to(options.place)
    if eager:
        return EagerLoop(network, images, options)
    network, layout = prepare.in_layout(network, options, images, options.place)
    layer = options.chosen.layer(MODEL)
    return BiLevelRun(network, layer, images, replace(options, channels_last=layout), None, MODEL)


def judged(delta: torch.Tensor, eps: float, images: data.Dataset, held_out: data.Dataset) -> dict:
    """What victims of a perturbation learn: their accuracies on held-out images, and the mean
    accuracy on their own training images.
    """
    poisoned = data.apply_poison(images.images, delta, eps)
    runs = [
        run_cell(
            poisoned,
            images.labels,
            held_out.images,
            held_out.labels,
            len(images.classes),
            victim=MODEL,
            epochs=VICTIM_EPOCHS,
            seed=seed,
        )
        for seed in VICTIMS
    ]
    return {"tests": [run.test for run in runs], "train": statistics.fmean(r.train for r in runs)}


class Kept:
    """The state of a loop at its last checkpoint, as one file."""

    def __init__(self, path: Path, loop: EagerLoop | BiLevelRun, key: dict) -> None:
        self.path, self.loop, self.key = path, loop, key
        self.optimizer = loop.optimizer if isinstance(loop, EagerLoop) else loop.trainer.optimizer
        self.clock = {"epoch": 0, "wall_s": 0.0, "processor_s": 0.0}

    def load(self) -> None:
        """Puts the loop where the file says. Errors: SystemExit where the file is of other
        settings.
        """
        if not self.path.exists():
            return
        state = torch.load(self.path, weights_only=True)
        if state["key"] != self.key:
            raise SystemExit(f"protection: {self.path} is of other settings; remove it")
        self.loop.network.load_state_dict(state["network"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.loop.delta.copy_(state["delta"])
        self.clock = state["clock"]

    def run(self, until: int) -> None:
        """Runs to the end of an epoch, with a clock, and writes the file."""
        while self.clock["epoch"] < until:
            wall, processor = time.perf_counter(), time.process_time()
            self.loop.epoch(self.clock["epoch"] + 1, lambda images: None)
            self.clock["epoch"] += 1
            self.clock["wall_s"] += time.perf_counter() - wall
            self.clock["processor_s"] += time.process_time() - processor
        content = io.BytesIO()
        torch.save(
            {
                "key": self.key,
                "network": self.loop.network.state_dict(),
                "optimizer": self.optimizer.state_dict(),
                "delta": self.loop.delta,
                "clock": self.clock,
            },
            content,
        )
        data.write_file(self.path, lambda file: file.write(content.getvalue()))


def measure(method: str, seed: int, sets: tuple, args: argparse.Namespace, record: dict) -> None:
    """Runs a method to the end of its schedule and records each checkpoint as it comes."""
    images, held_out = sets
    loop = made(method, images, seed)
    key = {"method": method, "seed": seed, "options": loop.options.as_dict(), "images": len(images)}
    row = next((r for r in record["runs"] if {k: r[k] for k in key} == key), None)
    if row is None:
        row = {**key, "machine": machine.environment(), "checkpoints": []}
        record["runs"].append(row)
    recorded = {point["epoch"] for point in row["checkpoints"]}
    epochs = loop.options.epochs
    wanted = sorted({*(n for n in CHECKPOINTS if n < epochs), epochs})
    if recorded >= set(wanted):
        return
    kept = Kept(args.work / f"{method}-seed{seed}.pt", loop, key)
    kept.load()
    for until in (n for n in wanted if n not in recorded):
        if until < kept.clock["epoch"]:
            raise SystemExit(f"protection: {kept.path} is ahead of {args.record}; remove it")
        kept.run(until)
        point = {**kept.clock, **judged(loop.delta.float(), loop.options.eps, images, held_out)}
        row["checkpoints"].append(point)
        save(record, args.record)
        print(
            f"{method}, seed {seed}, epoch {until}: {point['wall_s']:.1f} s, "
            f"{100 * statistics.fmean(point['tests']):.1f} %",
            file=sys.stderr,
            flush=True,
        )


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, metavar="CIFAR")
    parser.add_argument("--work", type=Path, default=Path("scratch/protection"), metavar="WORK")
    parser.add_argument("--only", nargs="+", default=list(METHODS), choices=METHODS, metavar="NAME")
    parser.add_argument("--seeds", type=int, nargs="+", default=[7], help="of the generation")
    parser.add_argument("--record", type=Path, default=RESULT, help="the JSON file")
    parser.add_argument("--plot", type=Path, metavar="SVG", help="draw the recorded curves")
    args = parser.parse_args(argv)
    if args.data is None and args.plot is None:
        parser.error("--data is needed, but for --plot")
    return args


def main(argv: list[str] | None = None) -> int:
    from benchmarks.pages import protection as page

    args = parse(argv)
    record = {"format": tables.FORMAT, "kind": "protection", "needed": NEEDED, "runs": []}
    if args.record.exists():
        record = tables.load(args.record)
    if args.plot is not None:
        page.draw(record, args.plot)
        return 0
    sets = tuple(split(args.data))
    try:
        with data.only_writer(data.check_writable(args.work)):
            for seed in args.seeds:
                for method in args.only:
                    measure(method, seed, sets, args, record)
    except KeyboardInterrupt:
        print("interrupted: checkpoints are kept; run the same command again", file=sys.stderr)
        return 130
    print(page.text(record))
    return 0


if __name__ == "__main__":
    # A shell starts background commands deaf to Ctrl-C; both signals end this one in good order.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.default_int_handler)
    sys.exit(main())
