"""Batch norm while a network trains: as exact as PyTorch's, with the ReLU behind it or without, the
same bits for any number of threads, and PyTorch's own for everything else.
"""

import contextlib
import copy
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from miue_fast.dispatch import native
from miue_fast.frozen import batch_norm
from miue_fast.frozen.training import packed_training

NHWC = torch.channels_last
WIDE = nn.Conv2d(128, 128, 1)  # a network that is worth packing
pytestmark = pytest.mark.skipif(native.cpu_missing() is not None, reason="needs the C++ kernels")


@pytest.fixture(params=["generic", "avx2", "avx512"])
def level(request):
    before = native.cpu_level()
    try:
        native.set_cpu_level(request.param)
    except ValueError:
        pytest.skip(f"no {request.param} here")
    yield
    native.set_cpu_level(before)


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setattr(batch_norm, "WORTH", 0)


def ours():
    return packed_training(WIDE, "auto", torch.device("cpu"))


def layer_of(channels, **rest):
    layer = nn.BatchNorm2d(channels, **rest)
    if layer.affine:
        torch.nn.init.uniform_(layer.weight, -2, 2)
        torch.nn.init.uniform_(layer.bias, -1, 1)
    return layer


def drawn(channels, dtype=torch.float32, batch=7, height=11, width=9):
    torch.manual_seed(channels)
    x = 3 * torch.randn(batch, channels, height, width) + 20 * torch.randn(channels)[:, None, None]
    grad = torch.randn(x.shape) + torch.rand(channels)[:, None, None]
    return [t.to(dtype).contiguous(memory_format=NHWC) for t in (x, grad)]


def plain(y):
    return y


def relu_(y):
    return F.relu(y, inplace=True)


def results(layer, x, grad, after=plain, context=None):
    """[result, gradients of x and the parameters, running statistics]."""
    layer, x = copy.deepcopy(layer), x.clone().requires_grad_()
    with context or contextlib.nullcontext():
        y = after(layer(x))
    y.backward(grad)
    return [y.detach(), x.grad, *(p.grad for p in layer.parameters()), *layer.buffers()]


def assert_as_exact(found, theirs, truth, dtype):
    for own, other, right in zip(found, theirs, truth, strict=True):
        assert own.shape == other.shape and own.dtype == other.dtype
        error, scale = (own.double() - right).abs().max(), right.abs().max()
        rounding = torch.finfo(own.dtype).eps if own.is_floating_point() else 0
        assert error <= 2 * (other.double() - right).abs().max() + 8 * rounding * scale


@pytest.mark.parametrize("after", [plain, relu_, torch.relu_, torch.Tensor.relu_])
@pytest.mark.parametrize("channels", [16, 48, 80, 144])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_gradients(level, dtype, channels, after):
    layer, (x, grad) = layer_of(channels), drawn(channels, dtype)
    truth = results(copy.deepcopy(layer).double(), x.double(), grad.double(), after)
    theirs = results(layer, x, grad, after)
    with mock.patch.object(native, "batch_norm_grad", wraps=native.batch_norm_grad) as called:
        found = results(layer, x, grad, after, ours())
    assert called.call_args.args[-1] == (after is not plain)
    if dtype == torch.float32 and after is not plain:
        # A result that rounds to the other side of zero has another gradient: compare where both
        # have the same, which is nearly everywhere.
        same = (found[0] > 0) == (truth[0] > 0)
        assert same.float().mean() > 0.9999
    assert_as_exact(found, theirs, truth, dtype)


@pytest.mark.parametrize("rest", [{"affine": False}, {"track_running_stats": False}, {"eps": 0.1}])
def test_layers_without_some_of_it(rest):
    layer, (x, grad) = layer_of(32, **rest), drawn(32)
    truth = results(copy.deepcopy(layer).double(), x.double(), grad.double())
    found = results(layer, x, grad, context=ours())
    assert_as_exact(found, results(layer, x, grad), truth, torch.float32)


