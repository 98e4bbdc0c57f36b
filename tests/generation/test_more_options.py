"""The options that the published program has beside those of the paper: each against plain PyTorch
in float64, within the budget, and resumed to the same bits.
"""

import csv
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from _runs import SMALL, Plain

from miue_fast import data, freeze
from miue_fast.generation import (
    OBJECTIVES,
    Interrupted,
    Objective,
    Options,
    batches,
    checkpoint,
    generate,
    register,
)
from miue_fast.generation import run as generation_run
from miue_fast.generation.descent import Descent
from miue_fast.generation.objectives.cross_entropy import cross_entropy
from miue_fast.generation.run import BiLevelRun
from miue_fast.generation.training import Trainer
from miue_fast.reference.projected_step import cell_sums, viewed
from miue_fast.support import output


@pytest.fixture(scope="module")
def images():
    return data.shapes(40, seed=5, size=16, classes=4)


def run(dataset, out=None, **options):
    return generate(dataset, out, **{**SMALL, "epochs": 4, **options})


def test_each_default_is_the_run_without_the_option(images):
    """The bits of tests/generation/test_generation.py, whose loop by hand has none of them."""
    plain = run(images).delta
    off = {"eot": 1, "robust": "", "eps_0": 8 / 255, "poison_every": 1, "mixed": 0, "attack": 0}
    for option in ({name: value} for name, value in [*off.items(), ("attack_steps", 9)]):
        assert torch.equal(run(images, **option).delta, plain), option


# a wrong value


