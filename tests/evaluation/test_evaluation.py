"""Victims, the table and the figure: deterministic, fair between the rows, and able to tell a
poison from noise.
"""

import importlib.util
import json

import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from miue_fast import BackendError, data, evaluation, models
from miue_fast.evaluation import Run, Table, evaluate, poisoned_images, victims
from miue_fast.plots.evaluation import figure

EPS = 8 / 255
FAST = {"epochs": 2, "progress": False}


@pytest.fixture(scope="module")
def shapes():
    return data.shapes(60, size=16, classes=3, difficulty=0), data.shapes(
        30, seed=1, size=16, classes=3, difficulty=0
    )


@pytest.fixture(scope="module")
def delta(shapes):
    return data.random_noise(shapes[0], EPS, 3)


def brightness(count, seed, swapped=False):
    """Two classes, dark and bright; `swapped`: the other way round."""
    labels = torch.arange(count) % 2
    noise = torch.randint(0, 60, (count, 3, 16, 16), generator=torch.Generator().manual_seed(seed))
    level = (1 - labels if swapped else labels) * 150 + 20
    return data.Dataset(
        (noise + level[:, None, None, None]).to(torch.uint8),
        labels,
        ["dark", "bright"],
        [f"{i}" for i in range(count)],
    )


def test_tells_a_poison_from_noise():
    table = evaluate(
        brightness(64, 0),
        brightness(64, 1, swapped=True),
        brightness(40, 2),
        eps=EPS,
        epochs=4,
        batch=16,
        progress=False,
    )
    assert table.test("clean") >= 0.9 and table.test("random noise") >= 0.9
    assert table.test("poisoned") <= 0.1 and table.train("poisoned") >= 0.7
    assert table.options["eps"] == EPS


def test_same_seed_same_bits_and_the_callers_generator_is_left_alone(shapes, delta):
    torch.manual_seed(5)
    before = torch.get_rng_state()
    first, again, other = (
        evaluate(shapes[0], delta, shapes[1], seeds=seeds, **FAST) for seeds in ([4], [4], [5])
    )
    assert torch.equal(torch.get_rng_state(), before)
    curves = [
        [(run.train_curve, run.test_curve) for runs in table.rows.values() for run in runs]
        for table in (first, again, other)
    ]
    assert curves[0] == curves[1] != curves[2]


def test_rows_share_weights_order_crops_and_flips(shapes):
    table = evaluate(shapes[0], shapes[0], shapes[1], seeds=2, eps=EPS, **FAST)
    clean, copy, noise = (
        [(run.train_curve, run.test_curve) for run in runs] for runs in table.rows.values()
    )
    assert clean == copy != noise


def test_budget_of_the_noise_is_the_one_found_in_the_poison(shapes, monkeypatch):
    seen = []
    monkeypatch.setattr(
        evaluation.api,
        "run_cell",
        lambda images, *rest, **kw: seen.append(images) or Run(0, [0.5], [0.5]),
    )
    table = evaluate(shapes[0], torch.full(shapes[0].images.shape, -5 / 255), shapes[1], **FAST)
    change = (seen[2].int() - shapes[0].images.int()).abs()
    assert (
        table.options["eps"] == 5 / 255 and change.max() == 5 and (change == 5).float().mean() > 0.9
    )
    evaluate(shapes[0], shapes[0], shapes[1], eps=5 / 255, noise="uniform", **FAST)
    assert 0.2 < ((seen[5].int() - shapes[0].images.int()).abs() > 2).float().mean() < 0.8


def test_every_form_of_a_poison_gives_the_same_images(shapes, delta, tmp_path):
    clean = shapes[0]
    wanted = data.apply_poison(clean.images, delta, EPS)
    data.save_poison(tmp_path / "store", delta, clean, {"eps": EPS})
    data.export_folder(clean, delta, tmp_path / "png", eps=EPS)
    data.export_npz(clean, delta, tmp_path / "images.npz", eps=EPS)
    data.export_pt(clean, delta, tmp_path / "poison.pt")
    copy = data.Dataset(wanted, clean.labels, clean.classes, clean.names)
    for form in (
        delta,
        copy,
        *(tmp_path / name for name in ("store", "png", "images.npz", "poison.pt")),
    ):
        kept, images = poisoned_images(clean, form)
        assert torch.equal(images, wanted) and kept.names == clean.names, form


