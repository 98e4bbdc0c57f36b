"""What README.md and docs/ say works as it stands, and what they generate is current."""

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
from miue_fast.evaluation import DEFENCES
from miue_fast.models import NETWORKS

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text()
USAGE = (ROOT / "docs" / "usage.md").read_text()
EVIDENCE = {
    "name": "photos",
    "data": "photos/train",
    "test": "photos/test",
    "size": 32,
    "poisons": {"random": {"objective": "random"}},
    "victims": {"lenet5": {"epochs": 1}},
    "runs": [{}],
}
QUICK = {
    "generate": "--model small_resnet --epochs 1 --steps 1 --quiet",
    "evaluate": "--seeds 1 --epochs 1 --quiet",
}


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


def block(page, heading):
    """The first code block below a heading."""
    start = page.index(f"\n{heading}\n")
    return re.search(r"```\w*\n(.*?)```", page[start:], re.S).group(1)


def commands_of(text):
    lines = [shlex.split(line, comments=True) for line in text.splitlines()]
    return [line[1:] for line in lines if line and line[0] == "miue-fast"]


@pytest.mark.parametrize(
    "page, heading, names",
    [
        (README, "### A folder", ["generate", "verify", "evaluate"]),
        (
            USAGE,
            "## From the command line",
            ["generate", "verify", "evaluate", "evaluate", "report", "export"],
        ),
    ],
    ids=["README", "usage"],
)
def test_the_commands_run(photos, page, heading, names):
    lines = commands_of(block(page, heading))
    assert [line[0] for line in lines] == names
    Path("evidence.json").write_text(json.dumps(EVIDENCE))
    for line in lines:
        assert commands.main(line + QUICK.get(line[0], "").split()) == 0, line


def test_the_lines_of_usage_run(photos):
    code = block(USAGE, "## From Python").replace(
        '"resnet18", epochs=30', '"small_resnet", epochs=1, steps=1, progress=False'
    )
    batch = data.shapes(8, seed=3, classes=2)
    given = {
        "model": models.build("small_resnet", 2),
        "images": batch.images,
        "labels": batch.labels,
        "features": torch.rand(8, 4),
        "grad": torch.rand(8, 32),
    }
    exec(
        code.replace(
            "delta = result.delta ",
            "delta = torch.zeros(8, 3, 32, 32) if result.delta.any() else None ",
        ),
        given,
    )
    assert given["loss"].isfinite() and given["delta"].any()


def test_the_loop_of_the_readme_runs():
    batch, trained = data.shapes(8, seed=3, classes=2), []
    given = {
        "model": models.build("small_resnet", 2).eval(),
        "images": batch.images,
        "labels": batch.labels,
        "epochs": 2,
        "train": trained.append,
    }
    exec(block(README, "### A loop"), given)
    delta = given["delta"]
    assert len(trained) == 2 and delta.dtype == torch.float32 and delta.shape == (8, 3, 32, 32)
    assert 0 < delta.abs().max() <= 8 / 255


def test_the_loss_of_the_readme_runs():
    features = torch.rand(8, 4, requires_grad=True)
    exec(
        block(README, "### A loss"), given := {"features": features, "labels": torch.arange(8) % 2}
    )
    assert given["loss"].isfinite() and features.grad.any()


def test_the_readme_takes_a_minute():
    """It has at most 150 lines, fifteen for each of its three uses, and one small picture."""
    assert len(README.splitlines()) <= 150
    for heading in ("### A folder", "### A loop", "### A loss"):
        assert len(block(README, heading).splitlines()) <= 15
    (picture,) = re.findall(r"!\[[^\]]*\]\(([^)]*)\)", README)
    assert (ROOT / picture).stat().st_size < 200_000


def test_usage_names_what_can_be_chosen():
    missing = [name for name in [*DEFENCES, *NETWORKS] if f"`{name}`" not in USAGE]
    assert set(missing) <= {"none"}


def test_info_runs_without_a_warning():
    done = subprocess.run(
        [sys.executable, "-W", "error", "-m", "miue_fast", "info"], capture_output=True, text=True
    )
    assert done.returncode == 0 and "nt_xent" in done.stdout and not done.stderr, done.stderr


@pytest.mark.parametrize("page", readme.PAGES)
def test_the_generated_sections_are_current(page):
    text = (ROOT / page).read_text()
    assert readme.rewritten(page, text) == text, "run `python -m benchmarks.pages.readme --readme`"


def test_the_readme_says_where_each_backend_has_run():
    rows = re.findall(r"^\| (`.*) \| .* \| (.*) \|$", README, re.M)
    said = {name: where for names, where in rows for name in re.findall(r"`(\w+)`", names)}
    assert {name: said[name] for name in readme.RUN_ON if name != "wgmma"} == {
        name: where for name, where in readme.RUN_ON.items() if name != "wgmma"
    }
    assert "wgmma" in said and len(rows) == 4
