"""Convolutions on matrix tiles: float64's results within the rounding of bfloat16, ReLU bits that
are those of the results, and the same bits however the work is divided. The division of the work
runs on every machine, with products in plain C++; the tiles where the processor has them.
"""

import pytest
import torch
import torch.nn.functional as F

from miue_fast.dispatch import native
from miue_fast.dispatch.masks import mask_bytes
from miue_fast.frozen import freeze, matrix
from miue_fast.models import build

NHWC = torch.channels_last
pytestmark = pytest.mark.skipif(native.cpu_missing() is not None, reason="needs the C++ kernels")
TILES = pytest.mark.skipif(native.matrix_missing() is not None, reason=str(native.matrix_missing()))
PLAIN = [True, pytest.param(False, marks=TILES)]
# Batch, channels in and out, height, width, taps, stride, padding, dilation.
CASES = [
    (1, 1, 1, 1, 1, (1, 1), 1, 0, 1),
    (3, 64, 64, 8, 8, (3, 3), 1, 1, 1),
    (33, 32, 16, 5, 7, (3, 3), 1, 1, 1),
    (17, 3, 64, 6, 6, (3, 3), 1, 1, 1),
    (2, 128, 96, 7, 7, (3, 3), 2, 1, 1),
    (5, 200, 48, 4, 4, (3, 3), 2, 1, 1),
    (40, 64, 40, 6, 6, (1, 1), 2, 0, 1),
    (1, 64, 33, 9, 5, (5, 5), 1, 2, 1),
    (2, 16, 7, 12, 12, (3, 3), 1, 2, 2),
    (2, 3, 64, 20, 20, (7, 7), 2, 3, 1),
    (1, 8, 8, 3, 70, (1, 3), 1, 0, 1),
    (65, 96, 64, 1, 1, (1, 1), 1, 0, 1),
    (0, 8, 8, 4, 4, (3, 3), 1, 1, 1),
]


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


class Case:
    """One convolution with float64's result, input gradient and weight gradient."""

    def __init__(self, batch, channels, results, height, width, taps, stride, padding, dilation):
        self.generator = torch.Generator().manual_seed(1)
        self.conv, self.taps = ([stride] * 2, [padding] * 2, [dilation] * 2), taps
        self.weight = self.drawn(results, channels, *taps)
        self.x = self.drawn(batch, channels, height, width)
        weight = self.weight.double().requires_grad_()
        x = self.x.double().requires_grad_()
        y = F.conv2d(x, weight, None, *self.conv)
        self.grad = self.drawn(*y.shape)
        y.backward(self.grad.double())
        self.truth = {False: y.detach(), True: x.grad}
        self.weight_grad = weight.grad

    def drawn(self, *shape):
        x = torch.randn(shape, generator=self.generator)
        return x.to(torch.bfloat16).contiguous(memory_format=NHWC)

    def __call__(self, back, plain, bias=None, residual=None, relu=False, keep=None, rows=None):
        """(result, bits) of the images `rows`, or of all."""
        x, truth = (self.grad if back else self.x), self.truth[back]
        rows = slice(None) if rows is None else rows
        y = torch.full(truth[rows].shape, 7, dtype=torch.bfloat16).contiguous(memory_format=NHWC)
        mask = torch.full((mask_bytes(y.numel()),), 255, dtype=torch.uint8) if relu else None
        packed = native.pack_matrix_weights(self.weight, back)
        x, residual = x[rows], None if residual is None else residual[rows]
        native.matrix_conv(
            x, packed, bias, residual, relu, mask, keep, y, self.taps, self.conv, back, plain
        )
        return y, mask


def unpacked(bits, y):
    """ReLU bits in the order of the memory as booleans of y's shape [B, C, H, W]."""
    flags = (bits[:, None] >> torch.arange(8, dtype=torch.uint8) & 1).flatten()[: y.numel()]
    batch, channels, height, width = y.shape
    return flags.view(batch, height, width, channels).permute(0, 3, 1, 2).bool()


def close(y, truth, roundings=1.0):
    """Equal but for `roundings` roundings to bfloat16 of the largest values, and float32 sums."""
    if truth.numel():
        most = truth.abs().max() * (roundings * 2**-8 + 2**-18)
        assert (y.double() - truth).abs().max() <= most


