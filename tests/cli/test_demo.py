"""`miue-fast demo`: an interrupted one goes on where it stood, a finished one starts again, and
nobody else's files are touched.
"""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch

from miue_fast import data
from miue_fast.cli import commands, demo
from miue_fast.evaluation import api, evaluate
from miue_fast.generation.run import BiLevelRun


@pytest.fixture(scope="module", autouse=True)
def tiny():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(demo, "TRAIN", 60)
        patch.setattr(demo, "TEST", 30)
        patch.setattr(
            demo,
            "SOURCE",
            {
                "preset": "paper",
                "model": "small_resnet",
                "epochs": 3,
                "steps": 1,
                "width": 2,
                "batch": 30,
            },
        )
        patch.setattr(
            demo, "VICTIM", {"victim": "lenet5", "epochs": 1, "lr": 0.1, "batch": 32, "crop": 0}
        )
        yield


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The folder of a demo that nothing interrupted."""
    folder = tmp_path_factory.mktemp("whole")
    assert run(folder) == 1, "such a small one misses its numbers"
    return folder


class Work(list):
    """What was worked on: epochs of the generation and victims, in order. Ctrl-C comes once `left`
    of them were begun.
    """

    left = None

    def append(self, what):
        super().append(what)
        if self.left is not None:
            self.left -= 1
            if self.left < 0:
                self.left = None
                raise KeyboardInterrupt


@pytest.fixture
def made(monkeypatch):
    seen = Work()
    epoch, train = BiLevelRun.epoch, api.run_cell

    def one_epoch(self, number, tick):
        seen.append(number)
        return epoch(self, number, tick)

    def one_victim(images, *args, **options):
        seen.append("victim")
        return train(images, *args, **options)

    monkeypatch.setattr(BiLevelRun, "epoch", one_epoch)
    monkeypatch.setattr(api, "run_cell", one_victim)
    return seen


def run(out, *words):
    return commands.main(["demo", "--out", str(out), *words])


def numbers(out):
    """result.json without the seconds."""
    found = json.loads((out / "result.json").read_text())
    return {name: value for name, value in found.items() if name != "seconds"}


def images(out):
    return {
        path.relative_to(out): path.read_bytes()
        for path in [*out.rglob("*.png"), out / "poison/poison.safetensors"]
    }


ALL = [1, 2, 3, "victim", "victim", "victim"]


@pytest.mark.parametrize("after", [0, 1, 2, 3, 4, 5])
def test_an_interrupted_demo_goes_on_where_it_stood(whole, tmp_path, made, capsys, after):
    made.left = after
    assert run(tmp_path / "out") == 130
    told = capsys.readouterr().err
    assert told == (
        f"miue-fast: interrupted: what was finished is kept in {tmp_path / 'out'}; "
        "the same command goes on from there\n"
    )
    assert made == ALL[: after + 1] and not (tmp_path / "out/result.json").exists()
    made.clear()
    assert run(tmp_path / "out") == 1 and made == ALL[after:], (
        "nothing that was finished is made again"
    )
    assert numbers(tmp_path / "out") == numbers(whole) and images(tmp_path / "out") == images(whole)
    assert f"Going on with the interrupted demo in {tmp_path / 'out'}." in capsys.readouterr().out


def test_a_finished_demo_starts_again_and_so_does_one_of_another_seed(tmp_path, made):
    assert run(tmp_path) == 1 and run(tmp_path) == 1 and made == ALL * 2
    made.clear()
    made.left = 4
    assert run(tmp_path) == 130
    first = (tmp_path / "poison/poison.safetensors").read_bytes()
    made.left = 0
    assert run(tmp_path, "--seed", "1") == 130
    assert not list(tmp_path.glob("p*/*.*")) and not list(tmp_path.glob("victims/*")), (
        "of the other seed nothing is left"
    )
    made.clear()
    assert run(tmp_path, "--seed", "1") == 1 and made == ALL and numbers(tmp_path)["seed"] == 1
    assert (tmp_path / "poison/poison.safetensors").read_bytes() != first


@pytest.mark.parametrize(
    "place",
    [
        "figure.png",
        "result.json",
        "poison/poison.safetensors",
        "poisoned/*/*.png",
        "poisoned/mine/x.png",
    ],
)
def test_files_of_somebody_else_are_refused_before_the_work(whole, tmp_path, made, capsys, place):
    """In a finished demo's folder; where it is one of its own files, it was edited since."""
    out = shutil.copytree(whole, tmp_path / "out")
    path = next(out.glob(place)) if "*" in place else out / place
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"mine")
    assert run(out) == 2 and not made
    told = capsys.readouterr().err.splitlines()[-1]
    assert str(path) in told and "move it away" in told and path.read_bytes() == b"mine"


