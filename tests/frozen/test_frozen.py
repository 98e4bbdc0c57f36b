"""FrozenNet: features and input gradients are those of float64 autograd; what it cannot fuse falls
back with the same results.
"""

import logging

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

from miue_fast import freeze, generate, models, perturb
from miue_fast.dispatch.registry import OPS
from miue_fast.frozen import layers
from miue_fast.frozen.convolution import Conv
from miue_fast.frozen.plan import plan
from miue_fast.frozen.trace import NotLowered
from miue_fast.generation import Options
from miue_fast.models.resnet import ResNet
from miue_fast.ops import projected_step_
from miue_fast.ops.geometry import quantised


def lively(model, seed=0):
    """Batch norms as after some training: means, variances, weights and signs that matter."""
    gen = torch.Generator().manual_seed(seed)
    for m in model.modules():
        if isinstance(m, (nn.BatchNorm2d, nn.BatchNorm1d)):
            m.running_mean.copy_(torch.randn(m.num_features, generator=gen) / 2)
            m.running_var.copy_(torch.rand(m.num_features, generator=gen) + 0.5)
            if m.affine:
                with torch.no_grad():
                    m.weight.copy_(torch.randn(m.num_features, generator=gen) + 0.5)
                    m.bias.copy_(torch.randn(m.num_features, generator=gen) / 2)
    return model.eval()


