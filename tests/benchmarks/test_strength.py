"""benchmarks/studies/strength.py: every row is made once, its table has the mean and the worst
seed, and the page shows what is recorded.
"""

import pytest
from _images import write_images

from benchmarks.harness import tables
from benchmarks.pages import strength as page
from benchmarks.studies import strength
from miue_fast import data


@pytest.fixture
def place(tmp_path, monkeypatch):
    """train/CLASS/*.png: 60 shapes of three classes, and poisons of one epoch."""
    write_images(tmp_path / "images/train", data.shapes(60, size=16, classes=3))
    quick = {"preset": "fast", "epochs": 1, "train_batch": 12, "batch": 24}
    monkeypatch.setattr(strength, "POISONS", {"fast": quick, "em": {**quick, "objective": "em"}})
    monkeypatch.setattr(strength, "DEFENCES", {"none": "as it is", "jpeg:90": "JPEG 90"})
    for name, value in {"WIDTH": 4, "VICTIM_EPOCHS": 1, "VICTIMS": (0, 1)}.items():
        monkeypatch.setattr(strength, name, value)
    monkeypatch.setattr("benchmarks.studies.cifar10_settings.PER_CLASS", 12)
    monkeypatch.setattr("benchmarks.studies.cifar10_settings.HELD_OUT", 8)
    return tmp_path


def run(place, *more):
    words = ["--data", place / "images", "--work", place / "work", "--record", place / "r.json"]
    return strength.main([*map(str, words), *more])


def test_rows_are_made_once(place, monkeypatch, capsys):
    names = [*strength.POISONS]
    assert run(place, "--only", *names, "--seeds", "1", "2") == 0
    rows = tables.load(place / "r.json")["rows"]
    assert [(r["poison"], r["seed"], r["defence"], len(r["tests"])) for r in rows] == [
        (name, seed, defence, victims)
        for seed in (1, 2)
        for name in names
        for defence, victims in (("none", 2), ("jpeg:90", 1))
    ]
    first = capsys.readouterr().out
    monkeypatch.setattr(strength, "run_cell", lambda *a, **o: pytest.fail("judged twice"))
    assert run(place, "--only", *names, "--seeds", "1", "2") == 0
    assert capsys.readouterr().out == first


def test_an_interrupted_run_goes_on(place, monkeypatch, capsys):
    real, judged = strength.run_cell, []

    def stopped(*args, **options):
        judged.append(options["defence"])
        if len(judged) == 3:
            raise KeyboardInterrupt
        return real(*args, **options)

    monkeypatch.setattr(strength, "run_cell", stopped)
    assert run(place, "--only", "fast", "--seeds", "1") == 130
    assert "run the same command again" in capsys.readouterr().err
    assert run(place, "--only", "fast", "--seeds", "1") == 0
    assert judged == ["none", "none", "jpeg:90", "jpeg:90"]


def test_the_table_has_the_mean_and_the_worst_seed():
    machine = {"cpu": "a processor", "threads": 2}
    rest = {"defence": "none", "train": 1.0, "machine": machine}
    rows = [
        {"poison": "fast", "seed": 7, "tests": [0.1, 0.12], "generation_s": 60, **rest},
        {"poison": "fast", "seed": 3, "tests": [0.2, 0.22], "generation_s": 70, **rest},
        {"poison": "clean", "seed": 7, "tests": [0.4], **rest},
        {"poison": "clean", "seed": 3, "tests": [0.5], **rest},
    ]
    text, short = page.text({"rows": rows}), page.short({"rows": rows[:1] + rows[2:]})
    assert "| clean | 7, 3 | 45.0 (40.0) |" in text and "65 s" in text
    assert "| fast | 7, 3 | 16.0 (21.0) |" in text
    assert "| clean | 7, 3 | 45.0 (40.0) |" in short and "| fast | 7 | 11.0 |" in short
    assert "No results yet" in page.text(None) and page.short(None) == page.text(None)


def test_no_data():
    with pytest.raises(SystemExit):
        strength.main([])
