"""One batch's poison step: equal to a hand-written loop, exact micro-batching, and an error for
everything degenerate.
"""

import logging

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from miue_fast import data, freeze, models, perturb
from miue_fast.reference.mi_ue_value_and_grad import formula
from miue_fast.reference.mi_ue_value_and_grad import mi_ue_value_and_grad as closed_form

EPS, ALPHA = 8 / 255, 0.7 / 255


class Tiny(nn.Module):
    """No BN folding, no channels-last: what the hand-written loops below see is what perturb
    runs.
    """

    def __init__(self, width=6):
        super().__init__()
        self.conv = nn.Conv2d(3, width, 3, 2, 1)
        self.norm = nn.BatchNorm2d(width)
        self.relu = nn.ReLU()
        self.drop = nn.Dropout(0.5)
        self.avgpool = nn.AdaptiveAvgPool2d(2)
        self.fc = nn.Linear(4 * width, 4)

    def forward(self, x):
        return self.fc(self.drop(self.avgpool(self.relu(self.norm(self.conv(x))))).flatten(1))


@pytest.fixture
def case():
    torch.manual_seed(1)
    model = Tiny()
    batch = data.shapes(24, seed=3, size=16, classes=4)
    model(batch.images / 255)  # running statistics
    return model, batch.images, batch.labels


def by_hand(
    model,
    images,
    labels,
    delta,
    flip,
    *,
    steps,
    zeta=0.1,
    denominator="all",
    normalize_dim=True,
    gradient=closed_form,
):
    """K steps in plain PyTorch, on delta [B, C, H, W]. Returns delta and the last input
    gradient.
    """
    model.eval()
    x = images.to(delta.dtype) / 255
    x = torch.where(flip[:, None, None, None], x.flip(3), x)
    features = nn.Sequential(model.conv, model.norm, model.relu, model.avgpool, nn.Flatten())
    for _ in range(steps):
        image = (x + delta).requires_grad_()
        f = features(image)
        _, g = gradient(f.detach(), labels, 0.1, zeta, denominator, normalize_dim)
        (grad,) = torch.autograd.grad(f, image, g)
        delta = (delta - ALPHA * grad.sign()).clamp(-EPS, EPS)
        delta = (x + delta).clamp(0, 1) - x
    return delta, grad


def autograd_gradient(features, *args):
    leaf = features.clone().requires_grad_()
    loss = formula(leaf, *args)
    return loss, torch.autograd.grad(loss, leaf)[0]


@pytest.mark.parametrize(
    "options", [{}, {"zeta": 0.0}, {"denominator": "negatives", "normalize_dim": False}]
)
def test_in_autograd_equal_to_a_loop_by_hand_bit_for_bit(case, options):
    model, images, labels = case
    flip = torch.arange(24) % 3 == 0
    start = torch.zeros(images.shape)
    got = perturb(
        model,
        images,
        labels,
        start,
        steps=5,
        alpha=ALPHA,
        eps=EPS,
        flip=flip,
        fused=False,
        backend="reference",
        **options,
    )
    expected, _ = by_hand(model, images, labels, start, flip, steps=5, **options)
    assert torch.equal(got, expected) and not start.any()
    assert got.abs().max() <= 5 * ALPHA * 1.0001 and got.abs().max() > 4 * ALPHA


def test_fused_and_autograd_give_the_same_signs(case):
    model, images, labels = case
    run = {"steps": 5, "alpha": ALPHA, "eps": EPS}
    fused, plain = (
        perturb(model, images, labels, torch.zeros(images.shape), fused=on, **run)
        for on in (True, False)
    )
    assert (fused.sign() == plain.sign()).double().mean() >= 0.999


@pytest.mark.parametrize("fused", [True, False])
def test_what_freeze_returned_serves_many_batches(case, fused):
    model, images, labels = case
    net = freeze(model.eval(), fused=fused, channels_last=False)
    for zero in torch.zeros(2, *images.shape):
        got = perturb(net, images, labels, zero, steps=2, alpha=ALPHA)
        assert (
            torch.equal(
                got, perturb(model, images, labels, zero, steps=2, alpha=ALPHA, fused=fused)
            )
            and got.any()
        )
    with pytest.raises(
        ValueError, match=r"model: expected an nn.Module, or what `freeze` returned, got int"
    ):
        perturb(3, images, labels, zero, alpha=ALPHA)


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_signs_are_those_of_float64_autograd(case, backend):
    """A sign may differ only where the gradient is smaller than its float32 error."""
    model, images, labels = case
    flip = torch.arange(24) % 2 == 0
    start = torch.zeros(images.shape)
    got = perturb(
        model, images, labels, start, steps=1, alpha=ALPHA, eps=EPS, flip=flip, backend=backend
    )
    _, single = by_hand(model, images, labels, start, flip, steps=1)
    model.double()
    expected, truth = by_hand(
        model, images, labels, start.double(), flip, steps=1, gradient=autograd_gradient
    )
    clear = truth.abs() > 4 * (single.double() - truth).abs().max()
    assert clear.float().mean() > 0.9
    assert torch.equal(got.sign()[clear], expected.float().sign()[clear])


