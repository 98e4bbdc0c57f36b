"""Where `report` and `evaluate` print and write: no stream loses the work, and no file of somebody
else's is replaced.
"""

import json
import os
import subprocess
import sys

import numpy as np
import pytest

from miue_fast import data
from miue_fast.cli import commands


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("é")
    for name, seed in (("train", 1), ("test", 2)):
        drawn = data.shapes(36, seed=seed, size=16, classes=3)
        np.savez(folder / f"{name}.npz", images=drawn.images.numpy(), labels=drawn.labels.numpy())
    clean = data.load(folder / "train.npz")
    data.export_npz(
        clean, data.random_noise(clean, 4 / 255, 0), folder / "poisoned.npz", eps=4 / 255
    )
    config = {
        **{
            "name": "é",
            "data": str(folder / "train.npz"),
            "test": str(folder / "test.npz"),
            "poisons": {},
        },
        **{"victims": {"linear": {"epochs": 1}}, "runs": [{}]},
    }
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def evaluation(place, *words):
    paths = [
        "--data",
        place / "train.npz",
        "--poisoned",
        place / "poisoned.npz",
        "--test",
        place / "test.npz",
    ]
    return [
        "evaluate",
        *map(str, paths),
        "--victim",
        "linear",
        "--epochs",
        "1",
        "--quiet",
        *map(str, words),
    ]


def process(words, **options):
    return subprocess.run(
        [sys.executable, "-m", "miue_fast", *words],
        stderr=subprocess.PIPE,
        text=True,
        timeout=300,
        **options,
    )


@pytest.mark.parametrize("stdout", ["ascii", "closed", "broken"])
def test_no_stdout_loses_the_work(place, tmp_path, stdout):
    """Narrower than the folder's name, closed from the start, or a pipe that nobody reads."""
    read, write = os.pipe()
    os.close(read)
    options = {
        "ascii": {"env": {**os.environ, "PYTHONIOENCODING": "ascii"}, "stdout": subprocess.PIPE},
        "closed": {"preexec_fn": lambda: os.close(1)},
        "broken": {"stdout": write},
    }[stdout]
    out = tmp_path / "é"
    found = process(["report", str(place / "config.json"), "--out", str(out), "--quiet"], **options)
    assert (found.returncode, found.stderr) == (0, "") and (out / "report.html").exists()
    assert stdout != "ascii" or f"{tmp_path}/\\xe9/report.html\n" in found.stdout
    found = process(
        evaluation(place, "--json", out / "a.json", "--figure", out / "a.png"), **options
    )
    assert (
        (found.returncode, found.stderr) == (0, "")
        and (out / "a.json").exists()
        and (out / "a.png").exists()
    )
    os.close(write)


@pytest.mark.parametrize("flag, name", [("--json", "a.json"), ("--figure", "a.png")])
def test_evaluate_replaces_its_own_files_alone(place, tmp_path, capsys, monkeypatch, flag, name):
    path = tmp_path / name
    assert commands.main(evaluation(place, flag, path)) == 0
    assert commands.main(evaluation(place, flag, path, "--seeds", 2)) == 0
    path.write_bytes(b"mine")
    capsys.readouterr()
    monkeypatch.setattr(data, "load", lambda *args, **options: pytest.fail("the work has started"))
    assert commands.main(evaluation(place, flag, path)) == 2
    told = capsys.readouterr().err
    assert (
        told.startswith("miue-fast: evaluate: output: expected a new name")
        and f"{path}, which was changed since" in told
    )
    assert path.read_bytes() == b"mine"
    (tmp_path / "new").mkdir()
    (tmp_path / "new" / name).write_bytes(b"mine")
    assert commands.main(evaluation(place, flag, tmp_path / "new" / name)) == 2
    assert (
        "which miue_fast did not write" in capsys.readouterr().err
        and (tmp_path / "new" / name).read_bytes() == b"mine"
    )
