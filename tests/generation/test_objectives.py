"""The other objectives on the same loop: error-minimising, targeted adversarial, random; per image
and per class.
"""

import pytest
import torch
import torch.nn.functional as F

from miue_fast import data, freeze, generate, models
from miue_fast.generation import OBJECTIVES, Options
from miue_fast.generation.descent import Descent

CLASSES, EPS, ALPHA = 4, 8 / 255, 1 / 255
SHORT = {
    "model": "small_resnet",
    "progress": False,
    "epochs": 2,
    "steps": 2,
    "batch": 20,
    "train_batch": 8,
    "width": 4,
}


@pytest.fixture(scope="module")
def shapes():
    return data.shapes(40, seed=5, size=16, classes=CLASSES)


def targets(objective, labels, shift):
    return labels if objective == "em" else (labels + shift) % CLASSES


@pytest.mark.parametrize("objective, shift", [("em", 1), ("tap", 1), ("tap", 3)])
@pytest.mark.parametrize("width", [CLASSES, CLASSES + 2])
def test_value_and_gradient(objective, shift, width):
    torch.manual_seed(0)
    logits, labels = torch.randn(12, width, requires_grad=True), torch.arange(12) % CLASSES
    loss = F.cross_entropy(logits.double(), targets(objective, labels, shift))
    (grad,) = torch.autograd.grad(loss, logits)
    options = Options(objective=objective, target_shift=shift)
    got, found = OBJECTIVES[objective].value_and_grad(logits.detach(), labels, CLASSES, options)
    torch.testing.assert_close(got.double(), loss.detach(), rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(found, grad, rtol=1e-5, atol=1e-7)


def by_hand(model, images, labels, delta, flip, objective, shift, steps, classwise):
    """Sign steps by autograd in float64; also the smallest |gradient| that decided a sign."""
    model = model.double()
    x = images.double() / 255
    x = torch.where(flip[:, None, None, None], x.flip(3), x)
    delta, least = delta.double(), []
    for _ in range(steps):
        leaf = delta.clone().requires_grad_()
        loss = F.cross_entropy(
            model((x + (leaf[labels] if classwise else leaf)).clamp(0, 1)),
            targets(objective, labels, shift),
        )
        (grad,) = torch.autograd.grad(loss, leaf)
        least.append(grad.abs())
        delta = (delta - ALPHA * grad.sign()).clamp(-EPS, EPS)
        if not classwise:
            delta = (x + delta).clamp(0, 1) - x
    return delta, torch.stack(least).amin(0)


@pytest.mark.parametrize("classwise", [False, True])
@pytest.mark.parametrize("objective, shift", [("em", 1), ("tap", 1), ("tap", 2)])
@pytest.mark.parametrize("chunk", [None, 7])
def test_steps_are_those_of_autograd(shapes, objective, shift, classwise, chunk):
    torch.manual_seed(1)
    model = models.build("small_resnet", CLASSES, width=16, size=16)
    inside = shapes.images[:24].clamp(
        40, 215
    )  # with delta never outside [0, 255]: clamps have no part in the gradient
    model(inside / 255)
    model.eval()
    labels, flip = shapes.labels[:24], torch.rand(24) < 0.5
    store = torch.zeros((CLASSES if classwise else 24, *inside.shape[1:]))
    options = Options(
        objective=objective, target_shift=shift, steps=3, eps=EPS, classwise=classwise
    )
    net = freeze(model, "fc", chunk=chunk)
    net.chunk.size, net.chunk.least = chunk or 64, 2
    loss, bad = Descent(net, inside, store, options, CLASSES)(labels, torch.arange(24), flip, ALPHA)
    wanted, least = by_hand(
        model, inside, labels, torch.zeros_like(store), flip, objective, shift, 3, classwise
    )
    assert bad.tolist() == [0, 0] and loss.isfinite()
    clear = least > 1e-3 * least.median()  # a sign within rounding of zero may turn
    assert clear.double().mean() > 0.9
    assert ((store - wanted).abs() < 1e-6)[clear].double().mean() > 0.998


@pytest.mark.parametrize("objective", ["em", "tap"])
@pytest.mark.parametrize("classwise", [False, True])
def test_generate(shapes, objective, classwise, tmp_path):
    result = generate(shapes, tmp_path, objective=objective, classwise=classwise, **SHORT)
    delta = result.delta
    assert delta.shape == shapes.images.shape and 0 < delta.abs().max() <= EPS
    assert torch.equal(data.load_poison(tmp_path, shapes)[0], delta)
    per_class = all(
        torch.equal(
            delta[shapes.labels == k][0].expand_as(delta[shapes.labels == k]),
            delta[shapes.labels == k],
        )
        for k in range(CLASSES)
    )
    assert per_class == classwise
    assert torch.equal(
        delta, generate(shapes, objective=objective, classwise=classwise, **SHORT).delta
    )
    assert not torch.equal(delta, generate(shapes, classwise=classwise, **SHORT).delta)


def test_classwise_is_resumed_to_the_same_bits(shapes, tmp_path, monkeypatch):
    from miue_fast.generation.run import BiLevelRun

    whole = generate(shapes, objective="em", classwise=True, **SHORT).delta
    real = BiLevelRun.epoch
    monkeypatch.setattr(
        BiLevelRun,
        "epoch",
        lambda self, epoch, tick: real(self, epoch, tick) if epoch == 1 else pytest.fail("stopped"),
    )
    with pytest.raises(pytest.fail.Exception):
        generate(shapes, tmp_path, objective="em", classwise=True, **SHORT)
    monkeypatch.undo()
    assert torch.equal(
        generate(shapes, tmp_path, objective="em", classwise=True, **SHORT).delta, whole
    )


def test_only_tap_trains_on_clean_images(shapes):
    """Its source model does not see the perturbation: another step size changes nothing in its
    training.
    """
    for objective, same in (("tap", True), ("em", False), ("mi-ue", False)):
        losses = [
            generate(shapes, objective=objective, alpha_0=a, alpha_K=a, **SHORT).history[-1][
                "train_loss"
            ]
            for a in (1 / 255, 4 / 255)
        ]
        assert (losses[0] == losses[1]) == same, objective


@pytest.mark.parametrize("classwise", [False, True])
def test_random_is_the_whole_budget_and_no_training(shapes, classwise, tmp_path):
    delta = generate(shapes, tmp_path, objective="random", classwise=classwise, seed=3).delta
    assert (delta.abs() == torch.tensor(EPS)).all() and abs(delta.sign().mean()) < 0.1
    same = torch.equal(delta[shapes.labels == 2][0], delta[shapes.labels == 2][1])
    assert same == classwise and not torch.equal(
        delta[shapes.labels == 0][0], delta[shapes.labels == 1][0]
    )
    assert torch.equal(data.load_poison(tmp_path, shapes)[0], delta)
    assert not torch.equal(
        delta, generate(shapes, objective="random", classwise=classwise, seed=4).delta
    )


def test_the_layer_of_the_logits_is_checked(shapes):
    with pytest.raises(
        ValueError,
        match=r"generate: feature: expected the layer that gives the logits, got 'avgpool'",
    ):
        generate(shapes, objective="em", feature="avgpool", **SHORT)
    with pytest.raises(ValueError, match=r"no nn\.Linear"):
        generate(
            shapes,
            objective="em",
            **{
                **SHORT,
                "model": lambda c: torch.nn.Sequential(
                    torch.nn.Conv2d(3, c, 16), torch.nn.Flatten()
                ),
            },
        )
    own = torch.nn.Sequential(
        torch.nn.Flatten(), torch.nn.Linear(768, 16), torch.nn.ReLU(), torch.nn.Linear(16, CLASSES)
    )
    assert generate(shapes, objective="em", **{**SHORT, "model": own}).delta.any()


def test_tap_needs_another_class(shapes):
    with pytest.raises(
        ValueError, match="target_shift: expected no multiple of the 4 classes, got 8"
    ):
        generate(shapes, objective="tap", target_shift=8, **SHORT)


BAD = [
    ({"objective": "rem"}, "objective: expected one of em, linear, mi-ue, random, tap"),
    ({"target_shift": 0}, "target_shift: expected a whole number >= 1"),
    ({"classwise": True, "delta_dtype": "int8"}, "delta_dtype: expected float32 or float16"),
]


@pytest.mark.parametrize("options, part", BAD)
def test_bad_options(options, part):
    with pytest.raises(ValueError, match=part):
        Options(**options)


# linear


def test_linear_is_em_with_a_linear_classifier_of_its_own(shapes, tmp_path):
    """The network, and no other, is chosen by the objective; a run of it resumes."""
    short = {**SHORT, "model": None, "width": None, "robust": "crop,grid:4", "lr": 0.001}
    made = generate(shapes, tmp_path, objective="linear", **short)
    same = generate(shapes, objective="em", **{**short, "model": "linear"})
    assert torch.equal(made.delta, same.delta) and made.delta.any()
    assert torch.equal(
        made.delta, generate(shapes, objective="linear", **{**short, "model": "linear"}).delta
    )
    _, manifest = data.load_poison(tmp_path)
    assert manifest["options"]["model"] == "linear" and manifest["options"]["feature"] == "fc"
    for model, got in (("resnet18", "'resnet18'"), (torch.nn.Linear(2, 2), "Linear")):
        with pytest.raises(ValueError) as error:
            generate(shapes, objective="linear", **{**short, "model": model})
        wanted = "generate: model: expected none, or linear, for the objective linear, got "
        assert str(error.value) == wanted + got


@pytest.mark.parametrize("grid", [1, 4])
def test_a_linear_step_follows_the_weights(shapes, grid):
    """The gradient of an image is W' (softmax - label), whatever its place: by hand in float64."""
    torch.manual_seed(1)
    model, count = models.build("linear", CLASSES, size=16).eval(), len(shapes.images)
    robust = f"grid:{grid}" if grid > 1 else ""
    options = Options(objective="linear", robust=robust, steps=1, device="cpu")
    delta = torch.zeros(shapes.images.shape)
    descent = Descent(freeze(model, "fc"), shapes.images, delta, options, CLASSES)
    loss, _ = descent(shapes.labels, torch.arange(count), None, ALPHA)
    x = (shapes.images / 255).double()
    pixels = ((x - model.mean) * model.inv_std).flatten(1)
    weight, bias = model.fc.weight.double(), model.fc.bias.double()
    wrong = (pixels @ weight.T + bias).softmax(1)
    named = wrong[torch.arange(count), shapes.labels]
    assert float(loss) == pytest.approx(float(-named.log().mean().detach()), rel=1e-4)
    wrong = wrong - F.one_hot(shapes.labels, CLASSES)
    grad = (wrong @ weight).view(x.shape) * model.inv_std
    if grid > 1:
        grad = F.avg_pool2d(grad, grid).repeat_interleave(grid, 2).repeat_interleave(grid, 3)
    wanted = ((x - ALPHA * grad.sign()).clamp(0, 1) - x).detach()
    sure = grad.abs() > 1e-4 * grad.abs().max()
    assert sure.double().mean() > 0.9
    assert (delta - wanted)[sure].abs().max() < 1e-6
