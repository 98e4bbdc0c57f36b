"""The demo: draws shapes, generates a poison, exports and verifies it, trains three victims and
draws the figure, without a download.

`python -m miue_fast demo` is `miue-fast demo`. The last line of its output is one JSON object.
"""

import json
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from .. import data
from ..data.kept import pack, read_part
from ..evaluation import evaluate, poisoned_images
from ..evaluation.table import Table
from ..generation import Interrupted, generate
from ..plots.evaluation import figure
from ..plots.evaluation import missing as figure_missing
from ..support.messages import fail, printable
from ..support.output import say
from ..support.version import __version__

EPS = 8 / 255
TRAIN, TEST, DIFFICULTY = 3000, 1000, 1.0
SOURCE = {
    "preset": "paper",
    "model": "small_resnet",
    "epochs": 12,
    "steps": 8,
}  # the paper: resnet18, 100 epochs, 10 steps
# Flips only, as the source model saw them: twelve epochs of a small source do not give a poison
# that survives random crops here.
VICTIM = {"victim": "small_resnet", "epochs": 16, "lr": 0.1, "batch": 32, "crop": 0}
MARK = ".miue-fast-demo"  # what demo a folder is of: only there does the next one replace things
RESULTS, PARTS = ("figure.png", "result.json"), ("poison", "poisoned", "victims")


def run(out: Path, seed: int = 0) -> int:
    """Writes everything to the folder `out` and returns the exit code: 0 if the poison did what it
    should, else 1.

    After an interruption the same call goes on, at the last epoch of the poison or at the next
    victim. A finished demo starts again. Errors: ValueError (somebody else's files in `out`),
    OSError, Interrupted.
    """
    with data.only_writer(data.check_writable(out)):
        _prepare(out, seed)
        try:
            return _run(out, seed)
        except (KeyboardInterrupt, Interrupted):
            raise Interrupted(
                f"interrupted: what was finished is kept in {out}; "
                "the same command goes on from there"
            ) from None


def _run(out, seed):
    started = time.perf_counter()
    seconds = {}

    def timed(name, work, *args, **options):
        begin = time.perf_counter()
        result = work(*args, **options)
        seconds[name] = round(time.perf_counter() - begin, 1)
        return result

    say(f"1. Drawing {TRAIN} training and {TEST} test images of ten shapes, 32 x 32.")
    clean = timed("draw", data.shapes, TRAIN, seed=2 * seed + 1, difficulty=DIFFICULTY)
    test = data.shapes(TEST, seed=2 * seed + 2, difficulty=DIFFICULTY)
    data.check_folder(clean, out / "poisoned", eps=EPS, overwrite=True)
    say(
        "2. Generating: preset 'paper', budget 8/255, small ResNet, "
        f"{SOURCE['epochs']} epochs of {SOURCE['steps']} steps"
    )
    say("   (the paper: ResNet-18, 100 epochs of 10 steps).")
    bar = sys.stderr is not None and not sys.stderr.closed and sys.stderr.isatty()
    result = timed(
        "generate", generate, clean, out / "poison", eps=EPS, seed=7 + seed, progress=bar, **SOURCE
    )
    say("3. Exporting the poisoned images as PNG files and reading them back.")
    timed(
        "export", data.export_folder, clean, result.delta, out / "poisoned", eps=EPS, overwrite=True
    )
    proof = timed("verify", data.verify, clean, out / "poisoned", eps=EPS)
    say(
        f"   {proof.count} files, largest change {proof.max_linf}/255: "
        f"{'ok' if proof.ok else proof.problems[0]}"
    )
    say(
        f"4. Training three victims, {VICTIM['epochs']} epochs each: "
        "on clean images, on those PNG files, on random noise of the budget"
    )
    say("   (flips as the only augmentation; the standard adds random crops).")
    table = timed(
        "victims",
        evaluate,
        clean,
        out / "poisoned",
        test,
        eps=EPS,
        seeds=[seed],
        progress=bar,
        keep=out / "victims",
        **VICTIM,
    )
    say(str(table))
    if figure_missing():
        say(f"5. {figure_missing()}")
    else:
        _, poisoned = poisoned_images(clean, out / "poisoned")
        drawn = timed("figure", figure, table, clean, poisoned, out / "figure.png")
        say(f"5. Figure: {printable(drawn, most=None)}")
    seconds["total"] = round(time.perf_counter() - started, 1)
    told = summary(table, proof, seconds, seed)
    text = json.dumps(told)
    data.write_owned({out / "result.json": lambda file: file.write(f"{text}\n".encode())})
    if not told["passed"]:
        say(
            "FAILED: expected clean test >= 80 %, poisoned <= 20 %, "
            "random noise within 8 points of clean, and an export in the budget."
        )
    say(text)
    return 0 if told["passed"] else 1


def _prepare(out, seed):
    """Accepts a new or empty folder, or one of a demo, whose own files are removed unless they are
    of this very demo and it was interrupted.
    """
    own = data.Owned(out)
    if not own.owns(MARK) and any(path.name not in (MARK, data.LIST) for path in out.iterdir()):
        fail(
            "demo",
            "out",
            "a new or empty folder, or one of an earlier demo",
            f"{out}, which holds something else; move it away",
        )
    own.check("demo", [MARK, *RESULTS])
    key = {
        "version": __version__,
        "seed": seed,
        "images": [TRAIN, TEST, DIFFICULTY],
        "eps": EPS,
        "source": SOURCE,
        "victim": VICTIM,
    }
    if own.owns(MARK) and read_part(out / MARK, key) and not (out / "result.json").exists():
        say(f"Going on with the interrupted demo in {printable(out, most=None)}.")
        return
    for part in (data.Owned(out / name) for name in PARTS):
        part.remove(part.names())
    own.remove(RESULTS)
    own.write({MARK: lambda file: file.write(pack({"key": key}))})


def summary(
    table: Table, proof: data.Verification, seconds: Mapping[str, float], seed: int
) -> dict[str, Any]:
    """The numbers in percent, and whether they are what a working poison gives."""
    test, train = (
        {row: round(100 * of(row), 1) for row in table.rows} for of in (table.test, table.train)
    )
    passed = (
        proof.ok
        and test["clean"] >= 80
        and test["poisoned"] <= 20
        and abs(test["clean"] - test["random noise"]) <= 8
    )
    return {
        "clean_test": test["clean"],
        "poisoned_test": test["poisoned"],
        "random_noise_test": test["random noise"],
        "clean_train": train["clean"],
        "poisoned_train": train["poisoned"],
        "random_noise_train": train["random noise"],
        "eps": EPS,
        "linf_levels": proof.max_linf,
        "files": proof.count,
        "seed": seed,
        "threads": torch.get_num_threads(),
        "seconds": seconds,
        "passed": passed,
    }
