"""An objective is one class, registered in one step: `generate`, the poison step, the command line
and its help then know it by its name, and no other file of the package names one.
"""

import json
import re
from pathlib import Path

import pytest
import torch

from miue_fast import data, freeze, generate, models
from miue_fast.cli import arguments, commands
from miue_fast.generation import OBJECTIVES, PRESETS, Objective, Options, register
from miue_fast.generation.descent import Descent

ROOT = Path(__file__).resolve().parents[2]
SHORT = {"model": "small_resnet", "width": 4, "epochs": 1, "steps": 2, "batch": 20}


class Quiet(Objective):
    """The mean square of the features."""

    name = "quiet"
    about = "the mean square of the features"
    outputs = "features"

    def check(self, op, options, num_classes):
        if num_classes == 3:
            raise ValueError(f"{op}: not for three classes")

    def value_and_grad(self, outputs, labels, num_classes, options):
        outputs = outputs.float()
        return outputs.square().mean(), 2 * outputs / outputs.numel()


class Brighter(Objective):
    """Every value is +eps."""

    name = "brighter"
    about = "every value is +eps"
    outputs = None

    def perturbation(self, dataset, options):
        return torch.full(dataset.images.shape, options.eps)


@pytest.fixture(params=[Quiet, Brighter])
def objective(request):
    yield register(request.param)
    del OBJECTIVES[request.param.name]


@pytest.fixture
def quiet():
    yield register(Quiet)
    del OBJECTIVES["quiet"]


@pytest.fixture(scope="module")
def shapes():
    return data.shapes(40, seed=5, size=16, classes=4)


def test_generate_runs_it_by_name_and_the_manifest_names_it(objective, shapes, tmp_path):
    made = generate(shapes, tmp_path, objective=objective.name, progress=False, **SHORT)
    assert made.options.objective == objective.name and made.delta.abs().max() > 0
    assert len(made.history) == (0 if objective.outputs is None else 1)
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    assert manifest["options"]["objective"] == objective.name
    again = generate(shapes, tmp_path, objective=objective.name, progress=False, **SHORT)
    assert torch.equal(again.delta, made.delta)
    assert repr(made).startswith("Result(delta=[40, 3, 16, 16], ") and "\n" not in repr(made)


def test_the_poison_step_lowers_its_loss(quiet, shapes):
    torch.manual_seed(0)
    network = models.build("small_resnet", 4, width=4, size=16).eval()
    images, labels = shapes.images[:20], shapes.labels[:20]
    delta = torch.zeros(images.shape)
    x = (images.float() / 255).requires_grad_()
    features = dict(network.named_modules())["avgpool"]
    seen = []
    handle = features.register_forward_hook(lambda module, given, out: seen.append(out.flatten(1)))
    network(x)
    handle.remove()
    (grad,) = torch.autograd.grad(seen[0].square().mean(), x)
    descent = Descent(freeze(network), images, delta, Options(objective="quiet", steps=1), 4)
    loss, bad = descent(labels, torch.arange(20), None, 1 / 255)
    assert loss == pytest.approx(float(seen[0].detach().square().mean()), rel=1e-4)
    assert not bad.any()
    inside = (x > 2 / 255) & (x < 253 / 255) & (grad.abs() > 1e-3 * grad.abs().max())
    assert inside.sum() > 1000
    assert torch.equal(delta[inside].sign(), -grad[inside].sign())


def test_what_it_checks_is_refused_before_any_work(quiet):
    with pytest.raises(ValueError, match=r"^generate: not for three classes$"):
        generate(data.shapes(9, size=16, classes=3), objective="quiet", progress=False, **SHORT)


def test_the_command_line_knows_it(objective, shapes, tmp_path, capsys):
    data.export_folder(shapes, torch.zeros(shapes.images.shape), tmp_path / "in", eps=8 / 255)
    words = ["generate", "--data", str(tmp_path / "in"), "--out", str(tmp_path / "out")]
    words += ["--objective", objective.name]
    assert arguments.given(arguments.parse(words)) == {"objective": objective.name}
    small = ["--model", "small_resnet", "--width", "4", "--epochs", "1", "--steps", "1"]
    assert commands.main([*words, *small, "--quiet"]) == 0
    capsys.readouterr()
    with pytest.raises(SystemExit):
        commands.main(["generate", "--help"])
    told = " ".join(capsys.readouterr().out.split())
    assert f"{objective.name}: {objective.about}" in told


def test_an_unknown_one_is_told_with_the_known_names(objective):
    with pytest.raises(ValueError, match=rf"objective: expected one of .*, {objective.name}, got"):
        Options(objective="nothing")
    with pytest.raises(ValueError, match="name: expected a text that is not taken yet"):
        register(objective)


def test_every_option_belongs_to_one_objective_at_most_and_is_a_field():
    own = [name for each in OBJECTIVES.values() for name in each.options]
    assert len(own) == len(set(own))
    assert set(own) == {"target_shift", "zeta", "denominator", "normalize_dim", "temperature"}
    assert set(own) <= set(Options().as_dict())


def test_no_other_file_names_an_objective_or_a_preset():
    """As a text in quotes: whoever needs one imports its class."""
    for path in (ROOT / "miue_fast").rglob("*.py"):
        names = [] if path.parent.name == "objectives" else {*OBJECTIVES} - {*models.NETWORKS}
        names = sorted(names)
        names += [] if path.name == "presets.py" else [name for name in PRESETS if name != "paper"]
        quoted = rf"[\"']({'|'.join(map(re.escape, names))})[\"']"
        found = re.search(quoted, path.read_text()) if names else None
        assert not found, f"{path.relative_to(ROOT)} names {found and found[1]}"


def test_presets_are_one_table_that_the_help_reads(capsys):
    assert list(PRESETS) == ["paper", "published", "paper-text", "fast", "publish"]
    with pytest.raises(SystemExit):
        commands.main(["generate", "--help"])
    told = "".join(capsys.readouterr().out.split())
    for preset in PRESETS.values():
        assert "".join(f"{preset.name}: {preset.about}".split()) in told