def test_files_of_somebody_else_in_an_interrupted_demo(tmp_path, made, capsys):
    made.left = 2
    assert run(tmp_path) == 130
    for place in ("figure.png", "poison/poison.safetensors", "poisoned/bars/x.png"):
        made.clear()
        path = tmp_path / place
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"mine")
        capsys.readouterr()
        assert run(tmp_path) == 2 and not made
        assert (
            str(path) in (told := capsys.readouterr().err)
            and told.count("\n") == 1
            and path.read_bytes() == b"mine"
        )
        path.unlink()


def test_a_folder_of_something_else_is_left_alone(tmp_path, capsys):
    (tmp_path / "notes.txt").write_text("mine")
    assert run(tmp_path) == 2
    assert (
        "got " in (told := capsys.readouterr().err)
        and "which holds something else; move it away" in told
        and told.count("\n") == 1
    )
    (tmp_path / demo.MARK).touch()
    assert run(tmp_path) == 2, "a mark that is not on the list is nobody's leave to replace things"
    assert sorted(path.name for path in tmp_path.iterdir()) == [demo.MARK, "notes.txt"]


def test_two_demos_in_one_folder(tmp_path, capsys):
    with data.only_writer(tmp_path):
        assert run(tmp_path) == 2
    assert "one that no other run is writing to" in capsys.readouterr().err


# ---- the victims that evaluate keeps


@pytest.fixture(scope="module")
def pair():
    return data.shapes(30, seed=1, size=16, classes=3), data.shapes(30, seed=2, size=16, classes=3)


QUICK = {"victim": "linear", "epochs": 1, "eps": 8 / 255, "progress": False}


def test_kept_victims_are_those_of_the_same_call_alone(pair, tmp_path, made):
    clean, test = pair
    first = evaluate(clean, clean.images.float() * 0, test, keep=tmp_path, **QUICK)
    assert made == ["victim"] * 2, "clean and poisoned are the same images here"
    made.clear()
    again = evaluate(clean, clean.images.float() * 0, test, keep=tmp_path, **QUICK)
    assert not made and again.rows == first.rows and str(again) == str(first)
    threads = torch.get_num_threads()
    try:
        for options in (
            {"lr": 0.5},
            {"seeds": [1]},
            {"defence": "jpeg:10"},
            {"unseen": [0]},
            {"curve": False},
            {"epochs": 2},
            "threads",
        ):
            if options == "threads":
                torch.set_num_threads(threads + 1)
                options = {}
            made.clear()
            evaluate(clean, clean.images.float() * 0, test, keep=tmp_path, **{**QUICK, **options})
            assert made, options
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("damage", ["flipped", "truncated", "empty", "swapped"])
def test_a_damaged_victim_is_told_and_never_used(pair, tmp_path, damage):
    clean, test = pair
    evaluate(clean, clean.images.float() * 0, test, keep=tmp_path, **QUICK)
    one, other = tmp_path.glob("*.json")
    text = one.read_text()
    one.write_text(
        {
            "flipped": text.replace("0.", "0.9", 1),
            "truncated": text[:-9],
            "empty": "",
            "swapped": other.read_text(),
        }[damage]
    )
    with pytest.raises(
        ValueError,
        match=(
            f"evaluate: {one}: expected a finished victim, got a damaged file; "
            "remove it and run again"
        ),
    ):
        evaluate(clean, clean.images.float() * 0, test, keep=tmp_path, **QUICK)
    one.unlink()
    evaluate(clean, clean.images.float() * 0, test, keep=tmp_path, **QUICK)
    assert one.read_text() != ""


def test_victims_that_cannot_be_named_are_not_kept(pair, tmp_path):
    clean, test = pair
    for options in (
        {"victim": lambda classes: torch.nn.Flatten(), "lr": 0.1},
        {"init": {"a": torch.zeros(1)}},
    ):
        with pytest.raises(
            ValueError,
            match=r"^evaluate: keep: expected None for a victim of your own or from given weights",
        ):
            evaluate(clean, clean.images.float() * 0, test, keep=tmp_path, **{**QUICK, **options})


def test_the_readme_shows_the_last_lines_of_a_demo(tmp_path, capsys):
    """They are the same but for the numbers, the path, and what the README leaves out as `...`."""
    page = (Path(__file__).parents[2] / "README.md").read_text()
    shown = re.search(r"ends with\n```\n(.*?)```", page, re.S).group(1).splitlines()
    run(tmp_path)
    said = capsys.readouterr().out.splitlines()
    told = json.loads(said.pop())
    shown_json = shown.pop()
    assert json.loads(shown_json.replace(" ...,", ""))["passed"] is True
    assert list(json.loads(shown_json.replace(" ...,", "")))[:-1] == list(told)[:3]

    def masked(line):
        return re.sub(r"\s*\d+\.\d", " N", line.replace(str(tmp_path), "demo-output"))

    lines = [line for line in said[said.index(shown[0]) :] if not line.startswith("FAILED")]
    assert [masked(line) for line in lines] == [masked(line) for line in shown]
