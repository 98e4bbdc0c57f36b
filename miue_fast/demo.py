"""The whole story on drawn shapes, without a download: generate, export, verify, train three victims, draw the figure.

`python -m miue_fast.demo` is `miue-fast demo`. The last line of its output is one JSON object.
"""

import json
import shutil
import sys
import time

import torch

from . import data
from ._checks import fail
from .evaluate import evaluate, figure, poisoned_images
from .evaluate.figure import missing as figure_missing
from .generate import generate

EPS = 8 / 255
TRAIN, TEST, DIFFICULTY = 3000, 1000, 1.0
SOURCE = {"preset": "paper", "model": "small_resnet", "epochs": 12, "steps": 8}  # the paper: resnet18, 100 epochs, 10 steps
# Flips only, as the source model saw them: twelve epochs of a small source do not give a poison that survives random crops here.
VICTIM = {"victim": "small_resnet", "epochs": 16, "lr": 0.1, "batch": 32, "crop": 0}
MADE = ("poison", "poisoned", "figure.png", "result.json")
MARK = ".miue-fast-demo"  # in a folder that a demo made: only there does the next one replace things


def run(out, seed=0):
    """Writes everything to the folder `out`; returns the exit code: 0 if the poison did what it should, else 1."""
    started = time.perf_counter()
    seconds = {}

    def timed(name, work, *args, **options):
        begin = time.perf_counter()
        result = work(*args, **options)
        seconds[name] = round(time.perf_counter() - begin, 1)
        return result

    _prepare(out)
    print(f"1. Drawing {TRAIN} training and {TEST} test images of ten shapes, 32 x 32.")
    clean = timed("draw", data.shapes, TRAIN, seed=2 * seed + 1, difficulty=DIFFICULTY)
    test = data.shapes(TEST, seed=2 * seed + 2, difficulty=DIFFICULTY)
    print(f"2. Generating: preset 'paper', budget 8/255, small ResNet, {SOURCE['epochs']} epochs of {SOURCE['steps']} steps")
    print("   (the paper: ResNet-18, 100 epochs of 10 steps).")
    bar = sys.stderr.isatty()
    result = timed("generate", generate, clean, out / "poison", eps=EPS, seed=7 + seed, overwrite=True, progress=bar, **SOURCE)
    print("3. Exporting the poisoned images as PNG files and reading them back.")
    timed("export", data.export_folder, clean, result.delta, out / "poisoned", eps=EPS)
    report = timed("verify", data.verify, clean, out / "poisoned", eps=EPS)
    print(f"   {report.count} files, largest change {report.max_linf}/255: {'ok' if report.ok else report.problems[0]}")
    print(f"4. Training three victims, {VICTIM['epochs']} epochs each: on clean images, on those PNG files, on random noise of the budget")
    print("   (flips as the only augmentation; the standard adds random crops).")
    table = timed("victims", evaluate, clean, out / "poisoned", test, eps=EPS, seeds=[seed], progress=bar, **VICTIM)
    print(table)
    if figure_missing():
        print(f"5. {figure_missing()}")
    else:
        _, poisoned = poisoned_images(clean, out / "poisoned")
        print(f"5. Figure: {timed('figure', figure, table, clean, poisoned, out / 'figure.png')}")
    seconds["total"] = round(time.perf_counter() - started, 1)
    told = summary(table, report, seconds, seed)
    text = json.dumps(told)
    data.write_file(out / "result.json", lambda file: file.write(f"{text}\n".encode()))
    if not told["passed"]:
        print("FAILED: expected clean test >= 80 %, poisoned <= 20 %, random noise within 8 points of clean, and an export in the budget.")
    print(text)
    return 0 if told["passed"] else 1


def _prepare(out):
    """A new or empty folder, or one that an earlier demo made: that one's results are removed."""
    if out.is_dir() and any(out.iterdir()) and not (out / MARK).exists():
        fail("demo", "out", "a new or empty folder, or one of an earlier demo", f"{out}, which holds something else")
    data.check_writable(out)
    (out / MARK).touch()
    for old in (out / name for name in MADE):
        shutil.rmtree(old) if old.is_dir() else old.unlink(missing_ok=True)


def summary(table, report, seconds, seed):
    """The numbers in percent, and whether they are what a working poison gives."""
    test, train = ({row: round(100 * of(row), 1) for row in table.rows} for of in (table.test, table.train))
    passed = report.ok and test["clean"] >= 80 and test["poisoned"] <= 20 and abs(test["clean"] - test["random noise"]) <= 8
    return {
        "clean_test": test["clean"], "poisoned_test": test["poisoned"], "random_noise_test": test["random noise"],
        "clean_train": train["clean"], "poisoned_train": train["poisoned"], "random_noise_train": train["random noise"],
        "eps": EPS, "linf_levels": report.max_linf, "files": report.count, "seed": seed, "threads": torch.get_num_threads(),
        "seconds": seconds, "passed": passed,
    }  # fmt: skip


if __name__ == "__main__":
    from .cli import main

    sys.exit(main(["demo", *sys.argv[1:]]))