REFUSED = {
    "no draw": ({"eot": 2}, "eot: expected 1 where robust draws nothing (the same gradient again)"),
    "a grid draws nothing": ({"eot": 3, "robust": "grid:4"}, "eot: expected 1 where robust draws"),
    "no gradient": ({"eot": 0, "robust": "crop"}, "eot: expected a whole number >= 1, got 0"),
    "larger than eps": ({"eps_0": 9 / 255}, "eps_0: expected at most eps = 0.0313725, got 0.035"),
    "no budget": ({"eps_0": 0}, "eps_0: expected a number in (0, 1]"),
    "share": ({"mixed": 1.5}, "mixed: expected a share from 0 to 1, got 1.5"),
    "attack": ({"attack": 8}, "attack: expected a number from 0 to 1 ([0, 1] image scale: 8/255,"),
    "no step": ({"attack_steps": 0}, "attack_steps: expected a whole number >= 1, got 0"),
    "no epoch": ({"poison_every": 0}, "poison_every: expected a whole number >= 1, got 0"),
    "levels": ({"eps_0": 2}, "eps_0: expected a number in (0, 1] ([0, 1] image scale: 8/255, not"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_wrong_value_is_refused_in_one_line(name):
    options, part = REFUSED[name]
    with pytest.raises(ValueError) as error:
        Options(**options)
    assert str(error.value).startswith(f"option: {part}") and "\n" not in str(error.value)


# the mean of several draws


@pytest.mark.parametrize("classwise", [False, True])
@pytest.mark.parametrize("fused, dtype", [(True, "float32"), (False, "float32"), (True, "float16")])
@pytest.mark.parametrize("text", ["crop", "crop,grid:3", "gray:0.5,resize", "crop,gray:0.5"])
def test_a_step_follows_the_mean_gradient_of_its_draws(images, text, fused, dtype, classwise):
    """One step of three draws against float64 autograd through all of them."""
    torch.manual_seed(1)
    network, count = Plain().eval(), len(images.images)
    options = Options(
        objective="em", robust=text, steps=1, eot=3, classwise=classwise, dtype=dtype, device="cpu"
    )
    labels, index = images.labels, torch.randperm(count)
    inside = images.images.clamp(40, 215)  # no pixel reaches 0 or 255
    delta = torch.zeros((4 if classwise else count, *inside.shape[1:]))
    frozen = freeze(network, "fc", fused=fused, chunk=16, dtype=getattr(torch, dtype))
    frozen.chunk.size = 16
    draws = partial(batches.step_generator, 3, 1, 1)
    loss, bad = Descent(frozen, inside, delta, options, 4)(labels[index], index, None, 0.01, draws)
    robust, generator, losses = options.transforms, draws(0), []
    leaf, network = (
        torch.zeros(delta.shape, dtype=torch.float64, requires_grad=True),
        network.double(),
    )
    for _ in range(3):
        x = (inside[index] / 255).double() + leaf[labels[index] if classwise else index]
        drawn = robust.draw(count, inside.shape, options.flip, generator)
        for change in drawn.changes:
            x = change(x.float()).double()
        losses.append(F.cross_entropy(network(viewed(x, drawn.view)), labels[index]))
    mean = torch.stack(losses).mean()
    (grad,) = torch.autograd.grad(mean, leaf)
    if robust.grid > 1:
        grad = cell_sums(grad, robust.grid)
    half = dtype == "float16"
    rough = 0.02 if half else 1e-4
    sure = grad.abs() > rough * grad.abs().max()
    assert sure.double().mean() > 0.5 and bad.tolist() == [0, 0]
    right = (delta.double() + 0.01 * grad.sign())[sure].abs() < 1e-6
    assert right.double().mean() > 0.995 if half else right.all()
    assert float(loss) == pytest.approx(float(mean.detach()), rel=rough)


class Unequal(Objective):
    """Cross-entropy whose draws count 1, 64 and 1/64 times."""

    name, about, outputs = "unequal", "cross-entropy of unequal draws", "logits"
    weights = 1.0, 64.0, 1 / 64

    def __init__(self):
        self.left = iter(self.weights)

    def value_and_grad(self, outputs, labels, num_classes, options):
        loss, grad = cross_entropy(outputs, labels)
        weight = next(self.left)
        return weight * loss, weight * grad


def test_draws_keep_their_sizes_in_half_precision(images):
    """Each gradient is lifted out of underflow by a power of two of its own, and comes back."""
    torch.manual_seed(1)
    network, index = Plain().eval(), torch.arange(40)
    register(Unequal())
    try:
        options = Options(objective="unequal", robust="crop", steps=1, eot=3, dtype="float16")
        delta, draws = torch.zeros(images.images.shape), partial(batches.step_generator, 3, 1, 1)
        frozen = freeze(network, "fc", dtype=torch.float16)
        Descent(frozen, images.images, delta, options, 4)(images.labels, index, None, 0.01, draws)
    finally:
        del OBJECTIVES["unequal"]
    x, generator, network = (images.images / 255).double(), draws(0), network.double()
    x.requires_grad_()
    views = [options.transforms.draw(40, x.shape, 0.5, generator).view for _ in range(3)]
    parts = [F.cross_entropy(network(viewed(x, view)), images.labels) for view in views]
    (grad,) = torch.autograd.grad(sum(w * part for w, part in zip(Unequal.weights, parts)), x)
    inside = (x > 0.02) & (x < 0.98) & (grad.abs() > 0.05 * grad.abs().max())
    assert inside.sum() > 1000
    assert (delta.sign() == -grad.sign())[inside].double().mean() > 0.995


def test_one_draw_of_several_is_that_of_one(images):
    """The first draw of a step is the only one of eot=1; the others differ from it and among each
    other.
    """
    options = Options(robust="crop", eot=3, steps=2)
    frozen = freeze(Plain().eval(), "fc")
    descent = Descent(frozen, images.images, torch.zeros(images.images.shape), options, 4)
    draws = partial(batches.step_generator, 3, 1, 1)
    several = [[drawn.view for drawn in step] for step in descent._drawn(40, draws)]
    descent.options = Options(robust="crop", steps=2)
    first = [step[0].view for step in descent._drawn(40, draws)]
    assert [len(step) for step in several] == [3, 3]
    assert all(torch.equal(step[0], view) for step, view in zip(several, first))
    views = [view for step in several for view in step]
    assert all(not torch.equal(a, b) for k, a in enumerate(views) for b in views[:k])


# an annealed budget


def test_the_budget_rises_linearly_to_that_of_the_run():
    options = Options(epochs=5, eps=8 / 255, eps_0=2 / 255)
    wanted = [2 / 255, 3.5 / 255, 5 / 255, 6.5 / 255, 8 / 255]
    assert [options.budget(e) for e in range(1, 6)] == pytest.approx(wanted, rel=1e-12)
    assert options.budget(5) == 8 / 255 == Options(epochs=1, eps_0=1 / 255).budget(1)
    assert {Options(epochs=5).budget(e) for e in range(1, 6)} == {8 / 255}


@pytest.mark.parametrize("plain", [False, True])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"classwise": True},
        {"random_start": True},
        {"robust": "crop,grid:3", "random_start": True},
        {"robust": "crop,gray:0.5", "eot": 2},
        {"delta_dtype": "int8"},
        {"delta_dtype": "int8", "random_start": True, "robust": "crop"},
        {"delta_dtype": "float16"},
    ],
)
def test_every_epoch_fills_its_own_budget_and_no_more(images, options, plain, monkeypatch):
    """Steps of 32 levels reach any bound. plain: without the first convolution's fused step."""
    reached, real = [], BiLevelRun.poison_step

    def watched(self, number, tick):
        scale = self.options.eps / 127 if self.delta.dtype is torch.int8 else 1
        before = float(self.delta.float().abs().max()) * scale
        loss = real(self, number, tick)
        reached.append((before, float(self.delta.float().abs().max()) * scale))
        return loss

    monkeypatch.setattr(BiLevelRun, "poison_step", watched)
    large = {"alpha_0": 32 / 255, "alpha_K": 32 / 255, "eps_0": 2 / 255, "backend": "auto"}
    made = run(images, fused=not plain, **large, **options)
    for number, (_, after) in enumerate(reached, 1):
        budget = made.options.budget(number)
        least = budget - (8 / 255 / 127 if "delta_dtype" in options else 0)
        assert least - 1e-6 <= after <= budget * (1 + 1e-3), (number, after * 255)
    start = 0.9 * 2 / 255 if "random_start" in options else 0
    assert start <= reached[0][0] <= 2 / 255 * (1 + 1e-6) and made.delta.abs().max() <= 8 / 255


