"""A network is one entry, registered in one step with its recipe and its feature layer: `build`,
`generate`, `evaluate` and the command line then know it by its name.
"""

import pytest
import torch
from torch import nn

from miue_fast import data, evaluate, generate, models
from miue_fast.cli import arguments, commands
from miue_fast.evaluation import victims

SMALL = {"epochs": 1, "steps": 1, "batch": 20, "progress": False}


class Pooled(models.Network):
    """One convolution, a global maximum, and a classifier."""

    def __init__(self, width, num_classes, normalize, size, channels):
        super().__init__(normalize, channels)
        self.conv = nn.Conv2d(channels, width, 3, 1, 1)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(width, num_classes)

    def forward(self, x):
        return self.fc(self.pool(self.conv(self.normalized(x)).relu()).flatten(1))


@pytest.fixture(autouse=True)
def pooled():
    recipe = models.Recipe(2, 0.125, 32)
    entry = models.Architecture(
        "pooled", "one convolution", recipe, Pooled, width=6, feature="pool", width_unit=2
    )
    yield models.NETWORKS.add(entry)
    del models.NETWORKS["pooled"]


@pytest.fixture(scope="module")
def shapes():
    return data.shapes(40, size=16, classes=4), data.shapes(20, size=16, classes=4, seed=9)


def test_build_makes_it_with_its_limits():
    made = models.build("pooled", 4, size=16)
    assert made(torch.rand(2, 3, 16, 16)).shape == (2, 4) and made.conv.out_channels == 6
    assert models.build("pooled", 4, width=8, channels=1).conv.in_channels == 1
    with pytest.raises(ValueError, match="width: expected a multiple of 2 for pooled, got 7"):
        models.build("pooled", 4, width=7)
    with pytest.raises(ValueError, match=r"name: expected one of .*, pooled, got 'poled'"):
        models.build("poled", 4)
    with pytest.raises(ValueError, match="name: expected a text that is not taken yet"):
        models.NETWORKS.add(models.NETWORKS["pooled"])


def test_generate_takes_its_feature_layer(shapes, tmp_path):
    made = generate(shapes[0], tmp_path, model="pooled", **SMALL)
    assert made.delta.abs().max() > 0
    options = data.load_poison(tmp_path, shapes[0])[1]["options"]
    assert options["model"] == "pooled" and options["feature"] == "pool"


def test_evaluate_takes_its_recipe(shapes):
    clean, test = shapes
    assert victims.recipe("pooled", None, None, None) == models.Recipe(2, 0.125, 32)
    table = evaluate(clean, torch.zeros(clean.images.shape), test, victim="pooled", progress=False)
    told = {name: table.options[name] for name in ("victim", "epochs", "lr", "batch")}
    assert told == {"victim": "pooled", "epochs": 2, "lr": 0.125, "batch": 32}
    assert len(table.rows["clean"][0].train_curve) == 2


def test_the_command_line_knows_it():
    words = ["generate", "--data", "a", "--out", "b", "--model", "pooled", "--feature", "pool"]
    args = arguments.parse(words)
    assert args.model == "pooled"
    commands.CHECKS["generate"](args)
    words = ["evaluate", "--data", "a", "--poisoned", "b", "--test", "c", "--victim", "pooled"]
    commands.CHECKS["evaluate"](arguments.parse(words))
