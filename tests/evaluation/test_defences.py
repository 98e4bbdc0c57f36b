"""Defences do what their papers say, to the data they say, and nothing else."""

import io
import math
import subprocess
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

from miue_fast import BackendError, data
from miue_fast.evaluation import DEFENCES, Stage, _torchvision, defence
from miue_fast.evaluation.defences.adversarial import Adversarial
from miue_fast.evaluation.defences.jpeg import Jpeg
from miue_fast.evaluation.defences.none import NoDefence
from miue_fast.evaluation.defences.orthogonal_projection import separating_directions
from miue_fast.evaluation.defences.ueraser import plasma

needs_torchvision = pytest.mark.skipif(_torchvision.missing() is not None, reason="no torchvision")


@pytest.fixture(scope="module")
def shapes():
    return data.shapes(60, size=16, classes=3)


def prepared(spec, shapes, seed=0):
    return defence(spec).prepare(shapes.images, shapes.labels, seed)


def batch(count=32, size=16, seed=0):
    draw = torch.Generator().manual_seed(seed)
    return torch.randint(256, (count, 3, size, size), generator=draw).float() / 255, torch.arange(
        count
    ) % 4


# the text


def test_the_text_and_its_defaults():
    assert defence("none") == NoDefence()
    assert (
        defence("jpeg").spec
        == defence("jpeg:10").spec
        == defence("jpeg:quality=10").spec
        == "jpeg:quality=10"
    )
    assert defence("adversarial:4:steps=3") == Adversarial(4, 3, 2)
    assert defence("adversarial").spec == "adversarial:eps=8:steps=10:step=2"
    assert defence("cutout").spec == "cutout"
    for name in DEFENCES:
        made = defence(name)
        assert defence(made.spec) == made and defence(made) is made
        assert made.tests == (name in ("grayscale", "resize"))
        assert (made.stage is Stage.ATTACK) == (name == "adversarial")


def test_options_that_python_code_gives_have_the_same_limits():
    with pytest.raises(ValueError, match="quality of jpeg: expected a whole number from 10 to 95"):
        Jpeg(quality=9)
    with pytest.raises(ValueError, match="quality of jpeg: expected a whole number"):
        Jpeg(quality=True)
    with pytest.raises(ValueError, match="expected at least eps = 8"):
        Adversarial(eps=8, steps=1)


@pytest.mark.parametrize(
    "spec, words",
    [
        ("jpg", "defence: name: expected one of adversarial, bit-depth, cutmix"),
        ("", "defence: name: expected one of"),
        (None, "defence: name: expected one of"),
        ("jpeg:5", "quality of jpeg: expected a whole number from 10 to 95, got '5'"),
        ("jpeg:96", "quality of jpeg"),
        ("jpeg:10.5", "a whole number"),
        ("jpeg:", "quality of jpeg"),
        ("jpeg:10:20", "option of jpeg"),
        ("jpeg:10:quality=20", "option of jpeg"),
        ("jpeg:size=3", "option of jpeg: expected each at most once of quality=, got 'size=3'"),
        ("none:1", "option of none"),
        ("grayscale:1", "option of grayscale: expected each at most once of none"),
        ("bit-depth:8", "bits of bit-depth"),
        (
            "gaussian-noise:nan",
            "std of gaussian-noise: expected a number from 0.1 to 128, got 'nan'",
        ),
        ("adversarial:0", "eps of adversarial"),
        ("adversarial:4:steps=0", "steps of adversarial"),
        ("adversarial:8:steps=3", "steps \\* step of adversarial: expected at least eps = 8"),
        ("resize:7", "side of resize: expected a whole number from 8 to 512, got '7'"),
        ("ueraser:0", "draws of ueraser"),
    ],
)
def test_bad_texts_are_one_line(spec, words):
    with pytest.raises(ValueError, match=words) as told:
        defence(spec)
    assert "\n" not in str(told.value)


