"""One folder for several commands: an overwriting run removes its own, `verify` misses a list, and
what cannot work is said first.
"""

import os
import signal

import pytest
from _commands import TINY, complaint, run

from miue_fast import data
from miue_fast.generation.run import BiLevelRun
from miue_fast.report import tasks


@pytest.fixture
def start(root, tmp_path):
    return lambda *words: run(
        "generate", "--data", root / "train", "--out", tmp_path / "out", *words
    )


def put(folder, name):
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    data.Owned(folder).write({name: lambda file: file.write(b"hours of work")})


@pytest.mark.parametrize("objective", ["mi-ue", "random"])
def test_an_overwriting_run_leaves_what_other_commands_wrote_beside_it(start, tmp_path, objective):
    out, words = tmp_path / "out", [*TINY, "--objective", objective]
    assert start(*words, "--export", "npz") == 0
    others = [
        "report.json",
        "cells/0123456789abcdef.json",
        "pretrained/0123456789abcdef.safetensors",
        "evaluation.json",
        "for-paper.npz",
    ]
    for name in others:
        put(out, name)
    assert start(*words, "--seed", "9", "--export", "png", "--overwrite") == 0
    assert all(
        (out / name).read_bytes() == b"hours of work" and data.Owned(out).owns(name)
        for name in others
    )
    assert not (out / "poisoned.npz").exists()  # the replaced run's


def test_a_run_of_one_epoch_that_was_killed_while_it_replaced_another(start, tmp_path, monkeypatch):
    out, words = tmp_path / "out", [*TINY, "--epochs", "1"]
    assert start(*words, "--export", "png") == 0
    with monkeypatch.context() as patch:
        patch.setattr(
            "miue_fast.generation.run.remove_run",
            lambda *a, **k: (_ for _ in ()).throw(KeyboardInterrupt),
        )
        assert start(*words, "--seed", "9", "--export", "npz", "--overwrite") == 130
    assert start(*words, "--seed", "9", "--export", "npz") == 0
    assert not (out / "images").exists() or not list((out / "images").glob("*/*"))
    assert start(*words, "--seed", "9", "--export", "png") == 0
    assert (
        start(*words, "--seed", "9", "--export", "png") == 0 and (out / "poisoned.npz").exists()
    )  # its own exports stay


@pytest.mark.parametrize("damage", ["no list", "header alone", "torn", "no note"])
def test_verify_misses_a_list_that_is_gone(start, root, tmp_path, damage, capsys):
    assert start(*TINY, "--objective", "random", "--export", "png") == 0
    path = tmp_path / "out/images" / data.LIST
    header = path.read_bytes().split(b"\n")[0] + b"\n"
    if damage == "no list":
        path.unlink()
    elif damage == "no note":
        (path.parent / "miue-export.json").unlink()
    else:
        os.truncate(path, len(header) + 30 * (damage == "torn"))
    capsys.readouterr()
    assert run("verify", root / "train", path.parent) == 1
    assert "miue-export.json: missing or changed" in capsys.readouterr().out


def test_a_list_of_other_files_says_nothing_about_the_images_of_another_program(root, tmp_path):
    clean = data.load(root / "train")
    data.export_folder(clean, clean.images * 0.0, tmp_path / "theirs", eps=0)
    for name in (data.LIST, data.NOTE):
        (tmp_path / "theirs" / name).unlink()
    put(tmp_path / "theirs", "evaluation.json")
    assert run("verify", root / "train", tmp_path / "theirs") == 0


@pytest.mark.parametrize(
    "name", ["poison.safetensors", "manifest.json", "checkpoint.safetensors", "miue-files.sha256"]
)
def test_an_evaluation_takes_no_name_of_a_run(start, root, tmp_path, name, capsys):
    assert start(*TINY, "--objective", "random") == 0
    before = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    words = [
        "evaluate",
        "--data",
        root / "train",
        "--test",
        root / "test",
        "--poisoned",
        tmp_path / "out",
        "--quiet",
    ]
    assert run(*words, "--json", tmp_path / "out" / name) == 2
    assert complaint(capsys).startswith(
        "miue-fast: evaluate: output: expected a name that no other file of this package has"
    )
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == before


def test_the_figure_does_not_replace_the_numbers(root, tmp_path, capsys):
    words = [
        "evaluate",
        "--data",
        root / "train",
        "--test",
        root / "test",
        "--poisoned",
        root / "out",
        "--quiet",
    ]
    assert run(*words, "--json", tmp_path / "e.png", "--figure", tmp_path / "." / "e.png") == 2
    assert complaint(capsys).startswith(
        "miue-fast: evaluate: --figure: expected another file than --json"
    )


def test_pretrained_weights_that_are_no_regular_file_are_not_waited_for(tmp_path):
    before = signal.signal(signal.SIGALRM, lambda *_: pytest.fail("it waits"))
    sources = tasks.Sources.__new__(tasks.Sources)
    sources.folder, sources.start_path = tmp_path, lambda victim: tmp_path / "weights"
    for make in (os.mkfifo, os.mkdir):
        make(tmp_path / "weights")
        signal.alarm(10)
        with pytest.raises(
            ValueError,
            match=(
                r"^report: .*/weights: expected pretrained weights, got a .*; "
                r"remove it and run again$"
            ),
        ):
            sources.start("victim")
        signal.alarm(0)
        (tmp_path / "weights").rmdir() if make is os.mkdir else (tmp_path / "weights").unlink()
    signal.signal(signal.SIGALRM, before)


@pytest.mark.parametrize("option", ["--out", "--data"])
def test_an_empty_path_is_not_the_current_folder(root, tmp_path, option, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = {"--data": root / "train", "--out": tmp_path / "out", option: ""}
    assert run("generate", *[word for pair in words.items() for word in pair], *TINY) == 2
    assert complaint(capsys).startswith(
        f"miue-fast: generate: argument {option}: expected a path, got an empty text"
    )
    assert not os.listdir(tmp_path)


def test_a_path_with_a_line_end_forges_no_line(root, tmp_path, capsys):
    out = tmp_path / "a\nexported 12 as png: b"
    assert (
        run(
            "generate",
            "--data",
            root / "train",
            "--out",
            out,
            *TINY,
            "--objective",
            "random",
            "--export",
            "png",
        )
        == 0
    )
    assert len(capsys.readouterr().out.splitlines()) == 2


@pytest.mark.parametrize("place", ["images/cat", "images/miue-files.sha256", "miue-files.sha256"])
@pytest.mark.parametrize("export", [True, False])
def test_what_may_not_be_changed_is_found_before_the_first_epoch(
    start, tmp_path, place, export, monkeypatch, capsys
):
    assert start(*TINY, "--export", "png") == 0
    out = tmp_path / "out"
    place = place.replace(
        "cat", min(path.name for path in (out / "images").iterdir() if path.is_dir())
    )
    monkeypatch.setattr(
        os,
        "access",
        lambda path, mode, access=os.access: path != out / place and access(path, mode),
    )
    monkeypatch.setattr(BiLevelRun, "epoch", lambda *a: pytest.fail("trained"))
    assert start(*TINY, "--seed", "9", "--overwrite", *(["--export", "png"] if export else [])) == 2
    assert f"{out / place}: Permission denied; choose another place" in complaint(capsys)
