"""Every op agrees with its definition on any valid input (hypothesis; MIUE_FUZZ cases per op, 2,000
by default).

Hypothesis chooses the structure and a seed, torch the data. Cases are the same in every run;
nothing is stored."""

import os

import pytest
import torch
from _support import (
    BY_NUMPY,
    DEVICES,
    LOSSES,
    OPS,
    assert_same_bits,
    available,
    check_losses,
    check_shrinks,
    check_statistics,
    run,
)
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from miue_fast.reference.conv_epilogue import mask_bytes

FUZZ = settings(
    max_examples=int(os.environ.get("MIUE_FUZZ", "2000")),
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=list(HealthCheck),
)
FLOATS = [torch.float32, torch.float16, torch.bfloat16]
SEED = st.integers(0, 2**31)
# Powers of ten of the features. Distances take any that float64's squares take, the other losses
# any above the clamp of the norms, and covariances those whose squares are numbers of the dtype.
MAGNITUDES = {
    "intra_class_distance": {
        torch.float32: (-28, 33),
        torch.bfloat16: (-28, 33),
        torch.float16: (-2, 3),
        torch.float64: (-130, 140),
    },
    "class_covariance": {
        torch.float32: (-5, 17),
        torch.bfloat16: (-5, 17),
        torch.float16: (-2, 3),
        torch.float64: (-5, 140),
    },
}
ABOVE_CLAMP = {
    torch.float32: (-5, 33),
    torch.bfloat16: (-5, 33),
    torch.float16: (-2, 3),
    torch.float64: (-5, 140),
}


def strided(tensor, kind):
    """The same values in memory of another layout."""
    rows, columns = tensor.shape
    if kind == "columns apart":
        return torch.stack([tensor, torch.full_like(tensor, torch.nan)], 2).flatten(1)[:, ::2]
    if kind == "rows apart":
        return torch.stack([tensor, torch.full_like(tensor, torch.nan)], 1).flatten(0, 1)[::2]
    if kind == "transposed":
        return tensor.t().contiguous().t()
    if kind == "odd offset":
        wide = torch.full((rows * columns + 1,), torch.nan, dtype=tensor.dtype)
        return wide[1:].view(rows, columns).copy_(tensor)
    return tensor


@st.composite
def batches(draw, name):
    """(features, labels) of an op: B 0..40, D 0..70."""
    gen = torch.Generator().manual_seed(draw(SEED))
    rows, columns = draw(st.integers(0, 40)), draw(st.integers(0, 70))
    dtype = draw(st.sampled_from([*FLOATS, torch.float64]))
    low, high = MAGNITUDES.get(name, ABOVE_CLAMP)[dtype]
    layout = draw(
        st.sampled_from(
            ["one class", "two", "few", "many", "lone members", "sorted", "huge", "negative"]
        )
    )
    classes = {"one class": 1, "two": 2, "many": 30}.get(layout, 4)
    labels = (
        torch.randperm(rows, generator=gen)
        if layout == "lone members"
        else torch.randint(classes, (rows,), generator=gen)
    )
    values = draw(
        st.sampled_from(["normal", "relu", "tight", "duplicates", "zeros", "uneven rows", "sparse"])
    )
    features = torch.randn(rows, columns, generator=gen, dtype=torch.float64)
    if values == "relu":
        features = features.relu()
    elif values == "tight":
        features = (
            torch.randn(classes, columns, generator=gen, dtype=torch.float64)[labels % classes]
            + 1e-3 * features
        )
    elif values == "duplicates":
        features = features[torch.randint(3, (rows,), generator=gen) % max(rows, 1)]
    elif values == "zeros":
        features[torch.rand(rows, generator=gen) < 0.3] = 0
    elif values == "uneven rows":
        features = features * 10 ** (
            3 * torch.rand(rows, 1, generator=gen, dtype=torch.float64) - 2
        )
    elif values == "sparse":
        features = features * (torch.rand(rows, columns, generator=gen) < 0.1)
    features = (features * 10.0 ** draw(st.floats(low, high))).to(dtype)
    # Norms are clamped at 1e-8: below, a row is zero or the closed form does not hold.
    if name not in MAGNITUDES:
        features[torch.linalg.vector_norm(features.double(), dim=1) < 1e-7] = 0
    if layout == "sorted":
        labels = labels.sort().values
    elif layout == "huge":
        labels = labels * 2**60 - 2**62
    elif layout == "negative":
        labels = -1 - labels
    features = strided(
        features,
        draw(
            st.sampled_from(
                ["contiguous", "columns apart", "rows apart", "transposed", "odd offset"]
            )
        ),
    )
    return features, labels


