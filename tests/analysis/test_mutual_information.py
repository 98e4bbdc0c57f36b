"""Sliced mutual information against closed forms on Gaussians and against plain loops in
float64.
"""

import itertools
import json
import math
import os

import numpy as np
import pytest
import torch

from benchmarks.harness import tables
from benchmarks.studies import mi_gaussian
from miue_fast.analysis import (
    ESTIMATORS,
    gaussian_sliced_mi,
    mutual_information,
    slice_directions,
    slices,
)
from miue_fast.analysis.histogram import histogram, terrell_scott
from miue_fast.analysis.kde import kde, scott
from miue_fast.analysis.knn import knn
from miue_fast.analysis.mine import mine

FAST = {"hidden": 8, "steps": 20, "batch": 64}


def gaussian(points, width, rho, seed=0):
    draw = torch.Generator().manual_seed(seed)
    x, noise = (torch.randn(points, width, generator=draw) for _ in range(2))
    return x, rho * x + (1 - rho**2) ** 0.5 * noise


def skewed(points, width, lowest, highest, seed=0):
    """(x, y, their covariances): scales from 1 to 3, correlations from lowest to highest per axis,
    both rotated together.
    """
    rho, scale = torch.linspace(lowest, highest, width), torch.linspace(1, 3, width)
    turn = torch.linalg.qr(
        torch.randn(width, width, generator=torch.Generator().manual_seed(seed + 100))
    )[0]
    x, noise = gaussian(points, width, 0, seed)
    y = rho * x + (1 - rho**2).sqrt() * noise
    own, cross = turn.T @ torch.diag(scale**2) @ turn, turn.T @ torch.diag(rho * scale**2) @ turn
    return x * scale @ turn + 5, y * scale @ turn - 7, own, cross


def errors(estimator, points, samples, count, width, lowest, highest, **options):
    """Relative errors against the closed form over the same directions, one per sample and
    slice.
    """
    found = []
    for seed in range(samples):
        x, y, own, cross = skewed(points, width, lowest, highest, seed)
        theta, _ = slice_directions(width, width, count, seed=seed)
        got = mutual_information(x, y, estimator, slices=count, seed=seed, **options).per_slice
        found.append(got / gaussian_sliced_mi(own, own, cross, theta) - 1)
    return torch.cat(found)


@pytest.mark.parametrize("width, samples, count", [(1, 8, 1), (8, 2, 8), (64, 1, 16)])
@pytest.mark.parametrize(
    "estimator, points", [("histogram", 20000), ("kde", 2000), ("knn", 2000), ("mine", 2000)]
)
def test_within_five_percent_on_gaussians(estimator, points, width, samples, count):
    assert errors(estimator, points, samples, count, width, 0.8, 0.9).mean().abs() < 0.05


@pytest.mark.parametrize(
    "estimator, rho, low, high",
    [
        ("histogram", 0.9, -0.08, -0.04),  # what varies inside a bin is not seen
        ("histogram", 0.99, -0.17, -0.11),
        (
            "kde",
            0.3,
            -0.25,
            -0.1,
        ),  # the logarithm of a noisy density is too low, of the joint one most
        ("kde", 0.5, -0.09, -0.03),
    ],
)
def test_the_bias_that_the_docstring_states(estimator, rho, low, high):
    assert low < errors(estimator, 2000, 1, 48, 64, rho, rho).mean() < high


def test_miller_madow_removes_the_excess_of_counting():
    x, y = gaussian(2000, 64, 0)
    bins = terrell_scott(2000)
    plain, corrected = (
        mutual_information(x, y, slices=64, miller_madow=on).value for on in (False, True)
    )
    excess = (bins - 1) ** 2 / (2 * 2000)
    assert bins == 16 and plain == pytest.approx(excess, rel=0.1) and abs(corrected) < 0.1 * excess


