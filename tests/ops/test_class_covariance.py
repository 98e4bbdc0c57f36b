"""What the registry's tests do not say about class_covariance: the definition, collapsed classes,
levels, threads, refusals.
"""

import pytest
import torch
from _support import OPS, assert_same_bits, available, check_statistics

import miue_fast
from miue_fast.dispatch import native

OP = OPS["class_covariance"]
IMPLS = pytest.mark.parametrize("impl", available(OP), ids=lambda impl: impl.backend)
NATIVE = pytest.mark.skipif(native.cpu_missing() is not None, reason=str(native.cpu_missing()))


def batch(rows, width, classes, *, dtype=torch.float32, seed=3):
    gen = torch.Generator().manual_seed(seed)
    return (
        torch.randn(rows, width, generator=gen).to(dtype),
        torch.randint(classes, (rows,), generator=gen),
        classes,
    )


def by_loops(features, labels, classes):
    """The definition in Python numbers."""
    width = features.shape[1]
    counts, means, covariances = [], [], []
    for k in range(classes):
        rows = [row for row, label in zip(features.tolist(), labels.tolist()) if label == k]
        mean = [sum(row[i] for row in rows) / max(len(rows), 1) for i in range(width)]
        sums = [
            [sum((row[i] - mean[i]) * (row[j] - mean[j]) for row in rows) for j in range(width)]
            for i in range(width)
        ]
        counts.append(len(rows))
        means.append(mean)
        covariances.append([[value / max(len(rows), 1) for value in line] for line in sums])
    return (
        torch.tensor(counts),
        torch.tensor(means, dtype=torch.float64),
        torch.tensor(covariances, dtype=torch.float64),
    )


def test_the_oracle_is_the_definition():
    features, labels, classes = batch(23, 4, 4, dtype=torch.float64)
    labels[labels == 2] = 3
    torch.testing.assert_close(
        OP.truth(features, labels, classes), by_loops(features, labels, classes)
    )


@IMPLS
def test_against_torch_cov(impl):
    features, labels, classes = batch(200, 37, 3)
    _, _, covariances = miue_fast.class_covariance(features, labels, backend=impl.backend)
    for k in range(classes):
        torch.testing.assert_close(
            covariances[k], torch.cov(features[labels == k].T, correction=0), rtol=1e-5, atol=1e-5
        )


@IMPLS
def test_a_collapsed_class_far_from_zero(impl):
    """Spread of a few units in the last place: the rounding of the mean alone would be as large."""
    ulp = 2.0**-13  # of float32 numbers in [1024, 2048)
    steps = torch.tensor([0.0, 1.0, 1.0, 3.0, 1.0])[:, None] * torch.tensor(
        [1.0, -1.0]
    )  # mean 1.2: no float32 number
    counts, means, covariances = miue_fast.class_covariance(
        1500 + ulp * steps, torch.zeros(5, dtype=torch.int64), backend=impl.backend
    )
    assert counts.tolist() == [5] and means.tolist() == [[1500 + ulp, 1500 - ulp]]
    torch.testing.assert_close(
        covariances[0] / ulp**2, torch.tensor([[0.96, -0.96], [-0.96, 0.96]]), rtol=1e-6, atol=0
    )
    for dtype in sorted({torch.float32, torch.float64} & impl.dtypes, key=str):
        rows = torch.full((7, 3), 0.1, dtype=dtype)
        same = miue_fast.class_covariance(
            rows, torch.zeros(7, dtype=torch.int64), backend=impl.backend
        )
        assert same[1].eq(rows[0]).all() and same[2].eq(0).all(), f"equal rows of {dtype}"


@IMPLS
def test_nan_stays_in_its_class_and_columns(impl):
    features, labels, classes = batch(40, 6, 3)
    features[labels.tolist().index(1), 4] = torch.nan
    _, means, covariances = miue_fast.class_covariance(features, labels, backend=impl.backend)
    bad = torch.zeros(classes, 6, 6, dtype=torch.bool)
    bad[1, 4], bad[1, :, 4] = True, True
    assert torch.equal(covariances.isnan(), bad) and torch.equal(
        means.isnan(), bad[:, 4, 4, None] & (torch.arange(6) == 4)
    )