def by_autograd(model, feature, images, seed=1):
    """(features, grad, image_grad) in float64 through PyTorch's own modules."""
    seen = []
    layer = dict(model.named_modules())[feature]
    handle = layer.register_forward_hook(lambda m, i, o: seen.append(o))
    x = images.double().clone().requires_grad_()
    model.double()(x)
    handle.remove()
    f = seen[0].flatten(1)
    d = torch.randn(f.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return f.detach(), d, torch.autograd.grad(f, x, d)[0]


def check(model, feature, images, chunk=None):
    """Exact in float64 up to rounding; in float32 as good as float32 autograd."""
    f, d, g = by_autograd(model, feature, images)
    for dtype, eps in ((torch.float64, 2.0**-52), (torch.float32, 2.0**-23)):
        model.to(dtype)
        net, plain = (
            freeze(model, feature, dtype=dtype, chunk=chunk),
            freeze(model, feature, dtype=dtype, fused=False),
        )
        assert net.fused and not plain.fused
        got, usual = net.forward(images.to(dtype)), plain.forward(images.to(dtype))
        image_grad, usual_grad = net.input_grad(d.to(dtype)), plain.input_grad(d.to(dtype))
        assert (
            image_grad.shape == images.shape
            and got.shape == f.shape
            and got.dtype == image_grad.dtype == dtype
        )
        # a fold changes the order of roundings: as many again as autograd's own error, and those of
        # the folded weights
        for a, b, truth in ((got, usual, f), (image_grad, usual_grad, g)):
            limit = 4 * (b.double() - truth).abs().max() + 64 * eps * truth.abs().max()
            if dtype == torch.float64 or truth is f:
                assert (a.double() - truth).abs().max() <= limit
        # a value within rounding of zero may pass one ReLU and not the other: few do
        assert (image_grad.sign() == g.sign()).double().mean() >= 0.999
    return net


class Bottleneck(nn.Module):
    def __init__(self, inner, width, stride=1):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(inner, width, 1, bias=False), nn.BatchNorm2d(width)
        self.conv2, self.bn2 = (
            nn.Conv2d(width, width, 3, stride, 1, bias=False),
            nn.BatchNorm2d(width),
        )
        self.conv3, self.bn3 = nn.Conv2d(width, 4 * width, 1, bias=False), nn.BatchNorm2d(4 * width)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = None
        if stride != 1 or inner != 4 * width:
            self.downsample = nn.Sequential(
                nn.Conv2d(inner, 4 * width, 1, stride, bias=False), nn.BatchNorm2d(4 * width)
            )

    def forward(self, x):
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.relu(self.bn2(self.conv2(out)))
        out = self.bn3(self.conv3(out))
        identity = x if self.downsample is None else self.downsample(x)
        out += identity
        return self.relu(out)


class ImageNetStem(nn.Module):
    """A ResNet-50 in small: 7x7 stride-2 stem, max-pool, bottlenecks, adaptive pool."""

    def __init__(self):
        super().__init__()
        self.conv1, self.bn1, self.relu = (
            nn.Conv2d(3, 8, 7, 2, 3, bias=False),
            nn.BatchNorm2d(8),
            nn.ReLU(inplace=True),
        )
        self.maxpool = nn.MaxPool2d(3, 2, 1)
        self.layers = nn.Sequential(Bottleneck(8, 4), Bottleneck(16, 4), Bottleneck(16, 8, 2))
        self.avgpool, self.fc = nn.AdaptiveAvgPool2d((1, 1)), nn.Linear(32, 5)

    def forward(self, x):
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        return self.fc(torch.flatten(self.avgpool(self.layers(x)), 1))


class VGG(nn.Module):
    """Convolutions with bias, max-pools, and a classifier of linear layers; the features are one of
    its hidden layers.
    """

    def __init__(self):
        super().__init__()
        body, inner = [], 3
        for width in (8, "pool", 16, "pool", 12, 12, "pool"):
            if width == "pool":
                body.append(nn.MaxPool2d(2, 2))
            else:
                body += [
                    nn.Conv2d(inner, width, 3, padding=1),
                    nn.BatchNorm2d(width),
                    nn.ReLU(True),
                ]
                inner = width
        self.body = nn.Sequential(*body)
        self.head = nn.Sequential(
            nn.Linear(12 * 4, 20), nn.BatchNorm1d(20), nn.ReLU(True), nn.Dropout(), nn.Linear(20, 7)
        )

    def forward(self, x):
        x = self.body(x)
        return self.head(x.view(x.size(0), -1))


class PreActivation(nn.Module):
    def __init__(self, inner, outer, stride):
        super().__init__()
        self.bn1, self.conv1 = (
            nn.BatchNorm2d(inner),
            nn.Conv2d(inner, outer, 3, stride, 1, bias=False),
        )
        self.bn2, self.conv2 = nn.BatchNorm2d(outer), nn.Conv2d(outer, outer, 3, 1, 1, bias=False)
        self.shortcut = (
            nn.Conv2d(inner, outer, 1, stride, bias=False)
            if stride != 1 or inner != outer
            else None
        )

    def forward(self, x):
        out = F.relu(self.bn1(x))
        shortcut = x if self.shortcut is None else self.shortcut(out)
        out = self.conv1(out)
        out = self.conv2(F.dropout(F.relu(self.bn2(out)), 0.3, training=self.training))
        return torch.add(out, shortcut)


class WideResNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 6, 3, 1, 1, bias=False)
        self.blocks = nn.Sequential(
            PreActivation(6, 12, 1), PreActivation(12, 12, 1), PreActivation(12, 20, 2)
        )
        self.bn, self.relu, self.fc = nn.BatchNorm2d(20), nn.ReLU(), nn.Linear(20, 4)

    def forward(self, x):
        out = self.relu(self.bn(self.blocks(self.conv(x))))
        return self.fc(F.avg_pool2d(out, 8).view(-1, 20))


class DenseNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 6, 3, 1, 1, bias=False)
        self.norms = nn.ModuleList(nn.BatchNorm2d(6 + 4 * i) for i in range(3))
        self.convs = nn.ModuleList(nn.Conv2d(6 + 4 * i, 4, 3, 1, 1, bias=False) for i in range(3))
        self.norm, self.squeeze, self.pool = (
            nn.BatchNorm2d(18),
            nn.Conv2d(18, 9, 1, bias=False),
            nn.AvgPool2d(2),
        )
        self.last, self.fc = nn.BatchNorm2d(9), nn.Linear(9, 4)

    def forward(self, x):
        x = self.conv(x)
        for norm, conv in zip(self.norms, self.convs):
            x = torch.cat([conv(F.relu(norm(x))), x], 1)
        x = self.pool(self.squeeze(F.relu(self.norm(x))))
        return self.fc(F.relu(self.last(x)).mean((2, 3)))


