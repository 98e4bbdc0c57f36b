"""Bad input to an op: a ValueError of one line, "op: argument: expected X, got Y", and nothing
written.
"""

import re
from fractions import Fraction
from functools import partial

import numpy as np
import pytest
import torch
from _support import OPS, available

import miue_fast
from miue_fast import ops
from miue_fast.data.sources import from_arrays

F, Y = torch.randn(4, 3), torch.tensor([0, 0, 1, 1])
IMAGES = torch.full((4, 3, 2, 2), 128, dtype=torch.uint8)
VIEW = torch.zeros(2, 3, dtype=torch.int32)
GRAD = torch.ones(4, 3, 2, 2)
ONE = torch.zeros(4)


def loss_cases():
    for name in ("nt_xent", "intra_class_distance", "mi_ue_value_and_grad"):
        call = getattr(miue_fast, name)
        yield from [
            (name, "features", call, (x, Y), {})
            for x in (F[0], F.long(), F[None], F.tolist(), F.to(torch.complex64))
        ]
        yield from [
            (name, "labels", call, (F, y), {})
            for y in (Y[:3], Y[:, None], Y.float(), Y.bool(), Y.tolist(), Y.to("meta"))
        ]
        if name != "intra_class_distance":
            yield from [
                (name, "temperature", call, (F, Y, t), {})
                for t in (0.0, -0.1, 1e-4, 11.0, float("nan"), float("inf"))
            ]
            yield from [
                (name, "denominator", call, (F, Y), {"denominator": d}) for d in ("none", None)
            ]
        yield name, "backend", call, (F, Y), {"backend": "fast"}


def step_cases():
    call, z = miue_fast.projected_step, torch.zeros(4)
    good = {"delta": z, "grad": z, "image": z, "alpha": 0.1, "eps": 0.1}
    bad = {
        "grad": [torch.zeros(5), z.half(), z.to("meta")],
        "image": [torch.zeros(4, 1), z.double(), z.byte()],
        "alpha": [-0.1, float("nan"), float("inf")],
        "eps": [-0.1, 1.1, 8, float("nan")],
        "delta": [z.clone().requires_grad_()],
    }
    for argument, values in bad.items():
        for value in values:
            yield "projected_step", argument, call, tuple({**good, argument: value}.values()), {}
    yield "projected_step", "delta", call, (Y, Y, Y, 0.1, 0.1), {}


def store_cases():
    index, flip = torch.tensor([2, 0]), torch.tensor([True, False])
    delta, count = torch.zeros(4, 3, 2, 2), torch.zeros(1, dtype=torch.int64)
    good = {
        "delta": delta,
        "index": index,
        "grad": GRAD[:2],
        "images": IMAGES,
        "flip": flip,
        "alpha": 0.01,
        "eps": 0.03,
        "nonfinite": count,
    }
    bad = {
        "delta": [
            delta[:3],
            delta.double(),
            delta.to("meta"),
            delta.mT,
            delta.long(),
            torch.zeros_like(delta, requires_grad=True),
        ],
        "index": [
            index.int(),
            torch.tensor([4, 0]),
            torch.tensor([0, -1]),
            torch.tensor([2**40, 0]),
            torch.arange(4)[::2],
            index[None],
        ],
        "grad": [GRAD, GRAD[:2, :2], GRAD[:2].double(), GRAD[:2].byte(), GRAD[:2].to("meta"), 3],
        "images": [
            IMAGES[0],
            IMAGES.double(),
            IMAGES.mT.expand(4, 3, 2, 2),
            IMAGES.to(memory_format=torch.channels_last),
            "cat.png",
        ],
        "flip": [flip[:1], flip.float(), flip.to("meta")],
        "alpha": [-1.0, float("nan"), float("inf")],
        "eps": [-1.0, 2.0, float("nan")],
        "nonfinite": [count.int(), torch.zeros(2, dtype=torch.int64), count[0]],
        "view": [VIEW[:1], VIEW.long(), VIEW[:, :2], VIEW.to("meta"), [[0, 0, 0]]],
        "grid": [0, -1, 2.0, True, "4", 2**31],
    }
    for argument, values in bad.items():
        for value in values:
            kwargs = {**good, argument: value}
            yield "projected_step_", argument, miue_fast.projected_step_, (), kwargs
    yield (
        "projected_step_",
        "delta",
        miue_fast.projected_step_,
        (),
        {**good, "delta": delta.to(torch.int8), "eps": 0.0},
    )