def test_closed_form():
    theta = torch.tensor([[1.0, 0.0], [0.6, 0.8]])
    own, cross = torch.diag(torch.tensor([4.0, 1.0])), torch.diag(torch.tensor([2.0, 0.0]))
    second = 0.72**2 / (1.44 + 0.64) ** 2
    want = torch.tensor(
        [-0.5 * math.log(1 - 0.25), -0.5 * math.log(1 - second)], dtype=torch.float64
    )
    assert torch.allclose(gaussian_sliced_mi(own, own, cross, theta), want, rtol=1e-6)
    assert gaussian_sliced_mi(
        own, torch.eye(3), torch.zeros(2, 3), theta, torch.ones(2, 3) / 3**0.5
    ).tolist() == [0, 0]


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("estimator", ["histogram", "knn"])
def test_every_slice_follows_its_own_directions(estimator, shared):
    x, y, own, cross = skewed(2000, 3, 0.2, 0.9)
    theta, phi = slice_directions(3, 3, 12, shared=shared, seed=4)
    want = gaussian_sliced_mi(own, own, cross, theta, phi)
    got = mutual_information(x, y, estimator, slices=12, shared=shared, seed=4).per_slice
    assert want.max() > 2 * want.min() and (got - want).abs().max() < 0.1
    mixed = gaussian_sliced_mi(
        own, own, cross, *slice_directions(3, 3, 12, shared=not shared, seed=4)
    )
    assert (got - mixed).abs().max() > 0.2


def test_directions():
    theta, phi = slice_directions(5, 5, 4000)
    assert theta is phi and torch.allclose(theta.norm(dim=1), torch.ones(4000))
    assert torch.allclose(theta.T @ theta / 4000, torch.eye(5) / 5, atol=0.02)
    theta, phi = slice_directions(5, 2, 7, shared=False, seed=3)
    assert phi.shape == (7, 2) and torch.equal(theta, slice_directions(5, 9, 7, seed=3)[0])


def rows(points=60, seed=0):
    u, v = gaussian(points, 2, 0.8, seed)
    return u.T.contiguous().exp(), v.T.contiguous()


def test_histogram_against_numpy():
    u, v = rows()
    both = (histogram(u, v, bins=5, miller_madow=on).tolist() for on in (False, True))
    for a, b, plain, corrected in zip(u.numpy(), v.numpy(), *both):
        edges = [np.sort(side)[[0, 12, 24, 36, 48, 59]] for side in (a, b)]
        share = np.histogram2d(a, b, edges)[0] / 60
        assert np.allclose(share.sum(0), 0.2) and np.allclose(share.sum(1), 0.2)
        terms = [p * math.log(p / 0.04) for p in share.flatten() if p]
        assert plain == pytest.approx(sum(terms), rel=1e-9)
        assert corrected == pytest.approx(plain + (4 + 4 - (len(terms) - 1)) / 120, rel=1e-9)


def test_histogram_keeps_equal_values_together_and_does_not_feel_monotone_maps():
    u, v = rows(500)
    assert torch.equal(
        histogram(u, v, bins=8, miller_madow=True),
        histogram(u.log(), (3 * v).sinh(), bins=8, miller_madow=True),
    )
    ties = (
        (torch.arange(500) < 250).float().expand(1, 500)
    )  # in the order of their index: cut by index they would look dependent
    assert histogram(ties, ties.roll(125, 1), bins=8, miller_madow=False).abs().max() < 1e-12


def test_kde_against_loops():
    u, v = rows()
    got = kde(u, v, bandwidth=0.4)
    for a, b, found in zip(u.double().numpy(), v.double().numpy(), got.tolist()):
        shape = np.cov(a, b, bias=True) * 0.4**2
        inverse, total = np.linalg.inv(shape), 0.0
        for i in range(60):
            others = [j for j in range(60) if j != i]
            gaps = np.stack([a[others] - a[i], b[others] - b[i]])
            joint = np.exp(-np.einsum("in,ij,jn->n", gaps, inverse, gaps) / 2).mean() / (
                2 * math.pi * np.linalg.det(shape) ** 0.5
            )
            alone = [
                np.exp(-(gap**2) / (2 * s)).mean() / (2 * math.pi * s) ** 0.5
                for gap, s in zip(gaps, np.diag(shape))
            ]
            total += math.log(joint / (alone[0] * alone[1]))
        assert found == pytest.approx(total / 60, rel=1e-4)


