"""The bi-level loop: equal to one written by hand, the presets and schedules of the paper,
repeatable, never silently useless.
"""

import csv
import logging
import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from miue_fast import data, generate
from miue_fast.dispatch import native
from miue_fast.generation import PRESETS, Options, batches
from miue_fast.reference.mi_ue_value_and_grad import mi_ue_value_and_grad

TINY = {"epochs": 2, "steps": 2, "batch": 16, "train_batch": 16, "width": 2, "device": "cpu"}


def run(dataset, out=None, **options):
    return generate(dataset, out, **{"model": "small_resnet", "progress": False, **TINY, **options})


@pytest.fixture(scope="module")
def images():
    return data.shapes(40, seed=5, size=16, classes=4)


class Plain(nn.Module):
    """A user's network: its own layer names, dropout."""

    def __init__(self, classes):
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(3, 5, 3, 2, 1),
            nn.BatchNorm2d(5),
            nn.ReLU(),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
        )
        self.drop = nn.Dropout(0.2)
        self.head = nn.Linear(5, classes)

    def forward(self, x):
        return self.head(self.drop(self.body((x - 0.5) * 4)))


def test_presets_are_the_table():
    common = {
        "temperature": 0.1,
        "eps": 8 / 255,
        "alpha_0": 0.2 / 255,
        "alpha_K": None,
        "steps": 10,
        "epochs": 100,
        "batch": 512,
    }
    common |= {
        "train_batch": 128,
        "lr": 0.1,
        "momentum": 0.9,
        "weight_decay": 1e-4,
        "seed": 7,
        "flip": 0.5,
        "random_start": False,
        "eot": 1,
        "mixed": 0.0,
        "attack": 0.0,
        "poison_every": 1,
        "eps_0": None,
    }
    table = {
        "published": {"zeta": 0, "denominator": "all", "normalize_dim": True},
        "paper": {"zeta": 0.1, "denominator": "all", "normalize_dim": True},
        "paper-text": {"zeta": 0.1, "denominator": "negatives", "normalize_dim": False},
    }
    for row in table.values():
        row["robust"] = ""
    few = {"steps": 2, "alpha_0": 1 / 255, "epochs": 32, "train_batch": None, "zeta": 0.1}
    table["fast"] = few | {"robust": "crop"}
    table["publish"] = few | {"robust": "crop,grid:4"}
    assert PRESETS["fast"].options.last_alpha == 2 / 255
    assert set(PRESETS) == set(table)
    for name, row in table.items():
        assert {k: getattr(PRESETS[name].options, k) for k in common | row} == common | row


def test_what_the_data_and_the_device_decide():
    fast = PRESETS["fast"].options
    assert fast.dtype == "auto"
    batches = {count: fast.resolved(count).train_batch for count in (20, 3000, 20_000, 50_000)}
    assert batches == {20: 8, 3000: 8, 20_000: 51, 50_000: 128}
    assert replace(fast, train_batch=32).resolved(50_000).train_batch == 32
    half = native.matrix_missing() is None
    assert replace(fast, device="cpu").resolved(9).dtype == ("bfloat16" if half else "float32")
    assert replace(fast, dtype="float32").resolved(9).dtype == "float32"
    result = generate(
        data.shapes(40, seed=0),
        preset="fast",
        model="small_resnet",
        epochs=1,
        device="cpu",
        progress=False,
        width=2,
    )
    assert result.options.train_batch == 8 and result.options.dtype != "auto"


def test_schedules():
    o = Options(epochs=100, steps=10)
    assert o.alpha(1) == pytest.approx(0.2 / 255) and o.alpha(51) == pytest.approx(0.3 / 255)
    assert o.alpha(100) == pytest.approx((0.4 - 0.2 / 100) / 255)
    assert (
        Options(steps=4).last_alpha == pytest.approx(1 / 255)
        and Options(alpha_K=0.0).last_alpha == 0
    )
    assert o.learning_rate(1) == pytest.approx(0.1) and o.learning_rate(51) == pytest.approx(
        0.1 * (0.5 + 0.5e-5)
    )
    assert o.learning_rate(100) == pytest.approx(
        0.1 * (1e-5 + (1 - 1e-5) * 0.5 * (1 + math.cos(math.pi * 0.99)))
    )


def attacked_by_hand(model, images, labels, eps, steps, generator):
    """Projected sign ascent in eval mode, from a uniform start."""
    model.eval()
    point = images + (2 * torch.rand(images.shape, generator=generator) - 1) * eps
    for step in range(steps + 1):
        if step:
            (grad,) = torch.autograd.grad(F.cross_entropy(model(point), labels), point)
            point = point.detach() + 2.5 * eps / steps * grad.sign()
        point = torch.max(torch.min(point, (images + eps).clamp(0, 1)), (images - eps).clamp(0, 1))
        point.requires_grad_()
    model.train()
    return point.detach()