def input_cases():
    index, flip, delta = torch.tensor([2, 0]), torch.tensor([True, False]), torch.zeros(4, 3, 2, 2)
    good = {
        "images": IMAGES,
        "delta": delta,
        "index": index,
        "flip": flip,
        "mean": [0.5] * 3,
        "std": [0.2] * 3,
    }
    bad = {
        "images": [IMAGES[0], IMAGES.half(), IMAGES.mT, None],
        "delta": [delta[:3], delta.bfloat16(), delta.mT],
        "index": [index.int(), torch.tensor([4, 0]), torch.tensor([0, -1])],
        "flip": [flip[:1], flip.long()],
        "mean and std": [],
        "dtype": [torch.float64, torch.uint8],
        "view": [VIEW[:1], VIEW.long(), VIEW[:, :2], VIEW.to("meta"), [[0, 0, 0]]],
        "backend": ["fast"],
    }
    for argument, values in bad.items():
        for value in values:
            yield (
                "perturbed_input",
                argument,
                miue_fast.perturbed_input,
                (),
                {**good, argument: value},
            )
    for mean, std in [
        ([0.5], [0.2]),
        ([0.5] * 3, None),
        (None, [0.2] * 3),
        ([0.5] * 3, [0.2, 0, 0.2]),
    ]:
        yield (
            "perturbed_input",
            "mean and std",
            miue_fast.perturbed_input,
            (),
            {**good, "mean": mean, "std": std},
        )
    yield (
        "perturbed_input",
        "eps",
        miue_fast.perturbed_input,
        (),
        {**good, "delta": delta.to(torch.int8)},
    )


X = torch.zeros(2, 16, 4, 4).contiguous(memory_format=torch.channels_last)
WEIGHT, BIAS, MASK = torch.zeros(16, 16, 3, 3), torch.zeros(16), torch.zeros(64, dtype=torch.uint8)
NOT_LIKE_X = [X.contiguous(), X[:1], X.half(), X.to("meta"), X[..., ::2], 3]
SCALE, X8, WEIGHT8 = torch.ones(()), X.to(torch.float8_e4m3fn), WEIGHT.to(torch.float8_e4m3fn)
NOT_A_SCALE = [None, 1.0, SCALE.double(), torch.ones(2), SCALE.to("meta")]
NOT_A_MASK = [
    MASK[:-1],
    MASK.to(torch.int8),
    MASK[:, None],
    torch.zeros(128, dtype=torch.uint8)[::2],
    MASK.to("meta"),
]


def changed(op, call, good, bad):
    for argument, values in bad.items():
        for value in values:
            yield op, argument, call, (), {**good, argument: value}


def epilogue_cases():
    good = {"y": X, "bias": BIAS, "residual": X, "mask": MASK}
    bad = {
        "y": [X.contiguous(), X[0], X.long(), X.mT, None],
        "residual": NOT_LIKE_X,
        "mask": NOT_A_MASK,
    }
    bad["bias"] = [BIAS[:8], BIAS.half(), BIAS.double(), BIAS.to("meta"), torch.zeros(32)[::2]]
    yield from changed("conv_epilogue_", ops.conv_epilogue_, good, bad)
    bad = {"grad": [X.contiguous(), X[0], X.long(), None], "addend": NOT_LIKE_X, "mask": NOT_A_MASK}
    yield from changed(
        "conv_grad_epilogue_", ops.conv_grad_epilogue_, {"grad": X, "addend": X, "mask": MASK}, bad
    )


