"""Linear separability of the perturbations themselves."""

from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F

from ..dispatch.checks import INTEGERS
from ..dispatch.registry import DOUBLES
from ..support.calls import ordinary
from ..support.messages import describe, fail

OP = "linear_separability"


@dataclass(frozen=True)
class Separability:
    """Accuracies from 0 to 1 of a linear classifier on perturbations alone.

    train, test: on the two parts. chance: of always answering the class most frequent in the
        training part, on the test part.
    """

    train: float
    test: float
    chance: float
    train_images: int
    test_images: int
    classes: int

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


@ordinary()
def linear_separability(
    delta: torch.Tensor,
    labels: torch.Tensor,
    *,
    test_share: float = 0.3,
    l2: float = 1e-4,
    iterations: int = 100,
    seed: int = 0,
) -> Separability:
    """How well a linear classifier tells the classes from the perturbations alone, fitted on one
    part and tested on the other.

    Many availability poisons are linearly separable shortcuts (Yu et al., "Availability Attacks
    Create Shortcuts", KDD 2022): test near 1. Noise without class information gives test near
    chance, though with more pixels than images train is 1 all the same.

    Multinomial logistic regression on the flattened perturbations, centred on the training part and
    scaled to a mean squared norm of 1: mean cross-entropy + l2 / 2 * |W|^2 (no penalty on the
        bias), full batch, L-BFGS with strong Wolfe line search from zero.

    Args:
        delta: float [N, ...] (any scale) or int8 levels. labels: integers [N] of the same device,
            any values.
        test_share: share of each class that is held out, in (0, 1); every class needs an image in
            both parts.
        l2: >= 0. iterations: at most, of L-BFGS. seed: of the split.

    Deterministic for one machine and thread count. 5000 x 3072 takes seconds on one CPU core.
    Errors: ValueError."""
    if (
        not isinstance(delta, torch.Tensor)
        or delta.dim() < 2
        or delta.dtype not in DOUBLES | {torch.int8}
        or not delta.numel()
    ):
        fail(OP, "delta", "a float or int8 tensor [N, ...]", describe(delta))
    if (
        not isinstance(labels, torch.Tensor)
        or labels.shape != delta.shape[:1]
        or labels.dtype not in INTEGERS
    ):
        fail(OP, "labels", f"an integer tensor [{len(delta)}]", describe(labels))
    if labels.device != delta.device:
        fail(OP, "labels", f"device {delta.device}", labels.device)
    if not 0 < test_share < 1:
        fail(OP, "test_share", "a number between 0 and 1", test_share)
    if not 0 <= l2 < float("inf"):
        fail(OP, "l2", "a finite number >= 0", l2)
    if not isinstance(iterations, int) or iterations < 1:
        fail(OP, "iterations", "a whole number >= 1", repr(iterations))
    values, classes = labels.unique(return_inverse=True)
    if len(values) < 2:
        fail(OP, "labels", "two or more classes", len(values))
    train, test = _split(classes, len(values), test_share, seed)
    points = delta.detach().flatten(1).float()
    if not torch.isfinite(points).all():
        fail(OP, "delta", "finite values", "NaN or infinity")
    points = points - points[train].mean(0)
    scale = points[train].square().sum(1).mean().sqrt()
    points = points / torch.where(scale > 0, scale, 1)
    weight, bias = _fit(points[train], classes[train], len(values), l2, iterations)

    def accuracy(rows):
        return ((points[rows] @ weight.T + bias).argmax(1) == classes[rows]).double().mean().item()

    commonest = classes[train].bincount().argmax()
    chance = (classes[test] == commonest).double().mean().item()
    return Separability(accuracy(train), accuracy(test), chance, len(train), len(test), len(values))


def _split(classes, count, share, seed):
    """Indices of both parts: of each class the same share."""
    draw = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(classes), generator=draw).to(classes.device)
    parts = [], []
    for number in range(count):
        rows = order[classes[order] == number]
        cut = round(share * len(rows))
        if not 0 < cut < len(rows):
            fail(
                OP,
                "test_share",
                "images of every class in both parts",
                f"{share} of {len(rows)} images of one class",
            )
        parts[0].append(rows[cut:])
        parts[1].append(rows[:cut])
    return torch.cat(parts[0]), torch.cat(parts[1])


def _fit(points, classes, count, l2, iterations):
    weight = points.new_zeros(count, points.shape[1], requires_grad=True)
    bias = points.new_zeros(count, requires_grad=True)
    optimizer = torch.optim.LBFGS(
        [weight, bias], max_iter=iterations, line_search_fn="strong_wolfe"
    )

    def loss():
        optimizer.zero_grad()
        value = (
            F.cross_entropy(torch.addmm(bias, points, weight.T), classes)
            + l2 / 2 * weight.square().sum()
        )
        value.backward()
        return value

    with torch.enable_grad():
        optimizer.step(loss)
    return weight.detach(), bias.detach()
