"""Covariance summaries, separability of noise, features of layers and rank correlation, each
against an independent computation.
"""

import itertools
import json
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from miue_fast import analysis, data, models
from miue_fast.analysis import (
    class_covariance_summary,
    correlation,
    covariance,
    layer_features,
    linear_separability,
    separability,
    spearman,
)


def clusters(seed=0, counts=(40, 7, 15), width=10):
    """Features of three classes of labels 3, -1 and 8, each with its own covariance."""
    draw = torch.Generator().manual_seed(seed)
    labels = torch.tensor([3, -1, 8]).repeat_interleave(torch.tensor(counts))
    mixing = torch.randn(3, width, width, generator=draw).repeat_interleave(torch.tensor(counts), 0)
    points = torch.einsum("nd,nde->ne", torch.randn(len(labels), width, generator=draw), mixing)
    order = torch.randperm(len(labels), generator=draw)
    return (points + labels[:, None])[order], labels[order]


def ledoit_wolf(points):
    """(shrunk covariance, intensity) by the definition, in float64, one outer product at a time."""
    centred = (points - points.mean(0)).double()
    n, d = centred.shape
    sample = sum(torch.outer(row, row) for row in centred) / n
    target = sample.trace() / d * torch.eye(d, dtype=torch.float64)
    noise = sum(((torch.outer(row, row) - sample) ** 2).sum() for row in centred) / n**2
    intensity = min(1.0, (noise / ((sample - target) ** 2).sum()).item())
    return (1 - intensity) * sample + intensity * target, intensity


def test_covariance_summary_against_the_definitions():
    features, labels = clusters()
    found = class_covariance_summary(features, labels)
    assert [row.label for row in found.classes] == [-1, 3, 8] and [
        row.count for row in found.classes
    ] == [7, 40, 15]
    for row in found.classes:
        chosen = features[labels == row.label].double()
        shrunk, intensity = ledoit_wolf(chosen)
        assert 0 < row.shrinkage < 1 and row.shrinkage == pytest.approx(intensity, rel=1e-4)
        assert row.trace == pytest.approx(
            (chosen - chosen.mean(0)).square().sum(1).mean().item(), rel=1e-5
        )
        assert row.logdet == pytest.approx(torch.logdet(shrunk).item(), rel=1e-4, abs=1e-3)
        spectrum = torch.linalg.svdvals(chosen - chosen.mean(0)) ** 2
        share = spectrum[spectrum > 1e-9] / spectrum.sum()
        assert row.effective_rank == pytest.approx(
            math.exp(-(share * share.log()).sum().item()), rel=1e-4
        )
    for what in ("trace", "logdet", "effective_rank"):
        assert getattr(found, what) == pytest.approx(
            sum(getattr(row, what) for row in found.classes) / 3
        )


@pytest.mark.parametrize("rows", [3, 40])
def test_a_class_without_variance(rows):
    """As float64 too, whose sums round."""
    for dtype in (torch.float32, torch.float64):
        found = class_covariance_summary(
            torch.full((rows, 12), 0.1, dtype=dtype), torch.zeros(rows, dtype=torch.int64)
        )
        assert (found.trace, found.effective_rank, found.logdet) == (0, 0, -math.inf)
    assert (
        class_covariance_summary(
            torch.full((rows, 12), 0.1, requires_grad=True), torch.zeros(rows, dtype=torch.int64)
        ).trace
        == 0
    )


def test_more_features_than_images_take_the_gram_matrix(monkeypatch):
    """The same numbers as through the covariances, which are 20 x 20 here."""
    gen = torch.Generator().manual_seed(3)
    features, labels = (
        torch.randn(36, 20, generator=gen) * torch.linspace(0.1, 2, 20),
        torch.arange(36) % 3,
    )
    ours = class_covariance_summary(features, labels)
    monkeypatch.setattr(covariance, "_gram_spectra", covariance._spectra)
    for a, b in zip(ours.classes, class_covariance_summary(features, labels).classes):
        for what in ("trace", "logdet", "effective_rank", "shrinkage"):
            assert getattr(a, what) == pytest.approx(getattr(b, what), rel=1e-4)