def convolution_cases():
    good = {"x": X, "weight": WEIGHT, "bias": BIAS, "residual": X, "padding": 1}
    weights = [
        WEIGHT[:, :8],
        WEIGHT.half(),
        WEIGHT[0],
        WEIGHT.to("meta"),
        torch.zeros(16, 16, 9, 9),
    ]
    numbers = {"stride": [0, [1], [1, 1, 1], 1.0], "padding": [-1], "dilation": [0]}
    bad = {
        "x": [X.contiguous(), X[0], X.long()],
        "weight": weights,
        "bias": [BIAS[:8], BIAS.half()],
        "residual": NOT_LIKE_X,
        **numbers,
    }
    yield from changed("conv_forward", ops.conv_forward, good, bad)
    yield "conv_forward", "weight", ops.conv_forward, (), {**good, "groups": 3}
    yield "conv_forward", "want_mask", ops.conv_forward, (), {**good, "relu": False}
    yield "conv_forward", "scale", ops.conv_forward, (), {**good, "scale": SCALE}
    good8 = {"x": X8, "weight": WEIGHT8, "residual": X.bfloat16(), "scale": SCALE, "padding": 1}
    bad8 = {
        "weight": [WEIGHT, WEIGHT.bfloat16()],
        "residual": [X, X8],
        "bias": [BIAS.bfloat16()],
        "scale": NOT_A_SCALE,
    }
    yield from changed("conv_forward", ops.conv_forward, good8, bad8)
    good = {"grad": X, "weight": WEIGHT, "size": X.shape, "addend": X, "mask": MASK, "padding": 1}
    bad = {
        "grad": [X.contiguous(), X[:1], X[:, :, :2].contiguous(memory_format=torch.channels_last)],
        "weight": weights,
        **numbers,
    }
    yield from changed(
        "conv_input_grad",
        ops.conv_input_grad,
        good,
        bad | {"addend": NOT_LIKE_X, "mask": NOT_A_MASK},
    )
    yield "conv_input_grad", "scale", ops.conv_input_grad, (), {**good, "scale": SCALE}
    good8 = {
        "grad": X8,
        "weight": WEIGHT8,
        "size": X.shape,
        "addend": X.bfloat16(),
        "scale": SCALE,
        "padding": 1,
    }
    bad8 = {"weight": [WEIGHT], "addend": [X, X8], "scale": NOT_A_SCALE}
    yield from changed("conv_input_grad", ops.conv_input_grad, good8, bad8)
    index, delta = torch.tensor([2, 0]), torch.zeros(4, 3, 4, 4)
    good = {
        "delta": delta,
        "index": index,
        "grad": X,
        "weight": WEIGHT[:, :3],
        "images": delta.byte(),
        "alpha": 0.01,
        "eps": 0.03,
        "padding": 1,
    }
    bad = {
        "delta": [delta[:3], delta.double(), delta.mT],
        "images": [delta.double(), delta.mT.byte()],
        "grad": [X.contiguous(), X[:1]],
        "index": [index.int(), index[None], torch.tensor([4, 0])],
        "weight": [WEIGHT, WEIGHT[:, :3].half()],
        "alpha": [-1.0],
        "eps": [2.0],
        "flip": [index],
        "nonfinite": [index],
    }
    yield from changed("conv_input_grad_step_", ops.conv_input_grad_step_, good, bad)
    doubles = {"grad": X.double(), "weight": good["weight"].double()}
    yield "conv_input_grad_step_", "grad", ops.conv_input_grad_step_, (), {**good, **doubles}
    yield (
        "conv_input_grad_step_",
        "grad",
        ops.conv_input_grad_step_,
        (),
        {**good, "grad": X8, "weight": WEIGHT8[:, :3]},
    )


NO_NUMBERS = ["0.1", True, None, [0.1], 0.1j, torch.tensor(0.1)]


def jpeg_cases():
    images, call = torch.rand(2, 3, 4, 5), miue_fast.jpeg_round_trip
    wrong = [
        images.half(),
        IMAGES,
        images[0],
        images[:, :2],
        images[..., :0],
        images[:, :, :0],
        images.tolist(),
    ]
    yield from [("jpeg_round_trip", "images", call, (x, 50), {}) for x in wrong]
    qualities = 0, 101, -1, 50.0, True, None, torch.tensor(50), "50"
    yield from [("jpeg_round_trip", "quality", call, (images, q), {}) for q in qualities]
    for chroma in ("4:2:2", 420, None):
        yield "jpeg_round_trip", "chroma", call, (images, 50), {"chroma": chroma}
    yield "jpeg_round_trip", "backend", call, (images, 50), {"backend": "fast"}
    call = ops.jpeg_round_trip_grad
    for grad in (*wrong, images.clone().requires_grad_()):
        yield "jpeg_round_trip_grad", "grad", call, (grad,), {}