def loop_by_hand(
    images,
    labels,
    *,
    epochs,
    steps,
    batch,
    train_batch,
    seed,
    alpha_0,
    lr,
    zeta,
    eps,
    poison_every=1,
    eps_0=None,
    mixed=0,
    attack=0,
    attack_steps=5,
):
    """docs/method.md in plain PyTorch; only the random orders and flips are the library's."""
    torch.manual_seed(batches.derive(seed, 0, "network"))
    model = Plain(4)
    sgd = torch.optim.SGD(model.parameters(), lr, 0.9, weight_decay=1e-4)
    count, x = len(images), images.float() / 255
    delta = torch.zeros_like(x)
    last = 4 / (255 * steps)
    for e in range(1, epochs + 1):
        torch.manual_seed(batches.derive(seed, e, "dropout"))
        sgd.param_groups[0]["lr"] = lr * (
            1e-5 + (1 - 1e-5) * 0.5 * (1 + math.cos(math.pi * (e - 1) / epochs))
        )
        model.train()
        order, flips = batches.order_and_flips(count, 0.5, seed, e, "model step")
        noise = batches.generator(seed, e, "attack")
        for s in range(0, count, train_batch):
            i, m = order[s : s + train_batch], flips[s : s + train_batch, None, None, None]
            image = torch.where(m, x[i].flip(3), x[i])
            point = image + delta[i]
            if attack:
                point = attacked_by_hand(model, point, labels[i], attack, attack_steps, noise)
            sgd.zero_grad()
            loss = F.cross_entropy(model(point), labels[i])
            if mixed:
                loss = (1 - mixed) * loss + mixed * F.cross_entropy(model(image), labels[i])
            loss.backward()
            sgd.step()
        if e % poison_every and e < epochs:
            continue
        model.eval()
        budget = eps if eps_0 is None else eps - (epochs - e) / (epochs - 1) * (eps - eps_0)
        alpha = (epochs - e + 1) / epochs * (alpha_0 - last) + last
        order, flips = batches.order_and_flips(count, 0.5, seed, e, "poison step")
        for s in range(0, count, batch):
            i, m = order[s : s + batch], flips[s : s + batch, None, None, None]
            image = torch.where(m, x[i].flip(3), x[i])
            d = delta[i]
            for _ in range(steps):
                point = (image + d).requires_grad_()
                f = model.body((point - 0.5) * 4)
                _, g = mi_ue_value_and_grad(f.detach(), labels[i], 0.1, zeta, "all", True)
                d = (d - alpha * torch.autograd.grad(f, point, g)[0].sign()).clamp(-budget, budget)
                d = ((image + d).clamp(0, 1) - image).clamp(
                    -budget, budget
                )  # the difference may round to more
            delta[i] = d
    return delta.clamp(-eps, eps)


@pytest.mark.parametrize(
    "options",
    [
        {"zeta": 0.1},
        {"zeta": 0.0},
        {"zeta": 0.1, "poison_every": 2},
        {"zeta": 0.1, "eps_0": 1 / 255},
        {"zeta": 0.1, "mixed": 0.3},
        {"zeta": 0.1, "mixed": 1.0},
        {"zeta": 0.1, "attack": 4 / 255},
        {"zeta": 0.1, "attack": 8 / 255, "attack_steps": 2, "mixed": 0.5},
    ],
)
def test_equal_to_a_loop_by_hand_bit_for_bit(images, options):
    numbers = {
        "epochs": 3,
        "steps": 3,
        "batch": 16,
        "train_batch": 16,
        "seed": 11,
        "alpha_0": 1 / 255,
        "lr": 0.05,
        "eps": 4 / 255,
    }
    got = run(
        images,
        model=Plain,
        feature="body.4",
        channels_last=False,
        fused=False,
        backend="reference",
        **numbers,
        **options,
    )
    expected = loop_by_hand(images.images, images.labels, **numbers, **options)
    assert torch.equal(got.delta, expected)
    assert got.delta.dtype == torch.float32 and got.delta.abs().max() > 3.9 / 255


def test_fused_and_autograd_agree(images):
    """The first epoch's poison step sees the same network; only values near zero may change
    sign.
    """
    fused, plain = (run(images, epochs=1, steps=1, fused=on).delta for on in (True, False))
    assert (fused.sign() == plain.sign()).double().mean() >= 0.999 and fused.any()


