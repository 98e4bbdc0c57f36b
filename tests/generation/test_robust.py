"""Transforms in the poison step: what they draw, that the step descends through their exact
transposes, and that a run with them resumes to the same bits.
"""

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from _runs import SMALL as SMALL_RUN
from _runs import Plain

import miue_fast
from miue_fast import data, freeze
from miue_fast.cli import arguments
from miue_fast.generation import TRANSFORMS, Interrupted, Options, batches, generate
from miue_fast.generation.descent import Descent
from miue_fast.generation.robust import read
from miue_fast.reference.projected_step import cell_sums, viewed

SMALL = {**SMALL_RUN, "epochs": 3}
JPEG = "jpeg:30:highest=80:share=1"
LISTS = ["crop", "grid:4", "resize", "gray:0.5", JPEG, f"crop,grid:3,resize:0.4,{JPEG},gray:0.5"]


@pytest.fixture(scope="module")
def images():
    return data.shapes(40, seed=5, size=16, classes=4)


KNOWN = ", ".join(TRANSFORMS)
SIZE = "size of grid: a whole number from 2 to 4096"


@pytest.mark.parametrize(
    "text, expected, got",
    [
        ("foo", f"one of {KNOWN}", "'foo'"),
        ("crop,,grid:2", f"one of {KNOWN}", "''"),
        ("crop,crop", "each transform at most once", "crop twice"),
        ("grid", SIZE, "None"),
        ("grid:1", SIZE, "'1'"),
        ("grid:4:5", "option of grid: each at most once of size=", "'5'"),
        ("crop:4", "option of crop: each at most once of none", "'4'"),
        ("gray:1.5", "share of gray: a number from 0 to 1", "'1.5'"),
        ("jpeg:0", "lowest of jpeg: a whole number from 1 to 100", "'0'"),
        ("jpeg:96", "highest of jpeg: a whole number from lowest, 96, to 100", "95"),
        ("resize:big", "smallest of resize: a number from 0.05 to 1", "'big'"),
        (4, f"a text such as {KNOWN}", "4"),
    ],
)
def test_a_wrong_list_is_refused_in_one_line(text, expected, got):
    with pytest.raises(ValueError) as error:
        Options(robust=text)
    assert str(error.value) == f"option: robust: expected {expected}, got {got}"


def test_the_command_line_takes_the_same_text():
    base = ["generate", "--data", "d", "--out", "o"]
    args = arguments.parse([*base, "--robust", "crop, grid:4"])
    assert arguments.given(args) == {"robust": "crop, grid:4"}
    wanted = read("crop,grid:size=4")
    assert Options(**arguments.given(args)).transforms == wanted and wanted.grid == 4
    assert Options().transforms.transforms == ()


@pytest.mark.parametrize("name", ["gray", "jpeg"])
def test_colours_need_three_channels(name):
    one = data.from_arrays(torch.zeros(8, 1, 16, 16).byte(), torch.arange(8) % 2)
    with pytest.raises(
        ValueError, match=rf"^option: robust: expected images of three channels for {name}, got 1$"
    ):
        generate(one, robust=name, **SMALL)


def test_crops_are_those_of_the_victims():
    """Up to an eighth of the width in both directions, every one about as often, half mirrored."""
    shape = torch.Size([9, 3, 48, 32])
    view = read("crop").draw(20_000, shape, 0.5, batches.step_generator(7, 1, 2, 3)).view
    assert view is not None and view.dtype == torch.int32
    for axis in (0, 1):
        found, often = view[:, axis].unique(return_counts=True)
        assert found.tolist() == list(range(-4, 5)) and often.min() > 1900
    assert abs(view[:, 2].float().mean() - 0.5) < 0.02
    again = read("crop").draw(20_000, shape, 0.5, batches.step_generator(7, 1, 2, 3)).view
    other = read("crop").draw(20_000, shape, 0.5, batches.step_generator(7, 1, 2, 4)).view
    assert torch.equal(view, again) and not torch.equal(view, other)
    never = read("crop").draw(50, shape, 0.0, batches.step_generator(7, 1, 2, 3)).view
    assert not never[:, 2].any()


def test_resizing_is_that_of_pytorch():
    shape, x = torch.Size([3, 3, 24, 32]), torch.rand(3, 3, 24, 32)
    (resize,), widths = read("resize").transforms, set()
    for step in range(60):
        change = resize.change(shape, batches.step_generator(7, 1, 1, step))
        drawn = int(torch.randint(16, 33, (), generator=batches.step_generator(7, 1, 1, step)))
        widths.add(drawn)
        if drawn == 32:
            assert change is None
            continue
        small = F.interpolate(x, (round(drawn * 0.75), drawn), mode="bilinear", antialias=True)
        wanted = F.interpolate(small, (24, 32), mode="bilinear")
        torch.testing.assert_close(change(x), wanted, rtol=0, atol=1e-6)
    assert {16, 32} < widths


def test_gray_in_its_share_of_the_steps():
    (gray,) = read("gray:0.4").transforms
    shape, x = torch.Size([2, 3, 4, 4]), torch.rand(2, 3, 4, 4)
    changes = [gray.change(shape, batches.step_generator(7, 1, 1, step)) for step in range(500)]
    assert 0.3 < sum(change is not None for change in changes) / 500 < 0.5
    grey = next(change for change in changes if change)(x)
    wanted = 0.299 * x[:, :1] + 0.587 * x[:, 1:2] + 0.114 * x[:, 2:]
    torch.testing.assert_close(grey, wanted.expand_as(x))


