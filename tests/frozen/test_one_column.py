"""Results of one column from strided convolutions in bfloat16: oneDNN computes them, and the weight
gradient, wrongly on processors with AMX (PyTorch 2.13). They are right everywhere here.
"""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from miue_fast import ops
from miue_fast.dispatch import native
from miue_fast.frozen.training import packed_training

# Channels, results, height, width, taps, stride, padding, groups.
CASES = [
    (16, 16, 18, 2, 3, 2, 1, 1),
    (8, 8, 9, 1, 3, 2, 1, 1),
    (3, 64, 18, 2, 3, 2, 1, 1),
    (64, 64, 2, 2, 3, 2, 1, 1),
    (64, 64, 18, 2, 5, 3, 2, 1),
    (32, 32, 18, 2, 3, 2, 1, 4),
]


def made(channels, results, height, width, taps, stride, padding, groups):
    generator = torch.Generator().manual_seed(1)
    layer = nn.Conv2d(channels, results, taps, stride, padding, groups=groups, bias=False)
    with torch.no_grad():
        layer.weight.copy_(torch.randn(layer.weight.shape, generator=generator).bfloat16())
    x = torch.randn(5, channels, height, width, generator=generator).bfloat16()
    y = F.conv2d(x.double(), layer.weight.double(), None, stride, padding, 1, groups)
    assert y.shape[3] == 1
    return layer, x, y


def close(got, truth):
    assert (got.double() - truth).abs().max() <= 0.01 * truth.abs().max()


@pytest.mark.parametrize("backend", ["reference", "cpu", "auto"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_forward(case, backend):
    layer, x, truth = made(*case)
    *_, stride, padding, groups = case
    y, _ = ops.conv_forward(
        x.contiguous(memory_format=torch.channels_last),
        layer.weight.detach().bfloat16().contiguous(memory_format=torch.channels_last),
        stride=stride,
        padding=padding,
        groups=groups,
        relu=False,
        want_mask=False,
        backend=backend,
    )
    close(y, truth)


@pytest.mark.skipif(native.cpu_missing() is not None, reason="needs the C++ kernels")
@pytest.mark.parametrize("case", CASES, ids=str)
def test_training_under_autocast(case):
    layer, x, truth = made(*case)
    leaf = x.float().requires_grad_()
    half = torch.autocast("cpu", torch.bfloat16, cache_enabled=False)
    with packed_training(layer, "auto", torch.device("cpu"), "bfloat16"), half:
        y = layer(leaf)
    close(y, truth)
    grad = torch.randn(y.shape, generator=torch.Generator().manual_seed(2)).bfloat16()
    y.backward(grad)
    *_, stride, padding, groups = case
    expected = torch.ops.aten.convolution_backward(
        grad.double(),
        x.double(),
        layer.weight.detach().double(),
        None,
        [stride] * 2,
        [padding] * 2,
        [1, 1],
        False,
        [0, 0],
        groups,
        [True, True, False],
    )
    close(leaf.grad, expected[0])
    close(layer.weight.grad, expected[1])