def test_fp8_is_bfloat16_with_other_roundings(images, tmp_path):
    fp8, plain = (
        run(images, tmp_path / str(on), epochs=1, steps=1, dtype="bfloat16", fp8=on).delta
        for on in (True, False)
    )
    assert not torch.equal(fp8, plain)
    assert (fp8.sign() == plain.sign())[plain != 0].double().mean() > 0.5  # a coin gives a half
    with pytest.raises(
        ValueError,
        match=r"^freeze: fp8: expected False without a fused network, got True \(fused=False\)$",
    ):
        run(images, dtype="bfloat16", fp8=True, fused=False)


def test_same_run_same_bits(images, tmp_path):
    a, b, other = run(images, tmp_path / "a"), run(images), run(images, seed=8)
    assert torch.equal(a.delta, b.delta) and not torch.equal(a.delta, other.delta)
    assert torch.equal(data.load_poison(tmp_path / "a", images)[0], a.delta)
    assert [row["train_loss"] for row in a.history] == [row["train_loss"] for row in b.history]


def test_a_named_model_has_its_own_feature_layer(images):
    """mlp2 has no `avgpool`."""
    assert run(images, model="mlp2", width=16, epochs=1).delta.any()


def test_the_callers_random_state_and_settings_stay(images):
    before = (
        torch.get_rng_state(),
        torch.backends.cudnn.deterministic,
        torch.backends.cudnn.benchmark,
    )
    run(images)
    assert torch.equal(before[0], torch.get_rng_state())
    assert before[1:] == (torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark)


def test_network_chunk_does_not_change_the_result(images):
    assert torch.equal(run(images).delta, run(images, network_chunk=5).delta)


@pytest.mark.parametrize(
    "options",
    [
        {"delta_dtype": "float16"},
        {"delta_dtype": "int8"},
        {"dtype": "bfloat16"},
        {"dtype": "float16"},
        {"random_start": True},
        {"random_start": True, "delta_dtype": "int8"},
        {"flip": 0.0},
        {"channels_last": False},
        {"preset": "paper-text"},
    ],
)
def test_options_take_effect_within_the_budget(images, options):
    result = run(images, **options)
    assert (
        result.delta.abs().max() <= 8 / 255
        and result.delta.isfinite().all()
        and result.delta.any(dim=(1, 2, 3)).all()
    )
    if "dtype" not in options and "channels_last" not in options:
        assert not torch.equal(result.delta, run(images).delta)


def test_random_start_fills_the_budget_and_the_image_range(images):
    result = run(images, random_start=True, alpha_0=1e-9, alpha_K=0.0, flip=0.0, eps=16 / 255)
    moved = images.images / 255 + result.delta
    assert result.delta.abs().max() > 15.9 / 255 and moved.min() > -1e-6 and moved.max() < 1 + 1e-6
    assert abs(result.delta.mean()) < 1 / 255


def test_history_and_metrics(images, tmp_path):
    result = run(images, tmp_path, epochs=3)
    with open(tmp_path / "metrics.csv") as file:
        rows = list(csv.DictReader(file))
    assert [row["epoch"] for row in rows] == ["1", "2", "3"]
    for row, saved in zip(result.history, rows):
        assert row["alpha"] == result.options.alpha(row["epoch"]) == float(saved["alpha"])
        assert row["lr"] == result.options.learning_rate(row["epoch"])
        assert (
            row["image_steps_per_s"] > 0
            and row["seconds"] > 0
            and 0 <= row["train_accuracy"] <= 100
        )
        assert {k: float(v) for k, v in saved.items()} == row
    assert (
        result.options.as_dict().items()
        <= (data.load_poison(tmp_path)[1]["options"] | {"network_chunk": None}).items()
    )


def test_the_loss_falls_and_training_learns(images):
    history = run(images, epochs=10, steps=5, width=8, lr=0.05).history
    assert (
        history[-1]["poison_loss"] < history[0]["poison_loss"]
        and history[-1]["train_loss"] < history[0]["train_loss"]
    )


def test_source_models(images):
    torch.manual_seed(0)
    instance = Plain(4)
    before = instance.head.weight.clone()
    assert run(images, model=instance, feature="body.4").delta.any()
    assert not torch.equal(before, instance.head.weight)  # trained in place
    assert run(
        (images.images, images.labels), model=lambda classes: Plain(classes), feature="drop"
    ).delta.any()


def test_a_network_that_onednn_would_corrupt_runs_in_the_other_format(images):
    assert run(images, model=Strided, feature="body.4").options.channels_last is False
    assert run(images, model=Plain, feature="body.4").options.channels_last is True


# ---- batches


