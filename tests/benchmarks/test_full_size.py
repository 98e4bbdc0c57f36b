"""benchmarks/studies/full_size.py: pieces are made once, an interruption loses one of them, and the
page shows what there is.
"""

import json

import pytest
from _images import write_images
from _schema import nameless

from benchmarks.harness import tables
from benchmarks.pages import full_size as page
from benchmarks.studies import full_size
from benchmarks.studies.full_size import Generation, Victim
from miue_fast import data
from miue_fast.generation import PRESETS, Options
from miue_fast.generation.presets import Preset

SETTING = ["--images", "36", "--width", "4", "--victim-epochs", "1", "--dtype", "float32"]
TINY = [
    Victim("clean", network="mlp3", width=8),
    Generation("fast"),
    Victim("fast", "resize:8", network="mlp3", width=None),
    Victim("fast", "jpeg:60", seed=1, width=4),
]


@pytest.fixture
def place(tmp_path, monkeypatch):
    """train/CLASS/*.png and test/CLASS/*.png: 36 shapes of three classes each, and two epochs of a
    small source network for the preset.
    """
    for part, seed in (("train", 1), ("test", 2)):
        drawn = data.shapes(36, seed=seed, size=16, classes=3)
        write_images(tmp_path / "images" / part, drawn)
    monkeypatch.setitem(full_size.SOURCE, "model", "small_resnet")
    quick = Preset("fast", "", Options(epochs=2, steps=1))
    monkeypatch.setitem(PRESETS, "fast", quick)
    monkeypatch.setattr(full_size, "pieces", lambda width: TINY)
    (tmp_path / "work").mkdir()
    return tmp_path


def run(place, *more):
    words = ["--data", place / "images", "--out", place / "work", "--record", place / "r.json"]
    return full_size.main([*map(str, words), *SETTING, *more])


def rows(place):
    return json.loads((place / "r.json").read_text())["pieces"]


def test_a_piece_is_made_once_and_an_interruption_loses_one(place, monkeypatch, capsys):
    real, trained = full_size.run_cell, []

    def stopped(*args, **options):
        if len(trained) == 1:
            raise KeyboardInterrupt
        trained.append(options["seed"])
        return real(*args, **options)

    monkeypatch.setattr(full_size, "run_cell", stopped)
    assert run(place) == 130
    assert capsys.readouterr().err.strip().endswith("run the same command again")
    assert [row["name"] for row in rows(place)] == [piece.name for piece in TINY[:2]]
    trained.append("again")
    monkeypatch.setattr(full_size, "generate", lambda *a, **o: pytest.fail("made twice"))
    assert run(place) == 0
    assert run(place) == 0 and len(trained) == 4, "the third command has nothing to do"
    found = rows(place)
    assert [row["name"] for row in found] == [piece.name for piece in TINY]
    made, victim = found[1], found[2]
    assert made["epochs"] == 2 and made["options"]["steps"] == 1 and made["seconds"] > 0
    assert 0 <= made["source_accuracy"] <= 1 and made["dtype"] == victim["dtype"] == "float32"
    assert victim["settings"]["poison"] == made["settings"]
    assert victim["settings"]["recipe"]["epochs"] == 60, "the network's own"
    assert found[3]["settings"]["recipe"]["schedule"] == "one-cycle"
    for row in (found[0], victim, found[3]):
        assert len(row["test_classes"]) == 3 and 0 <= row["test"] <= 1
        assert row["test"] == pytest.approx(sum(row["test_classes"]) / 3)
        assert row["seconds"] > 0 and row["processor_seconds"] > 0
        assert {"cpu", "cores", "commit"} <= row["machine"].keys()
    nameless(json.loads((place / "r.json").read_text()))


def test_a_generation_goes_on_from_its_epoch(place, monkeypatch):
    from miue_fast.generation.run import BiLevelRun

    real, epochs = BiLevelRun.epoch, []

    def stopped(self, number, tick):
        if epochs == [1]:
            epochs.append("stop")
            raise KeyboardInterrupt
        epochs.append(number)
        return real(self, number, tick)

    monkeypatch.setattr(BiLevelRun, "epoch", stopped)
    assert run(place, "--only", "generation") == 130 and not (place / "r.json").exists()
    assert run(place, "--only", "generation") == 0
    assert epochs == [1, "stop", 2] and [row["epochs"] for row in rows(place)] == [2]


def test_other_settings_are_other_pieces_and_the_list_makes_nothing(place, monkeypatch, capsys):
    assert run(place, "--only", "clean") == 0
    monkeypatch.setattr(full_size, "generate", lambda *a, **o: pytest.fail("made"))
    monkeypatch.setattr(full_size, "run_cell", lambda *a, **o: pytest.fail("made"))
    capsys.readouterr()
    assert run(place, "--list") == 0
    told = capsys.readouterr().out
    assert told.count("| done |") == 1 and told.count("| missing |") == 3
    assert run(place, "--list", "--images", "30") == 0
    assert "| done |" not in capsys.readouterr().out


def test_a_victim_makes_the_poison_that_it_needs(place):
    assert run(place, "--only", "resize") == 0
    assert [row["name"] for row in rows(place)] == [piece.name for piece in TINY[1:3]]


def test_the_pieces_of_the_study():
    found = full_size.pieces()
    assert len(found) == len(set(found)) == len({piece.name for piece in found})
    made = set()
    for piece in found:
        if isinstance(piece, Generation):
            made.add(piece.poison)
        else:
            assert piece.trained_on in made | {"clean"}, "a poison comes before its victims"
    assert made == set(full_size.POISONS)


def test_the_page_shows_what_there_is_and_leaves_the_rest_empty():
    settings = {"images": 50_000, "recipe": {"epochs": 15}}
    machine = {"cpu": "a processor", "threads": 2, "commit": "0123456789abcdef"}

    def victim(trained_on, test, seed=0, defence="none", network="resnet18"):
        piece = Victim(trained_on, defence, seed, network)
        own = {"piece": "victim", "trained_on": trained_on, "defence": defence}
        return {
            "name": piece.name,
            "settings": settings | own | {"seed": seed, "network": network, "width": 64},
            **{"train": 0.99, "test": test, "test_classes": [test, 0.5], "robust": None},
            **{"seconds": 7200.0, "processor_seconds": 9000.0, "dtype": "bfloat16"},
            "machine": machine,
        }

    made = {
        "name": "generation fast",
        "settings": {"piece": "generation", "poison": "fast", "images": 50_000, "width": 32},
        **{"seconds": 3600.0, "processor_seconds": 7000.0, "epochs": 9, "source_accuracy": 0.98},
        **{"dtype": "bfloat16", "machine": machine},
    }
    found = [victim("clean", 0.91), victim("fast", 0.101), victim("fast", 0.12, 1), made]
    found += [victim("fast", 0.3, 0, "jpeg:60"), victim("clean", 0.7, 0, network="lenet5")]
    found += [victim("publish", 0.77) | {"settings": settings | {"images": 10}}]
    text = page.text({"format": tables.FORMAT, "classes": ["cat", "dog"], "pieces": found})
    assert "| clean | 91.0 |" in text and "| fast | 10.1, 12.0 |" in text
    assert "77.0" not in text, "a trial on fewer images is no row of the page"
    assert "| lenet5 | 70.0 |" in text and "| fast | 10.1 | 50.0 |" in text
    assert "| fast | 9 | 60 | 117 | 98.0 |" in text
    assert "python -m benchmarks.studies.full_size" in text
    empty = page.text(None)
    assert "| publish |  |" in empty and "91.0" not in empty
