"""Messages name options as the user wrote them, and say one line about paths and sizes that no
machine has.
"""

import errno
import os
import re
from pathlib import Path

import pytest
import torch

import miue_fast
from miue_fast import data
from miue_fast.cli import commands
from miue_fast.support import messages
from miue_fast.support.written import option, shown, written_as

TINY = {
    "model": "small_resnet",
    "width": 4,
    "epochs": 1,
    "steps": 1,
    "batch": 10,
    "progress": False,
}
WORDS = [
    "--model",
    "small_resnet",
    "--width",
    "4",
    "--epochs",
    "1",
    "--steps",
    "1",
    "--batch",
    "10",
    "--quiet",
]
# What only Python takes; an option of the command line is --so, and its value follows a space.
PYTHON = re.compile(
    r"\b(overwrite|resume|allow_lossy|partial|channels_last|fused|fp8)=(True|False)|\bsize=N|\b[a-z]+_[a-z_]+=\w"
)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Clean images, a poison of them, and images of other sizes."""
    root = tmp_path_factory.mktemp("words")
    shapes = data.shapes(20, seed=0, size=16, classes=2, difficulty=0)
    data.export_folder(shapes, shapes.images * 0.0, root / "train", eps=0)
    data.export_folder(shapes, shapes.images * 0.0, root / "mixed", eps=0)
    large = data.shapes(4, seed=1, size=24, classes=2, difficulty=0)
    data.export_folder(large, large.images * 0.0, root / "more", eps=0)
    for path in (root / "more").rglob("*.png"):
        path.rename(root / "mixed" / path.parent.name / f"large{path.name}")
    miue_fast.generate(data.load(root / "train"), root / "out", **TINY)
    data.export_npz(shapes, shapes.images * 0.0, root / "p.npz", eps=0)
    return root


def lines_to_try(root):
    """(command line, how it names what to do)."""
    generate = ["generate", "--data", root / "train", "--out", root / "out", *WORDS]
    export = ["export", root / "out", "--data", root / "train", "--to"]
    return [
        ([], "required: COMMAND"),
        ([*generate, "--no-resume"], "set --overwrite"),
        (
            [*generate, "--steps", "2"],
            "--steps = 1 (now 2); repeat them, choose another folder or set --overwrite",
        ),
        ([*generate, "--target-shift", "0"], "--target-shift: expected"),
        (["generate", "--data", root / "mixed", "--out", root / "new", *WORDS], "or --size N to"),
        ([*generate, "--export", "jpeg"], "--export: expected a lossless one, or --allow-lossy"),
        (
            [*export, root / "new", "--format", "jpeg"],
            "--format: expected a lossless one, or --allow-lossy",
        ),
        ([*export, root / "more"], "--to: expected a new or empty folder (or --overwrite)"),
        (
            [*export, root / "p.npz", "--format", "npz"],
            "--to: expected a new file (or --overwrite)",
        ),
        ([*export, root / "p.txt", "--format", "npz"], "--to: expected a file name"),
    ]


def test_the_command_line_never_speaks_python(made, capsys):
    for words, expected in lines_to_try(made):
        assert commands.main([str(word) for word in words]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert expected in line, line
        assert line.count("miue-fast:") == 1 and not PYTHON.search(line), line


def test_python_never_speaks_the_command_line(made):
    clean = data.load(made / "train")
    calls = [
        (
            lambda: miue_fast.generate(clean, made / "out", resume=False, **TINY),
            "set overwrite=True",
        ),
        (
            lambda: miue_fast.generate(clean, made / "out", **{**TINY, "steps": 2}),
            "steps = 1 (now 2)",
        ),
        (lambda: miue_fast.generate(clean, target_shift=0), "target_shift: expected"),
        (lambda: data.load(made / "mixed"), "or size=N to"),
        (
            lambda: data.export_folder(clean, clean.images * 0.0, made / "more", eps=0),
            "(or overwrite=True)",
        ),
        (
            lambda: data.export_folder(
                clean, clean.images * 0.0, made / "new", eps=0, image_format="jpeg"
            ),
            "or allow_lossy=True",
        ),
        (
            lambda: data.align(clean, data.load(made / "mixed", size=16)),
            "same per_class and split?",
        ),
    ]
    for call, expected in calls:
        with pytest.raises(ValueError, match=re.escape(expected)) as error:
            call()
        assert "--" not in str(error.value), error.value


def test_no_source_names_a_flag_where_python_may_be_told():
    """A flag in the text of a message belongs into the files of the command line; all others ask
    `option` and `shown`.
    """
    package = Path(miue_fast.__file__).parent
    for path in package.rglob("*.py"):
        for number, line in enumerate(path.read_text().splitlines(), 1):
            if path.parent.name == "cli" or path.name in ("written.py", "_waiting.py"):
                continue
            spoken = (
                line
                if (
                    "fail(" in line
                    or "Error(" in line
                    or "log." in line
                    or line.lstrip().startswith(('f"', '"'))
                )
                else ""
            )
            told = re.search(
                r"\b(overwrite|resume|allow_lossy)=(True|False)|size=N|[^-]--[a-z]", spoken
            )
            assert not told, f"{path.relative_to(package)}:{number}: {line.strip()}"


def test_names_of_blocks():
    assert (
        shown("op", "eps and lr") == "eps and lr"
        and option("overwrite", True) == "overwrite=True"
        and option("size", "N") == "size=N"
    )
    with written_as(
        {
            "eps": "--eps",
            "overwrite": "--overwrite",
            "channels_last": "--channels-last",
            "op.path": "--to",
        }
    ):
        assert (
            shown("op", "eps and lr") == "--eps and lr"
            and shown("op", "path") == "--to"
            and shown("other", "path") == "path"
        )
        assert (
            option("overwrite", True) == "--overwrite"
            and option("channels_last", False) == "--no-channels-last"
        )
        assert option("eps", "8/255") == "--eps 8/255" and option("partial", True) == "partial=True"
        with (
            written_as({"eps": "poisons.em.eps"}),
            pytest.raises(ValueError, match=r"^op: poisons\.em\.eps: expected a, got b$"),
        ):
            messages.fail("op", "eps", "a", "b")
        assert shown("op", "eps") == "--eps"
    assert shown("op", "eps") == "eps"


PATHS = {
    "loop": errno.ELOOP,
    "file/below": errno.ENOTDIR,
    "x" * 300: errno.ENAMETOOLONG,
    "nothing": None,
    "null\0": None,
}


@pytest.mark.parametrize("name", PATHS, ids=lambda name: name[:10])
def test_paths_that_lead_nowhere(tmp_path, capsys, name):
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "nothing").symlink_to("not there")
    (tmp_path / "file").touch()
    before = sorted(tmp_path.iterdir())
    path, reason = tmp_path / name, os.strerror(PATHS[name]) if PATHS[name] else ""
    for words in (
        ["generate", "--data", "/nowhere", "--out", path],
        ["demo", "--out", path],
        ["report", "/nowhere", "--out", path],
        ["export", "/nowhere", "--data", "/nowhere", "--to", path],
    ):
        assert commands.main([str(word) for word in words]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert f"{words[-2]}: expected a path " in line and reason in line, line
    with pytest.raises(ValueError, match="output: folder: expected a path ") as error:
        data.check_writable(path)
    assert reason in str(error.value) and len(str(error.value).splitlines()) == 1
    assert sorted(tmp_path.iterdir()) == before


TOO_LARGE = {
    "bytes": lambda: torch.empty(2**46),
    "count": lambda: torch.empty(2**40, 2**40),
    "layer": lambda: torch.nn.Conv2d(2**31, 2**31, 3),
    "float": lambda: torch.zeros(3).add_(torch.ones(3), alpha=1e39),
    "python": lambda: float(10**400),
    "memory": lambda: [None] * 2**60,
}


@pytest.mark.parametrize("what", TOO_LARGE)
def test_what_fits_nowhere_is_one_line(monkeypatch, capsys, what):
    monkeypatch.setitem(commands.COMMANDS, "info", lambda args: TOO_LARGE[what]())
    assert commands.main(["info"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert re.match(r"miue-fast: (memory|numbers): expected .*, got: .*; choose smaller", line), (
        line
    )


@pytest.mark.parametrize(
    "bug",
    [
        RuntimeError("shape mismatch"),
        NotImplementedError("op"),
        RecursionError("too deep"),
        KeyError("a"),
    ],
)
def test_a_fault_of_the_program_keeps_its_traceback(monkeypatch, bug):
    def broken(args):
        raise bug

    monkeypatch.setitem(commands.COMMANDS, "info", broken)
    with pytest.raises(type(bug)):
        commands.main(["info"])


@pytest.mark.parametrize("text", ["", "  "])
def test_an_empty_path_is_not_the_current_folder(tmp_path, monkeypatch, capsys, text):
    monkeypatch.chdir(tmp_path)
    for words in (
        ["generate", "--data", text, "--out", "x"],
        ["generate", "--data", "x", "--out", text],
        ["verify", "x", text],
        ["export", text, "--data", "x", "--to", "y"],
        ["demo", "--out", text],
        ["report", text, "--out", "x"],
        ["evaluate", "--data", "x", "--poisoned", "x", "--test", "x", "--figure", text],
    ):
        assert commands.main(words) == 2
        told = capsys.readouterr().err
        assert (
            told.count("\n") == 1
            and "expected a path, got an empty text; the current folder is ." in told
        )
    assert not list(tmp_path.iterdir())