@pytest.mark.parametrize("k", [1, 4])
def test_knn_against_loops(k):
    u, v = (slices.standard(side) for side in rows())
    harmonic = [0.0, *itertools.accumulate(1 / n for n in range(1, 61))]

    def psi(n):
        return harmonic[n - 1] - 0.5772156649015329

    for a, b, found in zip(u.numpy(), v.numpy(), knn(u, v, k=k).tolist()):
        total = 0.0
        for i in range(60):
            du, dv = np.delete(abs(a - a[i]), i), np.delete(abs(b - b[i]), i)
            radius = np.sort(np.maximum(du, dv))[k - 1]
            total += psi(int((du < radius).sum()) + 1) + psi(int((dv < radius).sum()) + 1)
        assert found == pytest.approx(psi(k) + psi(60) - total / 60, rel=1e-9)


def test_mine_is_judged_on_points_it_was_not_trained_on():
    """A network that learns 75 independent points by heart must not find information in them."""
    u, v = (side.T.contiguous() for side in gaussian(100, 8, 0))
    assert mine(u, v, hidden=16, steps=300, batch=64, seed=0).mean() < 0.05


def test_knn_of_points_that_coincide():
    """Fair coins: equal ones share one bit, independent ones nothing."""
    coins = torch.randint(0, 2, (2, 400), generator=torch.Generator().manual_seed(0)).float()
    equal, independent = knn(coins, torch.stack([coins[0], coins[0]]), k=3).tolist()
    assert equal == pytest.approx(math.log(2), abs=0.02) and independent == pytest.approx(
        0, abs=0.02
    )


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_identical_and_constant_features(estimator):
    x, _ = gaussian(400, 4, 0)
    bins, psi = terrell_scott(400), torch.tensor([400.0, 3.0]).double().digamma()
    want, allowed = {
        "histogram": (math.log(bins) + (bins - 1) / 800, 0.005),
        "knn": ((psi[0] - psi[1]).item(), 1e-9),
        "kde": (math.log(400) + 1.6, 0.3),
        "mine": (3, 1.5),
    }[estimator]
    assert mutual_information(x, x, estimator, slices=4, steps=100).value == pytest.approx(
        want, abs=allowed
    )
    dead = torch.ones(400, 4)
    for left, right in ((x, dead), (dead, x), (dead, dead)):
        assert mutual_information(
            left, right, estimator, slices=4, steps=100
        ).value == pytest.approx(0, abs=0.02)


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_repeatable_seeded_and_the_same_in_any_pieces(estimator, monkeypatch):
    x, y = gaussian(300, 5, 0.6)
    torch.manual_seed(3)
    before = torch.get_rng_state()
    first, again, other = (
        mutual_information(x, y, estimator, slices=6, seed=seed, **FAST) for seed in (1, 1, 2)
    )
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(first.per_slice, again.per_slice) and not torch.equal(
        first.per_slice, other.per_slice
    )
    monkeypatch.setitem(slices.PIECE, "cpu", 2000)  # a few rows of one slice at a time
    assert torch.allclose(
        mutual_information(x, y, estimator, slices=6, seed=1, **FAST).per_slice,
        first.per_slice,
        atol=1e-4,
    )


def test_result():
    x, y = gaussian(200, 3, 0.9)
    found = mutual_information(x.half(), y.double(), "knn", slices=9, k=5, seed=2)
    assert found.per_slice.shape == (9,) and found.per_slice.dtype == torch.float64
    assert found.value == pytest.approx(found.per_slice.mean().item())
    assert found.stderr == pytest.approx(found.per_slice.std().item() / 3)
    options = {"points": 200, "slices": 9, "shared": True, "seed": 2, "k": 5}
    assert json.loads(json.dumps(found.to_dict())) == {
        "value": found.value,
        "stderr": found.stderr,
        "estimator": "knn",
        "options": options,
    }
    assert mutual_information(x, y, slices=1).stderr is None
    assert mutual_information(x, y, "kde", slices=1).options["bandwidth"] == scott(200)
    assert (
        mutual_information(x, torch.cat([y, y], 1), slices=2, shared=False).options["bins"]
        == terrell_scott(200)
        == 8
    )


