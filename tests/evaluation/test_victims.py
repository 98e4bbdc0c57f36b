"""Victims under defences: the plain path to the bit, recipes, partial poisons, pretrained starts,
what a Run carries.
"""

import json
import math

import pytest
import safetensors.torch
import torch
import torch.nn.functional as F

from miue_fast import data, models
from miue_fast.cli import commands
from miue_fast.evaluation import _torchvision, defence, evaluate, pretrain, run_cell, start, victims
from miue_fast.plots.evaluation import figure

EPS = 8 / 255
CELL = {"victim": "linear", "epochs": 2, "lr": 0.05, "batch": 16}
needs_torchvision = pytest.mark.skipif(_torchvision.missing() is not None, reason="no torchvision")


def levels(count, seed, *, classes=4):
    """Classes that differ in brightness: learnt in two epochs."""
    labels = torch.arange(count) % classes
    noise = torch.randint(0, 50, (count, 3, 8, 8), generator=torch.Generator().manual_seed(seed))
    images = (noise + (labels * 200 // classes)[:, None, None, None]).to(torch.uint8)
    return data.Dataset(
        images, labels, [f"c{k}" for k in range(classes)], [str(i) for i in range(count)]
    )


@pytest.fixture(scope="module")
def sets():
    return levels(96, 0), levels(40, 1)


def cell(sets, **options):
    train, test = sets
    return run_cell(
        train.images,
        train.labels,
        test.images,
        test.labels,
        len(train.classes),
        **{**CELL, **options},
    )


def plain_training(images, labels, classes, *, seed, epochs, lr, batch, pad):
    """Standard training once more, in plain PyTorch, from its description: the weights after it."""
    torch.manual_seed(seed)
    draw = torch.Generator().manual_seed(seed)
    model = models.build("small_resnet", classes, normalize=False, size=images.shape[-1]).to(
        memory_format=torch.channels_last
    )
    optimizer = torch.optim.SGD(model.parameters(), lr, 0.9, weight_decay=1e-4)
    count, side = len(images), images.shape[-1]
    padded = F.pad(images, (pad,) * 4)
    for epoch in range(epochs):
        optimizer.param_groups[0]["lr"] = 1e-6 + (lr - 1e-6) * 0.5 * (
            1 + math.cos(math.pi * epoch / epochs)
        )
        order = torch.randperm(count, generator=draw)
        top, left = (
            torch.randint(2 * pad + 1, (count,), generator=draw).tolist() for _ in range(2)
        )
        flip = torch.rand(count, generator=draw) < 0.5
        model.train()
        for rows in order.split(batch):
            cut = [
                padded[i, :, top[i] : top[i] + side, left[i] : left[i] + side]
                for i in rows.tolist()
            ]
            x = (
                torch.stack(
                    [image.flip(2) if flip[i] else image for i, image in zip(rows.tolist(), cut)]
                ).float()
                / 255
            )
            optimizer.zero_grad()
            F.cross_entropy(
                model(x.contiguous(memory_format=torch.channels_last)), labels[rows]
            ).backward()
            optimizer.step()
    return model


def test_without_a_defence_the_weights_are_those_of_plain_training_to_the_bit(sets):
    train, test = sets
    torch.manual_seed(77)
    before = torch.get_rng_state()
    run = cell(
        sets,
        victim="small_resnet",
        epochs=3,
        lr=0.1,
        batch=32,
        seed=5,
        keep_network=True,
        curve=True,
    )
    assert torch.equal(torch.get_rng_state(), before)
    with torch.random.fork_rng():
        wanted = plain_training(
            train.images, train.labels, 4, seed=5, epochs=3, lr=0.1, batch=32, pad=1
        )
    assert all(
        torch.equal(value, wanted.state_dict()[name])
        for name, value in run.network.state_dict().items()
    )
    right = (wanted.eval()(test.images.float() / 255).argmax(1) == test.labels).float().mean()
    assert (
        run.test == pytest.approx(float(right)) and len(run.test_curve) == len(run.train_curve) == 3
    )
    assert run.robust is None and run.test_unseen is None and not run.network.training


def test_evaluate_is_made_of_cells(sets):
    delta = data.random_noise(sets[0], EPS, 3)
    table = evaluate(sets[0], delta, sets[1], seeds=[2], progress=False, defence="cutout:3", **CELL)
    poisoned = data.apply_poison(sets[0].images, delta, EPS)
    run = run_cell(
        poisoned,
        sets[0].labels,
        sets[1].images,
        sets[1].labels,
        4,
        seed=2,
        defence="cutout:3",
        curve=True,
        **CELL,
    )
    (found,) = table.rows["poisoned"]
    assert (found.train_curve, found.test_curve) == (run.train_curve, run.test_curve)
    assert table.options["defence"] == "cutout:size=3" and "defence: cutout:size=3" in str(table)


BATCHED = [
    "cutout",
    "gaussian-noise",
    "adversarial:4:steps=2",
    *(pytest.param(name, marks=needs_torchvision) for name in ("cutmix", "mixup")),
]
BATCHED += [pytest.param("ueraser:2", marks=needs_torchvision)]


@pytest.mark.parametrize(
    "spec", [*BATCHED, "grayscale", "bit-depth", "jpeg", "orthogonal-projection"]
)
def test_every_defence_trains_repeatably_and_changes_the_victim(sets, spec):
    plain, first, again, other = (
        cell(sets, defence=d, seed=seed, keep_network=True)
        for d, seed in (("none", 0), (spec, 0), (spec, 0), (spec, 1))
    )
    weights = [run.network.fc.weight for run in (plain, first, again, other)]
    assert (
        torch.equal(weights[1], weights[2])
        and first.test == again.test
        and first.train == again.train
    )
    assert not torch.equal(weights[0], weights[1]) and not torch.equal(weights[1], weights[3])
    assert (first.robust is not None) == spec.startswith("adversarial")


class Watcher(torch.nn.Module):
    """A linear victim that remembers what it was shown in training and what in eval mode."""

    shown: dict

    def __init__(self, classes):
        super().__init__()
        self.fc = torch.nn.Linear(192, classes)
        Watcher.shown = {True: [], False: []}

    def forward(self, x):
        Watcher.shown[self.training].append(x.detach())
        return self.fc(x.flatten(1))


@pytest.mark.parametrize(
    "spec, tests", [("grayscale", True), ("bit-depth:1", False), ("jpeg", False)]
)
def test_what_is_prepared_and_what_is_not(spec, tests):
    colourful = levels(32, 0)
    colourful.images[:, 0] = 255 - colourful.images[:, 0]
    cell((colourful, colourful), victim=Watcher, defence=spec, crop=0)
    trained, tested = (torch.cat(Watcher.shown[mode]) for mode in (True, False))
    clean = {tuple(x.flatten().tolist()) for x in colourful.images / 255}
    assert ({tuple(x.flatten().tolist()) for x in tested} == clean) != tests
    assert not {tuple(x.flatten().tolist()) for x in trained} & clean
    if tests:
        assert all(torch.equal(x[:, 0], x[:, 1]) for x in (trained, tested))


def test_a_victim_of_smaller_images_is_built_trained_and_tested_at_their_size():
    sizes = {True: set(), False: set()}

    class Small(torch.nn.Module):
        def __init__(self, classes):
            super().__init__()
            self.fc = torch.nn.Linear(3, classes)

        def forward(self, x):
            sizes[self.training].add(tuple(x.shape[1:]))
            return self.fc(x.mean((2, 3)))

    large = [data.shapes(count, size=24, classes=4, seed=count) for count in (48, 24)]
    cell(large, victim=Small, defence="resize:16")
    assert sizes == {True: {(3, 16, 16)}, False: {(3, 16, 16)}}
    run = cell(large, victim="linear", defence="resize:16", keep_network=True)
    assert run.network.fc.in_features == 3 * 16 * 16
    for victim, side, words in (("lenet5", 12, "size"), ("vit", 18, "a multiple of 4")):
        with pytest.raises(ValueError, match=words):
            cell(large, victim=victim, defence=f"resize:{side}")
    table = evaluate(
        large[0],
        large[0].images * 0.0,
        large[1],
        **CELL,
        eps=EPS,
        defence="resize:16",
        progress=False,
    )
    assert table.options["crop"] == 2 and table.options["defended_test"]


def test_adversarial_training_reports_clean_and_robust_accuracy(sets):
    runs = {
        eps: cell(
            sets, victim="small_resnet", defence=f"adversarial:{eps}:steps=8:step=4", epochs=6
        )
        for eps in (2, 24)
    }
    assert all(run.robust <= run.test for run in runs.values()) and runs[2].robust > 0.9
    assert (
        runs[24].robust < runs[24].test - 0.1
    )  # classes lie 50 levels apart, with noise: 24 on each side nearly closes the gap
    table = evaluate(
        *(sets[0], sets[0], sets[1]),
        eps=EPS,
        seeds=2,
        progress=False,
        defence="adversarial:2:steps=2",
        **CELL,
    )
    told = json.loads(json.dumps(table.to_dict()))
    assert "robust test accuracy" in str(table) and told["options"]["schedule"] == "steps"
    row = told["rows"]["clean"]
    assert row["robust"]["mean"] == pytest.approx(sum(run["robust"] for run in row["runs"]) / 2)


# recipes


def test_every_network_has_a_recipe_and_the_old_ones_are_as_they_were():
    for name, entry in models.NETWORKS.items():
        assert victims.recipe(name, None, None, None) == entry.recipe and entry.about
    plan = victims.recipe("small_resnet", None, None, None)
    assert (plan.epochs, plan.lr, plan.batch, plan.weight_decay, plan.optimizer, plan.schedule) == (
        20,
        0.1,
        64,
        1e-4,
        "sgd",
        "cosine",
    )
    vit = victims.recipe("vit", 3, None, 8)
    assert (vit.optimizer, vit.epochs, vit.batch, vit.weight_decay) == ("adamw", 3, 8, 0.05)
    assert isinstance(vit.new_optimizer(torch.nn.Linear(2, 2)), torch.optim.AdamW)
    assert victims.recipe(Watcher, 3, 0.1, None) == models.Recipe(3, 0.1, 128)


def test_the_recipe_of_adversarial_training():
    plan = victims.recipe("resnet18", None, None, None, defence=defence("adversarial"))
    assert (plan.epochs, plan.lr, plan.batch, plan.momentum, plan.weight_decay) == (
        100,
        0.1,
        128,
        0.9,
        5e-4,
    )
    rates = [plan.learning_rate(epoch) for epoch in range(100)]
    assert rates == pytest.approx([0.1] * 40 + [0.01] * 40 + [0.001] * 20)
    against = defence("adversarial")
    assert victims.recipe("resnet18", 7, 0.3, None, defence=against).epochs == 7
    assert victims.recipe("vit", None, None, None, defence=against).weight_decay == 0.05


@pytest.mark.parametrize(
    "name",
    [
        name
        for name in models.NETWORKS
        if name not in ("densenet121", "resnet50", "resnet18", "vgg16")
    ],
)
def test_victims_train(name):
    train, test = data.shapes(12, size=16, classes=3), data.shapes(6, seed=1, size=16, classes=3)
    run = run_cell(
        train.images, train.labels, test.images, test.labels, 3, victim=name, epochs=1, batch=6
    )
    assert 0 <= run.train <= 1 and len(run.test_curve) == 1


# partial poisons


def test_the_share_is_taken_per_class():
    labels = torch.tensor([0] * 40 + [1] * 10 + [2] * 7 + [3])
    mask = start.poisoned_rows(labels, 0.3, [], 4)
    assert [int(mask[labels == k].sum()) for k in range(4)] == [12, 3, 2, 1]
    assert torch.equal(mask, start.poisoned_rows(labels, 0.3, [], 4)) and not torch.equal(
        mask, start.poisoned_rows(labels, 0.3, [], 5)
    )
    apart = start.poisoned_rows(labels, 0.3, [0], 4)
    assert not apart[labels == 0].any() and torch.equal(apart[labels > 0], mask[labels > 0])
    assert start.poisoned_rows(labels, 1.0, [], 0).all()


def test_ratio_and_unseen_decide_what_the_victim_sees(sets):
    clean = sets[0]
    inverted = data.Dataset(255 - clean.images, clean.labels, clean.classes, clean.names)
    options = {
        "victim": Watcher,
        "epochs": 1,
        "lr": 0.01,
        "batch": 16,
        "crop": 0,
        "eps": EPS,
        "progress": False,
        "curve": False,
    }
    seen = []

    class Keeping(Watcher):
        def forward(self, x):
            if self.training:
                seen.append(x.detach())
            return super().forward(x)

    table = evaluate(
        clean,
        inverted,
        sets[1],
        poison_ratio=0.5,
        unseen=["c1", 3],
        **{**options, "victim": Keeping},
    )
    poisoned = torch.cat(seen[6:12])  # three rows of six batches each
    forms = {
        tuple(f.flatten().tolist()): int(k)
        for x, k in zip(inverted.images / 255, clean.labels)
        for f in (x, x.flip(2))
    }
    labels = [forms[key] for x in poisoned if (key := tuple(x.flatten().tolist())) in forms]
    assert (
        sorted(labels) == [0] * 12 + [2] * 12
    )  # half of 24 images each; classes 1 and 3 stay clean
    (run,) = table.rows["poisoned"]
    assert len(run.test_curve) == 1 and run.test == pytest.approx(
        (run.test_poisoned + run.test_unseen) / 2
    )  # equally many test images
    assert table.options["unseen"] == [
        "c1",
        "c3",
    ] and "poisoned share: 50 %; classes without poison: c1, c3" in str(table)
    assert "  test, poisoned classes " in str(table) and "  test, unseen classes\n" in str(table)
    assert "test_unseen" in table.to_dict()["rows"]["clean"]


def test_accuracy_apart_is_that_of_the_classes(sets):
    run = cell(sets, victim="small_resnet", epochs=1, unseen=[1], keep_network=True)
    labels = sets[1].labels
    right = run.network(sets[1].images.float() / 255).argmax(1) == labels
    assert run.test_unseen == pytest.approx(float(right[labels == 1].float().mean()))
    assert run.test_poisoned == pytest.approx(float(right[labels != 1].float().mean()))


# pretrained starts


def test_every_class_has_its_accuracy(sets):
    train, test = sets
    run = cell((train, test.select((test.labels != 2).nonzero()[:, 0])), keep_network=True)
    assert run.test_classes[2] is None and len(run.test_classes) == 4
    kept = test.labels != 2
    assert sum(share for share in run.test_classes if share is not None) / 3 == pytest.approx(
        run.test
    ), "equally many images of each class"
    with torch.no_grad():
        right = run.network(test.images / 255).argmax(1) == test.labels
    assert run.test == pytest.approx(float(right[kept].float().mean()))
    for label in (0, 1, 3):
        found = float(right[test.labels == label].float().mean())
        assert run.test_classes[label] == pytest.approx(found)


def test_a_recipe_takes_the_place_of_the_victims_own(sets, monkeypatch):
    rates = []
    real = torch.optim.SGD.step

    def watched(self, *args, **options):
        rates.append(self.param_groups[0]["lr"])
        return real(self, *args, **options)

    monkeypatch.setattr(torch.optim.SGD, "step", watched)
    short = models.Recipe(4, 0.2, 48, schedule="one-cycle")
    run_cell(
        *(each for part in sets for each in (part.images, part.labels)),
        4,
        victim="linear",
        recipe=short,
    )
    assert len(rates) == 4 * 2 and rates[0] == pytest.approx(0.02)
    assert rates[1] == pytest.approx(0.11) and rates[2] == 0.2 == max(rates)
    assert rates[2:] == sorted(rates[2:], reverse=True) and 1e-6 < rates[-1] < 0.03
    assert short.learning_rate(4) == pytest.approx(1e-6)
    made = victims.recipe(torch.nn.Linear, 7, None, None, usual=short)
    assert (made.epochs, made.lr, made.schedule) == (7, 0.2, "one-cycle")
    rates.clear()
    cell(sets)
    assert len(set(rates)) == 2, "the rate of a cosine changes with the epoch"


def test_fine_tuning_starts_from_the_pretrained_weights(sets, tmp_path):
    train, test = sets
    weights = pretrain(
        train.images,
        train.labels,
        test.images,
        test.labels,
        4,
        victim="small_resnet",
        epochs=4,
        lr=0.1,
        batch=16,
        seed=9,
    )
    torch.save(weights, tmp_path / "w.pt")
    safetensors.torch.save_file(weights, tmp_path / "w.safetensors")
    tiny = {"victim": "small_resnet", "epochs": 1, "lr": 1e-12, "seed": 0, "keep_network": True}
    for init in (weights, tmp_path / "w.pt", str(tmp_path / "w.safetensors")):
        run = cell(sets, init=init, **tiny)
        assert (
            torch.allclose(run.network.fc.weight, weights["fc.weight"], atol=1e-6)
            and run.test > 0.9
        )
    few = (
        train.select((train.labels < 3).nonzero()[:, 0]),
        test.select((test.labels < 3).nonzero()[:, 0]),
    )
    for part in few:
        part.classes = part.classes[:3]
    run, fresh = (cell(few, init=init, **tiny) for init in (weights, None))
    assert torch.equal(
        run.network.fc.weight, fresh.network.fc.weight
    ) and run.network.fc.weight.shape == (3, 32)  # a new head, from the seed
    assert torch.allclose(run.network.conv1.weight, weights["conv1.weight"], atol=1e-6)
    assert not torch.allclose(fresh.network.conv1.weight, weights["conv1.weight"], atol=1e-2)


def test_bad_starts_are_one_line(sets, tmp_path):
    good = models.build("linear", 4, size=8).state_dict()
    (tmp_path / "text.pt").write_text("hello")
    (tmp_path / "text.safetensors").write_text("hello")
    cases = [
        (tmp_path / "none.pt", "no such file"),
        (tmp_path / "text.pt", "damaged or foreign"),
        (tmp_path / "text.safetensors", "damaged or foreign"),
        ({}, "a state dict"),
        ({"fc.weight": 3}, "a state dict"),
        ({**good, "more": torch.zeros(1)}, "also a more"),
        ({"fc.weight": good["fc.weight"]}, "no fc.bias"),
        ({**good, "fc.weight": torch.zeros(4, 48)}, r"fc.weight \[4, 192\], got \[4, 48\]"),
    ]
    for init, words in cases:
        with pytest.raises(ValueError, match=words) as told:
            cell(sets, init=init)
        assert "\n" not in str(told.value)


# bad input, figure, command


@pytest.mark.parametrize(
    "change, words",
    [
        (dict(defence="jpg"), "defence: name"),
        (dict(defence="cutout:9"), "a square within 8 x 8"),
        (dict(poison_ratio=0), "poison_ratio: expected"),
        (dict(poison_ratio=1.5), "poison_ratio: expected"),
        (dict(unseen=["cat"]), "unseen: expected names or indices"),
        (dict(unseen=range(4)), "unseen: expected fewer than all classes"),
        (dict(victim="vgg"), "victim: expected"),
        (dict(init="/nowhere.pt"), "init: expected"),
    ],
)
def test_bad_settings_are_told_before_training(sets, monkeypatch, change, words):
    monkeypatch.setattr(victims, "_one_epoch", lambda *args: pytest.fail("trained"))
    with pytest.raises(ValueError, match=words) as told:
        evaluate(sets[0], sets[0], sets[1], eps=EPS, progress=False, **{**CELL, **change})
    assert "\n" not in str(told.value)


def test_cells_check_their_arrays(sets):
    train, test = sets
    arrays = [train.images, train.labels, test.images, test.labels, 4]
    for place, wrong, words in [
        (0, train.images.float(), "train_images: expected a uint8"),
        (1, train.labels[:5], r"labels: expected int64 \[96\] from 0 to 3"),
        (3, test.labels + 1, r"test_labels: expected int64 \[40\] from 0 to 3"),
    ]:
        with pytest.raises(ValueError, match=words):
            run_cell(*[wrong if place == i else array for i, array in enumerate(arrays)], **CELL)
    with pytest.raises(ValueError, match="a square within 8 x 8, got 9"):
        run_cell(*arrays, defence="cutout:9", **CELL)
    wide = F.pad(train.images, (0, 4))
    with pytest.raises(
        ValueError, match="square images, or a convolutional victim, got linear and 12 x 8"
    ):
        run_cell(wide, train.labels, wide, train.labels, 4, **CELL)


def test_figure_without_test_curves(sets, tmp_path):
    pytest.importorskip("matplotlib")
    table = evaluate(sets[0], sets[0], sets[1], eps=EPS, progress=False, curve=False, **CELL)
    figure(table, sets[0], sets[0].images, tmp_path / "a.png")
    assert (tmp_path / "a.png").stat().st_size > 10_000


def test_the_command(sets, tmp_path, capsys):
    train, test = sets
    delta = data.random_noise(train, EPS, 3)
    for name, part, poison in (
        ("train.npz", train, delta * 0),
        ("test.npz", test, test.images * 0.0),
        ("poison.npz", train, delta),
    ):
        data.export_npz(part, poison, tmp_path / name, eps=EPS)
    torch.save(models.build("linear", 4, size=8).state_dict(), tmp_path / "w.pt")
    words = [
        "evaluate",
        "--data",
        tmp_path / "train.npz",
        "--poisoned",
        tmp_path / "poison.npz",
        "--test",
        tmp_path / "test.npz",
        "--quiet",
    ]
    words += ["--victim", "linear", "--epochs", "1"]
    options = [
        "--defence",
        "jpeg:50",
        "--poison-ratio",
        "1/2",
        "--unseen",
        "c2",
        "--init",
        tmp_path / "w.pt",
        "--json",
        tmp_path / "a.json",
    ]
    assert commands.main([str(word) for word in words + options]) == 0
    told = json.loads((tmp_path / "a.json").read_text())["options"]
    assert (told["defence"], told["poison_ratio"], told["unseen"], told["pretrained"]) == (
        "jpeg:quality=50",
        0.5,
        ["c2"],
        True,
    )
    capsys.readouterr()
    for wrong in (
        ["--defence", "jpeg:5"],
        ["--defence", "blur"],
        ["--poison-ratio", "2"],
        ["--unseen", "cat"],
        ["--init", "no.pt"],
    ):
        assert commands.main([str(word) for word in words + wrong]) == 2
        out, err = capsys.readouterr()
        assert out == "" and err.count("\n") == 1 and err.startswith("miue-fast: ")
