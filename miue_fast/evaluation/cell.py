"""One victim on one training set: the unit that `evaluate` and reports are made of."""

import os
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from ..dispatch import checks
from ..dispatch.precision import check_unscaled
from ..models import Recipe
from ..support import calls, messages
from .defences import Defence
from .defences import defence as make_defence
from .defences.none import NoDefence
from .victims import Run, train
from .victims import recipe as filled


@calls.ordinary()
@torch.enable_grad()  # whatever the caller runs in
def run_cell(
    train_images: torch.Tensor,
    labels: torch.Tensor,
    test_images: torch.Tensor,
    test_labels: torch.Tensor,
    num_classes: int,
    *,
    victim: str | Callable[[int], nn.Module] = "small_resnet",
    defence: str | Defence = NoDefence.name,
    seed: int = 0,
    epochs: int | None = None,
    lr: float | None = None,
    batch: int | None = None,
    crop: int | None = None,
    recipe: Recipe | None = None,
    init: dict[str, torch.Tensor] | str | os.PathLike[str] | None = None,
    unseen: Sequence[int] = (),
    curve: bool = False,
    keep_network: bool = False,
    device: str | torch.device | None = None,
    dtype: str = "float32",
    on_epoch: Callable[[Run], object] | None = None,
) -> Run:
    """Prepares the images as the defence says, trains one victim and returns its Run.

    Args:
        train_images, test_images: uint8 [N, C, H, W] on the CPU. labels, test_labels: int64 [N]
            below num_classes.
        victim, epochs, lr, batch, crop: as for `evaluate`; None takes the victim's own (adversarial
            training has a recipe of its own).
        recipe: what takes the place of the victim's own: schedule, optimiser, weight decay and all.
        defence: as text or a Defence, see `miue_fast.evaluation.defences`.
        seed: of weights, order, crops, flips, and everything random in the defence.
        init: weights to start from: a state dict of the same network or a file of one; the
            classifier is new where the number of classes differs. None: a fresh network.
        unseen: class indices without poison: the test accuracy is also given apart for them and for
            the others.
        curve: test accuracy after every epoch (on 2,000 images), else after the last epoch alone.
        dtype: what the network computes in: "float32", "bfloat16" (autocast; weights, logits and
            loss stay float32), or "auto": bfloat16 where the device has matrix units for it,
            else float32.
        keep_network: leave the trained network in Run.network.
        on_epoch: called with the Run after every epoch.

    The same seed gives the same digits on a CPU for a given thread count, whatever other threads
    do: random numbers come from generators of this call. (A callable victim is made with PyTorch's
    own, seeded and put back.) Errors: ValueError and BackendError before any training, ValueError
    when the loss stops being finite.
    """
    calls.default_dtype("evaluate")
    check_unscaled("evaluate", dtype)
    made = make_defence(defence)
    plan = filled(victim, epochs, lr, batch, crop, made, usual=recipe)
    for name, images in (("train_images", train_images), ("test_images", test_images)):
        checks.images("evaluate", images, name, frozenset({torch.uint8}))
    for name, images, given in (
        ("labels", train_images, labels),
        ("test_labels", test_images, test_labels),
    ):
        if (
            given.shape != images.shape[:1]
            or given.dtype != torch.int64
            or not 0 <= int(given.min()) <= int(given.max()) < num_classes
        ):
            messages.fail(
                "evaluate",
                name,
                f"int64 [{len(images)}] from 0 to {num_classes - 1}",
                messages.describe(given),
            )
    made.check(train_images.shape[1:], num_classes)
    train_images = made.prepare(train_images, labels, seed)
    if made.tests:
        test_images = made.prepare(test_images, test_labels, seed)
    on = torch.device(
        checks.device("evaluate", device) or ("cuda" if torch.cuda.is_available() else "cpu")
    )
    moved = [part.to(on) for part in (train_images, labels, test_images, test_labels)]
    return train(
        victim,
        plan,
        *moved,
        num_classes,
        seed,
        defence=made,
        init=init,
        unseen=unseen,
        curve=curve,
        keep_network=keep_network,
        dtype=dtype,
        on_epoch=on_epoch,
    )


def pretrain(
    train_images: torch.Tensor,
    labels: torch.Tensor,
    test_images: torch.Tensor,
    test_labels: torch.Tensor,
    num_classes: int,
    **options: Any,
) -> dict[str, torch.Tensor]:
    """The weights (state dict on the CPU) of a victim trained on clean images, for `init` of
    another victim.

    The arguments are those of `run_cell`. That the images are disjoint from those of the later
    training is the caller's part. torch.save(pretrain(...), "weights.pt") makes a file for
    `miue-fast evaluate --init`.
    """
    trained = run_cell(
        train_images, labels, test_images, test_labels, num_classes, keep_network=True, **options
    ).network
    assert trained is not None
    return {
        name: value.cpu().clone(memory_format=torch.contiguous_format)
        for name, value in trained.state_dict().items()
    }
