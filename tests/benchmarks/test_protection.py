"""benchmarks/protection.py: the eager loop is the library's, checkpoints are recorded once, and the
first good one is the time to protection.
"""

import json

import pytest
import torch
from _images import write_images
from _schema import nameless

from benchmarks import protection
from benchmarks.baselines.loop import EagerLoop
from benchmarks.pages import protection as page
from miue_fast import data
from miue_fast.generation import PRESETS, Options
from miue_fast.generation.presets import Preset

QUICK = {"epochs": 3, "steps": 2, "train_batch": 16, "batch": 24}


@pytest.fixture
def place(tmp_path, monkeypatch):
    """train/CLASS/*.png: 60 shapes of three classes, and presets of three epochs."""
    write_images(tmp_path / "images/train", data.shapes(60, size=16, classes=3))
    quick = {
        "fast": (False, "fast", {}),
        "em": (False, "fast", {"objective": "em"}),
        "eager": (True, "published", QUICK),
        "published": (False, "published", QUICK),
    }
    monkeypatch.setattr(protection, "METHODS", quick)
    monkeypatch.setitem(PRESETS, "fast", Preset("fast", "", Options(**QUICK)))
    for name, value in {
        "WIDTH": 4,
        "VICTIM_EPOCHS": 1,
        "VICTIMS": (0, 1),
        "CHECKPOINTS": (1, 9),
    }.items():
        monkeypatch.setattr(protection, name, value)
    monkeypatch.setattr("benchmarks.studies.cifar10_settings.PER_CLASS", 12)
    monkeypatch.setattr("benchmarks.studies.cifar10_settings.HELD_OUT", 8)
    return tmp_path


def run(place, *more):
    words = ["--data", place / "images", "--work", place / "work", "--record", place / "r.json"]
    return protection.main([*map(str, words), *more])


def test_the_eager_loop_is_the_librarys(place):
    """The same weights and draws: perturbations differ where a gradient is zero but for roundings,
    which are few.
    """
    images = data.shapes(60, size=16, classes=3)
    eager, ours = (protection.made(name, images, 7) for name in ("eager", "published"))
    assert isinstance(eager, EagerLoop) and not isinstance(ours, EagerLoop)
    for number in (1, 2):
        for loop in (eager, ours):
            loop.epoch(number, lambda images: None)
        same = (eager.delta - ours.delta).abs() < 1e-6
        assert same.float().mean() > 0.99 and eager.delta.abs().max() <= 8 / 255 + 1e-7
    mine, theirs = eager.network.state_dict(), ours.network.state_dict()
    assert all(torch.allclose(mine[k], theirs[k], atol=1e-3) for k in mine)


def test_checkpoints_are_recorded_once_and_an_interrupted_run_has_the_same_digits(
    place, monkeypatch, capsys
):
    real, judged = protection.run_cell, []

    def stopped(*args, **options):
        judged.append(options["seed"])
        if len(judged) == 4:
            raise KeyboardInterrupt
        return real(*args, **options)

    monkeypatch.setattr(protection, "run_cell", stopped)
    assert run(place, "--only", "fast", "eager") == 130
    assert "run the same command again" in capsys.readouterr().err
    assert run(place, "--only", "fast", "eager") == 0
    assert len(judged) == 4 + 2 + 4, "two checkpoints of two victims each; one victim was lost"
    assert run(place, "--only", "fast", "eager") == 0 and len(judged) == 10
    found = json.loads((place / "r.json").read_text())
    nameless(found)
    assert [(r["method"], r["seed"]) for r in found["runs"]] == [("fast", 7), ("eager", 7)]
    whole = place / "whole.json"
    assert run(place, "--only", "fast", "--record", str(whole), "--work", str(place / "w")) == 0
    again = json.loads(whole.read_text())["runs"][0]
    for one, other in zip(found["runs"][0]["checkpoints"], again["checkpoints"], strict=True):
        assert one["epoch"] == other["epoch"] and one["tests"] == other["tests"]
        assert one["processor_s"] > 0 and one["wall_s"] > 0
    assert [point["epoch"] for point in again["checkpoints"]] == [1, 3]
    with pytest.raises(SystemExit, match="ahead of"):
        run(place, "--only", "fast", "--record", str(place / "new.json"))


def test_the_first_checkpoint_that_is_low_enough_is_the_time(tmp_path):
    machine = protection.machine.environment()

    def method(name, *tests, seconds=1.0):
        points = [
            {"epoch": k, "wall_s": k * seconds, "processor_s": 2 * k * seconds, "tests": each}
            for k, each in enumerate(tests, 1)
        ]
        options = {"epochs": len(tests)}
        return {
            **{"method": name, "seed": 7, "options": options, "machine": machine},
            "checkpoints": points,
        }

    fast = method("fast", [0.4, 0.4], [0.13, 0.16], [0.1, 0.13])
    slow = method("eager-batch8", [0.4, 0.4], [0.16, 0.16], [0.1, 0.19], seconds=20.0)
    record = {"needed": 0.15, "runs": [slow, fast, method("em", [0.3, 0.2])]}
    assert page.reached(fast, 0.15)["epoch"] == 2
    text = page.text(record)
    assert "| `fast` | 7 | 2 | 2.0 | 4.0 | 30x | 11.5 (13.0) | 3 of 3 | 6 |" in text
    assert "| em with the settings of `fast` | 7 | not reached |  |  |  | 25.0 (30.0) |" in text
    assert "No results yet" in page.text(None) and set(page.ABOUT) == set(protection.METHODS)
    assert set(page.COLOURS) == set(page.ABOUT)
    pytest.importorskip("matplotlib")
    page.draw(record, tmp_path / "a.svg")
    page.draw(record, tmp_path / "b.svg")
    drawn = (tmp_path / "a.svg").read_bytes()
    assert drawn.startswith(b"<?xml") and drawn == (tmp_path / "b.svg").read_bytes()