@pytest.mark.parametrize(
    "spec, shape, classes, words",
    [
        ("grayscale", (1, 16, 16), 3, "grayscale: expected images of three channels, got 1"),
        ("resize:24", (3, 24, 24), 3, "square images of more than 24 pixels a side, got 24 x 24"),
        ("resize:8", (3, 16, 20), 3, "square images of more than 8 pixels a side, got 20 x 16"),
        ("cutout:17", (3, 16, 20), 3, "a square within 20 x 16, got 17"),
        ("orthogonal-projection:3", (3, 16, 16), 3, "1 to 2 components, for 3 classes, got 3"),
        pytest.param(
            "gaussian-blur:6",
            (3, 16, 16),
            3,
            r"a kernel \(37 pixels\) that fits 16 x 16",
            marks=needs_torchvision,
        ),
    ],
)
def test_images_that_cannot_be_defended(spec, shape, classes, words):
    with pytest.raises(ValueError, match=words):
        defence(spec).check(shape, classes)


# once


def test_grayscale_is_the_luma_in_every_channel(shapes):
    grey = prepared("grayscale", shapes)
    assert (
        torch.equal(grey[:, 0], grey[:, 1])
        and torch.equal(grey[:, 0], grey[:, 2])
        and grey.is_contiguous()
    )
    r, g, b = shapes.images.double().unbind(1)
    assert (grey[:, 0] - (0.299 * r + 0.587 * g + 0.114 * b)).abs().max() <= 0.5 + 1e-4
    pillow = np.stack(
        [
            np.asarray(Image.fromarray(x.permute(1, 2, 0).numpy()).convert("L"))
            for x in shapes.images
        ]
    )
    assert (
        grey[:, 0].int() - torch.from_numpy(pillow).int()
    ).abs().max() <= 1  # Pillow rounds its weights to 16 bits


@pytest.mark.parametrize("bits", [1, 2, 5, 7])
def test_bit_depth_has_so_many_levels_and_takes_the_nearest(shapes, bits):
    every = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16)
    got = defence(f"bit-depth:{bits}").prepare(every, None, 0)
    levels = torch.arange(2**bits) * 255 / (2**bits - 1)
    assert len(got.unique()) == 2**bits and got.min() == 0 and got.max() == 255
    nearest = (every.flatten()[:, None] - levels).abs().amin(1)
    assert torch.allclose((got.flatten() - every.flatten().float()).abs(), nearest, atol=0.5 + 1e-4)
    assert torch.equal(defence(f"bit-depth:{bits}").prepare(got, None, 0), got)


def test_two_bits_are_the_thirds_of_255():
    assert torch.tensor([0, 85, 170, 255], dtype=torch.uint8).equal(
        defence("bit-depth").prepare(torch.arange(256), None, 0).unique()
    )


def test_jpeg_is_pillows_round_trip(shapes):
    got = prepared("jpeg:30", shapes)
    for before, after in zip(shapes.images[:10], got):
        buffer = io.BytesIO()
        Image.fromarray(before.permute(1, 2, 0).numpy()).save(
            buffer, "JPEG", quality=30, subsampling="4:2:0"
        )
        assert np.array_equal(np.asarray(Image.open(buffer)), after.permute(1, 2, 0).numpy())
    worse = [
        (prepared(f"jpeg:{quality}", shapes).int() - shapes.images.int()).abs().float().mean()
        for quality in (10, 50, 95)
    ]
    assert worse[0] > worse[1] > worse[2] > 0
    grey = defence("jpeg:50").prepare(shapes.images[:2, :1], None, 0)
    buffer = io.BytesIO()
    Image.fromarray(shapes.images[1, 0].numpy()).save(buffer, "JPEG", quality=50)
    assert grey.shape == (2, 1, 16, 16) and np.array_equal(
        np.asarray(Image.open(buffer)), grey[1, 0].numpy()
    )


def test_resizing_is_pillows_antialiased_bilinear_filter(shapes):
    made = defence("resize:10")
    got = made.prepare(shapes.images, shapes.labels, 0)
    assert got.shape == (60, 3, 10, 10) and made.shape((3, 16, 16)) == (3, 10, 10)
    for before, after in zip(shapes.images, got):
        small = Image.fromarray(before.permute(1, 2, 0).numpy()).resize(
            (10, 10), Image.Resampling.BILINEAR
        )
        assert np.array_equal(np.asarray(small), after.permute(1, 2, 0).numpy())
    board = (torch.arange(16)[:, None] + torch.arange(16)) % 2 * 255
    board = board.to(torch.uint8).expand(1, 1, 16, 16)
    inside = defence("resize:8").prepare(board, None, 0)[0, 0, 1:-1, 1:-1]
    assert (inside.int() - 128).abs().max() <= 1, "pixels are averaged, not left out"