LOG_T = st.floats(-3, 1).map(lambda v: min(max(10**v, 1e-3), 10.0))
DENOMINATOR = st.sampled_from(["all", "negatives"])
ARGUMENTS = {
    "nt_xent": st.tuples(batches("nt_xent"), LOG_T, DENOMINATOR, st.booleans()),
    "intra_class_distance": st.tuples(
        batches("intra_class_distance"), st.booleans(), st.booleans()
    ),
    "mi_ue_value_and_grad": st.tuples(
        batches("mi_ue_value_and_grad"),
        LOG_T,
        st.sampled_from([0.0, 1e-3, 0.1, 1.0, 10.0]),
        DENOMINATOR,
        st.booleans(),
    ),
}


def on(device, args):
    return tuple(a.to(device) if isinstance(a, torch.Tensor) else a for a in args)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", LOSSES)
def test_losses(name, device):
    op = OPS[name]

    @FUZZ
    @given(ARGUMENTS[name])
    def check(case):
        (features, labels), *rest = case
        args = on(device, (features, labels, *rest))
        plain, truth = check_losses(op, args, available(op, device, features.dtype)[:-1])
        check_shrinks(op, args, plain, truth)

    check()


@pytest.mark.parametrize("device", DEVICES)
def test_class_covariance(device):
    op = OPS["class_covariance"]

    @FUZZ
    @given(batches("class_covariance"), st.integers(0, 3))
    def check(batch, empty):
        features, labels = batch
        classes, labels = labels.unique(return_inverse=True)
        args = on(device, (features, labels, len(classes) + empty))
        check_statistics(op, args, available(op, device, features.dtype)[:-1])

    check()


def shuffled(tensor, order):
    """The same values with the dimensions in memory in another order."""
    back = [order.index(k) for k in range(len(order))]
    return tensor.permute(order).contiguous().permute(back)


def special(tensor, gen, *numbers):
    """Puts each of the numbers into about a tenth of the places."""
    for number in numbers:
        tensor[torch.rand(tensor.shape, generator=gen) < 0.1] = number
    return tensor


def any_range(draw, image, gen):
    """On the [0, 1] scale, or normalised, or anything."""
    kind = draw(st.sampled_from(["right", "right", "normalised", "anything"]))
    if kind == "anything":
        return special(
            image * 10.0 ** draw(st.floats(-30, 30)),
            gen,
            torch.inf,
            -torch.inf,
            torch.nan,
            -1e-40,
            255,
            -0.0,
        )
    return image if kind == "right" else image * 5 - 2


SHAPES = st.tuples(st.integers(0, 6), st.integers(1, 4), st.integers(0, 9), st.integers(0, 40))
EPS = st.one_of(st.just(8 / 255), st.just(1.0), st.floats(-9, 0).map(lambda v: 10**v))
ALPHA = st.one_of(st.just(0.0), st.just(0.8 / 255), st.floats(-9, 2).map(lambda v: 10**v))
ORDER = st.permutations(range(4))


@st.composite
def projected_steps(draw):
    gen = torch.Generator().manual_seed(draw(SEED))
    shape, dtype, eps = (
        draw(SHAPES),
        draw(st.sampled_from([*FLOATS, torch.float64])),
        draw(st.one_of(EPS, st.just(0.0))),
    )
    delta = (torch.rand(shape, generator=gen) * 4 - 2) * eps
    image = any_range(draw, special(torch.rand(shape, generator=gen), gen, 0, 1), gen)
    grad = special(
        torch.randn(shape, generator=gen), gen, 0, -0.0, torch.nan, torch.inf, -torch.inf, 1e-40
    )
    tensors = [shuffled(x.to(dtype), draw(ORDER)) for x in (delta, grad, image)]
    return *tensors, draw(ALPHA), eps


@st.composite
def stores(draw, eps):
    """(gen, delta store, images, index, flip, batch)."""
    gen = torch.Generator().manual_seed(draw(SEED))
    shape, dtype = draw(SHAPES), draw(st.sampled_from([torch.float32, torch.float16, torch.int8]))
    if draw(st.booleans()):
        images = special(torch.randint(256, shape, generator=gen, dtype=torch.uint8), gen, 0, 255)
    else:
        images = any_range(draw, special(torch.rand(shape, generator=gen), gen, 0, 1), gen)
    delta = (torch.rand(shape, generator=gen) * 4 - 2) * eps
    if dtype == torch.int8:
        delta = torch.randint(-128, 128, shape, generator=gen)
    kind, index, batch = (
        draw(st.sampled_from(["whole", "permuted", "some", "none"])),
        None,
        shape[0],
    )
    if kind != "whole":
        batch = {
            "permuted": shape[0],
            "some": int(torch.randint(shape[0] + 1, (), generator=gen)),
            "none": 0,
        }[kind]
        index = torch.randperm(shape[0], generator=gen)[:batch].contiguous()
    flip = draw(st.sampled_from([None, torch.bool, torch.uint8]))
    if flip is not None:
        flip = (torch.rand(batch, generator=gen) < 0.5).to(flip)
    return gen, delta.to(dtype), images, index, flip, (batch, *shape[1:])