def test_delta_is_not_flipped(case):
    """All images mirrored, with mirrored weights: the same delta would need mirroring, so it must
    differ from the unflipped run.
    """
    model, images, labels = case
    run = {"steps": 2, "alpha": ALPHA, "eps": EPS, "backend": "reference"}
    flipped = perturb(
        model,
        images,
        labels,
        torch.zeros(images.shape),
        flip=torch.ones(24, dtype=torch.bool),
        **run,
    )
    mirrored = perturb(model, images.flip(3).contiguous(), labels, torch.zeros(images.shape), **run)
    assert torch.equal(flipped, mirrored)


@pytest.mark.parametrize("chunk", [2, 5, 8, 23, 24, 100])
@pytest.mark.parametrize("network", ["tiny", "small_resnet", "channels_last", "fused"])
def test_micro_batches_are_bitwise_the_full_batch(case, chunk, network):
    model, images, labels = case
    last = network == "channels_last"
    if network != "tiny":
        model = models.build("small_resnet", 4)
        model(images / 255)
    run = {
        "steps": 3,
        "alpha": ALPHA,
        "eps": EPS,
        "channels_last": last,
        "fused": network == "fused",
    }
    full = perturb(model, images, labels, torch.zeros(images.shape), **run)
    sizes = []
    if network != "fused":
        model.register_forward_hook(lambda module, inputs, output: sizes.append(len(output)))
    part = perturb(model, images, labels, torch.zeros(images.shape), network_chunk=chunk, **run)
    assert torch.equal(full, part) and full.any()
    assert network == "fused" or (max(sizes) <= max(chunk + 1, 3) and min(sizes) > 1)


def test_the_objective_is_that_of_the_whole_batch(case):
    """Two halves on their own give another delta than the whole batch in two launches."""
    model, images, labels = case
    run = {"steps": 1, "alpha": ALPHA, "eps": EPS}
    whole = perturb(model, images, labels, torch.zeros(images.shape), network_chunk=12, **run)
    halves = [
        perturb(model, images[s], labels[s], torch.zeros(12, 3, 16, 16), **run)
        for s in (slice(0, 12), slice(12, 24))
    ]
    assert not torch.equal(whole, torch.cat(halves))


class Limited(Tiny):
    """A network that runs out of memory above `limit` images, or above `with_graph` when a graph is
    kept.
    """

    limit, with_graph = 10**9, 10**9

    def forward(self, x):
        if len(x) > (self.with_graph if torch.is_grad_enabled() else self.limit):
            raise torch.OutOfMemoryError("CUDA out of memory (simulated)")
        return super().forward(x)


@pytest.mark.parametrize("limit, with_graph", [(13, 13), (20, 6), (3, 3)])
def test_out_of_memory_halves_the_network_chunk_only(case, limit, with_graph, caplog):
    model, images, labels = case
    run = {"steps": 3, "alpha": ALPHA, "eps": EPS}
    full = perturb(model, images, labels, torch.zeros(images.shape), **run)
    small = Limited()
    small.load_state_dict(model.state_dict())
    small.limit, small.with_graph = limit, with_graph
    with caplog.at_level(logging.WARNING, "miue_fast"):
        part = perturb(small, images, labels, torch.zeros(images.shape), **run)
    assert torch.equal(full, part)
    assert (
        all("network_chunk is now" in r.message for r in caplog.records if "memory" in r.message)
        and "memory" in caplog.text
    )


class Refusing(torch.autograd.Function):
    """The identity; its gradient runs out of memory above `limit` images."""

    @staticmethod
    def forward(ctx, x, limit):
        ctx.limit = limit
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        if len(grad) > ctx.limit:
            raise torch.OutOfMemoryError("CUDA out of memory (simulated)")
        return grad, None


class LimitedBackward(Tiny):
    limit = 10**9

    def forward(self, x):
        return super().forward(Refusing.apply(x, self.limit) if torch.is_grad_enabled() else x)