def test_images_without_a_poisoned_copy_are_left_out_whatever_the_order(shapes, delta):
    clean = shapes[0]
    wanted = data.apply_poison(clean.images, delta, EPS)
    rows = torch.randperm(60, generator=torch.Generator().manual_seed(0))[:20]
    part = data.Dataset(wanted, clean.labels, clean.classes, clean.names).select(rows)
    kept, images = poisoned_images(clean, part)
    assert kept.names == [clean.names[i] for i in rows.sort().values] and torch.equal(
        images, wanted[rows.sort().values]
    )


def test_bad_input_is_one_clear_line(shapes, delta, tmp_path):
    clean, test = shapes
    other = data.Dataset(clean.images, (clean.labels + 1) % 3, clean.classes, clean.names)
    data.save_poison(tmp_path, delta, other, {"eps": EPS})
    renamed = data.Dataset(
        clean.images, clean.labels, clean.classes, [f"x{name}" for name in clean.names]
    )
    cases = [
        (dict(poisoned=tmp_path), "fingerprint"),
        (dict(poisoned=other), "poisoned: expected class"),
        (dict(poisoned=renamed), "names of the clean ones"),
        (dict(poisoned=delta[:5]), "like the clean images"),
        (dict(poisoned=7), "poisoned: expected a folder"),
        (dict(test=data.shapes(30, size=16, classes=4)), "test: expected the 3 classes"),
        (dict(test=data.shapes(30, size=24, classes=3)), "test: expected images"),
        (dict(victim="vgg"), "victim: expected"),
        (dict(victim=lambda classes: None, lr=None, epochs=None), "epochs and lr"),
        (dict(epochs=0), "epochs: expected"),
        (dict(batch=0), "batch: expected"),
        (dict(lr=-1.0), "lr: expected"),
        (dict(crop=-1), "crop: expected"),
        (dict(seeds=0), "seeds: expected"),
        (dict(eps=8), "eps: expected"),
        (dict(noise="pink"), "noise: expected"),
        (dict(device="tpu"), "device: expected 'cpu', 'cuda' or 'cuda:N', got 'tpu'"),
        (dict(device="cuda:99"), "CUDA devices here"),
        (dict(test=clean), "test: expected other images than the clean training images"),
    ]
    for change, words in cases:
        arguments = {"clean": clean, "poisoned": delta, "test": test, **FAST, **change}
        with pytest.raises(ValueError, match=words) as told:
            evaluate(**arguments)
        assert "\n" not in str(told.value)


def test_a_victim_that_diverges_is_an_error(shapes, delta):
    with pytest.raises(ValueError, match="finite training loss"):
        evaluate(shapes[0], delta, shapes[1], lr=1e30, **FAST)


def test_crops_are_the_padded_images_cut_out():
    images = torch.randint(256, (3, 2, 16, 24), dtype=torch.uint8)
    views = victims.crops(images, 3)
    padded = F.pad(images, (3, 3, 3, 3))
    assert views.shape == (3, 7, 7, 2, 16, 24)
    for n, top, left in [(0, 0, 0), (1, 6, 2), (2, 3, 3)]:
        assert torch.equal(views[n, top, left], padded[n, :, top : top + 16, left : left + 24])
    assert torch.equal(views[2, 3, 3], images[2])


def test_recipe_and_schedule():
    plan = victims.recipe("resnet18", None, None, None)
    assert (plan.epochs, plan.lr, plan.batch, plan.momentum, plan.weight_decay) == (
        200,
        0.5,
        128,
        0.9,
        1e-4,
    )
    assert plan.learning_rate(0) == 0.5
    assert plan.learning_rate(100) == pytest.approx(0.25, rel=1e-5)
    assert plan.learning_rate(200) == pytest.approx(1e-6)


class Watcher(torch.nn.Sequential):
    """A linear victim that keeps what it was trained on."""

    def __init__(self, classes, features, seen):
        super().__init__(
            torch.nn.Flatten(), torch.nn.Linear(features, classes), torch.nn.BatchNorm1d(classes)
        )
        self.seen = seen

    def forward(self, x):
        if self.training:
            self.seen.append(x)
        return super().forward(x)


def test_without_crops_only_flips_are_left(shapes):
    seen, few = [], shapes[0].select(range(12))
    options = {"epochs": 2, "lr": 0.01, "batch": 4, "crop": 0, "eps": EPS, "progress": False}
    table = evaluate(
        few, few, shapes[1], victim=lambda classes: Watcher(classes, 768, seen), **options
    )
    forms = {
        tuple(x.flatten().tolist()) for image in few.images / 255 for x in (image, image.flip(2))
    }
    assert {tuple(x.flatten().tolist()) for x in torch.cat(seen[:6])} <= forms
    assert table.options["crop"] == 0 and "augmentation: flip\n" in str(table)