def test_a_narrow_budget_projects_like_a_run_of_that_budget(images):
    """One epoch at 3/255 is the epoch of a run whose eps is that, also among int8 levels of 8/255:
    there to half a level.
    """
    network, index = Plain().eval(), torch.arange(40)
    found = {}
    for store, eps, budget in (
        ("float32", 3 / 255, None),
        ("float32", 8 / 255, 3 / 255),
        ("int8", 8 / 255, 3 / 255),
    ):
        options = Options(objective="em", eps=eps, steps=4, delta_dtype=store)
        delta = torch.zeros(images.images.shape, dtype=getattr(torch, store))
        descent = Descent(freeze(network, "fc"), images.images, delta, options, 4)
        descent(images.labels, index, None, 8 / 255, None, budget)
        found[store, eps] = delta.float() * (eps / 127 if store == "int8" else 1)
    assert torch.equal(found["float32", 3 / 255], found["float32", 8 / 255])
    gap = (found["int8", 8 / 255] - found["float32", 8 / 255]).abs()
    assert gap.median() <= 8 / 255 / 127 and found["int8", 8 / 255].abs().max() <= 3 / 255


# a poison step after some epochs only


@pytest.mark.parametrize("every, with_step", [(2, [2, 4, 5]), (3, [3, 5]), (9, [5])])
def test_other_epochs_have_no_poison_step_and_say_so(images, every, with_step, tmp_path):
    made = run(images, tmp_path, epochs=5, poison_every=every)
    with open(tmp_path / "metrics.csv") as file:
        rows = list(csv.DictReader(file))
    assert [row["epoch"] for row in made.history] == [1, 2, 3, 4, 5] and len(rows) == 5
    for row, saved in zip(made.history, rows):
        without = {name for name, value in row.items() if value is None}
        stepped = row["epoch"] in with_step
        assert without == (set() if stepped else {"poison_loss", "alpha", "image_steps_per_s"})
        assert {name for name, text in saved.items() if text == ""} == without
        assert row["alpha"] == (made.options.alpha(row["epoch"]) if stepped else None)
    assert checkpoint.load(tmp_path / checkpoint.NAME)[1]["history"] == made.history
    assert made.delta.any()


@pytest.mark.parametrize("every", [1, 2, 9])
def test_the_bar_ends_at_its_total_and_begins_where_a_resumed_run_does(
    images, every, tmp_path, monkeypatch
):
    bars, real, calls = [], output.progress_bar, []

    def bar(**options):
        bars.append(real(**{**options, "disable": False}))
        return bars[-1]

    def stopping(self, number, tick, epoch=BiLevelRun.epoch):
        calls.append(number)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return epoch(self, number, tick)

    monkeypatch.setattr(generation_run, "progress_bar", bar)
    with monkeypatch.context() as patch:
        patch.setattr(BiLevelRun, "epoch", stopping)
        with pytest.raises(Interrupted):
            run(images, tmp_path, epochs=5, poison_every=every)
    run(images, tmp_path, epochs=5, poison_every=every)
    first, second = bars
    steps = [number % every == 0 or number == 5 for number in range(1, 6)]
    assert first.total == second.total == second.n == 40 * (5 + 2 * sum(steps))
    assert first.n == second.initial == 40 * (3 + 2 * sum(steps[:3]))


# going on


NOT_DEFAULT = [
    {"eot": 2, "robust": "crop,gray"},
    {"eps_0": 1 / 255, "alpha_0": 4 / 255},
    {"poison_every": 3},
    {"mixed": 0.5},
    {"attack": 4 / 255},
    {"attack": 4 / 255, "dtype": "float16", "mixed": 0.2},
    {"eps_0": 1 / 255, "alpha_0": 4 / 255, "delta_dtype": "int8"},
]


@pytest.mark.parametrize("options", NOT_DEFAULT)
def test_a_resumed_run_has_the_same_bits(images, options, tmp_path, monkeypatch):
    whole = run(images, **options)
    real, calls = Trainer.epoch, []

    def stopping(*args):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return real(*args)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "epoch", stopping)
        with pytest.raises(Interrupted):
            run(images, tmp_path, **options)
    (name, value), *_ = options.items()
    default = getattr(Options(), name)
    with pytest.raises(ValueError, match=rf"got {name} = {value!r} \(now {default!r}\)"):
        run(images, tmp_path, **{**options, name: default})
    rest = run(images, tmp_path, **options)
    assert torch.equal(rest.delta, whole.delta) and len(rest.history) == 4
    assert not torch.equal(whole.delta, run(images, **{**options, name: default}).delta)
