"""The programs of examples/ run, and do what they say."""

import importlib.util
from pathlib import Path

import torch
from PIL import Image

from miue_fast import data

ROOT = Path(__file__).resolve().parents[2]


def example(name):
    spec = importlib.util.spec_from_file_location(name, ROOT / "examples" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_one_batch_stays_in_the_budget(capsys):
    delta = example("one_batch").main(epochs=2, count=16)
    assert delta.dtype == torch.float32 and delta.shape == (16, 3, 32, 32)
    assert 0 < delta.abs().max() <= 8 / 255
    assert "epoch 2: loss" in capsys.readouterr().out


def test_a_folder_comes_out_with_its_names(tmp_path):
    drawn = data.shapes(12, seed=1, classes=2)
    for k, (image, label) in enumerate(zip(drawn.images, drawn.labels)):
        path = tmp_path / "clean" / drawn.classes[label] / f"{k:02}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image.permute(1, 2, 0).numpy()).resize((40, 36)).save(path)
    report = example("folder").main(
        tmp_path / "clean", tmp_path / "out", epochs=1, model="small_resnet"
    )
    assert report.ok and report.count == 12 and 0 < report.max_linf <= 8

    def names(folder):
        return {p.relative_to(folder).as_posix() for p in folder.rglob("*.png")}

    assert names(tmp_path / "out" / "images") == names(tmp_path / "clean")


def test_an_own_objective_is_lowered():
    losses = example("own_objective").main(steps=4, count=16)
    assert len(losses) == 4 and losses[-1] < losses[0]


def test_every_example_is_tested():
    tested = {"one_batch.py", "folder.py", "own_objective.py"}
    assert {path.name for path in (ROOT / "examples").glob("*.py")} == tested
