"""The files of a report: nobody else's is replaced, and none of its own is used that is not as it
was written.
"""

import json
import shutil

import numpy as np
import pytest

from miue_fast import data, report
from miue_fast.cli import commands
from miue_fast.data.owned import LIST
from miue_fast.report import pages, tasks


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """(configuration, folder) of a small report with a poison, a part of it, and pretrained
    weights.
    """
    folder = tmp_path_factory.mktemp("files")
    for name, seed in (("train", 1), ("test", 2)):
        drawn = data.shapes(36, seed=seed, size=16, classes=3)
        np.savez(folder / f"{name}.npz", images=drawn.images.numpy(), labels=drawn.labels.numpy())
    config = {
        **{
            "name": "x",
            "data": str(folder / "train.npz"),
            "test": str(folder / "test.npz"),
            "per_class": 8,
        },
        "generation": {"model": "small_resnet", "width": 4, "epochs": 1, "steps": 2, "batch": 12},
        "poisons": {"mi-ue": {}, "half": {"of": "mi-ue", "ratio": 0.5}},
        "victims": {
            "tuned": {"model": "lenet5", "epochs": 1, "pretrain": {"per_class": 4, "epochs": 1}}
        },
        "runs": [{"poisons": ["clean", "half"]}],
    }
    (folder / "config.json").write_text(json.dumps(config))
    assert (
        commands.main(
            ["report", str(folder / "config.json"), "--out", str(folder / "out"), "--quiet"]
        )
        == 0
    )
    return folder / "config.json", folder / "out"


@pytest.fixture
def out(finished, tmp_path):
    return shutil.copytree(finished[1], tmp_path / "out")


def again(finished, out, capsys):
    """(exit code, stderr) of the same command."""
    capsys.readouterr()
    code = commands.main(["report", str(finished[0]), "--out", str(out), "--quiet"])
    return code, capsys.readouterr().err


def states(folder):
    return {
        path: (path.stat().st_mtime_ns, path.read_bytes())
        for path in folder.rglob("*")
        if path.is_file()
    }


# ---- somebody else's files


@pytest.mark.parametrize(
    "name", ["report.md", "report.html", "report.json", "noise.png", "jpeg.png"]
)
def test_files_of_somebody_else_are_refused_before_the_work(
    finished, tmp_path, capsys, monkeypatch, name
):
    (tmp_path / name).write_bytes(b"mine")
    monkeypatch.setattr(data, "load", lambda *args, **options: pytest.fail("the work has started"))
    code, told = again(finished, tmp_path, capsys)
    assert code == 2 and told.startswith(
        "miue-fast: report: output: expected a new name, or a file that miue_fast wrote"
    )
    assert f"{tmp_path / name}, which miue_fast did not write" in told and told.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == [name] and (
        tmp_path / name
    ).read_bytes() == b"mine"
    if name != "report.json":
        assert (
            commands.main(["report", str(finished[1] / "report.json"), "--out", str(tmp_path)]) == 2
        )
        assert [path.name for path in tmp_path.iterdir()] == [name] and (
            tmp_path / name
        ).read_bytes() == b"mine"


def test_a_page_that_was_edited_is_not_replaced(finished, out, capsys):
    (out / "report.md").write_text("my notes")
    before = states(out)
    code, told = again(finished, out, capsys)
    assert (
        code == 2
        and f"{out / 'report.md'}, which was changed since" in told
        and states(out) == before
    )


def test_its_own_pages_are_replaced_and_stale_figures_removed(finished, out, capsys, monkeypatch):
    assert (out / "noise.png").exists() and again(finished, out, capsys)[0] == 0
    for module in (report.figures, pages):
        monkeypatch.setattr(module, "missing", lambda: "no figures here")
    assert again(finished, out, capsys)[0] == 0
    assert not list(out.glob("*.png")) and "no figures here" in (out / "report.md").read_text()
    named = {line[66:] for line in (out / LIST).read_text().splitlines()[1:]}
    assert named == {
        path.relative_to(out).as_posix()
        for path in [*out.glob("report.*"), *out.glob("cells/*"), *out.glob("pretrained/*")]
    }