@pytest.mark.parametrize(
    "count, batch, sizes",
    [
        (40, 16, [16, 16, 8]),
        (39, 16, [16, 23]),
        (33, 16, [16, 17]),
        (10, 16, [10]),
        (32, 16, [16, 16]),
    ],
)
def test_a_short_tail_joins_the_batch_before_it(count, batch, sizes):
    labels = torch.arange(count) % 3
    assert [s.stop - s.start for s in batches.poison_slices(labels, batch)] == sizes


def test_no_batch_is_of_one_class():
    g = torch.Generator().manual_seed(0)
    for _ in range(300):
        count, batch = (int(torch.randint(2, high, (), generator=g)) for high in (60, 12))
        labels = (torch.rand(count, generator=g) < 0.1).long()
        if labels.unique().numel() == 1:
            labels[int(torch.randint(count, (), generator=g))] ^= 1
        slices = batches.poison_slices(labels, batch)
        assert [s.start for s in slices] + [count] == [0] + [s.stop for s in slices]
        assert all(labels[s].unique().numel() == 2 for s in slices)


def test_model_step_has_no_batch_of_one():
    assert [(s.start, s.stop) for s in batches.train_slices(33, 16)] == [(0, 16), (16, 33)]
    assert [(s.start, s.stop) for s in batches.train_slices(34, 16)] == [
        (0, 16),
        (16, 32),
        (32, 34),
    ]


@pytest.mark.parametrize("labels", [[0, 1], [0] * 30 + [1], list(range(20))])
def test_degenerate_but_valid_data_gives_every_image_a_perturbation(labels):
    """N < batch, a class with one member, every class with one member."""
    dataset = data.shapes(len(labels), seed=1, size=16, classes=2)
    result = run((dataset.images, torch.tensor(labels)), width=8, model="small_resnet")
    assert result.delta.any(dim=(1, 2, 3)).all()


# ---- bad input


class Dead(Plain):
    def forward(self, x):
        return self.head(self.body(x * 0))


class NaNLater(Plain):
    """Finite in training; NaN features from the n-th frozen pass on. For fused=False: a trace would
    not count the passes.
    """

    left = 6

    def forward(self, x):
        if not self.training:
            self.left -= 1
            x = x * (torch.nan if self.left < 0 else 1)
        return super().forward(x)


def test_a_zero_gradient_is_an_error(images):
    with pytest.raises(ValueError, match="epoch 1: delta: expected a perturbation, got zeros"):
        run(images, model=Dead, feature="body.3")


def test_nan_stops_the_run_and_names_epoch_and_batch(images, tmp_path):
    # 1 probe twice, then 2 poison batches x 2 steps per epoch: the 7th frozen pass is epoch 2,
    # batch 1
    with pytest.raises(
        ValueError,
        match=r"generate: epoch 2, batch 1 of 3 of the poison step: loss \(NaN or Inf features\)",
    ) as error:
        NaNLater.left = 2 + 3 * 2
        run(
            images,
            tmp_path,
            model=NaNLater,
            feature="body.4",
            epochs=3,
            fused=False,
            channels_last=False,
        )
    assert "\n" not in str(error.value)
    from miue_fast.generation import checkpoint

    assert (
        checkpoint.saved_epoch(tmp_path / checkpoint.NAME) == 1
        and checkpoint.load(tmp_path / checkpoint.NAME)[0]["delta"].any()
    )


def test_diverged_training_is_an_error(images):
    with pytest.raises(
        ValueError,
        match=r"epoch 1, batch \d of 3 of the model step: loss: expected a finite number.*lower lr",
    ):
        run(images, lr=1e30)


def test_out_of_memory_in_the_model_step(images):
    class Full(Plain):
        def forward(self, x):
            if self.training:
                raise torch.OutOfMemoryError("CUDA out of memory (simulated)")
            return super().forward(x)

    from miue_fast import BackendError

    with pytest.raises(BackendError, match="lower train_batch"):
        run(images, model=Full, feature="body.4")


