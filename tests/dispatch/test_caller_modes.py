"""Autocast, inference mode, no_grad, a float64 default, images that require a gradient, weights of
other types: right, or one line.
"""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from miue_fast import data, evaluate, freeze, generate, models, nt_xent, perturb
from miue_fast.analysis import (
    class_covariance_summary,
    layer_features,
    linear_separability,
    mutual_information,
)
from miue_fast.dispatch.registry import OPS
from miue_fast.evaluation import run_cell
from miue_fast.generation import Options
from miue_fast.generation.descent import Descent
from tests import samples

IMAGES = torch.rand(6, 3, 16, 16, generator=torch.Generator().manual_seed(0))
LABELS = torch.arange(6) % 2
SHAPES, TEST = (data.shapes(16, seed=seed, size=16, classes=2, difficulty=0) for seed in (0, 1))
RUN = {
    "model": "small_resnet",
    "epochs": 1,
    "steps": 2,
    "batch": 16,
    "train_batch": 8,
    "progress": False,
    "lr": 0.05,
}


class float64_by_default:
    def __enter__(self):
        torch.set_default_dtype(torch.float64)

    def __exit__(self, *error):
        torch.set_default_dtype(torch.float32)


MODES = {
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "autocast float16": lambda: torch.autocast("cpu", torch.float16),
    "no_grad": torch.no_grad,
    "inference_mode": torch.inference_mode,
    "float64 by default": float64_by_default,
}


def resnet(seed=0):
    torch.manual_seed(seed)
    return models.build("small_resnet", 4).eval()