def test_effective_rank_and_shrinkage_of_known_spectra():
    axes = torch.cat([torch.eye(6), -torch.eye(6)])[
        [0, 1, 2, 6, 7, 8]
    ]  # three directions of equal variance in six dimensions
    labels = torch.zeros(6, dtype=torch.int64)
    assert class_covariance_summary(axes, labels).effective_rank == pytest.approx(3, rel=1e-5)
    every = class_covariance_summary(
        torch.cat([torch.eye(4), -torch.eye(4)]), torch.zeros(8, dtype=torch.uint8)
    )
    assert every.effective_rank == pytest.approx(4, rel=1e-5) and every.logdet == pytest.approx(
        4 * math.log(0.25), rel=1e-5
    )
    many = torch.randn(20000, 4, generator=torch.Generator().manual_seed(0)) * torch.tensor(
        [1.0, 2.0, 3.0, 4.0]
    )
    found = class_covariance_summary(many, torch.zeros(20000, dtype=torch.int64))
    assert found.classes[0].shrinkage < 1e-3 and found.logdet == pytest.approx(
        2 * math.log(24), abs=0.05
    )
    assert found.trace == pytest.approx(30, rel=0.02)


def test_a_collapsed_class_has_no_rank_and_no_determinant():
    features, labels = clusters()
    features[labels == 8] = 2.5
    found = class_covariance_summary(features, labels)
    row = found.classes[2]
    assert (row.trace, row.logdet, row.effective_rank, row.shrinkage) == (
        0,
        -math.inf,
        0,
        1,
    ) and found.logdet == -math.inf
    plain = json.loads(json.dumps(found.to_dict(), allow_nan=False))
    assert (
        plain["logdet"] is None
        and plain["classes"][2]["logdet"] is None
        and plain["classes"][0]["logdet"] is not None
    )


@pytest.mark.parametrize(
    "features, labels, message",
    [
        (torch.zeros(4), torch.zeros(4, dtype=torch.int64), "features: expected a float tensor"),
        (
            torch.zeros(4, 2),
            torch.zeros(3, dtype=torch.int64),
            "labels: expected an integer tensor",
        ),
        (
            torch.zeros(4, 2),
            torch.tensor([0, 0, 1, 0]),
            "labels: expected two images of every class, got one of class 1",
        ),
        (
            torch.full((4, 2), math.nan),
            torch.zeros(4, dtype=torch.int64),
            "features: expected finite",
        ),
        (torch.zeros(0, 2), torch.zeros(0, dtype=torch.int64), "features: expected one image"),
    ],
)
def test_bad_features(features, labels, message):
    with pytest.raises(ValueError, match=f"^class_covariance_summary: {message}"):
        class_covariance_summary(features, labels)


def noise(count=300, seed=0):
    return torch.randint(
        -8, 9, (count, 3, 12, 12), generator=torch.Generator().manual_seed(seed)
    ).to(torch.int8)


def test_noise_with_a_pattern_per_class_is_separable_and_plain_noise_is_not():
    labels, plain = torch.arange(300) % 5, noise()
    pattern = noise(5, 1)[labels]
    mixed = (plain.float() + pattern) / 255
    found = linear_separability(mixed, labels + 40)
    assert (
        found.test >= 0.95
        and found.train == 1
        and found.classes == 5
        and (found.train_images, found.test_images) == (210, 90)
    )
    alone = linear_separability(plain, labels)
    assert (
        alone.train == 1
        and alone.chance == pytest.approx(0.2)
        and abs(alone.test - 0.2) < 4 * (0.16 / 90) ** 0.5
    )
    assert linear_separability(pattern, labels).to_dict()["test"] == 1
    assert linear_separability(mixed * 1000 + 3, labels).test == pytest.approx(
        found.test, abs=0.03
    ), "scale and offset do not matter"
    assert linear_separability(mixed, labels, seed=1) == linear_separability(mixed, labels, seed=1)
    assert linear_separability(torch.zeros(300, 4), labels).test == pytest.approx(0.2)


