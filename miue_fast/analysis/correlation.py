"""Rank correlation, for `MI gap against accuracy gap`."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ..support.messages import fail

EXACT = 7  # all n! orders up to here
DRAWS = 9999


@dataclass(frozen=True)
class Spearman:
    """rho, -1 to 1; p: two-sided permutation p-value; exact: over all orders (True) or over seeded
    random ones.
    """

    rho: float
    p: float
    exact: bool


def spearman(
    a: Sequence[float] | torch.Tensor, b: Sequence[float] | torch.Tensor, *, seed: int = 0
) -> Spearman:
    """Spearman's rank correlation of two sequences of n >= 3 numbers, ties sharing their mean rank,
    with a permutation p-value.

    p is the share of the orders of b whose |rho| is at least as large as the one found: of all n!
    for n <= 7, else of 9999 random ones (seeded) and the one found (Phipson and Smyth 2010), so
    that it is never 0. With n = 5 no p below 2 / 120 exists.
    Errors: ValueError (lengths, NaN, a sequence of equal numbers, which has no rank correlation).
    """
    values = {
        name: torch.as_tensor(side, dtype=torch.float64) for name, side in (("a", a), ("b", b))
    }
    n = len(values["a"]) if values["a"].dim() == 1 else 0
    if n < 3:
        fail("spearman", "a", "a sequence of at least 3 numbers", list(values["a"].shape))
    for name, side in values.items():
        if side.shape != (n,) or not torch.isfinite(side).all() or (side == side[0]).all():
            fail("spearman", name, f"{n} finite numbers, not all equal", side.tolist())
    x, y = (_centred_ranks(side) for side in values.values())
    norm = (x.norm() * y.norm()).item()
    rho = (x @ y).item() / norm
    if n <= EXACT:
        orders = torch.tensor(list(itertools.permutations(range(n))))
    else:
        draw = torch.Generator().manual_seed(seed)
        orders = torch.rand(DRAWS, n, generator=draw).argsort(1)
    extreme = int(((y[orders] @ x).abs() / norm >= abs(rho) - 1e-12).sum())
    exact = n <= EXACT
    return Spearman(rho, extreme / len(orders) if exact else (extreme + 1) / (DRAWS + 1), exact)


def _centred_ranks(values):
    below = (values[:, None] > values[None]).sum(1)
    equal = (values[:, None] == values[None]).sum(1)
    return (
        below + (equal - len(values)).double() / 2
    )  # rank - (n + 1) / 2, rank = below + (equal + 1) / 2