@needs_torchvision
def test_blur_is_a_normalised_gaussian():
    points = torch.zeros(1, 1, 21, 21, dtype=torch.uint8)
    points[0, 0, 10, 10] = 255
    got = defence("gaussian-blur:1.5").prepare(points, None, 0)[0, 0].double()
    line = torch.exp(-((torch.arange(21) - 10.0).double() ** 2) / (2 * 1.5**2)) * (
        (torch.arange(21) - 10).abs() <= 5
    )
    wanted = 255 * torch.outer(line, line) / line.sum() ** 2
    assert (got - wanted).abs().max() <= 0.51
    flat = torch.full((1, 3, 16, 16), 77, dtype=torch.uint8)
    assert torch.equal(defence("gaussian-blur").prepare(flat, None, 0), flat)


def linear_poison(count=300, classes=4, strength=24):
    """Images without any meaning, and a class-wise sign pattern: exactly the linearly separable
    noise that the projection is against.
    """
    draw = torch.Generator().manual_seed(0)
    labels = torch.arange(count) % classes
    pattern = torch.randint(2, (classes, 3, 8, 8), generator=draw) * 2 - 1
    images = torch.randint(60, 196, (count, 3, 8, 8), generator=draw) + strength * pattern[labels]
    return images.to(torch.uint8), labels


def nearest_mean(train, labels, test, wanted):
    means = torch.stack([train[labels == c].flatten(1).float().mean(0) for c in labels.unique()])
    return (torch.cdist(test.flatten(1).float(), means).argmin(1) == wanted).float().mean()


def test_projection_removes_the_separating_directions():
    images, labels = linear_poison()
    mean, directions = separating_directions(images, labels, 3, 0)
    assert torch.allclose(directions @ directions.T, torch.eye(3), atol=1e-5)
    assert torch.allclose(mean, images.flatten(1).float().mean(0) / 255, atol=1e-6)
    got = defence("orthogonal-projection").prepare(images, labels, 0)
    before, after = ((x.flatten(1).float() / 255 - mean) @ directions.T for x in (images, got))
    assert (
        after.std(0).max() < 0.02 * before.std(0).min()
    )  # what is left comes from rounding to 8 bits
    half = len(images) // 2
    assert nearest_mean(images[:half], labels[:half], images[half:], labels[half:]) > 0.95
    fitted = images.flatten(1).double() / 255 - mean
    residue = (got.flatten(1).double() / 255 - mean) - (
        fitted - (fitted @ directions.T.double()) @ directions.double()
    )
    assert residue.abs().max() <= 0.5 / 255 + 1e-5  # nothing else is taken away
    one = defence("orthogonal-projection:1").prepare(images, labels, 0)
    kept = ((one.flatten(1).float() / 255 - mean) @ directions.T).std(0)
    assert kept[0] < 0.02 * before.std(0)[0] and kept[1] > 0.9 * before.std(0)[1]


def test_projection_finds_the_class_patterns():
    images, labels = linear_poison(strength=40)
    _, directions = separating_directions(images, labels, 3, 0)
    means = torch.stack([images[labels == c].flatten(1).float().mean(0) for c in range(4)])
    means = means - means.mean(0)
    assert (means - means @ directions.T @ directions).norm() < 0.2 * means.norm()


def test_preparing_is_repeatable_and_depends_on_the_seed_only_where_it_draws(shapes):
    for name in DEFENCES:
        made = defence("resize:12" if name == "resize" else name)
        if made.stage is Stage.ONCE and name != "none":
            first, again = (made.prepare(shapes.images, shapes.labels, 3) for _ in range(2))
            assert (
                torch.equal(first, again)
                and first.dtype == torch.uint8
                and first.shape[1:] == made.shape(shapes.images.shape[1:])
            )
            assert not torch.equal(first, shapes.images), name
    images, labels = linear_poison()
    assert not torch.equal(
        *(defence("orthogonal-projection").prepare(images, labels, seed) for seed in (1, 2))
    )


# every batch


