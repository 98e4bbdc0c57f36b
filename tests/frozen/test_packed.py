"""The packed convolutions of the CPU: float64's results within the rounding of their transforms,
the same bits however the work is divided, and epilogues that are those of `conv_epilogue_`.
"""

import itertools

import pytest
import torch
import torch.nn.functional as F

from miue_fast.dispatch import native
from miue_fast.frozen.packed import PackedConv, family_of
from miue_fast.reference.conv_epilogue import conv_epilogue_, conv_grad_epilogue_, mask_bytes

NHWC = torch.channels_last
pytestmark = pytest.mark.skipif(native.cpu_missing() is not None, reason="needs the C++ kernels")
KINDS = [(3, 1, False), (3, 1, True), (3, 2, False), (1, 1, False), (1, 2, False)]
# Batch, channels in and out, height, width: ragged tiles, parts of vectors, one and several groups.
SIZES = [
    (1, 1, 1, 1, 1),
    (2, 3, 64, 9, 13),
    (1, 64, 3, 33, 47),
    (3, 16, 16, 8, 8),
    (2, 20, 12, 7, 7),
    (1, 17, 33, 14, 5),
    (2, 64, 96, 16, 16),
    (70, 128, 256, 4, 4),
    (0, 8, 8, 4, 4),
]


@pytest.fixture(params=["generic", "avx2", "avx512"])
def level(request):
    before = native.cpu_level()
    try:
        native.set_cpu_level(request.param)
    except ValueError as error:
        pytest.skip(str(error))
    yield request.param
    native.set_cpu_level(before)


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def drawn(generator, *shape):
    x = torch.randn(shape, generator=generator)
    return x.contiguous(memory_format=NHWC) if x.dim() == 4 else x