def number_cases():
    """Strings, bools, None, lists, complex numbers and tensors where a number is wanted, NaN and
    Inf where it has to be finite.
    """
    steps = {
        "delta": torch.zeros(4),
        "grad": torch.zeros(4),
        "image": torch.zeros(4),
        "alpha": 0.1,
        "eps": 0.1,
    }
    store = {
        "delta": GRAD * 0,
        "index": None,
        "grad": GRAD,
        "images": IMAGES,
        "alpha": 0.01,
        "eps": 0.03,
    }
    conv = {
        "delta": torch.zeros(4, 3, 4, 4),
        "index": None,
        "grad": torch.zeros(4, 16, 4, 4).to(memory_format=torch.channels_last),
        "weight": WEIGHT[:, :3],
        "images": torch.zeros(4, 3, 4, 4),
        "alpha": 0.01,
        "eps": 0.03,
        "padding": 1,
    }
    loss = {"features": F, "labels": Y}
    for value in NO_NUMBERS:
        for name, good in (
            ("projected_step", steps),
            ("projected_step_", store),
            ("conv_input_grad_step_", conv),
        ):
            call = getattr(ops, name)
            yield from [
                (name, argument, call, (), {**good, argument: value})
                for argument in ("alpha", "eps")
            ]
        for name, call in (
            ("nt_xent", miue_fast.nt_xent),
            ("mi_ue_value_and_grad", miue_fast.mi_ue_value_and_grad),
        ):
            if value is not None or name != "nt_xent":
                yield name, "temperature", call, (), {**loss, "temperature": value}
        if value is not None:
            yield "nt_xent", "temperature", miue_fast.nt_xent, (), {**loss, "t": value}
            yield (
                "class_covariance",
                "num_classes",
                miue_fast.class_covariance,
                (),
                {**loss, "num_classes": value},
            )
            yield (
                "perturbed_input",
                "eps",
                miue_fast.perturbed_input,
                (),
                {"images": IMAGES, "delta": GRAD.to(torch.int8), "eps": value},
            )
        yield (
            "perturbed_input",
            "mean and std",
            miue_fast.perturbed_input,
            (),
            {"images": IMAGES, "mean": [value] * 3, "std": [1] * 3},
        )
    for value in [*NO_NUMBERS, float("nan"), float("inf")]:
        yield (
            "mi_ue_value_and_grad",
            "zeta",
            miue_fast.mi_ue_value_and_grad,
            (),
            {**loss, "zeta": value},
        )
    for constants in (
        {"mean": "abc", "std": [1] * 3},
        {"mean": [0] * 3, "std": [1, 1, float("nan")]},
    ):
        yield (
            "perturbed_input",
            "mean and std",
            miue_fast.perturbed_input,
            (),
            {"images": IMAGES, **constants},
        )
    yield (
        "nt_xent",
        "temperature and t",
        miue_fast.nt_xent,
        (),
        {**loss, "temperature": 0.1, "t": 0.1},
    )
    yield "projected_step", "delta", ops.projected_step, (), {**steps, "delta": None}
    yield "projected_step", "grad", ops.projected_step, (), {**steps, "grad": [0.0]}
    yield (
        "conv_forward",
        "weight",
        ops.conv_forward,
        (),
        {"x": X, "weight": WEIGHT, "padding": 1, "groups": True},
    )


def test_the_type_that_came_is_named():
    for value, text in (
        ("0.1", "str '0.1'"),
        (True, "bool True"),
        (None, "None"),
        ([1], r"list \[1\]"),
        (float("nan"), "nan"),
    ):
        with pytest.raises(
            ValueError,
            match=(
                r"^mi_ue_value_and_grad: temperature: "
                rf"expected a number from 1e-3 to 10, got {text}$"
            ),
        ):
            miue_fast.mi_ue_value_and_grad(F, Y, value)
    for number in (1, np.float32(0.5), np.float64(0.5), np.int64(1), Fraction(1, 2)):
        assert miue_fast.nt_xent(F, Y, number) == miue_fast.nt_xent(F, Y, float(number))
    for dtype in (np.uint16, np.uint32, np.uint64, np.int64, np.int16):
        images, labels = np.ones((2, 3, 4, 4), dtype), np.array([0, 1], dtype)
        with pytest.raises(
            ValueError,
            match=rf"images: expected uint8, or floats in \[0, 1\], got {np.dtype(dtype).name} ",
        ):
            from_arrays(images, labels)
        assert from_arrays(images.astype(np.uint8), labels).labels.tolist() == [0, 1]