@pytest.mark.parametrize("limit", [13, 3])
def test_out_of_memory_in_the_backward_of_autograd(case, limit, caplog):
    """The graph of the whole batch is given up, and no row is stepped twice."""
    model, images, labels = case
    run = {"steps": 3, "alpha": ALPHA, "eps": EPS, "fused": False}
    full = perturb(model, images, labels, torch.zeros(images.shape), **run)
    small = LimitedBackward()
    small.load_state_dict(model.state_dict())
    small.limit = limit
    with caplog.at_level(logging.WARNING, "miue_fast"):
        part = perturb(small, images, labels, torch.zeros(images.shape), **run)
    assert torch.equal(full, part) and "network_chunk is now" in caplog.text


@pytest.mark.parametrize("chunk, limit", [(24, 13), (24, 7), (11, 6)])
def test_out_of_memory_in_the_backward_of_a_frozen_network(case, chunk, limit, monkeypatch, caplog):
    """The chunk is computed anew in smaller launches, from rows that no step has changed yet."""
    model, images, labels = case
    net = freeze(model.eval())
    net.chunk.size, net.chunk.least = chunk, 2
    run = {"steps": 3, "alpha": ALPHA, "eps": EPS}
    full = perturb(net, images, labels, torch.zeros(images.shape), **run)
    real = net._backward

    def backward(grad, *rest):
        if len(grad) > limit:
            raise torch.OutOfMemoryError("CUDA out of memory (simulated)")
        return real(grad, *rest)

    monkeypatch.setattr(net, "_backward", backward)
    with caplog.at_level(logging.WARNING, "miue_fast"):
        part = perturb(net, images, labels, torch.zeros(images.shape), **run)
    assert (
        torch.equal(full, part)
        and "network_chunk is now" in caplog.text
        and net.chunk.size <= limit
    )


def test_out_of_memory_at_the_end_is_one_clear_error(case):
    from miue_fast import BackendError

    _, images, labels = case
    model = Limited()
    model.limit = model.with_graph = 1
    with pytest.raises(BackendError, match="out of memory with"):
        perturb(model, images, labels, torch.zeros(images.shape), alpha=ALPHA)