class Case:
    """A convolution, or with `back` its input gradient, with the float64 result."""

    def __init__(self, taps, stride, small, back, size, seed=1):
        batch, channels, count, height, width = size
        self.generator, self.back = torch.Generator().manual_seed(seed), back
        self.weight = drawn(self.generator, count, channels, taps, taps) / (channels * taps) ** 0.5
        rows, columns = ((n - 1) // stride + 1 for n in (height, width))
        conv = {"stride": stride, "padding": taps // 2}
        narrow, wide = (batch, count, rows, columns), (batch, channels, height, width)
        self.x = drawn(self.generator, *(narrow if back else wide))
        self.size = wide if back else narrow
        if back:
            self.truth = torch.nn.grad.conv2d_input(
                wide, self.weight.double(), self.x.double(), **conv
            )
        else:
            self.truth = F.conv2d(self.x.double(), self.weight.double(), **conv)
        pair = (stride, stride), (taps // 2, taps // 2), (1, 1)
        self.family = "three2" if small else family_of(self.weight, *pair, 1, back)
        self.packed, self.conv = PackedConv(self.family, back), (*map(list, pair), 1)
        self.packed.refold(self.weight)

    def __call__(self, bias=None, residual=None, relu=False, want_mask=False, keep=None, rows=None):
        """(result, bits): of the images `rows` alone where they are given."""
        x = self.x if rows is None else self.x[rows]
        if self.back:
            size = (len(x), *self.size[1:])
            return self.packed.input_grad(x, self.weight, residual, keep, size, *self.conv), None
        y, mask = self.packed.forward(x, self.weight, bias, residual, *self.conv, relu, want_mask)
        return y, mask if want_mask else None

    def like(self):
        return drawn(self.generator, *self.size)

    def tolerance(self):
        """Per result: the sum of the absolute products, the dot product's own condition, times the
        growth of the transforms and the roundings of a chain.
        """
        scale = self.x.double().abs().amax() if self.x.numel() else 0.0
        terms = self.weight.double().abs().sum((0, 2, 3) if self.back else (1, 2, 3)).amax()
        return 32 * torch.finfo(torch.float32).eps * float(scale * terms)


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize("back", [False, True], ids=["forward", "back"])
def test_float64_and_bits(level, kind, back, size, threads):
    case = Case(*kind, back, size)
    threads(2)
    plain, _ = case()
    assert plain.is_contiguous(memory_format=NHWC) and plain.shape == torch.Size(case.size)
    if plain.numel():
        assert (plain.double() - case.truth).abs().max() <= case.tolerance()
    for count in (1, 3):
        threads(count)
        assert torch.equal(case()[0], plain), f"other bits with {count} threads"
    for start, stop in itertools.pairwise(sorted({0, len(plain) // 3, len(plain)})):
        if start < stop:  # images do not depend on the others of the call
            part, _ = case(rows=slice(start, stop))
            assert torch.equal(part, plain[start:stop]), "other bits in a smaller batch"


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_forward_epilogue(level, kind, size):
    case = Case(*kind, False, size)
    plain, none = case()
    assert none is None
    bias, residual = torch.randn(size[2], generator=case.generator), case.like()
    for b, r in itertools.product((None, bias), (None, residual)):
        wanted, bits = (
            plain.clone(memory_format=torch.preserve_format),
            torch.empty(mask_bytes(plain.numel()), dtype=torch.uint8),
        )
        conv_epilogue_(wanted, b, r, True, bits)
        got, mask = case(bias=b, residual=r, relu=True, want_mask=True)
        assert torch.equal(got, wanted) and torch.equal(mask, bits)
        assert torch.equal(case(bias=b, residual=r, relu=True)[0], wanted)
        summed = plain.clone(memory_format=torch.preserve_format)
        conv_epilogue_(summed, b, r, False, None)
        assert torch.equal(case(bias=b, residual=r)[0], summed)


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_gradient_epilogue(level, kind, size):
    case = Case(*kind, True, size)
    plain, _ = case()
    count = mask_bytes(plain.numel())
    mask = torch.randint(256, (count,), dtype=torch.uint8, generator=case.generator)
    for addend, keep in itertools.product((None, case.like()), (None, mask)):
        wanted = plain.clone(memory_format=torch.preserve_format)
        conv_grad_epilogue_(wanted, addend, keep)
        got, none = case(residual=addend, keep=keep)
        assert none is None and torch.equal(got, wanted)


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_weight_gradient(level, size, threads):
    batch, channels, count, height, width = size
    generator = torch.Generator().manual_seed(3)
    x, grad = (drawn(generator, batch, each, height, width) for each in (channels, count))
    shape = count, channels, 3, 3
    truth = torch.nn.grad.conv2d_weight(x.double(), shape, grad.double(), padding=1)
    found = []
    for number in (1, 2, 3):
        threads(number)
        found.append(native.conv_weight_grad(x, grad))
    assert found[0].shape == shape and found[0].is_contiguous(memory_format=NHWC)
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])
    # What a weight sums up, in magnitude, is the condition of its gradient.
    terms = torch.nn.grad.conv2d_weight(x.double().abs(), shape, grad.double().abs(), padding=1)
    error = (found[0].double() - truth).abs()
    assert (error <= 32 * torch.finfo(torch.float32).eps * terms.max()).all()


def test_weights_of_another_level_are_refused(level):
    case = Case(3, 1, False, False, (1, 8, 8, 4, 4))
    other = "avx2" if level == "generic" else "generic"
    try:
        native.set_cpu_level(other)
    except ValueError as error:
        pytest.skip(str(error))
    with pytest.raises(RuntimeError, match=f"packed for {other}, got {level}"):
        case()


def test_a_refold_takes_the_same_memory():
    case = Case(3, 1, False, False, (1, 8, 8, 4, 4))
    place, before = case.packed.weights.data_ptr(), case()[0]
    case.packed.refold(case.weight * 2)
    assert case.packed.weights.data_ptr() == place
    assert torch.allclose(case()[0], 2 * before)


def test_what_no_family_computes():
    weight = torch.randn(8, 8, 3, 3)
    one, same = (1, 1), (1, 1)
    assert family_of(weight, one, same, one, 1, False) == "three4"
    wide = torch.empty(1, 1, 3, 3).expand(1024, 512, 3, 3)
    assert family_of(wide, one, same, one, 1, True) == "three2"
    wider = torch.empty(1, 1, 3, 3).expand(2048, 1024, 3, 3)
    assert family_of(wider, one, same, one, 1, True) is None
    assert family_of(weight, (2, 2), same, one, 1, True) == "strided_back"
    for changed in (
        (weight, (2, 1), same, one, 1),
        (weight, one, (0, 0), one, 1),
        (weight, one, same, (2, 2), 1),
        (weight, one, same, one, 2),
        (weight.double(), one, same, one, 1),
        (torch.randn(8, 8, 5, 5), one, (2, 2), one, 1),
    ):
        assert family_of(*changed, False) is None
