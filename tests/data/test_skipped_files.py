"""Files beside images that are none: one line and exit code 0. Pictures that cannot be read:
listed, exit code 3. Names stay one line.
"""

import logging
import os
import subprocess

import numpy as np
import pytest
import torch
from PIL import Image

from miue_fast import data
from miue_fast.cli import commands

OTHERS = [
    "Thumbs.db",
    "desktop.ini",
    ".DS_Store",
    "notes.txt",
    "labels.json",
    "labels.csv",
    "photo.xmp",
    "photo.aae",
    "README.md",
    "index.html",
    "Makefile",
    "photo.png.bak",
    "empty",
]
PICTURES = ["photo.heic", "photo.CR2", "photo.avif", "drawing.svg", "photo.jfif"]


@pytest.fixture
def root(tmp_path):
    random = np.random.default_rng(0)
    for label in ("cat", "dog"):
        (tmp_path / "data" / label).mkdir(parents=True)
        for k in range(3):
            picture(random).save(tmp_path / "data" / label / f"{k}.png")
    return tmp_path / "data"


def picture(random):
    return Image.fromarray(random.integers(0, 256, (8, 8, 3), dtype=np.uint8))


def start(*arguments):
    return commands.main([str(argument) for argument in arguments])


def test_files_that_are_no_images_are_skipped_with_one_line(root, tmp_path, capsys, caplog):
    for name in OTHERS:
        (root / "cat" / name).write_bytes(b"" if name == "empty" else b"text of " + name.encode())
    with caplog.at_level(logging.WARNING):
        found = data.load(root)
    assert (
        found.skipped == sorted(f"cat/{name}" for name in OTHERS)
        and found.unreadable == []
        and len(found) == 6
    )
    (line,) = [record.getMessage() for record in caplog.records]
    assert line.startswith(
        "13 files that are not images were skipped: cat/.DS_Store, "
    ) and line.endswith(", 8 more")
    caplog.clear()
    assert (
        start(
            "generate",
            "--data",
            root,
            "--out",
            tmp_path / "out",
            "--objective",
            "random",
            "--quiet",
        )
        == 0
    )
    assert len([record for record in caplog.records if "not images" in record.getMessage()]) == 1
    assert "unreadable" not in capsys.readouterr().err
    caplog.clear()
    delta, _ = data.load_poison(tmp_path / "out")
    data.export_folder(found, delta, tmp_path / "images", eps=8 / 255)
    caplog.clear()
    assert start("verify", root, tmp_path / "images", "--eps", "8/255") == 0
    assert len([record for record in caplog.records if "not images" in record.getMessage()]) == 1


def test_a_data_set_without_them_says_nothing(root, caplog):
    assert data.load(root).skipped == [] and caplog.records == []


@pytest.mark.parametrize("name", PICTURES)
def test_pictures_of_other_kinds_are_missed(root, tmp_path, capsys, name):
    (root / "cat" / name).write_bytes(b"whatever")
    assert [listed for listed, _ in data.load(root).unreadable] == [f"cat/{name}"]
    assert (
        start(
            "generate",
            "--data",
            root,
            "--out",
            tmp_path / "out",
            "--objective",
            "random",
            "--quiet",
        )
        == 3
    )
    assert f"unreadable, left out: cat/{name}: not an image type" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["photo", "photo.png.bak", "photo.txt", "photo.jpg_large"])
@pytest.mark.parametrize("form", ["PNG", "JPEG", "GIF", "TIFF", "WEBP"])
def test_images_under_other_names_are_missed(root, name, form):
    picture(np.random.default_rng(1)).save(root / "cat" / name, form)
    found = data.load(root)
    assert [listed for listed, _ in found.unreadable] == [f"cat/{name}"] and found.skipped == []


def test_what_cannot_be_opened_may_be_an_image(root, monkeypatch):
    def refuse(path):
        raise PermissionError(13, "Permission denied", path)

    (root / "cat" / "photo").write_bytes(b"?")
    monkeypatch.setattr(data.tree, "open_regular", refuse)
    assert data.load(root).unreadable == [("cat/photo", "cannot be read: Permission denied")]