@pytest.mark.parametrize("fails", [False, True])
def test_mode_and_requires_grad_come_back(case, fails):
    model, images, labels = case
    model.train()
    model.norm.eval()
    model.fc.weight.requires_grad_(False)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    if fails:
        with torch.no_grad():
            model.conv.weight[0, 0, 0, 0] = before["conv.weight"][0, 0, 0, 0] = torch.nan
        with pytest.raises(
            ValueError, match=r"perturb: loss \(NaN or Inf features\): expected finite numbers"
        ):
            perturb(model, images, labels, torch.zeros(images.shape), alpha=ALPHA)
    else:
        perturb(model, images, labels, torch.zeros(images.shape), alpha=ALPHA)
    assert model.training and model.drop.training and not model.norm.training
    assert [n for n, p in model.named_parameters() if not p.requires_grad] == ["fc.weight"]
    assert all(
        torch.equal(value, before[name]) or value.isnan().any()
        for name, value in model.state_dict().items()
    )
    assert not model.avgpool._forward_hooks and all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("store", [torch.float16, torch.int8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_stores_and_compute_types(case, store, dtype):
    model, images, labels = case
    delta = perturb(
        model,
        images,
        labels,
        torch.zeros(images.shape, dtype=store),
        steps=4,
        alpha=ALPHA,
        eps=EPS,
        dtype=dtype,
    )
    full = perturb(model, images, labels, torch.zeros(images.shape), steps=4, alpha=ALPHA, eps=EPS)
    assert delta.dtype == store
    value = delta.float() * (EPS / 127 if store == torch.int8 else 1)
    assert (
        value.sign() == full.sign()
    ).float().mean() > 0.75  # the same descent, in fewer bits: chance is 0.5
    assert value.abs().max() <= EPS * 1.001


class InPlace(Tiny):
    def forward(self, x):
        return self.fc(self.avgpool(F.relu(self.norm(self.conv(x)), inplace=True)).flatten(1))


BAD = {
    "one image": (
        lambda a: {
            **a,
            "images": a["images"][:1],
            "labels": a["labels"][:1],
            "delta": a["delta"][:1],
        },
        "images: expected two",
    ),
    "one class": (
        lambda a: {**a, "labels": torch.zeros(24, dtype=torch.int64)},
        "labels: expected two or more classes",
    ),
    "label length": (
        lambda a: {**a, "labels": a["labels"][:-1]},
        "labels: expected an integer tensor [24]",
    ),
    "float labels": (
        lambda a: {**a, "labels": a["labels"].float()},
        "labels: expected an integer tensor",
    ),
    "delta shape": (
        lambda a: {**a, "delta": a["delta"][:, :, 1:]},
        "delta: expected shape [24, 3, 16, 16]",
    ),
    "delta dtype": (
        lambda a: {**a, "delta": a["delta"].double()},
        "delta: expected float32, float16 or int8",
    ),
    "images dtype": (
        lambda a: {**a, "images": a["images"].double()},
        "images: expected a float32 or uint8 tensor",
    ),
    "NaN images": (
        lambda a: {**a, "images": torch.full((24, 3, 16, 16), torch.nan)},
        "images: expected numbers from 0 to 1",
    ),
    "images 0 to 255": (
        lambda a: {**a, "images": a["images"].float()},
        "images: expected numbers from 0 to 1",
    ),
    "Inf delta": (
        lambda a: {**a, "delta": torch.full((24, 3, 16, 16), torch.inf)},
        "delta: expected finite numbers",
    ),
    "eps": (lambda a: {**a, "eps": -1.0}, "eps: expected a number in (0, 1]"),
    "eps of 8": (lambda a: {**a, "eps": 8}, "8/255, not 8"),
    "alpha": (lambda a: {**a, "alpha": -0.1}, "alpha: expected a number from 0 to 1"),
    "steps": (lambda a: {**a, "steps": 0}, "steps: expected a whole number >= 1"),
    "temperature": (lambda a: {**a, "temperature": 0.0}, "temperature: expected"),
    "denominator": (
        lambda a: {**a, "denominator": "some"},
        "denominator: expected 'all' or 'negatives'",
    ),
    "flip": (
        lambda a: {**a, "flip": torch.ones(3, dtype=torch.bool)},
        "flip: expected a bool tensor [24]",
    ),
    "chunk": (lambda a: {**a, "network_chunk": 1}, "network_chunk: expected a whole number >= 2"),
    "dtype": (lambda a: {**a, "dtype": torch.float64}, "dtype: expected one of float32"),
    "backend": (lambda a: {**a, "backend": "tpu"}, "backend: expected one of auto"),
    "feature": (
        lambda a: {**a, "feature": "pool"},
        "feature: expected a layer of the model (conv, norm, relu, drop, avgpool, fc)",
    ),
    "in place": (
        lambda a: {**a, "model": InPlace(), "feature": "norm"},
        "not changed in place, got 'norm'",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_clear_line(case, name):
    model, images, labels = case
    change, part = BAD[name]
    arguments = change(
        {
            "model": model,
            "images": images,
            "labels": labels,
            "delta": torch.zeros(images.shape),
            "alpha": ALPHA,
        }
    )
    positional = [arguments.pop(key) for key in ("model", "images", "labels", "delta")]
    with pytest.raises(ValueError) as error:
        perturb(*positional, **arguments)
    assert part in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_a_loop_without_gradients_gets_the_same_step(mode):
    torch.manual_seed(0)
    net = torch.nn.Sequential(
        torch.nn.Conv2d(3, 4, 3), torch.nn.GELU(), torch.nn.AdaptiveAvgPool2d(1)
    )  # GELU: not fused
    images, labels = torch.randint(256, (8, 3, 12, 12), dtype=torch.uint8), torch.arange(8) % 2
    step = dict(alpha=1 / 255, steps=2, feature="2")
    wanted = perturb(net, images, labels, torch.zeros(images.shape), **step)
    with mode():
        got = perturb(net, images.clone(), labels, torch.zeros(images.shape), **step)
    assert wanted.any() and torch.equal(got, wanted)


@pytest.mark.parametrize("feature", ["avgpool", "_orig_mod.avgpool"])
def test_a_compiled_model_is_its_layers(feature):
    torch.manual_seed(0)
    net = models.build("small_resnet", 3, width=4)
    images, labels = torch.randint(256, (8, 3, 12, 12), dtype=torch.uint8), torch.arange(8) % 2
    step = dict(alpha=1 / 255, steps=2)
    wanted = perturb(net, images, labels, torch.zeros(images.shape), **step)
    compiled = torch.compile(net)  # wrapped; compiled only when it is called
    assert torch.equal(
        perturb(compiled, images, labels, torch.zeros(images.shape), feature=feature, **step),
        wanted,
    )
    assert net.training and compiled.training