def test_jpeg_of_every_quality_in_its_share_of_the_steps():
    (jpeg,) = read("jpeg:60:highest=63:share=0.7").transforms
    shape, x = torch.Size([2, 3, 16, 16]), torch.rand(2, 3, 16, 16)
    changes = [jpeg.change(shape, batches.step_generator(7, 1, 1, step)) for step in range(400)]
    assert 0.6 < sum(change is not None for change in changes) / 400 < 0.8
    wanted = [miue_fast.jpeg_round_trip(x, quality) for quality in range(60, 64)]
    found = [change(x) for change in changes if change]
    often = [sum(torch.equal(each, one) for each in found) for one in wanted]
    assert sum(often) == len(found) and min(often) > 40
    assert read("jpeg").transforms == read("jpeg:60:highest=95:share=0.6").transforms


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("text", ["", *LISTS])
def test_the_step_is_the_sign_of_the_gradient_through_the_transforms(images, text, fused):
    """One step against float64 autograd through the whole path, written with plain PyTorch."""
    torch.manual_seed(1)
    network, count = Plain().eval(), len(images.images)
    options = Options(objective="em", robust=text, steps=1, device="cpu", fused=fused)
    robust, labels, index = options.transforms, images.labels, torch.randperm(count)
    draws = partial(batches.step_generator, 3, 1, 1)
    delta = torch.zeros(images.images.shape)
    descent = Descent(
        freeze(network, "fc", fused=fused, chunk=16), images.images, delta, options, 4
    )
    descent(labels[index], index, None, 0.01, draws)
    drawn = robust.draw(count, images.images.shape, options.flip, draws(0))
    x = (images.images[index] / 255).double().requires_grad_()
    changed = x
    for change in drawn.changes:
        changed = change(changed.float()).double()
    outputs = network.double()(viewed(changed, drawn.view))
    (grad,) = torch.autograd.grad(F.cross_entropy(outputs, labels[index]), x)
    if robust.grid > 1:
        grad = cell_sums(grad, robust.grid)
    wanted = ((x - 0.01 * grad.sign()).clamp(0, 1) - x).detach()
    sure = grad.abs() > 1e-4 * grad.abs().max()
    got = delta[index].double()
    assert sure.double().mean() > 0.5
    assert (got - wanted)[sure].abs().max() < 1e-6


@pytest.mark.parametrize("text", LISTS)
def test_a_resumed_run_has_the_same_bits(images, text, tmp_path, monkeypatch):
    whole = generate(images, robust=text, **SMALL).delta
    real, calls = Descent.__call__, []

    def stopping(*args, **kwargs):
        calls.append(1)
        if len(calls) == 5:  # of three batches per epoch
            raise KeyboardInterrupt
        return real(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(Descent, "__call__", stopping)
        with pytest.raises(Interrupted):
            generate(images, tmp_path, robust=text, **SMALL)
    with pytest.raises(ValueError, match=r"of the same options, got robust = "):
        generate(images, tmp_path, robust="crop,grid:2", **SMALL)
    assert torch.equal(generate(images, tmp_path, robust=text, **SMALL).delta, whole)
    plain = generate(images, **SMALL).delta
    assert not torch.equal(plain, whole)


@pytest.mark.parametrize("options", [{}, {"delta_dtype": "int8"}, {"random_start": True}])
def test_a_perturbation_is_constant_per_cell(options):
    """Grey images are never clamped to [0, 1], so only the rounding of image + delta differs, and
    levels of int8 not at all. Cells of 3 are cut at the border of 16.
    """
    most = 0 if "delta_dtype" in options else 1e-6
    gen = torch.Generator().manual_seed(0)
    images = torch.randint(64, 192, (40, 3, 16, 16), generator=gen).byte()
    grey = data.from_arrays(images, torch.arange(40) % 4)
    delta = generate(grey, robust="crop,grid:3", **SMALL, **options).delta
    assert delta.abs().max() > 0
    for top in range(0, 16, 3):
        for left in range(0, 16, 3):
            cell = delta[:, :, top : top + 3, left : left + 3].flatten(2)
            assert (cell - cell[..., :1]).abs().max() <= most


@pytest.mark.parametrize("text", LISTS)
def test_class_wise(images, text):
    """One perturbation per class, from gradients that went back through the same transposes."""
    delta = generate(images, robust=text, classwise=True, **SMALL).delta
    for label in range(4):
        rows = delta[images.labels == label]
        assert (rows == rows[0]).all() and rows.any()
    if text == "grid:4":
        coarse = delta[..., ::4, ::4]
        assert torch.equal(delta, coarse.repeat_interleave(4, 2).repeat_interleave(4, 3))


def test_the_model_step_sees_plain_images(images, monkeypatch):
    """Before the first poison step a run with transforms is the run without."""
    seen = []
    monkeypatch.setattr(
        Descent, "__call__", lambda self, *args: seen.append(self.network.model) or (1 / 0)
    )
    for text in ("", "crop,gray,resize"):
        with pytest.raises(ZeroDivisionError):
            generate(images, robust=text, **SMALL)
    one, other = (net.state_dict() for net in seen)
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_a_descent_asks_for_its_draws(images):
    network = Plain().eval()
    delta = torch.zeros(images.images.shape)
    descent = Descent(
        freeze(network, "fc"), images.images, delta, Options(objective="em", robust="crop"), 4
    )
    with pytest.raises(ValueError, match=r"^Descent: draws: expected a generator for each step"):
        descent(images.labels, torch.arange(40), None, 0.01)


def test_every_transform_says_what_it_is():
    assert set(TRANSFORMS) >= {"crop", "grid", "resize", "gray", "jpeg"}
    assert all(kind.about and kind.__doc__ for kind in TRANSFORMS.values())