class Sigmoids(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.norm, self.avgpool, self.fc = (
            nn.Conv2d(3, 6, 3),
            nn.BatchNorm2d(6),
            nn.AdaptiveAvgPool2d(2),
            nn.Linear(24, 4),
        )

    def forward(self, x):
        return self.fc(self.avgpool(torch.sigmoid(self.norm(self.conv(x)))).flatten(1))


def unfused(seed=0):
    torch.manual_seed(seed)
    return Sigmoids().eval()


def both_calls(net):
    features = net.forward(IMAGES)
    return [features, net.input_grad(torch.ones_like(features))]


def frozen(make, **options):
    return lambda model: both_calls(freeze(model, **options)), make


def a_descent(objective):
    def work(model):
        with torch.inference_mode(False):
            delta = torch.zeros(IMAGES.shape, dtype=torch.float32)
        options = Options(objective=objective, steps=2, batch=6)
        Descent(freeze(model, "fc" if objective == "em" else "avgpool"), IMAGES, delta, options, 4)(
            LABELS, torch.arange(6), None, 0.01
        )
        return [delta]

    return work, resnet


def one_step(model, **options):
    return [
        perturb(
            model,
            IMAGES,
            LABELS,
            torch.zeros_like(IMAGES),
            steps=3,
            alpha=0.01,
            eps=0.03,
            **options,
        )
    ]


CALLS = {
    "freeze": frozen(resnet),
    "freeze, half": frozen(resnet, dtype=torch.float16),
    "freeze, float64": frozen(resnet, dtype=torch.float64),
    "freeze, autograd": frozen(unfused),
    "freeze, autograd, half": frozen(unfused, dtype=torch.bfloat16),
    "freeze, chunks": frozen(resnet, chunk=3, fused=False),
    "perturb": (one_step, resnet),
    "perturb, autograd": (one_step, unfused),
    "perturb, reference": (lambda model: one_step(model, backend="reference"), resnet),
    "mi-ue": a_descent("mi-ue"),
    "em": a_descent("em"),
}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", CALLS)
def test_the_callers_mode_changes_nothing(name, mode):
    call, make = CALLS[name]
    wanted, model = call(make()), make()
    with MODES[mode]():
        got = call(model)
    assert all(
        torch.equal(a, b) and a.dtype == b.dtype and not a.is_inference()
        for a, b in zip(got, wanted)
    )


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("make", [resnet, unfused])
def test_calls_may_be_made_in_different_modes(make, mode):
    """Frozen in one mode, run and refolded in another."""
    wanted, model = both_calls(freeze(make())), make()
    with MODES[mode]():
        net = freeze(model)
    net.refold()
    assert all(map(torch.equal, both_calls(net), wanted))
    images = IMAGES
    with MODES[mode]():
        net.refold()
        features = net.forward(images.clone())
    with MODES[mode]():
        image_grad = net.input_grad(torch.ones_like(features))
    assert torch.equal(features, wanted[0]) and torch.equal(image_grad, wanted[1])


@pytest.mark.parametrize("name", sorted(OPS))
def test_ops_keep_their_precision_under_autocast(name):
    op = OPS[name]
    dtype = torch.int8 if name == "projected_step_" else torch.float32
    for args in list(samples.make(name, "cpu", dtype))[:6]:
        outcome = []
        for mode in (torch.autocast("cpu", enabled=False), torch.autocast("cpu", torch.bfloat16)):
            given = [
                a.clone(memory_format=torch.preserve_format) if isinstance(a, torch.Tensor) else a
                for a in args
            ]
            with mode:
                found = getattr(torch.ops.miue_fast, name)(*given, "reference")
            found = [] if found is None else [found] if isinstance(found, torch.Tensor) else found
            outcome.append([*found, *(given[k] for k in op.mutates if given[k] is not None)])
        assert len(outcome[0]) and all(
            a.dtype == b.dtype and torch.equal(a.nan_to_num(), b.nan_to_num())
            for a, b in zip(*outcome)
        )


def test_a_loss_and_its_gradient_under_autocast():
    features = torch.rand(8, 5, requires_grad=True)
    plain = torch.autograd.grad(
        nt_xent(features, torch.arange(8) % 2, backend="reference"), features
    )[0]
    with torch.autocast("cpu", torch.bfloat16):
        mixed = torch.autograd.grad(
            nt_xent(features, torch.arange(8) % 2, backend="reference"), features
        )[0]
    assert torch.equal(plain, mixed)


@pytest.mark.parametrize("mode", [m for m in MODES if m != "float64 by default"])
@pytest.mark.parametrize(
    "options", [{}, {"fused": False}, {"objective": "em"}, {"dtype": "bfloat16"}], ids=str
)
def test_generate(options, mode):
    wanted = generate(SHAPES, **RUN, **options).delta
    with MODES[mode]():
        assert torch.equal(generate(SHAPES, **RUN, **options).delta, wanted)
        mode_is_back = (
            torch.is_autocast_enabled("cpu"),
            torch.is_grad_enabled(),
            torch.is_inference_mode_enabled(),
        )
    assert mode_is_back == ("autocast" in mode, "autocast" in mode, mode == "inference_mode")


@pytest.mark.parametrize("mode", [m for m in MODES if m != "float64 by default"])
@pytest.mark.parametrize("defence", ["none", "orthogonal-projection", "adversarial:4:steps=2"])
def test_evaluate(defence, mode):
    small = {
        "epochs": 1,
        "batch": 8,
        "lr": 0.05,
        "defence": defence,
        "progress": False,
        "eps": 8 / 255,
    }

    def curves():
        return [
            (run.train_curve, run.test_curve, run.robust)
            for runs in evaluate(SHAPES, SHAPES, TEST, **small).rows.values()
            for run in runs
        ]

    wanted = curves()
    with MODES[mode]():
        assert curves() == wanted


def test_data_and_models_that_were_made_in_inference_mode():
    with torch.inference_mode():
        images, labels, model = (IMAGES * 255).byte() / 1.0, LABELS.clone(), resnet()
        shapes = data.Dataset(
            SHAPES.images.clone(), SHAPES.labels.clone(), SHAPES.classes, SHAPES.names
        )
        other = unfused()
    plain = resnet()
    assert all(map(torch.equal, both_calls(freeze(model)), both_calls(freeze(plain))))
    assert images.is_inference() and torch.equal(
        freeze(plain, fused=False).forward(images / 255),
        freeze(plain, fused=False).forward(images.clone() / 255),
    )
    assert torch.equal(one_step(model)[0], one_step(plain)[0])
    assert (
        torch.equal(generate(shapes, **RUN).delta, generate(SHAPES, **RUN).delta)
        and labels.is_inference()
    )
    words = (
        "model: expected ordinary tensors as weights, "
        "got tensors that were made in torch.inference_mode"
    )
    for call in (lambda: freeze(other), lambda: generate(SHAPES, **RUN | {"model": model})):
        with pytest.raises(ValueError, match=words):
            call()
    with pytest.raises(
        ValueError,
        match=r"evaluate: victim: expected ordinary float32 weights, got .* \(inference mode\)",
    ):
        run_cell(
            SHAPES.images,
            SHAPES.labels,
            TEST.images,
            TEST.labels,
            2,
            victim=lambda n: model,
            epochs=1,
            lr=0.1,
        )


def test_networks_are_not_made_in_float64_by_accident():
    with float64_by_default():
        for call in (
            lambda: generate(SHAPES, **RUN),
            lambda: evaluate(SHAPES, SHAPES, TEST, eps=0.03),
            lambda: run_cell(SHAPES.images, SHAPES.labels, TEST.images, TEST.labels, 2),
        ):
            with pytest.raises(
                ValueError,
                match=r"default dtype: expected float32, got float64; call torch.set_default_dtype",
            ):
                call()


# ---- weights of other types


@pytest.mark.parametrize("compute", [None, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "weights", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str
)
@pytest.mark.parametrize("make", [resnet, unfused])
def test_weights_of_any_float_type_in_any_form(make, weights, compute):
    """As a model whose weights were widened to the type that computes."""
    model = make().to(weights)
    before = {name: (value.dtype, value.clone()) for name, value in model.state_dict().items()}
    same = make().to(weights).to(torch.float64 if compute == torch.float64 else torch.float32)
    wanted = both_calls(freeze(same, dtype=compute, fused=False))
    got = both_calls(freeze(model, dtype=compute, fused=False))
    assert all(torch.equal(a, b) and a.dtype == b.dtype for a, b in zip(got, wanted))
    assert all(
        value.dtype == before[name][0] and torch.equal(value, before[name][1])
        for name, value in model.state_dict().items()
    )
    if compute != torch.bfloat16:
        auto = both_calls(freeze(model, dtype=compute))
        assert all(torch.allclose(a, b, rtol=1e-3, atol=1e-5) for a, b in zip(auto, wanted))
    if compute is None:
        assert torch.equal(one_step(model, fused=False)[0], one_step(same, fused=False)[0])


def test_a_victim_of_float64_is_refused():
    with pytest.raises(
        ValueError, match="evaluate: victim: expected ordinary float32 weights, got float64"
    ):
        run_cell(
            SHAPES.images,
            SHAPES.labels,
            TEST.images,
            TEST.labels,
            2,
            victim=lambda n: resnet().double(),
            epochs=1,
            lr=0.1,
        )


# ---- gradients that nobody would get


@pytest.mark.parametrize("fused", [True, False])
def test_images_that_require_a_gradient_are_refused(fused):
    net = freeze(resnet(), fused=fused)
    wanted = IMAGES.clone().requires_grad_()
    with pytest.raises(
        ValueError,
        match=(
            r"images: expected no gradient required .detach them; "
            r"input_grad gives it., got a tensor that requires"
        ),
    ):
        net.forward(wanted)
    with torch.no_grad():
        features = net.forward(wanted)
    assert torch.equal(features, net.forward(IMAGES)) and not features.requires_grad
    with pytest.raises(ValueError, match="grad: expected no gradient required"):
        net.input_grad(F.relu(features.clone().requires_grad_()))
    with torch.no_grad():
        assert net.input_grad(features.clone().requires_grad_()).shape == IMAGES.shape
    net.forward(IMAGES)
    assert torch.equal(net.input_grad(features), (net.forward(IMAGES), net.input_grad(features))[1])


@pytest.mark.parametrize("mode", [m for m in MODES if m != "float64 by default"])
def test_the_analysis(mode):
    gen = torch.Generator().manual_seed(2)
    x, labels, model = torch.rand(40, 6, generator=gen), torch.arange(40) % 2, unfused()

    def found():
        layers = layer_features(model, SHAPES.images, ["avgpool"])
        return [
            layers["avgpool"].tolist(),
            mutual_information(x, x.flip(1), slices=4).to_dict(),
            linear_separability(x, labels).to_dict(),
            class_covariance_summary(x, labels).to_dict(),
        ]

    wanted = found()
    with MODES[mode]():
        assert found() == wanted