def test_a_broken_image_is_missed(root, tmp_path, capsys):
    (root / "cat" / "3.png").write_bytes(b"broken")
    (root / "cat" / "Thumbs.db").write_bytes(b"x")
    assert (
        start(
            "generate",
            "--data",
            root,
            "--out",
            tmp_path / "out",
            "--objective",
            "random",
            "--quiet",
        )
        == 3
    )
    assert "cat/3.png: not an image" in capsys.readouterr().err


HARMFUL = ["new\nline", "\x1b[2K\x1b[1Gok", "tab\tbell\a", "\u202etxt.exe", "a\r"]


@pytest.mark.parametrize("name", HARMFUL)
def test_names_reach_the_terminal_as_one_harmless_line(root, tmp_path, capsys, caplog, name):
    """The data set keeps them as they are."""
    os.rename(root / "cat", root / name)
    (root / name / f"{name}.png").write_bytes(b"broken")
    (root / name / f"{name}.txt").write_bytes(b"text")
    found = data.load(root)
    assert (
        name in found.classes
        and found.skipped == [f"{name}/{name}.txt"]
        and found.unreadable[0][0] == f"{name}/{name}.png"
    )
    assert (
        all(record.getMessage().isprintable() for record in caplog.records)
        and len(caplog.records) == 1
    )
    assert (
        start(
            "generate",
            "--data",
            root,
            "--out",
            tmp_path / "out",
            "--objective",
            "random",
            "--quiet",
        )
        == 3
    )
    (line,) = capsys.readouterr().err.splitlines()
    assert line.isprintable() and line.startswith("miue-fast: unreadable, left out: ")
    data.export_folder(found, torch.zeros(found.images.shape), tmp_path / "images", eps=0)
    os.unlink(tmp_path / "images" / name / "0.png")
    report = data.verify(root, tmp_path / "images", eps=0)
    assert len(report.problems) == 1 and all(problem.isprintable() for problem in report.problems)
    with pytest.raises(ValueError) as error:
        data.align(
            found,
            data.Dataset(found.images[:1], found.labels[:1], found.classes, [f"{name}/other.png"]),
        )
    assert str(error.value).isprintable()


def test_a_path_of_a_thousand_folders(tmp_path):
    here = os.getcwd()
    for label in ("a", "b"):
        (tmp_path / label).mkdir()
        picture(np.random.default_rng(2)).save(tmp_path / label / "0.png")
    try:
        os.chdir(tmp_path / "a")
        for _ in range(1500):
            os.mkdir("d")
            os.chdir("d")
        picture(np.random.default_rng(3)).save("deep.png")
        found = data.load(tmp_path)
    finally:
        os.chdir(here)
        subprocess.run(
            ["rm", "-rf", tmp_path / "a"], check=True
        )  # shutil's recursion is not deep enough, nor is pytest's
    assert len(found) == 3


def test_a_link_that_leads_nowhere_as_output_or_data(root, tmp_path, capsys):
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "dangling").symlink_to("nowhere")
    for name in ("loop", "dangling"):
        with pytest.raises(
            ValueError,
            match=(
                r"a link that leads to no folder|"
                r"Too many levels of symbolic links|a link to nothing"
            ),
        ):
            data.check_writable(tmp_path / name)
        assert (
            start(
                "generate",
                "--data",
                root,
                "--out",
                tmp_path / name,
                "--objective",
                "random",
                "--quiet",
            )
            == 2
        )
        assert (
            start(
                "generate",
                "--data",
                tmp_path / name,
                "--out",
                tmp_path / "out",
                "--objective",
                "random",
                "--quiet",
            )
            == 2
        )
        found = data.load(root)
        with pytest.raises(
            ValueError,
            match=(
                r"a link that leads to no folder|"
                r"Too many levels of symbolic links|a link to nothing"
            ),
        ):
            data.export_folder(found, torch.zeros(found.images.shape), tmp_path / name, eps=0)
    err = capsys.readouterr().err
    assert len(err.splitlines()) == 4 and all(
        line.startswith("miue-fast: ") for line in err.splitlines()
    )


def test_the_first_images_of_many_classes_take_no_time():
    """As many classes as images: one pass for each class would be minutes."""
    count = 200_000
    images = torch.zeros((count, 1, 1, 1), dtype=torch.uint8)
    found = data.load((images, torch.arange(count).flip(0) // 2), per_class=1)
    assert len(found) == count // 2 and found.names[:2] == ["00000000", "00000002"]
