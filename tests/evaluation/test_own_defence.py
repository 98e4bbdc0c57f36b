"""A defence is one class, registered in one step: `evaluate`, `run_cell` and the command line then
know it by its name, with its options, its limits and its recipe.
"""

from dataclasses import dataclass, replace

import pytest
import torch

from miue_fast import data, evaluation
from miue_fast.cli import arguments, commands
from miue_fast.evaluation import DEFENCES, Defence, Stage, defence, evaluate, register, run_cell

FAST = {"victim": "linear", "epochs": 1, "lr": 0.05, "batch": 16}


@dataclass(frozen=True)
class Darker(Defence):
    """Training images are divided by a number, and batches once more."""

    name = "darker"
    stage = Stage.BATCH
    by: int = evaluation.option(2, 1, 9)

    def misfit(self, shape, num_classes):
        return None if shape[0] == 3 else ("images of three channels", shape[0])

    def recipe(self, usual):
        return replace(usual, weight_decay=0.25)

    def prepare(self, images, labels, seed):
        return images // self.by

    def batch(self, network, images, labels, num_classes):
        SEEN.append(float(images.max()))
        return images / self.by, labels


SEEN = []


@pytest.fixture(autouse=True)
def darker():
    SEEN.clear()
    yield register(Darker)
    del DEFENCES["darker"]


@pytest.fixture(scope="module")
def shapes():
    return data.shapes(60, size=16, classes=3), data.shapes(30, size=16, classes=3, seed=9)


def test_its_text_is_read_with_its_limits():
    assert defence("darker") == defence("darker:2") == defence("darker:by=2") == Darker(2)
    assert defence("darker:5").spec == "darker:by=5"
    for text in ("darker:0", "darker:10", "darker:x", "darker:1.5"):
        with pytest.raises(ValueError, match="by of darker: expected a whole number from 1 to 9"):
            defence(text)
    with pytest.raises(ValueError, match="option of darker: expected each at most once of by="):
        defence("darker:size=3")
    with pytest.raises(
        ValueError, match=r"defence: name: expected one of .*, darker, got 'darkest'"
    ):
        defence("darkest")
    with pytest.raises(ValueError, match="name: expected a text that is not taken yet"):
        register(Darker)


def test_evaluate_trains_with_it(shapes):
    clean, test = shapes
    table = evaluate(
        clean, torch.zeros(clean.images.shape), test, defence="darker:3", progress=False, **FAST
    )
    assert table.options["defence"] == "darker:by=3" and not table.options["defended_test"]
    assert table.options["weight_decay"] == 0.25
    assert "defence: darker:by=3" in str(table)
    assert SEEN and max(SEEN) <= 85 / 255 + 1e-6, "every batch is made of prepared images"


def test_the_victim_differs_from_an_undefended_one(shapes):
    clean, test = shapes
    sets = (clean.images, clean.labels, test.images, test.labels, 3)
    plain, defended = (
        run_cell(*sets, defence=text, keep_network=True, **FAST) for text in ("none", "darker")
    )
    assert not torch.equal(plain.network.fc.weight, defended.network.fc.weight)
    with pytest.raises(ValueError, match="darker:by=2: expected images of three channels, got 1"):
        grey = (clean.images[:, :1].clone(), clean.labels, *sets[2:])
        run_cell(*grey, defence="darker", **FAST)


def test_the_command_line_knows_it(capsys, tmp_path):
    words = ["evaluate", "--data", "a", "--poisoned", "b", "--test", "c", "--defence", "darker:4"]
    args = arguments.parse(words)
    assert args.defence == "darker:4"
    commands.CHECKS["evaluate"](args)
    args.defence = "darker:40"
    with pytest.raises(ValueError, match="by of darker"):
        commands.CHECKS["evaluate"](args)
    with pytest.raises(SystemExit):
        commands.main(["evaluate", "--help"])
    assert "darker" in capsys.readouterr().out