CASES = [
    *loss_cases(),
    *step_cases(),
    *store_cases(),
    *input_cases(),
    *epilogue_cases(),
    *convolution_cases(),
    *jpeg_cases(),
    *number_cases(),
]


def refused(call, op, argument, args, kwargs):
    with pytest.raises(ValueError) as error:
        call(*args, **kwargs)
    assert re.fullmatch(rf"{op}: {argument}: expected .+, got .+", str(error.value)), str(
        error.value
    )


@pytest.mark.parametrize(
    "op, argument, call, args, kwargs",
    CASES,
    ids=[f"{c[0]}-{c[1]}-{k}" for k, c in enumerate(CASES)],
)
def test_refused_in_one_line_and_nothing_written(op, argument, call, args, kwargs):
    tensors = [
        v
        for v in (*args, *kwargs.values())
        if isinstance(v, torch.Tensor) and v.device.type == "cpu"
    ]
    before = [t.detach().clone() for t in tensors]
    for impl in available(OPS[op]):
        if argument == "backend":
            refused(call, op, argument, args, kwargs)
        else:
            refused(call, op, argument, args, {**kwargs, "backend": impl.backend})
    assert all(torch.equal(t, b) for t, b in zip(tensors, before))


def test_a_missing_driver_is_a_backend_error():
    if torch.cuda.is_available():
        pytest.skip("this machine has a CUDA device")
    for backend in ("cuda", "triton"):
        with pytest.raises(
            miue_fast.BackendError,
            match=(
                rf"^nt_xent: backend '{backend}' cannot serve torch.float32 on cpu "
                r"\(triton: .*reference: available\)$"
            ),
        ):
            if (
                OPS["nt_xent"].why_not(OPS["nt_xent"].impls[0], "cpu", torch.float32) is None
                and backend == "triton"
            ):
                pytest.skip("triton runs in the interpreter")
            miue_fast.nt_xent(F, Y, backend=backend)


@pytest.mark.parametrize("name", ["nt_xent", "intra_class_distance"])
def test_degenerate_batches(name):
    for impl in available(OPS[name]):
        loss = partial(getattr(miue_fast, name), backend=impl.backend)
        assert loss(F[:0], Y[:0]).isnan()
        assert loss(F[:1], Y[:1]) == 0
        for bad in (torch.nan, torch.inf):
            assert loss(torch.where(torch.arange(12).view(4, 3) == 5, bad, F), Y).isnan(), (
                impl.backend,
                bad,
            )
        if name == "nt_xent":
            assert loss(F, Y * 0).abs() < 1e-6
            assert (
                miue_fast.nt_xent(F, Y * 0, denominator="negatives", backend=impl.backend)
                == -torch.inf
            )


def test_a_list_is_no_index_and_a_gradient_is_not_lost():
    images, delta = torch.zeros(2, 3, 4, 4, dtype=torch.uint8), torch.zeros(2, 3, 4, 4)
    for call in (
        lambda: miue_fast.perturbed_input(images, delta, [0]),
        lambda: miue_fast.perturbed_input(images, delta, None, [True, False]),
        lambda: miue_fast.projected_step_(
            delta, [0], torch.zeros(1, 3, 4, 4), images, alpha=0.1, eps=0.1
        ),
    ):
        with pytest.raises(ValueError, match=r"(index|flip): expected a .* tensor .* got list"):
            call()
    with pytest.raises(ValueError, match="images and delta: expected no gradient required"):
        miue_fast.perturbed_input(images, delta.requires_grad_())
    with torch.no_grad():
        assert not miue_fast.perturbed_input(images, delta).requires_grad