@st.composite
def inplace_steps(draw):
    eps = draw(EPS)
    gen, delta, images, index, flip, shape = draw(stores(eps))
    eps = 0.0 if delta.dtype != torch.int8 and draw(st.integers(0, 9)) == 0 else eps
    grad = special(
        torch.randn(shape, generator=gen), gen, 0, -0.0, torch.nan, torch.inf, -torch.inf, 1e-40
    )
    grad = grad.to(draw(st.sampled_from(FLOATS)))
    layout = draw(st.sampled_from(["shuffled", "every other", "expanded"]))
    if layout == "shuffled":
        grad = shuffled(grad, draw(ORDER))
    elif layout == "every other":
        grad = torch.stack([grad, torch.full_like(grad, torch.nan)], 4).flatten(3)[..., ::2]
    elif shape[0]:
        grad = grad[:1].expand(shape)
    nonfinite = torch.tensor([draw(st.sampled_from([0, 2**40]))]) if draw(st.booleans()) else None
    return delta, index, grad, images, flip, draw(ALPHA), eps, nonfinite


@st.composite
def inputs(draw):
    eps = draw(EPS)
    gen, delta, images, index, flip, shape = draw(stores(eps))
    mean, std = [], []
    if draw(st.booleans()):
        mean = (torch.rand(shape[1], generator=gen, dtype=torch.float64) * 2 - 0.5).tolist()
        std = (torch.rand(shape[1], generator=gen, dtype=torch.float64) + 0.01).tolist()
    delta = delta if draw(st.integers(0, 3)) else None
    return (
        images,
        delta,
        index,
        flip,
        mean,
        std,
        eps,
        draw(st.sampled_from(FLOATS)),
        draw(st.booleans()),
    )


@st.composite
def activations(draw):
    """(gen, make): `make()` gives dense values of one shape and dtype, full of what a ReLU bends
    at.
    """
    gen = torch.Generator().manual_seed(draw(SEED))
    shape = draw(
        st.one_of(
            st.tuples(st.integers(0, 9), st.integers(1, 200)),
            st.tuples(st.integers(0, 3), st.integers(1, 140), st.integers(1, 6), st.integers(1, 7)),
        )
    )
    dtype, power = draw(st.sampled_from([*FLOATS, torch.float64])), draw(st.integers(-9, 5))

    def make():
        x = special(
            torch.randn(shape, generator=gen) * 10.0**power,
            gen,
            0,
            -0.0,
            torch.nan,
            torch.inf,
            -torch.inf,
            1e-40,
        ).to(dtype)
        x = x.contiguous(memory_format=torch.channels_last) if len(shape) == 4 else x
        if offset:
            wide = torch.empty(x.numel() + 1, dtype=dtype)[1:]
            x = torch.as_strided(wide, x.shape, x.stride()).copy_(x)
        return x

    offset = draw(st.booleans())
    return gen, make


@st.composite
def epilogues(draw):
    gen, make = draw(activations())
    y = make()
    bias = special(torch.randn(y.shape[1], generator=gen, dtype=torch.float64), gen, 0, 1e-9, 1e-41)
    bias = bias.to(torch.promote_types(y.dtype, torch.float32))
    mask = torch.full((mask_bytes(y.numel()),), 0xA5, dtype=torch.uint8)
    return (
        y,
        bias if draw(st.booleans()) else None,
        make() if draw(st.booleans()) else None,
        draw(st.booleans()),
        mask if draw(st.booleans()) else None,
    )


@st.composite
def grad_epilogues(draw):
    gen, make = draw(activations())
    grad = make()
    mask = torch.randint(256, (mask_bytes(grad.numel()),), generator=gen, dtype=torch.uint8)
    return grad, make() if draw(st.booleans()) else None, mask if draw(st.booleans()) else None


POINTWISE = {
    "projected_step": projected_steps(),
    "projected_step_": inplace_steps(),
    "perturbed_input": inputs(),
    "conv_epilogue_": epilogues(),
    "conv_grad_epilogue_": grad_epilogues(),
}


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", POINTWISE)
def test_pointwise(name, device):
    op = OPS[name]

    @FUZZ
    @given(POINTWISE[name])
    def check(args):
        expected = BY_NUMPY[name](*args)
        args = on(device, args)
        for impl in available(op, device, op.dtype_of(*args)):
            assert_same_bits([g.cpu() for g in run(op, impl.fn, args)], expected)
            if name == "perturbed_input":
                got = impl.fn(*args)
                assert got.is_contiguous(
                    memory_format=torch.channels_last if args[-1] else torch.contiguous_format
                )
                assert not got.numel() or got.data_ptr() not in [
                    a.data_ptr() for a in args if isinstance(a, torch.Tensor)
                ]

    check()