def test_cutout_is_one_black_square_per_image():
    torch.manual_seed(0)
    images, labels = batch(400)
    images = images * 0.9 + 0.1  # nothing is black before
    got, targets = defence("cutout").batch(None, images, labels, 4)
    hole = (got == 0).all(1)
    assert targets is labels and torch.equal(
        got.masked_fill(hole[:, None], 0), images.masked_fill(hole[:, None], 0)
    )
    centres = set()
    for mask in hole:
        rows, columns = mask.any(1).nonzero()[:, 0], mask.any(0).nonzero()[:, 0]
        for line in (rows, columns):
            assert line.tolist() == list(range(int(line[0]), int(line[-1]) + 1))
            assert len(line) == 8 or (
                line[0] == 0 or line[-1] == 15
            )  # 8 at 16, 16 at 32; shorter at the border only
            assert 4 <= len(line) <= 8
        assert int(mask.sum()) == len(rows) * len(columns)
        centres.add((int(rows[0]), int(columns[0])))
    assert len(centres) > 60


@needs_torchvision
@pytest.mark.parametrize("name", ["cutmix", "mixup"])
def test_mixed_targets_are_the_shares_of_the_pixels(name):
    torch.manual_seed(1)
    shares = []
    for _ in range(30):
        images = (
            torch.eye(4)[:, :, None, None].expand(4, 4, 16, 16)[:, :3].contiguous()
        )  # image i is 1 in channel i; the last is black
        got, targets = defence(name).batch(None, images, torch.arange(4), 4)
        assert torch.allclose(targets.sum(1), torch.ones(4))
        present = got.mean((2, 3))
        assert torch.allclose(present, targets[:, :3], atol=1e-6)
        assert ((got == 0) | (got == 1)).all() or name == "mixup"
        shares.append(float(targets[0, 0]))
    assert min(shares) < 0.3 and max(shares) > 0.7  # Beta(1, 1) is uniform


def test_noise_is_fresh_normal_and_clamped():
    torch.manual_seed(0)
    images = torch.full((64, 3, 16, 16), 0.5)
    noise = defence("gaussian-noise:16")
    first, second = (noise.batch(None, images, None, 4)[0] for _ in range(2))
    change = (first - images) * 255
    assert abs(change.std() / 16 - 1) < 4 / math.sqrt(2 * change.numel()) and abs(
        change.mean()
    ) < 4 * 16 / math.sqrt(change.numel())
    assert not torch.equal(first, second) and images.eq(0.5).all()
    edge = noise.batch(None, torch.ones(8, 3, 16, 16), None, 4)[0]
    assert edge.max() == 1 and edge.min() < 1


def test_plasma_is_a_smooth_cloud():
    torch.manual_seed(0)
    clouds = plasma(50, 32, 24)
    assert clouds.shape == (50, 1, 32, 24)
    assert torch.equal(clouds.amin((1, 2, 3)), torch.zeros(50)) and torch.allclose(
        clouds.amax((1, 2, 3)), torch.ones(50)
    )
    assert (
        clouds.diff(dim=2).abs().mean() / clouds.flatten(1).std(1).mean()
    ) < 0.4  # white noise: about 1.15
    assert clouds.flatten(1).std(0).min() > 0.05


@needs_torchvision
def test_ueraser_style_changes_nearly_every_image_and_takes_the_worst_draw():
    images, labels = batch()
    model = nn.Sequential(nn.Flatten(), nn.Linear(768, 4), nn.BatchNorm1d(4))
    before = {name: value.clone() for name, value in model.state_dict().items()}

    def losses(x):
        model.eval()
        with torch.no_grad():
            loss = F.cross_entropy(model(x), labels, reduction="none")
        model.train()
        return loss

    torch.manual_seed(3)
    one = [defence("ueraser").batch(model, images, labels, 4)[0] for _ in range(4)]
    torch.manual_seed(3)
    worst, targets = defence("ueraser:4").batch(model, images, labels, 4)
    assert targets is labels and model.training
    assert all(torch.equal(model.state_dict()[name], value) for name, value in before.items())
    assert torch.equal(losses(worst), torch.stack([losses(x) for x in one]).amax(0))
    assert ((one[0] - images).abs().flatten(1).amax(1) > 0).float().mean() > 0.85
    assert one[0].min() >= 0 and one[0].max() <= 1 and not torch.equal(one[0], one[1])


