"""`miue-fast report`: checked before it starts, keeps finished cells, says what the cells say."""

import base64
import concurrent.futures
import copy
import json
import re
import shutil
import zlib
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch

from miue_fast import BackendError, data, report
from miue_fast.cli import commands
from miue_fast.data.kept import checksum
from miue_fast.generation import Interrupted
from miue_fast.report import content, figures, pages, paper, summary, tasks
from miue_fast.report.cells import Cells, duels

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with train.npz and test.npz: shapes of three classes."""
    folder = tmp_path_factory.mktemp("report")
    for name, seed in (("train", 1), ("test", 2)):
        drawn = data.shapes(36, seed=seed, size=16, classes=3)
        np.savez(folder / f"{name}.npz", images=drawn.images.numpy(), labels=drawn.labels.numpy())
    return folder


def config_of(place, **changes):
    return {
        "name": "shapes",
        "data": str(place / "train.npz"),
        "test": str(place / "test.npz"),
        "generation": {
            "model": "small_resnet",
            "width": 4,
            "epochs": 1,
            "steps": 3,
            "batch": 18,
            "alpha_0": 2 / 255,
            "alpha_K": 2 / 255,
        },
        "poisons": {"random": {"objective": "random"}, "em": {"objective": "em"}, "mi-ue": {}},
        "victims": {"small_resnet": {"epochs": 1}, "lenet5": {"epochs": 1}},
        "runs": [
            {"victims": ["small_resnet"], "seeds": [0, 1]},
            {
                "victims": ["small_resnet"],
                "poisons": ["clean", "mi-ue"],
                "defences": ["jpeg:10", "jpeg:50"],
            },
            {"victims": ["lenet5"], "poisons": ["clean", "mi-ue", "em"]},
        ],
        "analysis": {
            "victims": ["small_resnet", "lenet5"],
            "slices": 4,
            "points": 30,
            "layers": "small_resnet",
        },
        "paper": "CIFAR-10",
        **changes,
    }


@pytest.fixture(scope="module")
def finished(place):
    """(folder, report) of a whole run."""
    (place / "config.json").write_text(json.dumps(config_of(place)))
    assert (
        commands.main(
            ["report", str(place / "config.json"), "--out", str(place / "out"), "--quiet"]
        )
        == 0
    )
    return place / "out", json.loads((place / "out" / "report.json").read_text())


def test_one_command_makes_everything(finished):
    found = finished[1]
    assert {(c["poison"], c["victim"], c["defence"], c["seed"]) for c in found["cells"]} == {
        *(
            (p, "small_resnet", "none", s)
            for p in ("clean", "random", "em", "mi-ue")
            for s in (0, 1)
        ),
        *(
            (p, "small_resnet", f"jpeg:quality={q}", 0)
            for p in ("clean", "mi-ue")
            for q in (10, 50)
        ),
        *((p, "lenet5", "none", 0) for p in ("clean", "mi-ue", "em")),
    }
    assert [entry["name"] for entry in found["poisons"]] == ["random", "em", "mi-ue"]
    assert all(
        0 <= c["test"] <= 1 and c["robust"] is None and c["threads"] >= 1 for c in found["cells"]
    )
    assert all(
        entry["noise"]["linf"] == (8 if entry["name"] == "random" else 6)
        for entry in found["poisons"]
    )  # 3 steps of 2 levels
    assert found["poisons"][0]["cost"] is None and found["poisons"][1]["cost"]["peak_memory"] > 1e7
    assert not re.search(r"/(home|root|work|tmp)/", json.dumps(found))


def test_the_perturbations_travel_with_the_numbers(finished, place):
    """A report.json alone draws the grid of perturbations, and what it holds is what the poison
    does.
    """
    found, sources = finished[1], tasks.Sources(report.read(place / "config.json"), finished[0])
    entry = next(e for e in found["poisons"] if e["name"] == "em")
    levels = torch.frombuffer(
        bytearray(zlib.decompress(base64.b64decode(entry["pictures"]["levels"]))), dtype=torch.int16
    )
    clean, images = sources.images("em")
    rows = figures.one_per_class(clean.labels, 8)
    assert torch.equal(
        levels.view(entry["pictures"]["shape"]), images[rows].short() - clean.images[rows].short()
    )
    assert levels.abs().max() == 6 and entry["pictures"]["titles"] == [
        clean.classes[int(clean.labels[k])] for k in rows
    ]
    assert "noise" in figures.draw(json.loads(json.dumps(found)))
    big = data.Dataset(
        torch.zeros(2, 1, 100, 130, dtype=torch.uint8), torch.tensor([0, 1]), ["a", "b"], ["0", "1"]
    )
    assert figures.thumbnails(big, big.images)["shape"] == [2, 1, 34, 44]


def test_the_pages(finished):
    out = finished[0]
    page, text = (out / "report.html").read_text(), (out / "report.md").read_text()
    for heading in (
        "In short",
        "Setting",
        "Standard training",
        "JPEG quality",
        "Mutual information and covariance",
        "Depth",
        "Layers",
        "Cost",
    ):
        assert f"## {heading}" in text and f"<h2>{heading}</h2>" in page
    assert (
        "Not the setting of this report (36 training images instead of 50,000; "
        "36 test images instead of 10,000; victims"
    ) in text
    assert not re.search(r'(src|href)="(?!data:)', page), "self-contained"
    pictures = [base64.b64decode(found) for found in re.findall(r"base64,([A-Za-z0-9+/=]+)", page)]
    assert len(pictures) == 6 and all(picture.startswith(b"\x89PNG") for picture in pictures)
    for name in re.findall(r"\]\((\w+\.png)\)", text):
        assert (out / name).read_bytes() in pictures


def accuracy(poison, value, seed=0, defence="none", victim="v"):
    return {
        "poison": poison,
        "victim": victim,
        "defence": defence,
        "seed": seed,
        "test": value,
        "analysis": {
            "layers": [
                {"mutual_information": {"knn": {"value": value}, "kde": {"value": 1 - value}}}
            ]
        },
    }


def test_the_summary():
    cells = [
        accuracy("clean", 0.9),
        accuracy("random", 0.8),
        accuracy("em", 0.2),
        accuracy("mi-ue", 0.1),
        accuracy("mi-ue", 0.14, seed=1),
        accuracy("clean", 0.7, defence="grayscale"),
        accuracy("mi-ue", 0.6, defence="grayscale"),
        accuracy("em", 0.5, defence="grayscale"),
        accuracy("mi-ue", 0.3, defence="cutout"),
    ]
    found = {
        "classes": 4,
        "order": ["clean", "random", "em", "mi-ue"],
        "cells": cells,
        "poisons": [
            {"name": name, "options": {"objective": name}} for name in ("random", "em", "mi-ue")
        ],
        "missing": [],
        "setting": {
            "victims": ["v"],
            "train_images": 3000,
            "analysis": {"estimators": ["knn", "kde"]},
        },
    }
    assert summary.sentences(found, Cells(found)) == [
        "A v that was trained on 3,000 clean images gets 90.0 % of clean test images right, and "
        "12.0 % where they were poisoned by mi-ue, the strongest poison here (chance: 25.0 %).",
        "MI-UE leaves 12.0 % (10.0 to 14.0 by seed); another poison leaves less in 1 of 2 pairs of "
        "victim and defence.",
        "Of 2 defences grayscale undoes most, with 60.0 % (70.0 % on clean images), and cutout "
        "least, with 30.0 %.",
        "The paper's order of the mutual information (random > em > mi-ue) holds by 1 of 2 "
        "estimators.",
        "Poisons: 3; trained victims: 9.",
    ]
    found["cells"], found["missing"] = cells[:1], [["a cell", "a reason"]]
    assert summary.sentences(found, Cells(found)) == [
        "Poisons: 3; trained victims: 1 (1 more did not finish)."
    ]


def test_finished_cells_are_kept(finished, place, monkeypatch, tmp_path):
    out, found = Path(shutil.copytree(finished[0], tmp_path / "out")), finished[1]
    before = {path: path.stat().st_mtime_ns for path in (out / "cells").iterdir()}
    done = []
    for name in ("make_poison", "make_cell"):
        real = getattr(tasks, name)
        monkeypatch.setattr(
            tasks, name, lambda sources, *a, real=real: (done.append(a), real(sources, *a))
        )
    again, _ = report.run(report.read(place / "config.json"), out, progress=False)
    assert again == {name: value for name, value in found.items() if name != "sha256"} and not done
    changed = config_of(place)
    changed["runs"][2]["seeds"] = [0, 1]
    report.run(report.check(changed), out, progress=False)
    assert done == [(p, "lenet5", "none", 1) for p in ("clean", "mi-ue", "em")]
    done.clear()
    changed["poisons"]["em"] = {"objective": "em", "epochs": 2, "poison_every": 2}
    changed["runs"], changed["analysis"]["victims"] = changed["runs"][:1], ["small_resnet"]
    report.run(report.check(changed), out, progress=False)
    assert done == [("em",), ("em", "small_resnet", "none", 0), ("em", "small_resnet", "none", 1)]
    assert all(path.stat().st_mtime_ns == when for path, when in before.items())


def test_an_interrupted_run_goes_on(place, tmp_path, monkeypatch, capsys):
    config, real = report.read(place / "config.json"), tasks.make_cell
    left = [3]

    def stop(*arguments):
        if not left[0]:
            raise KeyboardInterrupt
        left[0] -= 1
        real(*arguments)

    monkeypatch.setattr(tasks, "make_cell", stop)
    assert (
        commands.main(["report", str(place / "config.json"), "--out", str(tmp_path), "--quiet"])
        == 130
    )
    assert (
        f"interrupted: 6 finished parts are kept in {tmp_path}; the same command goes on"
        in capsys.readouterr().err
    )
    assert (
        len(list((tmp_path / "cells").iterdir())) == 3 + 3
        and not (tmp_path / "report.json").exists()
    )
    assert (
        commands.main(["report", str(place / "config.json"), "--out", str(tmp_path), "--no-run"])
        == 2
    )
    assert "missing: mi-ue, lenet5, none, 0: not made" in capsys.readouterr().err
    assert "| mi-ue, lenet5, none, 0 | not made |" in (tmp_path / "report.md").read_text()
    monkeypatch.undo()
    ours, theirs = (
        report.run(config, tmp_path, progress=False)[0],
        json.loads((place / "out" / "report.json").read_text()),
    )
    for cells in (ours["cells"], theirs["cells"]):
        for cell in cells:
            cell.pop("seconds"), cell.pop("all_seconds")
    assert ours["cells"] == theirs["cells"], "the same digits"


def test_two_processes_give_the_same_numbers(place, tmp_path, monkeypatch):
    small = config_of(
        place,
        runs=[{"victims": ["lenet5"], "poisons": ["clean", "random"]}],
        poisons={"random": {"objective": "random"}},
        analysis={},
    )
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one, two = (
            report.run(report.check(small), tmp_path / str(jobs), jobs=jobs, progress=False)[0]
            for jobs in (1, 2)
        )
    finally:
        torch.set_num_threads(threads)
    for found in (one, two):
        for cell in found["cells"]:
            cell.pop("seconds"), cell.pop("all_seconds")
    assert one["cells"] == two["cells"] and [c["poison"] for c in two["cells"]] == [
        "clean",
        "random",
    ]


def test_unreadable_images_are_listed(tmp_path, capsys):
    for part, seed in (("train", 1), ("test", 2)):
        drawn = data.shapes(24, seed=seed, size=16, classes=2)
        data.export_folder(drawn, drawn.images * 0.0, tmp_path / part, eps=0)
    broken = next((tmp_path / "train").rglob("*.png"))
    broken.write_bytes(b"no image")
    places = {"data": str(tmp_path / "train"), "test": str(tmp_path / "test")}
    config = {
        "name": "x",
        **places,
        "poisons": {},
        "victims": {"lenet5": {"epochs": 1}},
        "runs": [{}],
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert (
        commands.main(
            ["report", str(tmp_path / "config.json"), "--out", str(tmp_path / "out"), "--quiet"]
        )
        == 3
    )
    assert (
        f"unreadable, left out: {broken.relative_to(tmp_path / 'train')}" in capsys.readouterr().err
    )


def test_a_killed_process_is_told(place, tmp_path, monkeypatch):
    """Not waited for: the kernel kills what needs too much memory."""

    class Broken(concurrent.futures.Executor):
        _processes = None

        def __init__(self, *args):
            pass

        def submit(self, *args):
            future = concurrent.futures.Future()
            future.set_exception(concurrent.futures.process.BrokenProcessPool())
            return future

        def shutdown(self, **options):
            pass

    monkeypatch.setattr(concurrent.futures, "ProcessPoolExecutor", Broken)
    config = report.check(
        config_of(place, runs=[{"victims": ["lenet5"], "seeds": [0, 1]}], poisons={}, analysis={})
    )
    with pytest.raises(
        BackendError, match="a process was killed, probably out of memory: lower jobs \\(2\\)"
    ):
        report.run(config, tmp_path, jobs=2, progress=False)


def test_a_cell_that_fails_is_named_and_the_others_are_made(place, tmp_path, capsys):
    victims = {"mlp2": {"epochs": 3, "lr": 1e30}, "lenet5": {"epochs": 1}}
    (tmp_path / "config.json").write_text(
        json.dumps(config_of(place, poisons={}, victims=victims, runs=[{}], analysis={}))
    )
    assert (
        commands.main(
            ["report", str(tmp_path / "config.json"), "--out", str(tmp_path / "out"), "--quiet"]
        )
        == 2
    )
    told, page = capsys.readouterr().err, (tmp_path / "out" / "report.md").read_text()
    assert (
        "missing: clean, mlp2, none, 0: evaluate: lr: expected a finite training loss" in told
        and "| clean, mlp2, none, 0 | evaluate: lr" in page
    )
    assert len(list((tmp_path / "out" / "cells").iterdir())) == 1


def test_a_random_poison_that_was_stopped_goes_on(place, tmp_path, monkeypatch):
    config = report.check(
        config_of(
            place,
            runs=[{"victims": ["lenet5"]}],
            poisons={"random": {"objective": "random"}},
            analysis={},
        )
    )

    def stop(*arguments):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(tasks, "linear_separability", stop)
        with pytest.raises(Interrupted):
            report.run(config, tmp_path, progress=False)
    assert not report.run(config, tmp_path, progress=False)[0]["missing"]


def test_a_finished_report_is_written_anew(finished, tmp_path):
    out, _ = finished
    assert commands.main(["report", str(out / "report.json"), "--out", str(tmp_path)]) == 0
    cut = (out / "report.md").read_text().split("## Pictures")[0]
    assert (tmp_path / "report.md").read_text().startswith(cut) and not (
        tmp_path / "cells"
    ).exists()


def test_a_changed_or_endless_file_is_refused(finished, tmp_path, capsys):
    out, _ = finished
    changed = re.sub(
        r'"test": [0-9.]+', '"test": 0.999', (out / "report.json").read_text(), count=1
    )
    for text, expected in ((changed, "sha256"), ("[" * 100_000, "expected a JSON file")):
        (tmp_path / "report.json").write_text(text)
        assert (
            commands.main(["report", str(tmp_path / "report.json"), "--out", str(tmp_path / "out")])
            == 2
        )
        assert expected in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_a_damaged_cell_is_told(place, tmp_path):
    config = report.check(
        config_of(
            place, runs=[{"victims": ["lenet5"], "poisons": ["clean"]}], poisons={}, analysis={}
        )
    )
    report.run(config, tmp_path, progress=False)
    (cell,) = (tmp_path / "cells").iterdir()
    cell.write_text("{")
    with pytest.raises(ValueError, match="expected a finished part, got a damaged file"):
        report.run(config, tmp_path, progress=False)
    cell.unlink()
    report.run(config, tmp_path, progress=False)
    cell.write_text(re.sub(r'"train": [0-9.]+', '"train": 0.123', cell.read_text()))
    with pytest.raises(ValueError, match="expected a finished part, got a damaged file"):
        report.run(config, tmp_path, progress=False)


def test_a_cell_under_the_name_of_another_is_told(place, tmp_path):
    config = report.check(
        config_of(
            place,
            runs=[{"victims": ["lenet5"], "poisons": ["clean"], "seeds": [0, 1]}],
            poisons={},
            analysis={},
        )
    )
    report.run(config, tmp_path, progress=False)
    one, other = (tmp_path / "cells").iterdir()
    shutil.copy(one, other)
    with pytest.raises(
        ValueError,
        match=(
            f"{other.name}: expected a finished part, got a damaged file; remove it and run again"
        ),
    ):
        report.run(config, tmp_path, progress=False)


def test_a_report_has_its_folder_to_itself(place, tmp_path):
    config = report.check(config_of(place))
    with data.only_writer(tmp_path):
        with pytest.raises(
            ValueError,
            match=(
                r"^output: folder: expected one that no other run is writing to, "
                r"got .* is at work$"
            ),
        ):
            report.run(config, tmp_path, progress=False)
        assert report.run(config, tmp_path, progress=False, make=False)[0]["missing"], (
            "what is there may be looked at meanwhile"
        )


def test_foreign_poisons(place, tmp_path):
    clean = data.load(place / "train.npz")
    data.export_pt(clean, data.random_noise(clean, 4 / 255, 0), tmp_path / "poison.pt")
    config = config_of(
        place,
        poisons={"theirs": {"path": str(tmp_path / "poison.pt")}},
        runs=[{"victims": ["lenet5"]}],
        analysis={},
    )
    found, _ = report.run(report.check(config), tmp_path / "out", progress=False)
    assert found["poisons"][0]["noise"]["linf"] == 4 and found["poisons"][0]["options"] == {
        "made": "elsewhere"
    }
    data.export_pt(
        clean, data.random_noise(clean, 16 / 255, 0), tmp_path / "poison.pt", overwrite=True
    )
    found, _ = report.run(report.check(config), tmp_path / "out", progress=False)
    assert found["poisons"][0]["noise"]["linf"] == 16, "another poison behind the same path"
    some = clean.select(list(range(12)))
    data.export_npz(some, data.random_noise(some, 4 / 255, 0), tmp_path / "some.npz", eps=4 / 255)
    config["poisons"]["theirs"]["path"] = str(tmp_path / "some.npz")
    with pytest.raises(
        ValueError,
        match=r"poisons\.theirs\.path: expected a poisoned copy of all 36 images, got of 12",
    ):
        report.run(report.check(config), tmp_path / "out", progress=False)


def test_a_part_of_a_poison(place, tmp_path):
    config = report.check(
        config_of(
            place,
            poisons={"random": {"objective": "random"}, "half": {"of": "random", "ratio": 0.5}},
            runs=[{}],
            analysis={},
        )
    )
    found, sources = report.run(config, tmp_path, progress=False)
    clean, whole = sources.images("random")
    part = sources.images("half")[1]
    kept = (part == whole).flatten(1).all(1)
    assert [int(kept[clean.labels == k].sum()) for k in range(3)] == [6, 6, 6] and torch.equal(
        part[~kept], clean.images[~kept]
    )
    assert found["poisons"][1]["options"] == {"of": "random", "ratio": 0.5}
    renamed = report.check(
        config_of(
            place,
            poisons={"random": {"objective": "random"}, "share": {"of": "random", "ratio": 0.5}},
            runs=[{}],
            analysis={},
        )
    )
    again, _ = report.run(renamed, tmp_path, progress=False, make=False)
    assert [entry["name"] for entry in again["poisons"]] == ["random", "share"] and {
        c["poison"] for c in again["cells"]
    } == set(again["order"])


def test_pretrained_victims_start_from_other_images(place, tmp_path, monkeypatch):
    seen = []
    real = tasks.pretrain
    monkeypatch.setattr(
        tasks,
        "pretrain",
        lambda images, labels, *rest, **options: (
            seen.append((images, labels, options)),
            real(images, labels, *rest, **options),
        )[1],
    )
    victims = {
        "plain": {"model": "lenet5", "epochs": 1},
        "tuned": {
            "model": "lenet5",
            "epochs": 1,
            "lr": 1e-6,
            "pretrain": {"per_class": 4, "epochs": 2},
        },
    }
    config = report.check(
        config_of(
            place,
            per_class=8,
            poisons={},
            victims=victims,
            runs=[{}],
            analysis={"victims": ["tuned"], "points": 20},
        )
    )
    found, sources = report.run(config, tmp_path, progress=False)
    ((images, labels, options),) = seen
    assert len(images) == 12 and options["epochs"] == 2 and labels.bincount().tolist() == [4, 4, 4]
    assert not any((image == own).all() for image in images for own in sources.clean.images)
    state = safetensors.torch.load_file(sources.start_path("tuned"))
    images = sources.clean.images, sources.clean.labels, sources.test.images, sources.test.labels
    again = tasks.run_cell(*images, 3, victim="lenet5", epochs=1, lr=1e-6, init=state)
    assert [c["test"] for c in found["cells"] if c["victim"] == "tuned"] == [again.test]
    report.run(config, tmp_path, progress=False)
    assert len(seen) == 1, "the weights are kept"


# ---- what the words say


def made(tests, values=None, options=None):
    """A report of one victim from {poison: {defence: [accuracy per seed]}}, {poison: [MI per seed]}
    and {poison: options}.
    """
    cells = []
    for poison, defences in tests.items():
        for name, accuracies in defences.items():
            for seed, test in enumerate(accuracies):
                cell = {
                    "poison": poison,
                    "victim": "v",
                    "defence": name,
                    "seed": seed,
                    "test": test,
                    "train": 1.0,
                    "robust": None,
                }
                if values and name == "none":
                    value = values[poison][seed]
                    row = {
                        "mutual_information": {"histogram": {"value": value}},
                        "poisoned": {
                            "trace": value,
                            "logdet": value if value > 1 else None,
                            "effective_rank": 1.0,
                        },
                    }
                    cell["analysis"] = {"layers": [row]}
                cells.append(cell)
    setting = {
        "victims": {"v": {}},
        "analysis": {"estimators": ["histogram"], "slices": 2, "points": 20},
    }
    options = {
        "mi-ue": {},
        "em": {"objective": "em"},
        "random": {"objective": "random"},
        **(options or {}),
    }
    poisons = [
        {"name": poison, "options": options[poison]} for poison in tests if poison != "clean"
    ]
    return {
        "cells": cells,
        "order": list(tests),
        "setting": setting,
        "paper": "CIFAR-10",
        "name": "made",
        "poisons": poisons,
    }


FLAT = {
    "clean": {"none": [0.9, 0.8]},
    "random": {"none": [0.8, 0.8]},
    "em": {"none": [0.3, 0.4]},
    "mi-ue": {"none": [0.2, 0.1]},
}


def told(found):
    return " ".join(
        block[1] for block in content._information(found, Cells(found))[1] if block[0] == "text"
    )


def test_order_and_correlation_in_words():
    right = told(made(FLAT, {"clean": [9, 9], "random": [4, 4], "em": [3, 3], "mi-ue": [2, 2.5]}))
    assert (
        "Mutual information (histogram, clean (the estimator's ceiling) 9): "
        "the paper's order (random > em > mi-ue) holds here"
    ) in right
    assert "random 4 > em 3 > mi-ue 2.25 (means; it holds in 2 of 2 seeds)" in right
    assert "over 3 poisons: Spearman's rho 1.00, permutation p 0.33 (paper: 0.78" in right
    wrong = told(made(FLAT, {"clean": [9, 9], "random": [4, 4], "em": [2, 3], "mi-ue": [4, 2]}))
    assert (
        "does **not** hold here: random 4 > mi-ue 3 > em 2.5 (means; it holds in 1 of 2 seeds)"
        in wrong
        and "rho 0.50" in wrong
    )


def test_a_collapsed_class_is_the_smallest_covariance_of_all():
    """Its log-determinant, -inf, is no number in JSON."""
    found = made(FLAT, {"clean": [9, 9], "random": [4, 4], "em": [3, 3], "mi-ue": [2, 0.5]})
    assert (
        "Covariance (log-determinant, clean 9): the paper's order (random > em > mi-ue) holds here"
        in told(found)
    )
    table = content._information(found, Cells(found))[1][1]
    assert table[2][-1][3] == "2.000; -inf in 1 of 2 seeds"


def test_where_mi_ue_loses():
    """Variants of MI-UE are no rivals."""
    ours = {"none": [0.2, 0.1], "jpeg:quality=10": [0.7], "cutout": [0.2]}
    tests = {**FLAT, "em": {"none": [0.1, 0.0], "jpeg:quality=10": [0.8]}, "mi-ue": ours}
    tests |= {"other seed": {"none": [0.0, 0.0]}, "part": {"none": [0.0, 0.0]}}
    found = made(tests, options={"other seed": {"seed": 11}, "part": {"of": "mi-ue", "ratio": 0.5}})
    assert Cells(found).variants == {"mi-ue", "other seed", "part"}
    assert duels(Cells(found)) == [
        ("v", "none", "em", pytest.approx(5.0), pytest.approx(15.0)),
        ("v", "jpeg:quality=10", "em", 80.0, 70.0),
    ]
    text, table = content._losses(Cells(found))[1]
    assert text[1].startswith("Of 2 pairs of victim and defence") and text[1].endswith(
        "another one leaves a lower mean accuracy in 1."
    )
    assert table[2] == [["v", "none", "em", "5.0", "15.0"]]


def test_differences_to_the_paper():
    plan = {"victim": "resnet18", "epochs": 200, "lr": 0.5, "batch": 128}
    setting = {
        "train_images": 50000,
        "test_images": 10000,
        "jpeg": False,
        "recipes": {"mine": plan},
    }
    same = {
        "setting": setting,
        "poisons": [
            {"options": {"objective": "em"}},
            {"options": {"objective": "random", "model": "mlp2"}},
        ],
    }
    assert paper.differences(paper.PAPER["CIFAR-10"], same) == []
    for change, part in (
        ({"jpeg": True}, "JPEG"),
        ({"train_images": 3000}, "3,000 training images"),
        ({"test_images": 9}, "9 test images"),
        ({"recipes": {"resnet18": {**plan, "victim": "lenet5"}}}, "victims resnet18 (200 epochs)"),
        ({"recipes": {"resnet18": {**plan, "epochs": 30}}}, "(30 epochs)"),
    ):
        (found,) = paper.differences(
            paper.PAPER["CIFAR-10"], {**same, "setting": {**setting, **change}}
        )
        assert part in found
    for options in (
        {"model": "small_resnet"},
        {"width": 16},
        {"epochs": 8},
        {"objective": "linear"},
    ):
        (found,) = paper.differences(
            paper.PAPER["CIFAR-10"], {**same, "poisons": [{"options": options}]}
        )
        assert "other source models" in found


def test_spread_and_tables():
    found = made(FLAT)
    (_, head, rows) = content._standard(found, Cells(found))[1][0]
    assert head == ["trained on", "v: clean test", "v: own images", "paper (ResNet-18)"]
    assert (
        rows[0] == ["clean", "85.0 ± 7.1 (80.0 to 90.0)", "100.0 ± 0.0 (100.0 to 100.0)", "94.45"]
        and rows[1][-1] == ""
    )


def test_no_figures_without_matplotlib(finished, tmp_path, monkeypatch):
    monkeypatch.setattr(figures, "missing", lambda: "no figures here")
    monkeypatch.setattr(pages, "missing", lambda: "no figures here")
    report.render(finished[1], tmp_path)
    assert "no figures here" in (tmp_path / "report.md").read_text() and not list(
        tmp_path.glob("*.png")
    )


# ---- bad input


def changed(place, path, value):
    found = copy.deepcopy(config_of(place))
    where = found
    for key in path[:-1]:
        where = where[key]
    if value is KeyError:
        del where[path[-1]]
    else:
        where[path[-1]] = value
    return found


BAD = [
    (("runs", 1, "defences"), ["cutout:64"], "defence: cutout:size=64: expected"),
    (("generation", "model"), "vit", "width"),
    (("generation", "feature"), "nothing", "feature: expected a layer of the model"),
    (("poisons", "em"), {"path": "nowhere.pt"}, "nowhere.pt"),
    (("poisons", "em"), {"path": 3}, "poisons.em.path: expected text"),
    (
        ("poisons", "em"),
        {"objective": "tap", "target_shift": 3},
        "target_shift: expected no multiple of the 3 classes",
    ),
    (("poisons", "em"), {"preset": []}, "preset: expected one of"),
    (("poisons", "em"), {"of": [], "ratio": 0.5}, "poisons.em.of: expected one of"),
    (("victims", "lenet5"), {"lr": "0.1"}, "victims.lenet5.lr: expected a number"),
    (("runs", 0, "victims"), [["x"]], "runs[0].victims: expected a list of"),
    (("runs", 0, "defences"), [["none"]], "runs[0].defences: expected a list of text"),
    (
        ("analysis", "seeds"),
        [5],
        "analysis: expected a run of clean, small_resnet, without a defence, of a seed among 5",
    ),
    (("analysis", "estimators"), [], "analysis.estimators: expected one at least"),
    (("test",), None, "test: expected other images than the clean training images"),
    (
        ("runs", 1, "defences"),
        ["jpeg:5"],
        "quality of jpeg: expected a whole number from 10 to 95, got '5'",
    ),
    (("runs", 1, "defences"), ["diffusion"], "'diffusion'"),
    (("runs", 1, "defences"), [], "runs[1].defences: expected one at least"),
    (("runs", 0, "seeds"), [-1], "runs[0].seeds: expected a whole number from 0 to 2^63 - 1"),
    (
        ("runs", 0, "poisons"),
        ["lsp"],
        "runs[0].poisons: expected a list of clean, random, em, mi-ue",
    ),
    (("runs", 0, "epochs"), 3, "runs[0]: expected the keys"),
    (("victims", "resnet9"), {}, "victim: expected"),
    (("victims", "lenet5"), {"epochs": 0}, "epochs: expected a whole number >= 1"),
    (("victims", "lenet5"), {"momentum": 0}, "victims.lenet5: expected the keys"),
    (("poisons", "clean"), {}, "other names than 'clean'"),
    (("poisons", "a/b"), {}, "names of letters, digits"),
    (("poisons", "em"), {"objective": "rem"}, "objective: expected one of"),
    (("poisons", "em"), {"stepz": 3}, "option: expected one of"),
    (
        ("poisons", "part"),
        {"of": "lsp", "ratio": 0.5},
        "poisons.part.of: expected one of random, em, mi-ue, got 'lsp'",
    ),
    (
        ("poisons", "part"),
        {"of": "em", "ratio": 1},
        "poisons.part.ratio: expected a number between 0 and 1",
    ),
    (
        ("victims", "tuned"),
        {"model": "lenet5", "pretrain": {"per_class": 4, "epochs": 1}},
        "victims.tuned.pretrain: expected per_class",
    ),
    (
        ("victims", "tuned"),
        {"model": "lenet5", "pretrain": {"per_class": 4}},
        "victims.tuned.pretrain.epochs: expected a whole number",
    ),
    (("poisons", "em"), {"path": "x", "steps": 3}, "poisons.em: expected the keys path"),
    (("generation", "model"), "resnet9", "model: expected one of"),
    (("analysis", "estimators"), ["minee"], "analysis.estimators"),
    (("analysis", "victims"), ["vgg11"], "analysis.victims"),
    (("analysis", "layers"), "vgg11", "analysis.layers: expected null or one of"),
    (("analysis", "slices"), 0, "analysis.slices"),
    (("paper",), "ImageNet", "paper: expected null or one of CIFAR-10"),
    (("name",), KeyError, "none of name"),
    (("data",), 3, "data: expected a str"),
    (("per_class",), 0, "per_class: expected a whole number >= 1"),
    (("extra",), 1, "the file: expected the keys"),
]


@pytest.mark.parametrize(
    "path, value, part", BAD, ids=[".".join(map(str, path)) + f" {value}" for path, value, _ in BAD]
)
def test_bad_configurations_are_refused_before_any_work(place, tmp_path, capsys, path, value, part):
    value = str(place / "train.npz") if path == ("test",) else value
    (tmp_path / "config.json").write_text(json.dumps(changed(place, path, value)))
    assert (
        commands.main(["report", str(tmp_path / "config.json"), "--out", str(tmp_path / "out")])
        == 2
    )
    told = capsys.readouterr().err.strip()
    assert part in told and "\n" not in told and not list(tmp_path.glob("out/*"))


@pytest.mark.parametrize("text, part", [("[1]", "an object"), ("{", "expected a JSON file")])
def test_no_configuration_at_all(tmp_path, capsys, text, part):
    (tmp_path / "config.json").write_text(text)
    assert (
        commands.main(["report", str(tmp_path / "config.json"), "--out", str(tmp_path / "out")])
        == 2
    )
    assert part in capsys.readouterr().err


def test_missing_data_is_told_before_any_work(place, tmp_path, capsys):
    (tmp_path / "config.json").write_text(json.dumps(config_of(place)))
    assert (
        commands.main(
            [
                "report",
                str(tmp_path / "config.json"),
                "--out",
                str(tmp_path / "out"),
                "--data",
                str(tmp_path / "none"),
            ]
        )
        == 2
    )
    assert "does not exist" in capsys.readouterr().err


def test_the_committed_configuration_is_valid():
    found = report.read(ROOT / "benchmarks" / "studies" / "report_cifar10_jpeg.json")
    assert {"mi-ue", "em", "tap", "random"} <= set(found.poisons) and len(found.cells()) > 100


def test_the_committed_page_is_that_of_the_committed_numbers(tmp_path):
    """`miue-fast report benchmarks/results/report_cifar10_jpeg.json --out NEW` makes it; its list
    of checksums is not committed.
    """
    numbers = ROOT / "benchmarks" / "results" / "report_cifar10_jpeg.json"
    assert commands.main(["report", str(numbers), "--out", str(tmp_path)]) == 0
    assert (tmp_path / "report.md").read_text() == (
        ROOT / "docs" / "evidence" / "report.md"
    ).read_text()
    found = json.loads(numbers.read_text())
    assert found["sha256"] == checksum(found) and not re.search(
        r"/(home|root|work|tmp)/", numbers.read_text()
    )
    for name in re.findall(r"\]\((\w+\.png)\)", (tmp_path / "report.md").read_text()):
        assert (ROOT / "docs" / "evidence" / name).read_bytes().startswith(b"\x89PNG")