BAD = {
    "option": ({"epsilon": 1}, "generate: option: expected one of objective, classwise"),
    "preset": ({"preset": "best"}, f"preset: expected one of {', '.join(PRESETS)}, got 'best'"),
    "eps": ({"eps": -1 / 255}, "eps: expected a number in (0, 1]"),
    "eps 8": ({"eps": 8}, "8/255, not 8"),
    "eps NaN": ({"eps": float("nan")}, "eps: expected"),
    "epochs": ({"epochs": 0}, "epochs: expected a whole number >= 1, got 0"),
    "steps": ({"steps": 2.5}, "steps: expected a whole number"),
    "batch": ({"batch": 1}, "batch: expected a whole number >= 2"),
    "lr": ({"lr": 0}, "lr: expected"),
    "momentum": ({"momentum": 1.0}, "momentum: expected"),
    "decay": ({"weight_decay": -1}, "weight_decay: expected"),
    "zeta": ({"zeta": float("inf")}, "zeta: expected"),
    "flip": ({"flip": 1.5}, "flip: expected a probability"),
    "alpha": ({"alpha_0": 0.0, "alpha_K": 0.0}, "one of them > 0"),
    "temperature": ({"temperature": 1e-4}, "temperature: expected"),
    "denominator": ({"denominator": "cross"}, "denominator: expected 'all' or 'negatives'"),
    "dtype": ({"dtype": "float64"}, "dtype: expected one of float32, bfloat16, float16"),
    "store": ({"delta_dtype": "uint8"}, "delta_dtype: expected one of float32, float16, int8"),
    "device": ({"device": "tpu"}, "device: expected 'cpu', 'cuda' or 'cuda:N', got 'tpu'"),
    "no such GPU": ({"device": "cuda:99"}, "CUDA devices here"),
    "seed": ({"seed": -1}, "seed: expected"),
    "boolean": ({"random_start": 1}, "random_start: expected True or False"),
    "model": ({"model": "resnet5"}, "model: expected one of vgg11"),
    "not a model": ({"model": 3}, "model: expected a name, an nn.Module"),
    "feature": ({"feature": "pool"}, "feature: expected a layer of the model (conv1, bn1"),
    "unused layer": (
        {"model": lambda c: Unused(c), "feature": "extra"},
        "'extra', which ran 0 times",
    ),
    "too few outputs": (
        {"model": lambda c: Plain(2), "feature": "body.4"},
        "model: expected logits [2, 4], got float32 [2, 2]",
    ),
    "wrong input": (
        {"model": lambda c: nn.Linear(7, 2), "feature": "x"},
        "feature: expected a layer",
    ),
    "wrong shape": (
        {"model": lambda c: nn.Sequential(nn.Linear(7, 4)), "feature": "0"},
        "a network for images [3, 16, 16], got an error",
    ),
    "oneDNN": (
        {"model": lambda c: Strided(c), "feature": "body.4", "channels_last": True},
        "oneDNN issue 6035",
    ),
    "tensorboard without out": ({"tensorboard": True}, "tensorboard: expected an output folder"),
}


class Strided(Plain):
    def __init__(self, classes):
        super().__init__(classes)
        self.body[0] = nn.Conv2d(3, 5, 1, 2)


class Unused(Plain):
    def __init__(self, classes):
        super().__init__(classes)
        self.extra = nn.ReLU()


@pytest.mark.parametrize("name", BAD)
def test_bad_options_are_one_clear_line(images, name):
    options, part = BAD[name]
    with pytest.raises(ValueError) as error:
        run(images, **options)
    assert part in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    "labels, part", [([3] * 6, "class"), ([1], "two or more|2 or more|class"), ([0, 1], "labels")]
)
def test_data_without_contrast_or_with_wrong_labels(images, labels, part):
    count = {1: 1}.get(len(labels), 6)
    with pytest.raises(ValueError, match=part) as error:
        run((images.images[:count], torch.tensor(labels)))
    assert "\n" not in str(error.value)


def test_one_class_in_a_data_set_object():
    one = data.Dataset(
        torch.zeros(4, 3, 16, 16, dtype=torch.uint8),
        torch.zeros(4, dtype=torch.int64),
        ["a", "b"],
        list("wxyz"),
    )
    with pytest.raises(ValueError, match="labels: expected two or more classes"):
        run(one)


def test_output_folder_is_tried_before_the_work(images, tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises((ValueError, OSError), match="file"):
        run(images, tmp_path / "file", model=lambda classes: pytest.fail("work began"))
    assert (tmp_path / "file").read_text() == "mine"


def test_tensorboard_without_the_package(images, tmp_path, monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(ValueError, match="tensorboard: expected the package tensorboard"):
        run(images, tmp_path, tensorboard=True)


def test_images_left_without_perturbation_are_said(images, caplog):
    class Half(Plain):
        """Sees nothing of an image whose first pixel is black."""

        def forward(self, x):
            return super().forward(x * (x[:, :1, :1, :1] > 0.5))

    pixels = images.images.clone()
    pixels[:, :, 0, 0] = 255
    pixels[:7, :, 0] = 0
    with caplog.at_level(logging.WARNING, "miue_fast"):
        run((pixels, images.labels), model=Half, feature="body.4", flip=0.0)
    assert "7 of 40 images stay as they are" in caplog.text
