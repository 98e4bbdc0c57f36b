"""What the README says works as it stands, and what it generates from the registry is current."""

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

from benchmarks.pages import readme
from miue_fast import data, models
from miue_fast.cli import commands

README = (Path(__file__).parents[2] / "README.md").read_text()
EVIDENCE = {
    "name": "photos",
    "data": "photos/train",
    "test": "photos/test",
    "size": 32,
    "poisons": {"random": {"objective": "random"}},
    "victims": {"lenet5": {"epochs": 1}},
    "runs": [{}],
}
QUICK = "--model small_resnet --epochs 1 --steps 1 --quiet"


@pytest.fixture
def photos(tmp_path, monkeypatch):
    """photos/train and photos/test of unequal sizes, in a folder of their own."""
    monkeypatch.chdir(tmp_path)
    for part, seed in (("train", 1), ("test", 2)):
        drawn = data.shapes(20, seed=seed, classes=2)
        for k, (image, label) in enumerate(zip(drawn.images, drawn.labels)):
            path = Path("photos", part, drawn.classes[label], f"{k:02}.png")
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image.permute(1, 2, 0).numpy()).resize((36 + k % 3, 40)).save(path)


def block(after):
    return re.search(r"```\w*\n(.*?)```", README[README.index(after) :], re.S).group(1)


def test_the_commands_run(photos):
    lines = [
        shlex.split(line, comments=True)
        for line in block("## The commands").splitlines()
        if line.startswith("miue-fast")
    ]
    assert [line[1] for line in lines] == [
        "generate",
        "verify",
        "evaluate",
        "evaluate",
        "report",
        "export",
    ]
    Path("evidence.json").write_text(json.dumps(EVIDENCE))
    for line in lines:
        quick = {"generate": QUICK, "evaluate": "--seeds 1 --epochs 1 --quiet"}.get(line[1], "")
        assert commands.main(line[1:] + quick.split()) == 0, line


def test_the_ten_lines_run(photos):
    code = block("## Ten lines").replace(
        '"resnet18", epochs=30', '"small_resnet", epochs=1, steps=1, progress=False'
    )
    batch = data.shapes(8, seed=3, classes=2)
    given = {
        "model": models.build("small_resnet", 2),
        "images": batch.images,
        "labels": batch.labels,
        "features": torch.rand(8, 4),
        "d_features": torch.rand(8, 32),
    }
    exec(
        code.replace(
            "delta = result.delta ",
            "delta = torch.zeros(8, 3, 32, 32) if result.delta.any() else None ",
        ),
        given,
    )
    assert given["loss"].isfinite() and given["delta"].any()


def test_info_runs_without_a_warning():
    done = subprocess.run(
        [sys.executable, "-W", "error", "-m", "miue_fast", "info"], capture_output=True, text=True
    )
    assert done.returncode == 0 and "nt_xent" in done.stdout and not done.stderr, done.stderr


def test_the_table_of_ops_and_backends_is_current():
    begin, end = "<!-- matrix:begin -->\n", "\n<!-- matrix:end -->"
    shown = README[README.index(begin) + len(begin) : README.index(end)]
    assert shown == readme.matrix(), (
        "run `python -m benchmarks.pages.readme --matrix` and paste it between the markers"
    )
