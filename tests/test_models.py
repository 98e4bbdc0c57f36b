"""The built-in networks: form, initialisation, normalisation inside."""

import math

import pytest
import torch
from torch import nn

from miue_fast import models


def _with_statistics(model):
    """Running statistics and affine parameters that are not the identity."""
    g = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                for tensor, low in ((module.weight, 0.5), (module.running_var, 0.5), (module.bias, -0.5), (module.running_mean, -0.5)):
                    tensor.copy_(torch.rand(tensor.shape, generator=g) + low)
    return model


def test_resnet18_has_the_cifar_form():
    model = models.build("resnet18", 10)
    assert sum(p.numel() for p in model.parameters()) == 11_173_962  # He et al. 2016 with a 3x3 stem, as CIFAR programs count it
    assert not any(isinstance(m, nn.MaxPool2d) for m in model.modules())
    sizes = []
    for block in model.layers:
        block.register_forward_hook(lambda module, inputs, output: sizes.append(tuple(output.shape[1:])))
    seen = []
    model.avgpool.register_forward_hook(lambda module, inputs, output: seen.append(output))
    assert model.eval()(torch.rand(2, 3, 32, 32)).shape == (2, 10)
    assert sizes == [(64, 32, 32)] * 2 + [(128, 16, 16)] * 2 + [(256, 8, 8)] * 2 + [(512, 4, 4)] * 2
    assert seen[0].shape == (2, 512, 1, 1) and (seen[0] >= 0).all()


@pytest.mark.parametrize("width", [None, 3])
def test_small_resnet(width):
    model = models.build("small_resnet", 7, width=width)
    assert model.fc.in_features == 4 * (width or 8)
    assert model(torch.rand(2, 3, 16, 16)).shape == (2, 7)


def test_convolutions_start_kaiming_normal_fan_out():
    torch.manual_seed(0)
    for conv in models.build("resnet18", 10).modules():
        if isinstance(conv, nn.Conv2d) and conv.weight.numel() > 10_000:
            expected = math.sqrt(2 / (conv.out_channels * conv.kernel_size[0] ** 2))
            assert abs(conv.weight.std().item() / expected - 1) < 4 / math.sqrt(2 * conv.weight.numel())  # four deviations of the estimate


@pytest.mark.parametrize("channels", [3, 1])
def test_normalisation_is_inside_and_optional(channels):
    inside = models.build("small_resnet", 4, channels=channels).eval().double()
    plain = models.build("small_resnet", 4, channels=channels, normalize=False).eval().double()
    plain.load_state_dict(inside.state_dict())
    x = torch.rand(2, channels, 16, 16, dtype=torch.float64)
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    if channels == 1:
        mean, std = mean.mean(0, keepdim=True), std.mean(0, keepdim=True)
    expected = plain((x - mean[:, None, None]) / std[:, None, None])
    assert (inside(x) - expected).abs().max() < 1e-5 * expected.abs().max()  # mean and std are float32 constants
    assert not torch.equal(inside(x), plain(x))


@pytest.mark.parametrize(
    "arguments, part",
    [
        (("vgg", 10), "name: expected one of resnet18, small_resnet, got 'vgg'"),
        (("small_resnet", 0), "num_classes"),
        (("small_resnet", 10, -1), "width"),
        (("small_resnet", 10, 8, 4), "size"),
        (("small_resnet", 10, 8, 32, 4), "channels"),
    ],
)
def test_bad_arguments(arguments, part):
    name, classes, *rest = arguments
    with pytest.raises(ValueError) as error:
        models.build(name, classes, **dict(zip(("width", "size", "channels"), rest)))
    assert part in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("name, width", [("small_resnet", 2), ("small_resnet", 8), ("small_resnet", 16), ("resnet18", 8)])
def test_no_strided_1x1_with_few_channels(name, width):
    """oneDNN issue 6035: its weight gradient in channels-last corrupts the heap below 16 channels (seen: free() aborts in training)."""
    for module in models.build(name, 3, width=width).modules():
        if isinstance(module, nn.Conv2d) and module.kernel_size == (1, 1) and module.in_channels < 16:
            assert module.stride == (1, 1)


def test_picking_pixels_first_is_a_strided_convolution():
    block = models.build("small_resnet", 3).layers[1]
    x = torch.rand(2, 8, 9, 9)
    assert block.pick == 2
    picked = block.conv3(x[:, :, ::2, ::2])
    strided = nn.functional.conv2d(x, block.conv3.weight, stride=2)
    assert (picked - strided).abs().max() <= 1e-6 * strided.abs().max() * 8  # sums of 8 products
