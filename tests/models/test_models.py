"""The built-in networks: form, initialisation, normalisation inside."""

import itertools
import math

import pytest
import torch
from torch import nn

from miue_fast import freeze, models
from miue_fast.frozen import AutogradNet, FrozenNet


def _with_statistics(model):
    """Running statistics and affine parameters that are not the identity."""
    g = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                for tensor, low in (
                    (module.weight, 0.5),
                    (module.running_var, 0.5),
                    (module.bias, -0.5),
                    (module.running_mean, -0.5),
                ):
                    tensor.copy_(torch.rand(tensor.shape, generator=g) + low)
    return model


def test_resnet18_has_the_cifar_form():
    model = models.build("resnet18", 10)
    assert (
        sum(p.numel() for p in model.parameters()) == 11_173_962
    )  # He et al. 2016 with a 3x3 stem, as CIFAR programs count it
    assert not any(isinstance(m, nn.MaxPool2d) for m in model.modules())
    sizes = []
    for block in model.layers:
        block.register_forward_hook(
            lambda module, inputs, output: sizes.append(tuple(output.shape[1:]))
        )
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
            assert abs(conv.weight.std().item() / expected - 1) < 4 / math.sqrt(
                2 * conv.weight.numel()
            )  # four deviations of the estimate


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
    assert (
        inside(x) - expected
    ).abs().max() < 1e-5 * expected.abs().max()  # mean and std are float32 constants
    assert not torch.equal(inside(x), plain(x))


@pytest.mark.parametrize(
    "arguments, part",
    [
        (
            ("vgg", 10),
            (
                "name: expected one of vgg11, vgg16, densenet121, lenet5, vit, linear, mlp2, mlp3, "
                "resnet18, small_resnet, resnet50, got 'vgg'"
            ),
        ),
        (("small_resnet", 0), "num_classes"),
        (("small_resnet", 10, -1), "width"),
        (("small_resnet", 10, 8, 4), "size"),
        (("small_resnet", 10, 8, 32, 4), "channels"),
        (("lenet5", 10, None, 12), "size: expected a whole number >= 16"),
        (("lenet5", 10, 8), "width: expected None for lenet5"),
        (("vit", 10, 192, 18), "size: expected a multiple of 4 for vit"),
        (("vit", 10, 64), "width: expected a multiple of 3 for vit"),
    ],
)
def test_bad_arguments(arguments, part):
    name, classes, *rest = arguments
    with pytest.raises(ValueError) as error:
        models.build(name, classes, **dict(zip(("width", "size", "channels"), rest)))
    assert part in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    "name, width",
    [
        ("small_resnet", 2),
        ("small_resnet", 8),
        ("small_resnet", 16),
        ("resnet18", 8),
        ("resnet50", 2),
        ("densenet121", 2),
    ],
)
def test_no_strided_1x1_with_few_channels(name, width):
    """oneDNN issue 6035: its weight gradient in channels-last corrupts the heap below 16 channels
    (seen: free() aborts in training).
    """
    for module in models.build(name, 3, width=width).modules():
        if (
            isinstance(module, nn.Conv2d)
            and module.kernel_size == (1, 1)
            and module.in_channels < 16
        ):
            assert module.stride == (1, 1)


def test_picking_pixels_first_is_a_strided_convolution():
    block = models.build("small_resnet", 3).layers[1]
    x = torch.rand(2, 8, 9, 9)
    assert block.pick == 2
    picked = block.conv3(x[:, :, ::2, ::2])
    strided = nn.functional.conv2d(x, block.conv3.weight, stride=2)
    assert (picked - strided).abs().max() <= 1e-6 * strided.abs().max() * 8  # sums of 8 products


