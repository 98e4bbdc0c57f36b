"""Training on packed weights: float64's gradients, the same bits for any number of threads, and
PyTorch's own convolution for everything else.
"""

import contextlib
import copy
import gc
from unittest import mock

import pytest
import torch
from torch import nn

from miue_fast import models
from miue_fast.dispatch import native
from miue_fast.frozen import training
from miue_fast.frozen.training import packed_training

CPU = torch.device("cpu")
pytestmark = pytest.mark.skipif(
    native.cpu_level() not in ("avx2", "avx512"), reason="needs an instruction level that packs"
)


WIDE = nn.Conv2d(training.WIDE, training.WIDE, 1)  # a network that is worth packing


def drawn(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def gradients(layer, x, context):
    """The result of a layer, and the gradients of its input and parameters."""
    layer, x = copy.deepcopy(layer), x.clone().requires_grad_()
    with context:
        y = layer(x)
    y.backward(torch.cos(torch.arange(y.numel(), dtype=y.dtype)).view_as(y))
    return [y.detach(), x.grad, *(p.grad for p in layer.parameters())]


@pytest.mark.parametrize(
    "channels, count, kernel, stride, side, bias",
    [
        (32, 48, 3, 1, 9, True),
        (3, 64, 3, 1, 13, False),
        (16, 16, 3, 1, 7, False),
        (256, 256, 3, 2, 5, True),
        (256, 32, 1, 2, 6, False),
        (256, 32, 1, 1, 4, True),
    ],
)
@pytest.mark.parametrize("memory", [torch.contiguous_format, torch.channels_last], ids=str)
def test_gradients(channels, count, kernel, stride, side, bias, memory):
    layer = nn.Conv2d(channels, count, kernel, stride, kernel // 2, bias=bias)
    layer, x = layer.to(memory_format=memory), drawn(3, channels, side, side + 2)
    truth = gradients(layer.double(), x.double(), contextlib.nullcontext())
    layer = layer.float()
    plain = gradients(layer, x, contextlib.nullcontext())
    with mock.patch.object(native, "packed_conv", wraps=native.packed_conv) as calls:
        got = gradients(layer, x, packed_training(WIDE, "auto", CPU))
    assert calls.called, "nothing ran on packed weights"
    for name, ours, theirs, right in zip(("y", "x", "weight", "bias"), got, plain, truth):
        assert ours.shape == theirs.shape and ours.dtype == torch.float32, name
        error, scale = (ours.double() - right).abs().max(), right.abs().max()
        assert error <= 2 * (theirs.double() - right).abs().max() + 2e-5 * scale, name


@pytest.mark.skipif(native.matrix_missing() is not None, reason=str(native.matrix_missing()))
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(
    "channels, count, kernel, stride",
    [(64, 96, 3, 1), (3, 64, 3, 1), (128, 64, 1, 2), (64, 160, 3, 2)],
)
def test_bfloat16_gradients(channels, count, kernel, stride, bias):
    """Under autocast: as exact as PyTorch's convolution in bfloat16."""
    layer = nn.Conv2d(channels, count, kernel, stride, kernel // 2, bias=bias)
    x = drawn(5, channels, 9, 7)
    truth = gradients(layer.double(), x.double(), contextlib.nullcontext())
    layer = layer.float()

    def found(context):
        half = torch.autocast("cpu", torch.bfloat16, cache_enabled=False)
        with mock.patch.object(native, "matrix_conv", wraps=native.matrix_conv) as calls:
            with context, half:
                y = layer(leaf := x.clone().requires_grad_())
            assert y.dtype == torch.bfloat16
            y.backward(torch.cos(torch.arange(y.numel()).double()).view_as(y).to(y.dtype))
        result = [y.detach(), leaf.grad, *(p.grad.clone() for p in layer.parameters())]
        layer.zero_grad()
        return result, calls.called

    theirs, _ = found(contextlib.nullcontext())
    ours, called = found(packed_training(WIDE, "auto", CPU))
    assert called
    for name, own, other, right in zip(("y", "x", "weight", "bias"), ours, theirs, truth):
        assert own.dtype == other.dtype and own.shape == other.shape, name
        error = (own.double() - right).abs().max()
        assert error <= 1.5 * (other.double() - right).abs().max() + 1e-3 * right.abs().max(), name


@pytest.mark.parametrize("channels", [64, 256])
def test_bfloat16_without_matrix_tiles(channels, monkeypatch):
    """Most processors: PyTorch's convolution, and none of the kernels that they do not have."""
    monkeypatch.setattr(native, "matrix_missing", lambda: "no tiles here")
    for name in ("matrix_conv", "matrix_weight_grad", "pack_matrix_weights", "packed_conv"):
        monkeypatch.setattr(native, name, mock.Mock(side_effect=AssertionError(name)))
    layer, x = nn.Conv2d(channels, channels, 3, 2, 1), drawn(2, channels, 5, 5)

    def found(context):
        half = torch.autocast("cpu", torch.bfloat16, cache_enabled=False)
        with context, half:
            y = layer(leaf := x.clone().requires_grad_())
        y.sum().backward()
        result = [y.detach(), leaf.grad, *(p.grad.clone() for p in layer.parameters())]
        layer.zero_grad()
        return result

    theirs = found(contextlib.nullcontext())
    for ours, right in zip(found(packed_training(WIDE, "auto", CPU, "bfloat16")), theirs):
        assert torch.equal(ours, right)


def test_the_bits_do_not_depend_on_the_number_of_threads():
    layer, x = nn.Conv2d(32, 48, 3, padding=1), drawn(5, 32, 9, 9)
    before, found = torch.get_num_threads(), []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        found.append(gradients(layer, x, packed_training(WIDE, "auto", CPU)))
    torch.set_num_threads(before)
    for one, two, three in zip(
        *(gradient[:3] for gradient in found)
    ):  # the bias's is PyTorch's sum
        assert torch.equal(one, two) and torch.equal(one, three)


def test_weights_that_changed_are_packed_anew():
    layer, x, context = (
        nn.Conv2d(32, 32, 3, padding=1),
        drawn(2, 32, 8, 8),
        packed_training(WIDE, "auto", CPU),
    )
    with context:
        first = layer(x)
        layer.weight.data.mul_(2)  # which autograd does not see
        layer.bias.data.zero_()
        second = layer(x)
    assert not torch.equal(first, second)
    assert torch.allclose(second, layer(x), atol=1e-4)


@pytest.mark.parametrize(
    "layer",
    [
        nn.Conv2d(32, 32, 3, padding=1, groups=2),
        nn.Conv2d(32, 32, 3, padding=2, dilation=2),
        nn.Conv2d(32, 32, 3, padding="same"),
        nn.Conv2d(32, 32, 5, padding=2),
        nn.Conv2d(32, 32, 3, padding=1, padding_mode="reflect"),
        nn.Conv2d(32, 8, 3, padding=1),
        nn.Conv2d(32, 32, 3, padding=1).double(),
    ],
    ids=str,
)
def test_what_is_left_to_pytorch_keeps_its_bits(layer):
    x = drawn(2, 32, 9, 9).to(layer.weight.dtype)
    with (
        mock.patch.object(native, "packed_conv", side_effect=AssertionError),
        packed_training(WIDE, "auto", CPU),
    ):
        inside = layer(x)
    assert torch.equal(inside, layer(x))


@pytest.mark.parametrize("backend, device", [("reference", CPU), ("auto", torch.device("cuda"))])
def test_where_it_changes_nothing(backend, device):
    assert isinstance(packed_training(WIDE, backend, device), contextlib.nullcontext)


def test_without_the_kernels(monkeypatch):
    monkeypatch.setattr(native, "cpu_missing", lambda: "not built")
    assert isinstance(packed_training(WIDE, "auto", CPU), contextlib.nullcontext)


def test_a_second_derivative_is_refused():
    x = drawn(2, 32, 8, 8).requires_grad_()
    with packed_training(WIDE, "auto", CPU):
        y = nn.Conv2d(32, 32, 3, padding=1)(x)
    (grad,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


def test_nothing_is_kept_of_a_parameter_that_is_gone():
    context, x, layer = packed_training(WIDE, "auto", CPU), drawn(1, 32, 8, 8), nn.Conv2d(32, 32, 3)
    layer.padding = (1, 1)
    with context:
        layer(x)
    assert len(context.weights) == 1
    del layer
    gc.collect()
    assert not context.weights


def test_a_narrow_network_is_left_to_pytorch():
    narrow = models.build("small_resnet", 4, width=16)
    assert isinstance(packed_training(narrow, "auto", CPU), contextlib.nullcontext)
    wide = models.build("resnet18", 4)
    assert not isinstance(packed_training(wide, "auto", CPU), contextlib.nullcontext)
