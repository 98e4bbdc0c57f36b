"""The command line beside one busy process per core: wall time against the idle machine, with
passive and other waiting.

python -m benchmarks.studies.busy --out benchmarks/results/busy.json

It takes eight minutes, on a machine that does nothing else.

Each run is `miue-fast generate` on drawn shapes with two threads, as a user starts it; other ways
of waiting are asked for in its environment. Idle and busy runs take turns. Spinning beside busy
processes may take minutes: it is stopped after --limit seconds, and its row then says "more than".
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.harness import machine, tables
from miue_fast import data

RESULT = tables.RESULTS / "busy.json"
NEEDED = 2.5  # times the idle wall time, beside one busy process per core
OPTIONS = ["--model", "small_resnet", "--batch", "128", "--quiet"]
# passive is what the command line does by itself, short looks a thousand times before it sleeps,
# active is libgomp's way.
WAITING = {
    "passive": {},
    "short spin": {"OMP_WAIT_POLICY": "passive", "GOMP_SPINCOUNT": "1000"},
    "active": {"OMP_WAIT_POLICY": "active"},
}


def run(images, words, variables, hogs, limit):
    """(wall seconds or None after `limit`, processor seconds) of one command beside so many
    processes that only count.
    """
    env = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("OMP_", "GOMP_", "KMP_"))
    }
    others = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(hogs)]
    try:
        with tempfile.TemporaryDirectory() as out:
            command = [
                sys.executable,
                "-m",
                "miue_fast",
                "generate",
                "--data",
                images,
                "--out",
                Path(out, "poison"),
                *OPTIONS,
                *words,
            ]
            before, started = os.times(), time.perf_counter()
            process = subprocess.Popen(
                [str(word) for word in command],
                stdout=sys.stderr,
                env={**env, "OMP_NUM_THREADS": "2", **variables},
            )
            try:
                if code := process.wait(limit):
                    raise SystemExit(f"busy: the command ended with exit code {code}")
                wall = time.perf_counter() - started
            except subprocess.TimeoutExpired:
                wall = None
            finally:
                process.kill()
                process.wait()
            after = os.times()
            return (
                wall,
                after.children_user
                + after.children_system
                - before.children_user
                - before.children_system,
            )
    finally:
        for other in others:
            other.kill()
            other.wait()


def rows(images, words, rounds, limit):
    """One row per way of waiting: medians over the rounds; a round is idle, then busy. Spinning
    beside busy processes runs once.
    """
    found = {name: {"idle": [], "busy": []} for name in WAITING}
    for number in range(rounds):
        for name, variables in WAITING.items():
            for state, hogs in (("idle", 0), ("busy", os.cpu_count())):
                if number == 0 or (name, state) != ("active", "busy"):
                    print(f"round {number + 1}: {name}, {state}", file=sys.stderr, flush=True)
                    found[name][state].append(run(images, words, variables, hogs, limit))
    for name, states in found.items():
        row = {"waiting": name, "limit_s": limit}
        for state, times in states.items():
            walls = [wall for wall, _ in times]
            row |= {
                f"{state}_wall_s": None if None in walls else statistics.median(walls),
                f"{state}_walls_s": walls,
                f"{state}_processor_s": statistics.median(used for _, used in times),
            }
        idle, busy = row["idle_wall_s"], row["busy_wall_s"]
        yield row | {"times_idle": busy / idle if idle and busy else None}


def markdown(record):
    def text(row):
        idle, limit = (
            tables.seconds(row["idle_wall_s"] or row["limit_s"]),
            tables.seconds(row["limit_s"]),
        )
        busy = tables.seconds(row["busy_wall_s"]) if row["busy_wall_s"] else f"more than {limit}"
        times = tables.ratio(
            row["times_idle"] or row["limit_s"] / (row["idle_wall_s"] or row["limit_s"])
        )
        return (
            row["waiting"],
            idle,
            tables.seconds(row["idle_processor_s"]),
            busy,
            times if row["times_idle"] else f"more than {times}",
        )

    head = (
        "idle threads",
        "wall, idle machine",
        "processor time",
        f"wall beside {record['hogs']} busy processes",
        "times",
    )
    return tables.table(head, [text(row) for row in record["rows"]])


def main(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="a tiny run: whether it runs")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--limit", type=float, default=60, help="seconds of one run")
    parser.add_argument("--out", type=Path, help="JSON file")
    args = parser.parse_args(argv)
    environment = machine.environment()
    shapes = data.shapes(100 if args.quick else 600, seed=0)
    words = ["--epochs", "1", "--steps", "1"] if args.quick else ["--epochs", "3", "--steps", "8"]
    with tempfile.TemporaryDirectory() as folder:
        images = Path(folder, "shapes.npz")
        data.export_npz(shapes, shapes.images * 0.0, images, eps=0)
        found = list(rows(images, words, 1 if args.quick else args.rounds, args.limit))
    passive = found[0]["times_idle"]
    target = {
        "name": "the command line beside one busy process per core: wall time against idle",
        "needed": NEEDED,
        "measured": passive,
        "met": passive is not None and passive <= NEEDED,
    }
    record = {
        "format": tables.FORMAT,
        "kind": "busy",
        "quick": args.quick,
        "environment": environment,
        "hogs": os.cpu_count(),
        "options": [*OPTIONS, *words],
        "images": len(shapes),
        "rows": found,
        "targets": [target],
    }
    print(markdown(record))
    print(f"{target['name']}: needed {NEEDED}x, {'met' if target['met'] else 'MISSED'}")
    if args.out:
        tables.save(record, args.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