def _counts():
    """Parameters for 32 x 32 colour images and ten classes, from the layer sizes in the papers; a
    norm has two per channel.
    """
    fc = 512 * 10 + 10
    narrow, wide = (
        [3, 64, 128, 256, 256, 512, 512, 512, 512],
        [3, 64, 64, 128, 128, 256, 256, 256, 512, 512, 512, 512, 512, 512],
    )
    token, tokens = 192, 64 + 1
    block = (
        12 * token * token + (3 + 1 + 4 + 1) * token + 2 * 2 * token
    )  # attention 4 w^2, perceptron 8 w^2, biases, two norms
    return {
        # this and the next: the ImageNet counts (11,689,512 and 25,557,032) with a 3x3 stem and ten
        # classes
        "resnet18": 11_173_962,
        "resnet50": 25_557_032 - 64 * 3 * (49 - 9) - (2048 + 1) * 990,
        "densenet121": 7_978_856
        - 64 * 3 * (49 - 9)
        - (1024 + 1) * 990
        - 2 * 64,  # and no norm behind the stem
        "vgg11": sum(9 * a * b + 2 * b for a, b in itertools.pairwise(narrow)) + fc,
        "vgg16": sum(9 * a * b + 2 * b for a, b in itertools.pairwise(wide)) + fc,
        "vit": (16 * 3 + 1) * token
        + token
        + tokens * token
        + 6 * block
        + 2 * token
        + token * 10
        + 10,
        "lenet5": 25 * 3 * 6 + 6 + 25 * 6 * 16 + 16 + 400 * 120 + 120 + 120 * 84 + 84 + 850,
        "linear": 3072 * 10 + 10,
        "mlp2": 3072 * 512 + 512 + fc,
        "mlp3": 3072 * 512 + 512 + 512 * 512 + 512 + fc,
    }


@pytest.mark.parametrize("name", [name for name in models.NETWORKS if name != "small_resnet"])
def test_parameter_counts(name):
    assert sum(p.numel() for p in models.build(name, 10).parameters()) == _counts()[name]


def test_densenet121_and_resnet50_are_torchvisions_without_the_imagenet_stem():
    """The weights behind the stem have the same shapes in the same order as an implementation that
    is not ours.
    """
    from miue_fast.evaluation import _torchvision

    if _torchvision.missing():
        pytest.skip("no torchvision")
    _torchvision.transforms()
    from torchvision import models as theirs

    for name in ("resnet50", "densenet121"):
        ours = [p.shape for p in models.build(name, 10).parameters() if p.dim() == 4][1:]
        assert (
            ours == [p.shape for p in getattr(theirs, name)().parameters() if p.dim() == 4][1:]
        ), name


WIDTHS = {"densenet121": 4, "vit": 12, "lenet5": None, "linear": None}


@pytest.mark.parametrize("channels, size", [(3, 16), (1, 32), (3, 8)])
@pytest.mark.parametrize("name", models.NETWORKS)
def test_every_network_gives_logits_and_features_that_freeze_can_differentiate(
    name, channels, size
):
    if name == "lenet5" and size == 8:
        pytest.skip("lenet5 needs 16")
    torch.manual_seed(0)
    model = _with_statistics(
        models.build(name, 5, width=WIDTHS.get(name, 4), size=size, channels=channels)
    ).eval()
    x = torch.rand(4, channels, size, size, requires_grad=True)
    seen = []
    hook = dict(model.named_modules())[models.NETWORKS[name].feature].register_forward_hook(
        lambda module, inputs, out: seen.append(out.flatten(1))
    )
    logits = model(x)
    hook.remove()
    assert logits.shape == (4, 5)
    assert torch.equal(model.fc(seen[0]), logits)  # the features are what the classifier reads
    frozen = freeze(model, models.NETWORKS[name].feature)
    assert isinstance(frozen, AutogradNet if name == "vit" else FrozenNet)
    grad = torch.randn(seen[0].shape)
    (wanted,) = torch.autograd.grad(seen[0], x, grad)
    assert (frozen.forward(x.detach()) - seen[0]).abs().max() <= 1e-4 * seen[0].abs().max()
    assert (frozen.input_grad(grad) - wanted).abs().max() <= 1e-4 * wanted.abs().max()


def test_vit_attends_by_its_formula():
    torch.manual_seed(0)
    block = models.build("vit", 5, width=12, size=8).blocks[0].double()
    x = torch.randn(2, 5, 12, dtype=torch.float64)
    q, k, v = block.qkv(block.norm1(x)).chunk(3, -1)
    heads = []
    for part in range(3):
        cut = slice(4 * part, 4 * part + 4)
        heads.append((q[..., cut] @ k[..., cut].mT / 2).softmax(-1) @ v[..., cut])
    y = x + block.project(torch.cat(heads, -1))
    assert torch.allclose(block(x), y + block.mlp(block.norm2(y)), rtol=1e-12, atol=1e-12)


def test_vit_knows_where_a_patch_is():
    torch.manual_seed(0)
    model = models.build("vit", 5, width=12, size=8).eval().double()
    x = torch.rand(1, 3, 8, 8, dtype=torch.float64)
    assert not torch.allclose(model(x), model(x.roll(4, 3)), rtol=1e-9)