def test_chance_is_the_share_of_the_commonest_class():
    labels = (torch.arange(200) % 10 == 0).long()
    assert linear_separability(noise(200), labels, test_share=0.5).chance == pytest.approx(0.9)


def test_the_fit_is_the_optimum_and_the_split_shares_nothing():
    draw = torch.Generator().manual_seed(0)
    points, classes = torch.randn(80, 6, generator=draw), torch.randint(0, 3, (80,), generator=draw)
    weight, bias = (t.double() for t in separability._fit(points, classes, 3, 0.01, 200))
    share = (points.double() @ weight.T + bias).softmax(1) - F.one_hot(classes, 3)
    assert (share.T @ points.double() / 80 + 0.01 * weight).abs().max() < 1e-4 and share.mean(
        0
    ).abs().max() < 1e-4
    train, test = separability._split(classes, 3, 0.3, 0)
    assert sorted(torch.cat([train, test]).tolist()) == list(range(80))
    for number in range(3):
        assert abs((classes[test] == number).sum() / (classes == number).sum() - 0.3) < 0.03


@pytest.mark.parametrize(
    "wrong, message",
    [
        ({"delta": torch.zeros(6)}, r"delta: expected a float or int8 tensor"),
        ({"delta": torch.full((6, 2), math.nan)}, "delta: expected finite"),
        ({"labels": torch.zeros(5, dtype=torch.int64)}, "labels: expected an integer tensor"),
        ({"labels": torch.zeros(6, dtype=torch.int64)}, "labels: expected two or more classes"),
        ({"test_share": 1}, "test_share: expected a number between"),
        ({"test_share": 0.01}, "test_share: expected images of every class"),
        ({"l2": -1}, "l2: expected"),
        ({"iterations": 0}, "iterations: expected"),
    ],
)
def test_bad_perturbations(wrong, message):
    with pytest.raises(ValueError, match=f"^linear_separability: {message}"):
        linear_separability(**{"delta": torch.randn(6, 2), "labels": torch.arange(6) % 2} | wrong)


class Odd(nn.Module):
    """In-place ReLU after a batch norm, tokens, a layer that runs twice, one that never runs, one
    that gives a pair.
    """

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.bn = nn.BatchNorm2d(4)
        self.tokens = nn.Linear(4, 5)
        self.twice = nn.Identity()
        self.unused = nn.Linear(2, 2)
        self.pair = Pair()
        self.tail = nn.Sequential(
            nn.Linear(5, 6), nn.Sequential(nn.ReLU(inplace=True), nn.Linear(6, 2))
        )

    def forward(self, x):
        x = F.relu(self.bn(self.conv(x)), inplace=True)
        x = self.twice(self.twice(self.tokens(x.flatten(2).transpose(1, 2))))
        return self.tail(self.pair(x)[0].mean(1))


class Pair(nn.Module):
    def forward(self, x):
        return x, x


@pytest.fixture(scope="module")
def odd():
    torch.manual_seed(0)
    return Odd().eval()


@pytest.fixture(scope="module")
def pictures():
    return data.shapes(60, size=16, classes=3, difficulty=0)