# attacks


@pytest.fixture(scope="module")
def net():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, 2), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 49, 4)
    ).train()


@pytest.mark.parametrize("eps", [2, 8])
def test_the_attack_stays_in_its_budget_and_raises_the_loss(net, eps):
    images, labels = batch()
    statistics = net[1].running_mean.clone()
    torch.manual_seed(0)
    attacked = Adversarial(eps, 10, 2).attack(net, images, labels)
    assert (
        not attacked.requires_grad and net.training and torch.equal(net[1].running_mean, statistics)
    )
    assert all(p.grad is None for p in net.parameters())
    change = (attacked - images).abs().max() * 255
    assert 0.99 * eps < change <= eps + 1e-4 and attacked.min() >= 0 and attacked.max() <= 1
    torch.manual_seed(0)
    start = (images + (2 * torch.rand(images.shape) - 1) * eps / 255).clamp(0, 1)
    net.eval()
    clean, noisy, worst = (
        float(F.cross_entropy(net(x), labels).detach()) for x in (images, start, attacked)
    )
    net.train()
    assert worst - clean > 5 * abs(noisy - clean) and worst > clean + 0.05 * eps / 8


def test_the_attack_of_a_linear_model_is_the_known_optimum():
    """Two classes, linear: the worst image moves every pixel by eps against its weight."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(48, 2)).eval()
    images, labels = torch.full((6, 3, 4, 4), 0.5), torch.arange(6) % 2
    attacked = Adversarial(8, 20, 2).attack(model, images, labels)
    gap = (model[1].weight[0] - model[1].weight[1]).view(3, 4, 4).sign().detach()
    wanted = images + 8 / 255 * torch.where(labels == 0, -1, 1)[:, None, None, None] * gap
    assert torch.allclose(attacked, wanted, atol=1e-6)


def test_robust_accuracy_is_of_the_attacked_images():
    """One pixel decides by a margin of 3/255: an attack of 2 changes nothing, one of 4
    everything.
    """
    model = nn.Sequential(nn.Flatten(), nn.Linear(48, 2)).eval()
    with torch.no_grad():
        model[1].weight.zero_()
        model[1].weight[1, 0], model[1].bias[:] = 100.0, torch.tensor([0.0, -100 * 100 / 255])
    labels = torch.arange(40) % 2
    images = torch.full((40, 3, 4, 4), 100, dtype=torch.uint8)
    images[:, 0, 0, 0] = (97 + 6 * labels).to(torch.uint8)
    accuracies = [
        defence(f"adversarial:{eps}").robust(model, images, labels, batch=7) for eps in (2, 4)
    ]
    assert accuracies == [1.0, 0.0]


# torchvision


def test_without_torchvision_one_line_says_what_to_install(monkeypatch):
    monkeypatch.setattr(_torchvision.importlib.util, "find_spec", lambda name, *rest: None)
    for name in ("cutmix", "mixup", "gaussian-blur", "ueraser"):
        with pytest.raises(
            BackendError,
            match=rf"{name}: this defence needs torchvision: pip install 'miue_fast\[defences\]'",
        ) as told:
            defence(name)
        assert "\n" not in str(told.value)
    with pytest.raises(BackendError, match="pip install"):
        _torchvision.transforms()
    assert defence("jpeg").spec and defence("adversarial").spec


@needs_torchvision
def test_torchvision_is_imported_when_it_is_used_and_not_before():
    program = (
        "import sys\n"
        "from miue_fast.evaluation import _torchvision, defence\n"
        "defence('cutmix')\n"
        "assert 'torchvision' not in sys.modules\n"
        "assert _torchvision.transforms().CutMix\n"
        "assert 'torchvision' in sys.modules"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


def test_a_torchvision_that_does_not_fit_is_a_backend_error(monkeypatch):
    def broken(name):
        raise RuntimeError("torch and torchvision disagree\nabout CUDA")

    monkeypatch.setattr(_torchvision, "missing", lambda: None)
    monkeypatch.setattr(_torchvision.importlib, "import_module", broken)
    with pytest.raises(BackendError, match="torchvision does not fit torch"):
        _torchvision.transforms()