class Odd(nn.Module):
    """What else a forward may hold: constants per channel, a shared value, groups, dilation, x + x,
    a ReLU read twice, no pooling.
    """

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 8, 3, 1, 2, dilation=2), nn.Conv2d(8, 8, 3, 1, 1, groups=4)
        self.c, self.norm = nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8, affine=False)
        self.pool = nn.AdaptiveAvgPool2d(3)
        self.register_buffer("scale", torch.linspace(-1, 2, 8)[:, None, None])

    def forward(self, x):
        x = F.relu(self.a(1 - x / 2))
        y = F.relu(self.b(x)) * self.scale.view(1, 8, 1, 1)
        y = y + y
        y.add_(x).relu_()
        z = self.norm(self.c(y)) + self.c(x)
        z += 0.5
        return self.pool(F.relu(z)) + y.mean([2, 3], keepdim=True)


NETWORKS = {
    "small_resnet": (lambda: models.build("small_resnet", 4), "avgpool", 16),
    "resnet18": (lambda: models.build("resnet18", 4, width=8), "avgpool", 16),
    "resnet18, inner layer": (lambda: models.build("resnet18", 4, width=8), "layers.3", 16),
    "bottleneck, ImageNet stem": (ImageNetStem, "avgpool", 40),
    "VGG": (VGG, "head.2", 16),
    "VGG, logits": (VGG, "head", 16),
    "pre-activation WRN": (WideResNet, "relu", 16),
    "pre-activation WRN, logits": (WideResNet, "fc", 16),
    "DenseNet": (DenseNet, "last", 12),
    "DenseNet, logits": (DenseNet, "fc", 12),
}


def images_of(size, count=6, seed=2):
    return torch.rand(
        count, 3, size, size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64
    )


def built(name, seed=0):
    torch.manual_seed(seed)
    make, feature, size = NETWORKS[name]
    return lively(make()), feature, size


@pytest.mark.parametrize("name", NETWORKS)
def test_equal_to_autograd(name):
    model, feature, size = built(name)
    net = check(model, feature, images_of(size))
    assert (
        not any(isinstance(layer, layers.Affine) for layer in net.plan.layers)
        or "Dense" in name
        or "WRN" in name
    )


def test_odd_operations_equal_autograd():
    torch.manual_seed(3)

    class Wrapped(nn.Module):
        def __init__(self):
            super().__init__()
            self.odd = Odd()

        def forward(self, x):
            return self.odd(x)

    net = check(lively(Wrapped()), "odd", images_of(9))
    assert net.std is not None  # 1 - x / 2 became the input's normalisation


class Spread(nn.Module):
    """One channel that constants make several of: at the start, or in the middle."""

    def __init__(self, where):
        super().__init__()
        self.where, self.inner = where, nn.Conv2d(2, 1, 3, padding=1)
        self.conv, self.avgpool = nn.Conv2d(3, 8, 3, padding=1), nn.AdaptiveAvgPool2d(2)
        self.fc = nn.Linear(32, 2)
        self.register_buffer("mean", torch.tensor([0.1, 0.3, 0.5])[:, None, None])

    def forward(self, x):
        if self.where == "middle":
            x = F.relu(self.inner(x))
        return self.fc(self.avgpool(F.relu(self.conv((x - self.mean) / 0.25))).flatten(1))


@pytest.mark.parametrize("where, channels", [("start", 1), ("middle", 2)])
def test_one_channel_becomes_several(where, channels, caplog):
    torch.manual_seed(5)
    model = Spread(where).eval()
    images = torch.rand(8, channels, 9, 9)
    if where == "middle":
        check(model, "avgpool", images.double())
        return
    net = freeze(model, channels=1)
    assert (
        not net.fused
        and net.reason == "a normalisation that spreads one channel over 3"
        and net.reason in caplog.text
    )
    labels, delta = torch.arange(8) % 2, torch.zeros_like(images)
    moved = [
        perturb(model, images, labels, delta, steps=2, alpha=1 / 255, fused=fused)
        for fused in (True, False)
    ]
    assert torch.equal(*moved) and moved[0].abs().max() > 0
    made = generate(
        (images.mul(255).byte(), labels),
        model=model.train(),
        preset="paper",
        epochs=1,
        steps=1,
        progress=False,
    )
    assert made.delta.shape == images.shape


