"""Random numbers of a run: those of PyTorch's global generator with the same seed, and that
generator is not touched.
"""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from miue_fast import data, generate, models
from miue_fast.support.draws import Draws

X = torch.rand(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))
DRAWN = {
    "small_resnet": lambda: list(models.build("small_resnet", 4).parameters()),
    "vit": lambda: list(models.build("vit", 4, width=12).parameters()),
    "dropout": lambda: [
        F.dropout(X, 0.3),
        F.dropout2d(X, 0.3),
        F.alpha_dropout(X, 0.3),
        F.feature_alpha_dropout(X, 0.3),
    ],
    "uniform and normal": lambda: [
        torch.rand(3),
        torch.rand_like(X),
        torch.randn(4),
        torch.randn_like(X),
        torch.rand(3).double(),
    ],
    "whole numbers": lambda: [
        torch.randint(5, (9,)),
        torch.randint(2, 5, (9,)),
        torch.randperm(20),
        torch.randint_like(X, 5),
    ],
    "distributions": lambda: [
        torch.bernoulli(X),
        torch.multinomial(X[0, 0, 0], 3),
        torch.normal(0.0, 1.0, (3,)),
        torch.poisson(X * 4),
        torch.empty(3).exponential_(),
        torch.distributions.Beta(1.0, 1.0).sample(),
        F.gumbel_softmax(X),
    ],
    "layers": lambda: [
        F.rrelu(X, training=True),
        F.fractional_max_pool2d(X, 2, output_size=4),
        nn.LSTM(8, 4, 2, dropout=0.5)(X[0])[0],
        F.scaled_dot_product_attention(X, X, X, dropout_p=0.5),
    ],
}


@pytest.mark.parametrize("name", DRAWN)
def test_the_same_numbers_from_another_generator(name):
    torch.manual_seed(3)
    wanted, after = DRAWN[name](), torch.get_rng_state()
    torch.manual_seed(99)
    before, draws = torch.get_rng_state(), Draws("test", 3)
    with draws:
        got = DRAWN[name]()
    assert all(torch.equal(a, b) for a, b in zip(got, wanted)) and draws.drew
    assert torch.equal(torch.get_rng_state(), before) and torch.equal(
        draws.generator("cpu").get_state(), after
    )


def test_what_draws_nothing_and_what_has_a_generator_are_left_alone():
    draws, own = Draws("test", 3), torch.Generator().manual_seed(5)
    wanted = torch.rand(4, generator=torch.Generator().manual_seed(5))
    with draws:
        F.scaled_dot_product_attention(X, X, X), F.dropout(X, 0.5, training=False)
        assert torch.equal(torch.rand(4, generator=own), wanted)
    assert not draws.drew


def test_dropout_of_a_gpu_has_no_generator_and_is_made_of_what_has():
    x = X.clone().requires_grad_()
    with Draws("test", 3):
        y, kept = torch.ops.aten.native_dropout(x, 0.25, True)
    assert 0.6 < kept.float().mean() < 0.9 and torch.equal(y, torch.where(kept, x * (1 / 0.75), 0))
    (image_grad,) = torch.autograd.grad(y.sum(), x)
    assert torch.equal(image_grad, kept * (1 / 0.75))
    with Draws("test", 3):
        assert not torch.ops.aten.native_dropout(x, 1.0, True)[0].any() and torch.equal(
            torch.ops.aten.native_dropout(x, 0.5, False)[0], x
        )


def test_an_operation_without_a_generator_is_refused():
    out = torch.empty_like(X), torch.empty_like(X, dtype=torch.bool)
    with (
        Draws("generate", 3),
        pytest.raises(
            ValueError,
            match="generate: model: expected random operations that take a generator, got aten",
        ),
    ):
        torch.ops.aten.native_dropout.out(X, 0.5, True, out0=out[0], out1=out[1])


SHAPES = data.shapes(24, seed=0, size=16, classes=2, difficulty=0)
RUN = {"epochs": 2, "steps": 1, "batch": 24, "train_batch": 8, "progress": False, "lr": 0.05}


class Noisy(nn.Module):
    """Noise in every mode, or dropout that activation checkpointing computes twice."""

    def __init__(self, twice=False):
        super().__init__()
        self.twice, self.conv, self.avgpool, self.fc = (
            twice,
            nn.Conv2d(3, 4, 3),
            nn.AdaptiveAvgPool2d(1),
            nn.Linear(4, 2),
        )

    def forward(self, x):
        x = self.conv(x)
        if self.twice:
            x = checkpoint(lambda y: F.dropout(y, 0.5, self.training), x, use_reentrant=False)
        else:
            x = torch.sigmoid(x) + 0.1 * torch.randn_like(x)
        return self.fc(self.avgpool(x).flatten(1))


def test_a_network_that_is_noisy_in_eval_mode_too_is_repeatable():
    torch.manual_seed(1)
    state, found = Noisy().state_dict(), []
    for seed in (1, 1, 2):
        model = Noisy()
        model.load_state_dict(state)
        torch.rand(5)  # nobody's business
        before = torch.get_rng_state()
        found.append(generate(SHAPES, model=model, seed=seed, **RUN).delta)
        assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(found[0], found[1]) and not torch.equal(found[0], found[2])


def test_dropout_that_is_computed_twice_is_refused():
    """The second time it would drop other values, and the gradient would be of another network."""
    with pytest.raises(ValueError, match="model: expected no random numbers in the backward pass"):
        generate(SHAPES, model=Noisy(twice=True), **RUN)


def test_a_callable_may_seed_its_network_itself():
    def make(classes):
        torch.manual_seed(12)
        return Noisy()

    torch.manual_seed(77)
    before = torch.get_rng_state()
    first, second = (
        generate(SHAPES, model=make, seed=seed, **RUN | {"epochs": 1}).history[0]["train_loss"]
        for seed in (1, 1)
    )
    assert first == second and torch.equal(torch.get_rng_state(), before)