@pytest.mark.parametrize("plain", PLAIN, ids=["plain", "tiles"])
@pytest.mark.parametrize("back", [False, True], ids=["forward", "back"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_parity(case, back, plain):
    made = Case(*case)
    truth = made.truth[back]
    close(made(back, plain)[0], truth)
    residual, bias = made.drawn(*truth.shape), torch.randn(truth.shape[1], generator=made.generator)
    if back:
        keep = torch.randint(
            256, (mask_bytes(truth.numel()),), generator=made.generator, dtype=torch.uint8
        )
        y, _ = made(back, plain, residual=residual, keep=keep)
        close(y, torch.where(unpacked(keep, truth), truth + residual, 0.0), 2)
        return
    expected = truth + residual + bias.double()[:, None, None]
    y, bits = made(back, plain, bias, residual, relu=True)
    close(y, expected.relu(), 2)
    assert torch.equal(unpacked(bits, y), y > 0)
    past = bits[len(bits) // 8 * 8 - 8 :].view(torch.int64) if len(bits) else bits
    assert y.numel() % 64 == 0 or past.item() >> (y.numel() % 64) == 0  # nothing behind the last
    close(made(back, plain, bias)[0], truth + bias.double()[:, None, None])


@pytest.mark.parametrize("plain", PLAIN, ids=["plain", "tiles"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_weight_gradient(case, plain):
    made = Case(*case)
    got = native.matrix_weight_grad(made.x, made.grad, made.taps, made.conv, plain)
    assert got.dtype == torch.float32 and got.is_contiguous(memory_format=NHWC)
    truth = made.weight_grad
    assert (got - truth).abs().max() <= 1e-5 * truth.abs().max() + 1e-30


@pytest.mark.parametrize("plain", PLAIN, ids=["plain", "tiles"])
@pytest.mark.parametrize("back", [False, True], ids=["forward", "back"])
def test_the_division_of_the_work_changes_no_bit(back, plain, threads):
    """Threads, images per call and repetition."""
    made = Case(67, 96, 72, 6, 6, (3, 3), 2, 1, 1)
    threads(1)
    whole, _ = made(back, plain)
    weight_grad = native.matrix_weight_grad(made.x, made.grad, made.taps, made.conv, plain)
    for count in (2, 3, 7):
        threads(count)
        assert torch.equal(made(back, plain)[0], whole)
        again = native.matrix_weight_grad(made.x, made.grad, made.taps, made.conv, plain)
        assert torch.equal(again, weight_grad)
    for rows in (slice(0, 1), slice(30, 35), slice(50, 67)):
        assert torch.equal(made(back, plain, rows=rows)[0], whole[rows])


@pytest.mark.parametrize("plain", PLAIN, ids=["plain", "tiles"])
def test_not_a_number_stays(plain):
    made = Case(2, 32, 32, 3, 3, (1, 1), 1, 0, 1)
    made.x[1, :, 0, 0] = torch.nan
    y, bits = made(False, plain, relu=True)
    assert y[1, :, 0, 0].isnan().all() and unpacked(bits, y)[1, :, 0, 0].all()
    assert not y[0].isnan().any()


@TILES
def test_a_frozen_network_takes_the_tiles():
    torch.manual_seed(0)
    network = build("resnet18", 10, width=32).eval()
    images = torch.rand(16, 3, 32, 32, generator=torch.Generator().manual_seed(2))
    net = freeze(network, dtype=torch.bfloat16)
    features = net.forward(images)
    convolutions = [layer for layer in net.plan.layers if hasattr(layer, "packed")]
    taken = [layer for layer in convolutions if False in layer.packed]
    assert len(taken) >= 15 and all(
        type(layer.packed[False]) is matrix.MatrixConv for layer in taken
    )
    truth = freeze(network, dtype=torch.float64)
    expected = truth.forward(images)
    assert (features - expected).abs().max() <= 0.03 * expected.abs().max()
    grad = torch.randn(features.shape, generator=torch.Generator().manual_seed(3))
    exact = truth.input_grad(grad.double())
    library = freeze(network, dtype=torch.bfloat16, backend="reference")
    library.forward(images)

    def flipped(net):
        wrong = net.input_grad(grad).sign() != exact.sign()
        return wrong.float().mean(), exact[wrong].abs().sum() / exact.abs().sum()

    for own, theirs in zip(flipped(net), flipped(library)):
        assert own <= 1.1 * theirs
    with torch.no_grad():
        network.conv1.weight.mul_(2)
    net.refold()
    truth.refold()
    assert not torch.equal(net.forward(images), features)
    assert (net.forward(images) - truth.forward(images)).abs().max() <= 0.03 * expected.abs().max()


@TILES
def test_lower_levels_have_no_tiles():
    try:
        native.set_cpu_level("avx2")
        assert "avx2" in str(native.matrix_missing())
        assert not matrix.chosen(torch.zeros(64, 64, 3, 3, dtype=torch.bfloat16), 1, False)
    finally:
        native.set_cpu_level("avx512")


def test_what_is_not_taken():
    half = torch.zeros(64, 64, 3, 3, dtype=torch.bfloat16)
    assert not matrix.chosen(half.float(), 1, False)
    assert not matrix.chosen(half, 2, False)
    assert not matrix.chosen(half[:16], 1, False)