def test_pages_beside_a_run_leave_its_list_alone(finished, out, capsys):
    """It adds lines to the list meanwhile."""
    with data.only_writer(out):
        before = (out / LIST).read_bytes()
        assert (
            commands.main(["report", str(finished[0]), "--out", str(out), "--quiet", "--no-run"])
            == 0
        )
        assert (out / LIST).read_bytes().startswith(before)


def test_what_a_killed_process_left_is_removed(finished, out, capsys):
    for folder in (out, out / "cells", out / "pretrained"):
        (folder / ".0123.miue-tmp").write_bytes(b"half")
    assert again(finished, out, capsys)[0] == 0 and not list(out.rglob("*.miue-tmp"))


# ---- its own files


@pytest.mark.parametrize("damage", ["flipped", "truncated", "empty", "foreign", "list gone"])
def test_damaged_weights_are_told_before_the_work_and_made_anew_once_removed(
    finished, out, capsys, monkeypatch, damage
):
    (weights,) = (out / "pretrained").iterdir()
    whole = weights.read_bytes()
    flipped = bytearray(whole)
    flipped[-9] ^= 1
    weights.write_bytes(
        {
            "flipped": flipped,
            "truncated": whole[:-100],
            "empty": b"",
            "foreign": b"x" * 9,
            "list gone": whole,
        }[damage]
    )
    if damage == "list gone":
        (out / LIST).unlink()
        for path in [*out.glob("report.*"), *out.glob("*.png")]:
            path.unlink()
    next(
        path for path in (out / "cells").iterdir() if json.loads(path.read_text())["kind"] == "cell"
    ).unlink()
    with monkeypatch.context() as patch:
        patch.setattr(tasks, "run_cell", lambda *args, **options: pytest.fail("used"))
        code, told = again(finished, out, capsys)
    wanted = (
        f"expected the weights whose sha256 is in {LIST}, got a damaged file; "
        "remove it and run again"
    )
    assert (code, told) == (2, f"miue-fast: report: {weights}: {wanted}\n")
    weights.unlink()
    assert again(finished, out, capsys) == (0, "") and weights.read_bytes() == whole


@pytest.mark.parametrize("damage", ["flipped", "truncated", "gone"])
def test_a_damaged_poison_is_told_before_the_work_and_made_anew_once_removed(
    finished, out, capsys, monkeypatch, damage
):
    (folder,) = (out / "poisons").iterdir()
    path = folder / "poison.safetensors"
    whole = path.read_bytes()
    flipped = bytearray(whole)
    flipped[-9] ^= 1
    path.write_bytes({"flipped": flipped, "truncated": whole[:-100], "gone": b""}[damage])
    if damage != "gone":
        with monkeypatch.context() as patch:
            patch.setattr(tasks, "run_cell", lambda *args, **options: pytest.fail("used"))
            code, told = again(finished, out, capsys)
        assert code == 2 and told.startswith(
            f"miue-fast: poison: {path}: expected the file its manifest describes (sha256)"
        )
        assert told.endswith(f"; remove {folder} and run again\n") and told.count("\n") == 1
    shutil.rmtree(folder)
    assert again(finished, out, capsys) == (0, "") and path.read_bytes() == whole


def test_a_part_is_missing_while_its_whole_is(finished, out, capsys):
    """It was a KeyError of the page."""
    config = report.read(finished[0])
    sources = tasks.Sources(config, out)
    sources.path(sources.poison_key("mi-ue")).unlink()
    found, _ = report.run(config, out, progress=False, make=False)
    assert (
        found["missing"] == [["poison mi-ue", "not made"], ["poison half", "not made"]]
        and not found["poisons"]
    )
    report.render(found, out)
    assert again(finished, out, capsys) == (0, "")


def test_a_part_that_no_report_could_hold_is_a_failure_of_that_part(
    finished, tmp_path, monkeypatch
):
    """Not of the pages, after everything else was made."""
    config = report.read(finished[0])
    real = tasks.run_cell

    def backwards(*args, **options):
        run = real(*args, **options)
        run.seconds = -1.0
        return run

    monkeypatch.setattr(tasks, "run_cell", backwards)
    found, sources = report.run(config, tmp_path, progress=False)
    assert not found["cells"] and all(
        "seconds: expected a number from 0 to 1e+12, got -1.0" in why for _, why in found["missing"]
    )
    report.render(found, tmp_path, sources)