def test_the_bits_do_not_depend_on_the_number_of_threads(level):
    layer, (x, grad) = layer_of(32), drawn(32, batch=40, height=13)
    before, found = torch.get_num_threads(), []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        found.append(results(layer, x, grad, relu_, ours()))
    torch.set_num_threads(before)
    for one, two, three in zip(*found):
        assert torch.equal(one, two) and torch.equal(one, three)


def test_a_large_mean_costs_no_variance():
    """The sums are of x less its first row: a variance as a difference of squares would be lost."""
    layer, x = nn.BatchNorm2d(16), 1000 + drawn(16)[1]
    with ours():
        y = layer(x)
    wanted = nn.BatchNorm2d(16).double()(x.double())
    assert (y - wanted).abs().max() < 1e-3


def test_not_a_number_stays_one():
    layer, (x, grad) = layer_of(16), drawn(16)
    x[0, 3, 0, 0] = float("nan")
    for after in (plain, relu_):
        found, theirs = (results(layer, x, grad, after, c) for c in (ours(), None))
        for own, other in zip(found, theirs):
            assert torch.equal(own.isnan(), other.isnan())


class Doubled(torch.autograd.Function):
    @staticmethod
    def forward(ctx, y):
        return 2 * y

    @staticmethod
    def backward(ctx, grad):
        return 2 * grad


def used_before(y):
    """A second use of the result, which no function mode sees."""
    return Doubled.apply(y) + F.relu(y, inplace=True)


def test_a_result_that_is_used_before_its_relu():
    layer, (x, grad) = layer_of(32), drawn(32)
    found, theirs = (results(layer, x, grad, used_before, c) for c in (ours(), None))
    for own, other in zip(found, theirs):
        assert torch.allclose(own, other, rtol=1e-4, atol=1e-3)


def used_between(y):
    z = y * 2
    return z + F.relu(y, inplace=True)


def test_a_relu_that_is_not_the_next_call_is_pytorchs():
    layer, (x, grad) = layer_of(32), drawn(32)
    with mock.patch.object(batch_norm, "relu", side_effect=AssertionError):
        found = results(layer, x, grad, lambda y: used_between(y.clone()), ours())
        results(layer, x, grad, F.relu, ours())  # it makes another tensor
        results(layer, x, grad, lambda y: relu_(y + 0), ours())
    theirs = results(layer, x, grad, lambda y: used_between(y.clone()))
    for own, other in zip(found, theirs):
        assert torch.allclose(own, other, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize(
    "layer, x",
    [
        (nn.BatchNorm2d(24), drawn(24)[0]),
        (nn.BatchNorm2d(32), drawn(32)[0].contiguous()),
        (nn.BatchNorm2d(32).eval(), drawn(32)[0]),
        (nn.BatchNorm2d(32).double(), drawn(32)[0].double()),
        (nn.BatchNorm2d(32).bfloat16(), drawn(32, torch.bfloat16)[0]),
        (nn.BatchNorm1d(32), drawn(32)[0][:, :, 0]),
    ],
    ids=["24 channels", "contiguous", "eval", "double", "bfloat16 weights", "1d"],
)
def test_what_is_left_to_pytorch_keeps_its_bits(layer, x):
    other = copy.deepcopy(layer)
    with mock.patch.object(native, "batch_norm", side_effect=AssertionError), ours():
        inside = layer(x)
    assert torch.equal(inside, other(x))
    assert all(torch.equal(a, b) for a, b in zip(layer.buffers(), other.buffers()))


def test_one_value_per_channel_is_refused_as_ever():
    with pytest.raises(ValueError, match="more than 1 value per channel"), ours():
        nn.BatchNorm2d(16)(torch.zeros(1, 16, 1, 1).contiguous(memory_format=NHWC))


def test_without_a_gradient():
    layer, (x, _) = layer_of(32), drawn(32)
    with torch.no_grad(), ours():
        y = relu_(layer(x))
    with torch.no_grad():
        assert torch.allclose(y, relu_(copy.deepcopy(layer)(x)), atol=1e-4)