def test_features_of_layers(odd, pictures):
    images = pictures.images[:10]
    with torch.no_grad():
        conv = odd.bn(odd.conv(images / 255))
        tokens = odd.tokens(conv.relu().flatten(2).transpose(1, 2))
        first = odd.tail[0](tokens.mean(1))
    wanted = ["tail.0", "bn", "tokens"]  # before the in-place operations that follow
    found = layer_features(odd, images, wanted, chunk=4)
    assert list(found) == wanted and [t.shape[1] for t in found.values()] == [6, 4, 5]
    for name, want in zip(wanted, (first, conv.mean((2, 3)), tokens.mean(1))):
        assert torch.allclose(found[name], want, atol=1e-5), name
    flat = layer_features(odd, images, wanted, pool=False, chunk=3)
    for name, want in zip(wanted, (first, conv.flatten(1), tokens.flatten(1))):
        assert torch.allclose(flat[name], want, atol=1e-5), name
    assert not any(module._forward_hooks for module in odd.modules())


def test_hooks_are_taken_off_when_the_model_fails(odd):
    with pytest.raises(RuntimeError):
        layer_features(odd, torch.zeros(2, 1, 16, 16, dtype=torch.uint8), ["bn"])
    assert not any(module._forward_hooks for module in odd.modules())


@pytest.mark.parametrize(
    "layers, message",
    [
        (["nothing"], r"layers of the model \(conv, bn, .*\), got \['nothing'\]"),
        ([], "layers of the model .*, got none"),
        (["unused"], "run once per forward .* unused: 0 outputs in 2 forwards"),
        (["twice"], "run once per forward .* twice: 4 outputs in 2 forwards"),
        (["pair"], "give one tensor, got pair: 2 outputs in 2 forwards, tuple"),
    ],
)
def test_bad_layers(odd, pictures, layers, message):
    with pytest.raises(ValueError, match=f"^layer_features: layers: expected .*{message}"):
        layer_features(odd, pictures.images[:6], layers, chunk=4)


def test_bad_models_and_images(odd, pictures):
    clean, labels = pictures.images, pictures.labels
    for call in (
        lambda model: layer_features(model, clean, ["bn"]),
        lambda model: analysis.analyse_layers(model, clean, clean, labels),
    ):
        with pytest.raises(ValueError, match="model: expected eval mode"):
            call(Odd())
        with pytest.raises(ValueError, match=r"model: expected an nn\.Module"):
            call("resnet18")
    cases = [
        ({"poisoned": clean[:5]}, "poisoned: expected shape"),
        ({"labels": labels[:5]}, "labels: expected an integer"),
    ]
    cases += [
        ({"clean": clean / 255}, "clean: expected a uint8"),
        ({"estimators": ["kdee"]}, "estimator: expected"),
    ]
    for wrong, message in cases:
        with pytest.raises(ValueError, match=f"^analyse_layers: {message}"):
            analysis.analyse_layers(
                odd, **{"clean": clean, "poisoned": clean, "labels": labels} | wrong
            )
    with pytest.raises(ValueError, match="chunk: expected"):
        layer_features(odd, clean, ["bn"], chunk=0)
    with pytest.raises(ValueError, match="images: expected at least one"):
        layer_features(odd, clean[:0], ["bn"])


def test_default_layers(odd):
    assert analysis.block_names(odd) == [
        "conv",
        "bn",
        "tokens",
        "twice",
        "unused",
        "pair",
        "tail.0",
        "tail.1.0",
        "tail.1.1",
    ]
    names = analysis.block_names(models.build("small_resnet", 3, size=16))
    assert names == ["conv1", "bn1", "layers.0", "layers.1", "layers.2", "avgpool", "fc"]


