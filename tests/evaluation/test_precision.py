"""Victims that compute in bfloat16: they learn as those in float32 do, and results say which it
was.
"""

import pytest
import torch
from torch import nn

from miue_fast import data
from miue_fast.cli import commands
from miue_fast.dispatch import native
from miue_fast.evaluation import _torchvision, evaluate, run_cell, victims

FAST = {"victim": "linear", "epochs": 1, "lr": 0.05, "batch": 16}


@pytest.fixture(scope="module")
def shapes():
    return data.shapes(600, size=16, classes=4), data.shapes(200, size=16, classes=4, seed=9)


def cell(sets, **options):
    train, test = sets
    return run_cell(
        train.images, train.labels, test.images, test.labels, len(train.classes), **options
    )


def test_a_victim_in_bfloat16_learns_as_one_in_float32_does():
    sets = data.shapes(300, size=16, classes=3), data.shapes(200, size=16, classes=3, seed=9)
    setting = {"victim": "small_resnet", "epochs": 5, "batch": 32, "crop": 0, "keep_network": True}
    single, half = (cell(sets, dtype=dtype, **setting) for dtype in ("float32", "bfloat16"))
    assert single.dtype == "float32" and half.dtype == "bfloat16"
    assert single.test > 0.85 and abs(half.test - single.test) < 0.06
    assert {value.dtype for value in half.network.parameters()} == {torch.float32}
    assert not torch.equal(half.network.fc.weight, single.network.fc.weight)


def test_the_same_seed_gives_the_same_bits(shapes):
    one, two = (cell(shapes, **FAST, keep_network=True, dtype="bfloat16") for _ in range(2))
    assert torch.equal(one.network.fc.weight, two.network.fc.weight)


def test_float32_is_what_is_taken_without_a_word(shapes):
    plain = cell(shapes, **FAST, keep_network=True)
    asked = cell(shapes, **FAST, keep_network=True, dtype="float32")
    assert plain.dtype == asked.dtype == "float32"
    assert torch.equal(plain.network.fc.weight, asked.network.fc.weight)


@pytest.mark.parametrize("spec", ["adversarial:4:steps=2:step=2", "ueraser", "mixup"])
def test_what_a_defence_asks_the_network_is_in_bfloat16_too(shapes, spec):
    """The network's layers see bfloat16 wherever it is called, and the defence its float32
    logits; what a defence does to images stays in float32.
    """
    if spec == "ueraser" and (reason := _torchvision.missing()):
        pytest.skip(reason)
    seen, given = set(), set()

    class Watched(nn.Module):
        def __init__(self, classes):
            super().__init__()
            self.fc = nn.Linear(3 * 16 * 16, classes)

        def forward(self, images):
            given.add(images.dtype)
            logits = self.fc(images.flatten(1))
            seen.add(logits.dtype)
            return logits

    options = {**FAST, "victim": Watched, "defence": spec, "dtype": "bfloat16"}
    run = cell([each.select(torch.arange(40)) for each in shapes], **options)
    assert seen == {torch.bfloat16} and given == {torch.float32}
    assert (run.robust is not None) == spec.startswith("adversarial")


@pytest.mark.parametrize("missing, wanted", [(None, "bfloat16"), ("no tiles", "float32")])
def test_auto_is_bfloat16_where_the_processor_has_matrix_tiles(
    missing, wanted, monkeypatch, shapes
):
    monkeypatch.setattr(native, "matrix_missing", lambda: missing)
    assert cell(shapes, **FAST, device="cpu", dtype="auto").dtype == wanted


@pytest.mark.parametrize("bad", ["float16", "bf16", "", None, torch.bfloat16])
def test_another_type_is_one_line(shapes, bad, monkeypatch):
    monkeypatch.setattr(victims, "build", lambda *_: pytest.fail("a network was made"))
    for call in (
        lambda: cell(shapes, **FAST, dtype=bad),
        lambda: evaluate(shapes[0], shapes[0].images * 0.0, shapes[1], **FAST, dtype=bad),
    ):
        with pytest.raises(ValueError, match=r"^evaluate: dtype: expected one of float32") as told:
            call()
        assert "\n" not in str(told.value)


def test_evaluate_records_it_and_keeps_both(shapes, tmp_path):
    train, test = (each.select(torch.arange(60)) for each in shapes)
    delta = data.random_noise(train, 8 / 255, 3)
    options = {**FAST, "progress": False, "curve": False, "keep": tmp_path}
    for count, dtype in ((3, "float32"), (6, "bfloat16"), (6, "bfloat16")):
        table = evaluate(train, delta, test, dtype=dtype, **options)
        assert table.to_dict()["options"]["dtype"] == dtype
        assert {run.dtype for runs in table.rows.values() for run in runs} == {dtype}
        assert ("victims computed in bfloat16" in str(table)) == (dtype == "bfloat16")
        assert len(list(tmp_path.glob("*.json"))) == count


def test_the_command_line_takes_it(shapes, tmp_path, capsys):
    train, test = (each.select(torch.arange(60)) for each in shapes)
    for name, each in (("train", train), ("test", test)):
        data.export_npz(each, each.images * 0.0, tmp_path / f"{name}.npz", eps=0)
    words = ["evaluate", "--data", tmp_path / "train.npz", "--poisoned", tmp_path / "train.npz"]
    words += ["--test", tmp_path / "test.npz", "--victim", "linear", "--epochs", "1", "--quiet"]
    words = [str(word) for word in words]
    assert commands.main([*words, "--eps", "8/255", "--dtype", "bfloat16"]) == 0
    assert "victims computed in bfloat16" in capsys.readouterr().out
    assert commands.main([*words, "--dtype", "bf16"]) == 2
    assert "--dtype: expected one of float32, bfloat16, auto" in capsys.readouterr().err
