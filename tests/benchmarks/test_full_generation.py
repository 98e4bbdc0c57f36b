"""benchmarks/generation.py: the main job in pieces, on drawn images; what it has done stays
done.
"""

import json
from pathlib import Path

import pytest
from _images import write_images
from _schema import BENCHMARKS, check_generation

from benchmarks import generation
from benchmarks.harness import tables
from miue_fast import data

SMALL = ["--model", "small_resnet", "--width", "4", "--dtype", "float32", "--victim-epochs", "1"]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """train/CLASS/*.png and test/CLASS/*.png: 36 shapes of three classes each."""
    folder = tmp_path_factory.mktemp("full")
    for part, seed in (("train", 1), ("test", 2)):
        drawn = data.shapes(36, seed=seed, size=16, classes=3)
        write_images(folder / part, drawn)
    return folder


def run(place, work, *more):
    return generation.main([str(place), str(work), *SMALL, *more])


def test_what_is_interrupted_goes_on_and_what_is_finished_stays(
    place, tmp_path, monkeypatch, capsys
):
    """Stopped in the first epoch, then in a victim, then whole; the digits are those of one run."""
    assert run(place, tmp_path / "a", "--epochs", "2", "--minutes", "1e-6") == 130
    assert capsys.readouterr().err.strip().endswith("run the same command again")
    real, done = generation.run_cell, []

    def stopped(*args, **options):
        if done:
            raise KeyboardInterrupt
        done.append(options["seed"])
        return real(*args, **options)

    more = "--epochs", "2", "--sets", "poisoned", "clean", "--victims", "2"
    monkeypatch.setattr(generation, "run_cell", stopped)
    assert run(place, tmp_path / "a", *more) == 130
    assert len(json.loads((tmp_path / "a" / "victims.json").read_text())) == 1
    monkeypatch.setattr(
        generation,
        "run_cell",
        lambda *args, **options: done.append(options["seed"]) or real(*args, **options),
    )
    assert run(place, tmp_path / "a", *more, "--out", str(tmp_path / "a.json")) == 0
    assert done == [0, 1, 0, 1], "nothing is trained twice"
    assert run(place, tmp_path / "b", *more, "--out", str(tmp_path / "b.json")) == 0
    records = [tables.load(tmp_path / f"{name}.json") for name in "ab"]
    for record in records:
        check_generation(record)
        for row in (*record["victims"], *record["history"]):
            for clock in ("seconds", "image_steps_per_s"):
                row.pop(clock, None)
    assert all(
        records[0][key] == records[1][key] for key in ("victims", "history", "linf", "options")
    )
    assert records[0]["targets"] == [], "targets are those of the full size"
    text = tables.generation(
        records[0] | {"victims": [row | {"seconds": 1.0} for row in records[0]["victims"]]}
    )
    assert (
        "2 epochs of 10 steps" in text
        and "small_resnet, 1 epochs, seed 1" in text
        and text.count("| poisoned |") == 2
    )


def test_targets_of_the_full_size(place, tmp_path, monkeypatch):
    assert run(place, tmp_path / "w", "--epochs", "1", "--out", str(tmp_path / "w.json")) == 0
    record = tables.load(tmp_path / "w.json")
    record["targets"] = [{"name": "accuracy", "needed": 0.12, "measured": 0.13, "met": False}]
    check_generation(record)
    assert "| accuracy | 0.12 | 0.13 | **missed** |" in tables.generation(record)
    with pytest.raises(AssertionError):
        check_generation(record | {"targets": [record["targets"][0] | {"met": True}]})
    with pytest.raises(AssertionError):
        check_generation(record | {"linf": 9})


@pytest.mark.parametrize(
    "path", sorted((BENCHMARKS / "results").glob("generation_*.json")), ids=lambda p: Path(p).name
)
def test_committed_results(path):
    check_generation(tables.load(path))