def test_layer_table(odd, pictures):
    """Every block that runs once; the numbers are those of the single functions; more noise leaves
    less information.
    """
    torch.manual_seed(1)
    model = models.build("small_resnet", 3, size=16).eval()
    clean, labels = pictures.images, pictures.labels
    weak, strong = (
        data.apply_poison(clean, data.random_noise(pictures, eps, 0), eps)
        for eps in (2 / 255, 64 / 255)
    )
    options = {"estimators": ["histogram", "knn"], "slices": 10, "seed": 3}
    rows = analysis.analyse_layers(model, clean, weak, labels, **options)
    assert [row.layer for row in rows] == analysis.block_names(model)
    less = analysis.analyse_layers(model, clean, strong, labels, ["avgpool"], **options)[0]
    row = rows[-2]
    assert all(
        less.mutual_information[name].value < row.mutual_information[name].value - 0.1
        for name in ("histogram", "knn")
    )
    x, y = (layer_features(model, side, ["avgpool"])["avgpool"] for side in (clean, weak))
    assert row.width == 32 and torch.equal(
        row.mutual_information["knn"].per_slice,
        analysis.mutual_information(x, y, "knn", slices=10, seed=3).per_slice,
    )
    assert row.clean == class_covariance_summary(
        x, labels
    ) and row.poisoned == class_covariance_summary(y, labels)
    plain = json.loads(json.dumps([row.to_dict() for row in rows], allow_nan=False))
    assert (
        plain[-2]["layer"] == "avgpool"
        and plain[-2]["mutual_information"]["knn"]["value"] == row.mutual_information["knn"].value
    )
    runs_once = [row.layer for row in analysis.analyse_layers(odd, clean, weak, labels, slices=2)]
    assert runs_once == ["conv", "bn", "tokens", "tail.0", "tail.1.0", "tail.1.1"]
    depth = analysis.analyse_depth(
        {"b": (model, "avgpool"), "a": (odd, "tail.0")}, clean, weak, labels, **options
    )
    assert (
        list(depth) == ["b", "a"]
        and depth["b"].to_dict() == row.to_dict()
        and depth["a"].layer == "tail.0"
    )


def test_spearman_values():
    assert spearman([1, 2, 3, 4, 5], [10, 20, 30, 40, 50]) == correlation.Spearman(
        pytest.approx(1.0), pytest.approx(2 / 120), True
    )
    assert spearman([3, 1, 2], [1, 3, 2]).rho == pytest.approx(-1)
    assert spearman([1, 2, 3, 4], [1, 2, 4, 3]).rho == pytest.approx(0.8, rel=1e-14), "in float64"
    # 1 - 6 sum d^2 / (n (n^2 - 1)) with d = 1, 1, 1, 1, 0
    assert spearman([1, 2, 3, 4, 5], [2, 1, 4, 3, 5]).rho == pytest.approx(1 - 6 * 4 / 120)
    # ties: ranks 1.5, 1.5, 3, 4 and 1, 2.5, 2.5, 4; Pearson of the ranks by hand
    assert spearman([7, 7, 8, 9], [0.1, 0.2, 0.2, 0.3]).rho == pytest.approx(3.75 / 4.5)


def test_spearman_p_exact_and_drawn(monkeypatch):
    a, b = [1.0, 2, 3, 4, 5, 6, 7], [2.0, 1, 4, 3, 7, 5, 6]
    found = spearman(a, b)
    rho = [
        1 - 6 * sum((x - y) ** 2 for x, y in zip(a, order)) / (7 * 48)
        for order in itertools.permutations(b)
    ]
    assert found.exact and found.p == pytest.approx(
        sum(abs(r) >= abs(found.rho) - 1e-9 for r in rho) / 5040
    )
    monkeypatch.setattr(correlation, "EXACT", 6)
    drawn = spearman(a, b, seed=1)
    assert not drawn.exact and drawn.p == spearman(a, b, seed=1).p != spearman(a, b, seed=2).p
    assert drawn.p == pytest.approx(found.p, abs=4 * (found.p / 9999) ** 0.5 + 1e-4)
    assert spearman(range(40), range(40)).p == pytest.approx(1e-4), "never 0"


@pytest.mark.parametrize(
    "a, b",
    [([1, 2], [1, 2]), ([1, 2, 3], [1, 2]), ([1, 1, 1], [1, 2, 3]), ([1, 2, math.nan], [1, 2, 3])],
)
def test_bad_sequences(a, b):
    with pytest.raises(ValueError, match=r"^spearman: [ab]: expected"):
        spearman(a, b)