@st.composite
def networks(draw):
    """A random ResNet-like module: depth, widths, kernels, strides, pools, residuals, with or
    without batch norms and biases.
    """
    torch.manual_seed(draw(st.integers(0, 2**31)))
    kinds = draw(
        st.lists(
            st.sampled_from(["conv", "block", "project", "pre", "max", "avg", "relu"]),
            min_size=1,
            max_size=6,
        )
    )
    width = draw(st.integers(1, 9))
    parts = [
        (
            draw(st.integers(1, 3)),
            draw(st.sampled_from([1, 3, 5])),
            draw(st.integers(1, 2)),
            draw(st.booleans()),
        )
        for _ in kinds
    ]
    return Random(kinds, width, parts, normalize=draw(st.booleans()))


class Random(nn.Module):
    def __init__(self, kinds, width, parts, normalize):
        super().__init__()
        self.kinds, self.normalize, inner = kinds, normalize, 3
        self.parts = nn.ModuleList()
        for kind, (grow, kernel, stride, norm) in zip(kinds, parts):
            outer = width * grow if kind in ("conv", "project") else inner
            stride = stride if kind in ("conv", "project") else 1
            made = nn.ModuleDict()
            if kind in ("conv", "block", "project", "pre"):
                made["conv"] = nn.Conv2d(inner, outer, kernel, stride, kernel // 2, bias=not norm)
                made["norm"] = (
                    nn.BatchNorm2d(inner if kind == "pre" else outer) if norm else nn.Identity()
                )
            if kind in ("block", "project"):
                made["second"] = nn.Conv2d(outer, outer, 3, 1, 1)
            if kind == "project":
                made["short"] = nn.Sequential(
                    nn.Conv2d(inner, outer, 1, stride), nn.BatchNorm2d(outer)
                )
            if kind in ("max", "avg"):
                made["pool"] = (
                    nn.MaxPool2d(kernel, 1, kernel // 2)
                    if kind == "max"
                    else nn.AvgPool2d(kernel, 1, kernel // 2)
                )
            self.parts.append(made)
            inner = outer
        self.end = nn.AdaptiveAvgPool2d(2)

    def forward(self, x):
        if self.normalize:
            x = (x - 0.4) / torch.tensor([0.2, 0.3, 0.25], dtype=torch.float64)[:, None, None]
        for kind, part in zip(self.kinds, self.parts):
            if kind == "conv":
                x = F.relu(part["norm"](part["conv"](x)))
            elif kind == "pre":
                x = x + part["conv"](torch.relu(part["norm"](x)))
            elif kind in ("block", "project"):
                y = part["second"](F.relu(part["norm"](part["conv"](x)), inplace=True))
                x = (y + (part["short"](x) if kind == "project" else x)).relu()
            else:
                x = part["pool"](x) if kind != "relu" else F.relu(x)
        return self.end(x)


@settings(
    max_examples=150,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=list(HealthCheck),
)
@given(networks(), st.integers(2, 5), st.integers(5, 12), st.integers(2, 6))
def test_random_networks(model, count, size, chunk):
    lively(model)
    images = images_of(size, count)
    f, d, g = by_autograd(model, "end", images)
    net = freeze(model, "end", dtype=torch.float64, chunk=chunk)
    assert net.fused
    got = net.forward(images)
    image_grad = net.input_grad(d)
    for a, truth in ((got, f), (image_grad, g)):
        assert (a - truth).abs().max() <= 2.0**-52 * 4096 * truth.abs().max() * len(net.plan.layers)


# ---- what falls back


class Sigmoid(ResNet):
    def forward(self, x):
        return super().forward(torch.sigmoid(x))


class Branching(nn.Module):
    """Python control flow on the data."""

    def __init__(self):
        super().__init__()
        self.conv, self.avgpool = nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1)

    def forward(self, x):
        x = self.conv(x)
        return self.avgpool(x.relu() if x.sum() > 0 else x)


class InstanceNorm(Branching):
    def __init__(self):
        super().__init__()
        self.norm = nn.InstanceNorm2d(4)

    def forward(self, x):
        return self.avgpool(self.norm(self.conv(x)))


class Hooked(Branching):
    def __init__(self):
        super().__init__()
        self.conv.register_forward_hook(lambda m, i, o: o * 2)

    def forward(self, x):
        return self.avgpool(F.relu(self.conv(x)))


class Product(Branching):
    def forward(self, x):
        x = self.conv(x)
        return self.avgpool(x * x.relu())


class Same(Branching):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding="same")

    def forward(self, x):
        return self.avgpool(F.relu(self.conv(x)))


class Doctored(Branching):
    """A layer whose class no longer says what it does."""

    def __init__(self):
        super().__init__()
        self.conv.forward = lambda x: F.conv2d(
            x.abs() * 2, self.conv.weight, self.conv.bias, padding=1
        )

    def forward(self, x):
        return self.avgpool(F.relu(self.conv(x)))


class Noise(Branching):
    """Numbers that must be drawn anew each time."""

    def __init__(self, channels=None):
        super().__init__()
        self.channels = channels

    def forward(self, x):
        kind = self.conv.weight.dtype if self.channels is None else torch.float32
        return self.avgpool(self.conv(x) + 0 * torch.rand(1, 4, 1, 1, dtype=kind))


FALLBACKS = {
    "noise": (Noise, "aten::rand: random numbers in eval mode"),
    "noise of a size": (lambda: Noise(4), "aten::rand: random numbers in eval mode"),
    "forward of its own": (Doctored, "conv: a module with a forward of its own"),
    "sigmoid": (lambda: Sigmoid([4, 8], 1, 3, True, 3), "sigmoid: sigmoid"),
    "branch": (Branching, "torch.fx cannot trace it"),
    "instance norm": (InstanceNorm, "norm: InstanceNorm2d"),
    "hook": (Hooked, "conv: a module with hooks"),
    "product": (Product, "mul: mul"),
    "padding same": (Same, "conv: Conv2d"),
}


@pytest.mark.parametrize("name", FALLBACKS)
def test_fallback_is_named_logged_once_and_right(name, caplog):
    make, reason = FALLBACKS[name]
    torch.manual_seed(0)
    model = lively(make())
    images = images_of(10).float()
    f, d, g = by_autograd(model, "avgpool", images)
    model.float()
    with pytest.raises(NotLowered, match=reason):
        plan(model, "avgpool")
    with caplog.at_level(logging.WARNING, "miue_fast"):
        net = freeze(model, chunk=4)
    assert (
        not net.fused
        and reason in net.reason
        and [reason in r.message for r in caplog.records] == [True]
    )
    torch.testing.assert_close(net.forward(images).double(), f, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(net.input_grad(d.float()).double(), g, rtol=1e-3, atol=1e-6)
    assert not dict(model.named_modules())["avgpool"]._forward_hooks and all(
        p.requires_grad for p in model.parameters()
    )


# ---- refolding, chunks, memory


@pytest.mark.parametrize("fp8", [False, True], ids=["", "fp8"])
@pytest.mark.parametrize("name", NETWORKS)
def test_refold_takes_over_new_weights_in_place(name, fp8):
    model, feature, size = built(name)
    model.float()
    net = freeze(model, feature, fp8=fp8)
    held = [
        t.data_ptr()
        for layer in net.plan.layers
        for t in vars(layer).values()
        if isinstance(t, torch.Tensor)
    ]
    images = images_of(size).float()
    old = net.forward(images)
    model.train()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    model(images).square().sum().backward()
    optimizer.step()
    model.eval()
    net.refold()
    assert [
        t.data_ptr()
        for layer in net.plan.layers
        for t in vars(layer).values()
        if isinstance(t, torch.Tensor)
    ] == held
    new, fresh = net.forward(images), freeze(model, feature, fp8=fp8).forward(images)
    assert torch.equal(new, fresh) and not torch.equal(new, old)


@pytest.mark.parametrize("name", NETWORKS)
def test_chunks_are_the_whole_batch(name):
    """Up to rounding: MKL and oneDNN may take another algorithm for another number of rows (on AVX2
    they do).
    """
    model, feature, size = built(name)
    model.double()
    images = images_of(size, 43).double()
    whole = freeze(model, feature, dtype=torch.float64, chunk=100)
    f = whole.forward(images)
    g = whole.input_grad(torch.ones_like(f))
    for chunk in (2, 9, 16, 31):
        net = freeze(model, feature, dtype=torch.float64, chunk=chunk)
        net.chunk.size, net.chunk.least = chunk, 2
        torch.testing.assert_close(net.forward(images), f, rtol=1e-11, atol=1e-12)
        assert len(net.tapes) == -(-43 // chunk) - (43 % chunk == 1)
        torch.testing.assert_close(net.input_grad(torch.ones_like(f)), g, rtol=1e-10, atol=1e-11)


def test_bits_are_kept_and_not_activations():
    """Between the calls: at most an eighth of what autograd keeps, measured on both sides."""
    torch.manual_seed(0)
    model = models.build("resnet18", 10).eval()
    images = images_of(32, 4).float()
    saved = {}

    def count(tensor):
        saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    weights = {p.untyped_storage().data_ptr() for p in [*model.parameters(), *model.buffers()]}
    model.requires_grad_(False)
    with torch.autograd.graph.saved_tensors_hooks(count, lambda t: t):
        kept = model(images.clone().requires_grad_())
    assert kept.requires_grad
    autograd = sum(size for pointer, size in saved.items() if pointer not in weights)
    net = freeze(model, chunk=2)
    net.forward(images)
    ours = sum(tape.bytes() for _, tape in net.tapes)
    assert 0 < ours <= autograd / 8
    assert ours == 4 * 557056 // 8  # one bit for each of ResNet-18's 557,056 ReLU outputs


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype):
    model, _, size = built("small_resnet")
    model.float()
    images = images_of(size).float()
    net, plain = freeze(model, dtype=dtype), freeze(model)
    got, want = net.forward(images), plain.forward(images)
    assert got.dtype == dtype
    assert (got.float() - want).abs().max() <= 16 * torch.finfo(dtype).eps * want.abs().max()
    a, b = net.input_grad(torch.ones_like(got)), plain.input_grad(torch.ones_like(want))
    assert (a.sign() == b.sign()).double().mean() > 0.95


E4M3 = torch.finfo(torch.float8_e4m3fn)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_quantised(dtype):
    x = (torch.randn(2, 8, 3, 5, dtype=torch.float64) * torch.logspace(-9, 3, 8)[:, None, None]).to(
        dtype
    )
    x = x.contiguous(memory_format=torch.channels_last)
    for sign in (1, -1):
        q, scale = quantised(sign * x.abs())
        assert (
            q.dtype == torch.float8_e4m3fn
            and q.is_contiguous(memory_format=torch.channels_last)
            and scale.dtype == torch.float32
        )
        wide = q.double() * scale.double()
        assert q.double().abs().max() == E4M3.max
        # half a step: of the value, or of what is below e4m3's normal numbers; the scale and the
        # quotient are rounded to float32
        step = torch.maximum(wide.abs(), scale.double() * E4M3.smallest_normal) * (E4M3.eps / 2)
        assert (
            (wide - sign * x.abs().double()).abs()
            <= step * (1 + 8 * torch.finfo(torch.float32).eps / E4M3.eps)
        ).all()
    q, scale = quantised(torch.zeros_like(x))
    assert scale == 1 and not q.double().any()
    for bad in (torch.nan, torch.inf):
        x[0, 0, 0, 0] = bad
        assert quantised(x)[0].double().isnan().any()


@pytest.mark.parametrize("name", NETWORKS)
def test_fp8_is_near_bfloat16(name):
    """Independent roundings of e4m3's size in each layer; a gradient also passes other ReLUs, but
    is nearer to the right one than 0 is.
    """
    model, feature, size = built(name)
    model.float()
    images = images_of(size).float()
    net, plain = freeze(model, feature, fp8=True), freeze(model, feature, dtype=torch.bfloat16)
    convolutions = [layer for layer in net.plan.layers if isinstance(layer, Conv)]
    assert (
        net.fp8 and net.fused and not plain.fp8 and not net.stem.fp8 and net.dtype == torch.bfloat16
    )
    assert [c.fp8 for c in convolutions] == [c is not net.stem for c in convolutions]
    assert {c.weight.dtype for c in convolutions} == {torch.bfloat16, torch.float8_e4m3fn}
    got, want = net.forward(images).float(), plain.forward(images).float()
    assert 0 < (got - want).norm() <= E4M3.eps * len(convolutions) ** 0.5 * want.norm()
    d = torch.randn(want.shape, generator=torch.Generator().manual_seed(1)).bfloat16()
    image_grad, want = net.input_grad(d), plain.input_grad(d).float()
    assert image_grad.dtype == torch.bfloat16 and image_grad.isfinite().all()
    assert 0 < (image_grad.float() - want).norm() < want.norm()


def test_fp8_without_relu_is_within_its_rounding():
    torch.manual_seed(0)
    shapes = [(3, 8, 3, 1), (8, 32, 3, 2), (32, 32, 3, 1), (32, 16, 1, 1), (16, 4, 3, 1)]
    model = nn.Sequential(
        *(nn.Conv2d(c, k, r, s, r // 2) for c, k, r, s in shapes), nn.AdaptiveAvgPool2d(2)
    ).eval()
    images = images_of(10).float()
    net, plain = freeze(model, "5", fp8=True), freeze(model, "5", dtype=torch.bfloat16)
    f, want = net.forward(images), plain.forward(images)
    d = torch.randn(want.shape, generator=torch.Generator().manual_seed(1)).bfloat16()
    for a, b in ((f, want), (net.input_grad(d), plain.input_grad(d))):
        assert 0 < (a - b).float().norm() <= E4M3.eps * len(shapes) ** 0.5 * b.float().norm()


def test_fp8_of_a_dead_network_is_zero_and_of_nan_is_nan():
    model, _, size = built("small_resnet")
    model.float()
    images = images_of(size).float()
    with torch.no_grad():
        model.bn1.weight.zero_()
        model.bn1.bias.fill_(-1)
    net = freeze(model, fp8=True)
    f = net.forward(images)
    assert f.isfinite().all() and not net.input_grad(torch.zeros_like(f)).any()
    with torch.no_grad():
        model.conv1.weight.fill_(torch.nan)
    net.refold()
    assert net.forward(images).isnan().all()


def test_fp8_on_a_cpu_says_once_that_it_is_emulated(caplog):
    for name in ("conv_forward", "conv_input_grad"):
        OPS[name]._chosen.clear()
    with caplog.at_level(logging.WARNING, "miue_fast"):
        net = frozen_small(fp8=True)
        for _ in range(2):
            net.input_grad(torch.zeros_like(net.forward(IMAGE)))
    said = [r.getMessage() for r in caplog.records if "float8_e4m3fn" in r.getMessage()]
    assert len(said) == len(set(said)) <= 2
    assert all("runs in plain PyTorch" in text for text in said)


def test_perturb_with_fp8():
    model, _, size = built("small_resnet")
    model.float()
    images, labels = images_of(size).float(), torch.arange(6) % 2
    run = {"steps": 2, "alpha": 0.01, "eps": 0.03}
    start = torch.zeros_like(images)
    got, want = (
        perturb(model, images, labels, start, fp8=True, **run),
        perturb(model, images, labels, start, dtype=torch.bfloat16, **run),
    )
    again = perturb(freeze(model, fp8=True), images, labels, start, **run)
    assert torch.equal(got, again) and not torch.equal(got, want)
    moved = want != 0
    assert (got.sign() == want.sign())[moved].double().mean() > 0.5  # a coin gives a half


@pytest.mark.parametrize("fused", [True, False])
def test_bytes_are_divided_by_255(fused):
    net = freeze(models.build("small_resnet", 4).eval(), fused=fused)
    images = (images_of(16) * 255).to(torch.uint8)
    assert torch.equal(net.forward(images), net.forward(images / 255))


@pytest.mark.parametrize("normalize", [True, False])
def test_the_stem_epilogue_is_the_two_step_form(normalize):
    torch.manual_seed(0)
    model = lively(models.build("small_resnet", 4, normalize=normalize))
    images = (images_of(16) * 255).to(torch.uint8)
    net = freeze(model, chunk=4)
    f = net.forward(images / 255)
    image_grad = net.input_grad(torch.ones_like(f))
    two, one = torch.zeros(2, *images.shape)
    projected_step_(two, None, image_grad, images, alpha=0.01, eps=0.03)
    from miue_fast.ops import conv_input_grad_step_

    def take(rows, grad):
        index = torch.arange(rows.start, rows.stop)
        conv_input_grad_step_(
            one,
            index,
            grad,
            net.stem.back_weight,
            images,
            alpha=0.01,
            eps=0.03,
            **net.stem.geometry,
        )

    net.forward(images / 255)
    net.back(torch.ones_like(f), take, stem=True)
    assert torch.equal(one, two) and one.any()


# ---- bad input


class ActiveDropout(Branching):
    def forward(self, x):
        return self.avgpool(F.dropout(self.conv(x)))


class Twice(Branching):
    def forward(self, x):
        return self.avgpool(self.conv(x)) + self.avgpool(x)[:, :1]


def frozen_small(**options):
    return freeze(models.build("small_resnet", 4).eval(), **options)


IMAGE = torch.zeros(2, 3, 16, 16)
BAD = {
    "training mode": (
        lambda: freeze(models.build("small_resnet", 4)),
        "expected eval mode (call model.eval()), got training",
    ),
    "dropout module": (
        lambda: freeze(nn.Sequential(nn.Conv2d(3, 4, 3), nn.Dropout()).eval().train(), "0"),
        "got training mode (1)",
    ),
    "active dropout": (
        lambda: freeze(ActiveDropout().eval()),
        "freeze: model: expected no active dropout",
    ),
    "feature": (
        lambda: freeze(nn.Sequential(nn.Conv2d(3, 4, 3)).eval(), "pool"),
        "feature: expected a layer of the model (0), got 'pool'",
    ),
    "feature twice": (
        lambda: freeze(Twice().eval()),
        "a layer that runs once per forward pass, got 'avgpool', which ran 2 times",
    ),
    "no module": (lambda: freeze("resnet18"), "freeze: model: expected an nn.Module, got str"),
    "dtype": (
        lambda: freeze(Branching().eval(), dtype=torch.int8),
        "freeze: dtype: expected float32",
    ),
    "fp8": (lambda: frozen_small(fp8=1), "freeze: fp8: expected True or False, got 1"),
    "fp8 in float32": (
        lambda: frozen_small(fp8=True, dtype=torch.float32),
        "freeze: dtype: expected bfloat16 with fp8, got torch.float32",
    ),
    "fp8 in autograd": (
        lambda: frozen_small(fp8=True, fused=False),
        "fp8: expected False without a fused network, got True (fused=False)",
    ),
    "fp8 not lowered": (
        lambda: freeze(Product().eval(), fp8=True),
        "fp8: expected False without a fused network, got True (mul: mul)",
    ),
    "option fp8": (
        lambda: Options(fp8=True),
        "option: fp8: expected False without dtype bfloat16, got True with float32",
    ),
    "chunk": (
        lambda: freeze(Branching().eval(), chunk=1),
        "freeze: chunk: expected None or a whole number >= 2, got 1",
    ),
    "two devices": (
        lambda: freeze(
            nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3, device="meta")).eval(), "0"
        ),
        "freeze: model: expected weights on one device, got cpu, meta",
    ),
    "device": (
        lambda: frozen_small().forward(IMAGE.to("meta")),
        "images: expected the model's device cpu, got meta",
    ),
    "channels": (
        lambda: frozen_small().forward(IMAGE[:, :1]),
        "images: expected 3 channels, got [2, 1, 16, 16]",
    ),
    "integers": (
        lambda: frozen_small().forward(IMAGE.to(torch.int32)),
        "images: expected a uint8 or float tensor [B, C, H, W], got int32",
    ),
    "no batch": (
        lambda: frozen_small().forward(IMAGE[0]),
        "images: expected a uint8 or float tensor [B, C, H, W], got float32 [3,",
    ),
    "empty": (lambda: frozen_small().forward(IMAGE[:0]), "images: expected at least one image"),
    "size": (
        lambda: freeze(lively(VGG()), "head.2").forward(torch.zeros(2, 3, 24, 24)),
        "48 values per image, got [108]",
    ),
    "too small": (
        lambda: freeze(nn.Sequential(nn.Conv2d(3, 4, 5)).eval(), "0").forward(
            torch.zeros(2, 3, 4, 4)
        ),
        "a kernel that fits into [4, 4]",
    ),
    "no forward": (
        lambda: frozen_small().input_grad(torch.zeros(2, 32)),
        "expected a forward before each input_grad",
    ),
    "gradient": (
        lambda: (n := frozen_small(), n.forward(IMAGE), n.input_grad(torch.zeros(3, 32))),
        "grad: expected [2, D] on cpu",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_clear_line(name):
    call, part = BAD[name]
    with pytest.raises(ValueError) as error:
        call()
    assert part in str(error.value) and "\n" not in str(error.value)