BAD = [
    ({"x": [1.0]}, "x: expected a float tensor"),
    ({"x": torch.zeros(30)}, "x: expected a float tensor"),
    ({"x": torch.zeros(30, 3, dtype=torch.int64)}, "x: expected a float tensor"),
    ({"x": torch.zeros(19, 3)}, "x: expected at least 20 points, got 19"),
    ({"x": torch.full((30, 3), math.nan)}, "x: expected finite"),
    ({"y": torch.full((30, 3), math.inf)}, "y: expected finite"),
    ({"y": torch.zeros(29, 3)}, "y: expected 30 points"),
    ({"y": torch.zeros(30, 4)}, "shared: expected False for x and y of different widths"),
    ({"estimator": "bins"}, "estimator: expected 'histogram' or"),
    ({"slices": 0}, "slices: expected a whole number >= 1, got 0"),
    ({"bins": 1}, "bins: expected a whole number from 2 to 30"),
    ({"estimator": "kde", "bandwidth": 0}, "bandwidth: expected a finite number > 0"),
    ({"estimator": "knn", "k": 30}, "k: expected a whole number from 1 to 29"),
    ({"estimator": "mine", "hidden": 0}, "hidden: expected a whole number"),
    ({"estimator": "mine", "steps": 0}, "steps: expected a whole number"),
    ({"estimator": "mine", "batch": 1}, "batch: expected a whole number >= 2"),
]


@pytest.mark.parametrize("wrong, message", BAD, ids=lambda v: v if isinstance(v, str) else "")
def test_bad_input(wrong, message):
    arguments = {"x": torch.randn(30, 3), "y": torch.randn(30, 3)} | wrong
    with pytest.raises(ValueError, match=f"^mutual_information: {message}"):
        mutual_information(**arguments)


def test_committed_table():
    """Every cell, and errors that are 5 % and chance where the docstring promises no other bias."""
    record = tables.load(mi_gaussian.RESULT)
    assert record["kind"] == "mi" and not record["quick"] and record["environment"]["threads"] == 1
    cells = [
        (*of, width, rho)
        for of in mi_gaussian.POINTS
        for width in mi_gaussian.SAMPLES
        for rho in mi_gaussian.CORRELATIONS
    ]
    assert [
        (row["estimator"], row["points"], row["dimension"], row["rho"]) for row in record["rows"]
    ] == cells
    for row in record["rows"]:
        assert row["closed_form"] == pytest.approx(-0.5 * math.log(1 - row["rho"] ** 2), rel=1e-4)
        assert (
            abs(row["error"] - (row["estimate"] / row["closed_form"] - 1)) < 1e-3
            and row["seconds_per_slice"] > 0
        )
        biased = (row["estimator"], row["points"], row["rho"]) in [
            ("histogram", 2000, 0.9),
            ("kde", 2000, 0.5),
        ]
        assert abs(row["error"]) < (0.08 if biased else 0.05) + (
            0 if biased else 2 * row["error_stderr"]
        ), row
    assert mi_gaussian.markdown(record).count("\n") == len(cells) + 1
    assert not any(
        word in json.dumps(record)
        for word in ("/home", "/root", "/work", "/tmp", os.uname().nodename)
    ), "a path or host name"


def test_a_cell_of_the_table_repeats():
    again = [mi_gaussian.cell("histogram", 8, 0.7, 2000, 6, 8) for _ in range(2)]
    assert again[0]["estimate"] == again[1]["estimate"]
    assert again[0]["samples"] * again[0]["slices"] == 48 and abs(again[0]["error"]) < 0.05