def test_a_last_batch_of_one_image_is_trained_with_the_one_before(shapes):
    seen, few = [], shapes[0].select(range(9))
    options = {"epochs": 1, "lr": 0.01, "batch": 4, "eps": EPS, "progress": False}
    evaluate(few, few, shapes[1], victim=lambda classes: Watcher(classes, 768, seen), **options)
    assert [len(x) for x in seen] == [4, 5] * 3


def test_the_victim_sees_crops_and_mirrored_crops_of_every_image_once():
    images = torch.randint(
        256, (40, 3, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
    )
    seen, plan = [], models.Recipe(1, 0.01, 16)
    victims.train(
        lambda classes: Watcher(classes, 192, seen),
        plan,
        images,
        torch.arange(40) % 2,
        images,
        torch.arange(40) % 2,
        2,
        0,
    )
    crops = (victims.crops(images, 1).flatten(1, 2) / 255).contiguous()  # [40, 9, C, H, W]
    found = [
        [
            (kind, n)
            for kind, x in enumerate((x, x.flip(2)))
            for n, k in (crops == x).flatten(2).all(2).nonzero()
        ]
        for x in torch.cat(seen)
    ]
    assert all(len(matches) == 1 for matches in found)
    assert sorted(int(matches[0][1]) for matches in found) == list(range(40))
    assert 10 < sum(matches[0][0] for matches in found) < 30


@pytest.fixture
def table():
    rows = {"clean": [Run(0, [0.4, 0.9], [0.3, 0.80]), Run(1, [0.4, 1.0], [0.3, 0.90])]}
    rows["poisoned"] = [Run(0, [0.9, 1.0], [0.2, 0.1]), Run(1, [0.9, 1.0], [0.2, 0.1])]
    rows["random noise"] = [Run(0, [0.4, 0.8], [0.3, 0.7]), Run(1, [0.4, 0.8], [0.3, 0.9])]
    options = {
        "victim": "small_resnet",
        "epochs": 2,
        "seeds": [0, 1],
        "eps": EPS,
        "noise": "sign",
        "classes": 3,
        "crop": 2,
    }
    return Table(rows, {**options, "train_images": 60, "test_images": 30})


def test_table_as_text_and_json(table):
    lines = str(table).splitlines()
    assert (
        "small_resnet, 2 epochs, 2 seeds" in lines[0]
        and "crop(2) and flip" in lines[0]
        and "sign, +-8/255" in lines[1]
    )
    row = next(line for line in lines if line.startswith("clean"))
    assert (
        row.split("  ")[-1].strip() == "85.0 +- 7.1 (80.0 to 90.0)"
        and "95.0 +- 7.1 (90.0 to 100.0)" in row
    )
    assert len({len(line) for line in lines[3:7]}) == 1
    told = json.loads(json.dumps(table.to_dict()))
    assert told["rows"]["random noise"]["test"] == pytest.approx(
        {"mean": 0.8, "std": 0.02**0.5, "min": 0.7, "max": 0.9}
    )
    assert told["rows"]["poisoned"]["runs"][1]["test_curve"] == [0.2, 0.1]
    assert told["options"]["eps"] == EPS and told["environment"]["torch"] == torch.__version__
    single = Table({"clean": table.rows["clean"][:1]}, {**table.options, "seeds": [0]})
    assert "80.0 %" in str(single) and "+- " not in str(single).splitlines()[-1]


def test_figure_is_drawn(table, shapes, delta, tmp_path):
    pytest.importorskip("matplotlib")
    figure(table, shapes[0], data.apply_poison(shapes[0].images, delta, EPS), tmp_path / "a.png")
    with Image.open(tmp_path / "a.png") as picture:
        assert min(picture.size) > 400 and len(picture.convert("RGB").getcolors(1 << 24)) > 500
    grey = data.from_arrays(shapes[0].images[:, :1], shapes[0].labels)
    figure(table, grey, grey.images, tmp_path / "b.png")  # one channel, and a perturbation of zero
    with pytest.raises(ValueError, match="poisoned: expected uint8"):
        figure(table, shapes[0], delta, tmp_path / "c.png")


def test_without_matplotlib_one_line_says_what_to_install(table, shapes, monkeypatch, tmp_path):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util,
        "find_spec",
        lambda name, *rest: None if name == "matplotlib" else find(name, *rest),
    )
    with pytest.raises(BackendError, match=r"figure not drawn: pip install 'miue_fast\[plot\]'"):
        figure(table, shapes[0], shapes[0].images, tmp_path / "a.png")