@IMPLS
@pytest.mark.parametrize("labels", [torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64])
def test_integer_labels_of_any_kind(impl, labels):
    features, y, classes = batch(30, 5, 3)
    want = impl.fn(features, y, classes)
    strided = torch.stack([y, y + 9], 1)[:, 0].to(labels)
    assert_same_bits(miue_fast.class_covariance(features, strided, backend=impl.backend), want)


@IMPLS
def test_empty_batches_and_classes(impl):
    features, labels, _ = batch(4, 3, 2)
    for rows, classes in ((0, None), (0, 2), (4, 9)):
        counts, means, covariances = miue_fast.class_covariance(
            features[:rows], labels[:rows], classes, backend=impl.backend
        )
        k = classes or 0
        assert (
            counts.shape == (k,)
            and means.shape == (k, 3)
            and covariances.shape == (k, 3, 3)
            and counts.sum() == rows
        )
        assert means[counts == 0].eq(0).all() and covariances[counts == 0].eq(0).all()
    assert miue_fast.class_covariance(features[:, :0], labels, 2, backend=impl.backend)[
        2
    ].shape == (2, 0, 0)


REFUSED = [
    ("labels", {"labels": torch.tensor([0, 1, 2, -1])}),
    ("labels", {"num_classes": 2}),
    ("labels", {"num_classes": 0}),
    ("labels", {"labels": torch.zeros(3, dtype=torch.int64)}),
    ("labels", {"labels": torch.zeros(4)}),
    ("features", {"features": torch.zeros(4)}),
    ("features", {"features": torch.zeros(4, 3, dtype=torch.int64)}),
    ("num_classes", {"num_classes": -1}),
    ("num_classes", {"num_classes": 3.0}),
    ("num_classes", {"num_classes": True}),
    ("backend", {"backend": "fast"}),
]


@IMPLS
@pytest.mark.parametrize(
    "argument, change", REFUSED, ids=lambda value: None if isinstance(value, dict) else value
)
def test_refused_in_one_line(impl, argument, change):
    good = {
        "features": torch.zeros(4, 3),
        "labels": torch.tensor([0, 1, 2, 2]),
        "num_classes": 3,
        "backend": impl.backend,
    }
    with pytest.raises(ValueError, match=rf"^class_covariance: {argument}: expected .+, got .+$"):
        miue_fast.class_covariance(**good | change)


@IMPLS
def test_a_gradient_is_refused(impl):
    features, labels, _ = batch(6, 3, 2)
    features.requires_grad_()
    with pytest.raises(
        ValueError,
        match=(
            r"^class_covariance: features: expected no gradient required \(detach them\), "
            r"got a tensor that requires one$"
        ),
    ):
        miue_fast.class_covariance(features, labels, backend=impl.backend)
    with torch.no_grad():
        assert not miue_fast.class_covariance(features, labels, backend=impl.backend)[
            1
        ].requires_grad


@NATIVE
@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.float64], ids=lambda dtype: str(dtype)[6:]
)
def test_levels_and_threads(dtype):
    """Every instruction set is right; within one the bits depend on no thread count. Ragged panels,
    several chains, several windows.
    """
    level, threads, cpu = (
        native.cpu_level(),
        torch.get_num_threads(),
        next(i for i in OP.impls if i.backend == "cpu"),
    )
    cases = [
        batch(900, 130, 3, dtype=dtype),
        batch(60, 7, 40, dtype=dtype),
        batch(5000, 300, 4, dtype=dtype),
    ]
    try:
        for name in ("generic", "avx2", "avx512"):
            try:
                native.set_cpu_level(name)
            except ValueError:
                continue  # this processor lacks it
            for args in cases:
                torch.set_num_threads(2)
                check_statistics(OP, args, [cpu])
                first = cpu.fn(*args)
                for count in (1, 3, 8):
                    torch.set_num_threads(count)
                    assert_same_bits(cpu.fn(*args), first)
    finally:
        native.set_cpu_level(level)
        torch.set_num_threads(threads)


@NATIVE
def test_rows_of_no_class_are_left_out():
    """The kernel itself, past the check of the op: nothing is read or written where such a label
    would point.
    """
    features, labels, classes = batch(50, 9, 3)
    stray = torch.cat([labels, torch.tensor([-1, 3, 2**40, -(2**62)])])
    assert_same_bits(
        native.class_covariance(torch.cat([features, features[:4]]), stray, classes),
        native.class_covariance(features, labels, classes),
    )
