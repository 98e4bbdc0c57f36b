"""One victim on one training set: the unit that `evaluate` and reports are made of."""

import torch

from ..dispatch import checks
from ..support import calls, messages
from .defences import defence as make_defence
from .victims import recipe, train


@calls.ordinary()
@torch.enable_grad()  # whatever the caller runs in
def run_cell(
    train_images,
    labels,
    test_images,
    test_labels,
    classes,
    *,
    victim="small_resnet",
    defence="none",
    seed=0,
    epochs=None,
    lr=None,
    batch=None,
    crop=None,
    init=None,
    unseen=(),
    curve=False,
    keep_model=False,
    device=None,
    on_epoch=None,
):
    """Prepares the images as the defence says, trains one victim and returns its Run.

    Args:
        train_images, test_images: uint8 [N, C, H, W] on the CPU. labels, test_labels: int64 [N].
            classes: how many.
        victim, epochs, lr, batch, crop: as for `evaluate`; None takes the victim's own (adversarial
            training has a recipe of its own).
        defence: as text or a Defence, see `miue_fast.evaluation.defences`.
        seed: of weights, order, crops, flips, and everything random in the defence.
        init: weights to start from: a state dict of the same network or a file of one; the
            classifier is new where the number of classes differs. None: a fresh network.
        unseen: class indices without poison: the test accuracy is also given apart for them and for
            the others.
        curve: test accuracy after every epoch (on 2,000 images), else after the last epoch alone.
        keep_model: leave the trained network in Run.model.
        on_epoch: called with the Run after every epoch.

    The same seed gives the same digits on a CPU for a given thread count, whatever other threads
    do: random numbers come from generators of this call. (A callable victim is made with PyTorch's
        own, seeded and put back.) Errors: ValueError and BackendError before any
    training, ValueError when the loss stops being finite.
    """
    calls.default_dtype("evaluate")
    defence = make_defence(defence)
    plan = recipe(victim, epochs, lr, batch, crop, adversarial=defence.attack is not None)
    for name, images in (("train_images", train_images), ("test_images", test_images)):
        checks.images("evaluate", images, name, frozenset({torch.uint8}))
    for name, images, given in (
        ("labels", train_images, labels),
        ("test_labels", test_images, test_labels),
    ):
        if (
            given.shape != images.shape[:1]
            or given.dtype != torch.int64
            or not 0 <= int(given.min()) <= int(given.max()) < classes
        ):
            messages.fail(
                "evaluate",
                name,
                f"int64 [{len(images)}] from 0 to {classes - 1}",
                messages.describe(given),
            )
    defence.check(train_images.shape[1:], classes)
    if defence.prepare:
        train_images = defence.prepare(train_images, labels, seed)
        test_images = (
            defence.prepare(test_images, test_labels, seed) if defence.tests else test_images
        )
    device = torch.device(
        checks.device("evaluate", device) or ("cuda" if torch.cuda.is_available() else "cpu")
    )
    moved = (part.to(device) for part in (train_images, labels, test_images, test_labels))
    return train(
        plan,
        *moved,
        classes,
        seed,
        defence=defence,
        init=init,
        unseen=unseen,
        curve=curve,
        keep_model=keep_model,
        on_epoch=on_epoch,
    )


def pretrain(train_images, labels, test_images, test_labels, classes, **options):
    """The weights (state dict on the CPU) of a victim trained on clean images, for `init` of
    another victim.

    The arguments are those of `run_cell`. That the images are disjoint from those of the later
    training is the caller's part. torch.save(pretrain(...), "weights.pt") makes a file for
    `miue-fast evaluate --init`."""
    run = run_cell(
        train_images, labels, test_images, test_labels, classes, keep_model=True, **options
    )
    return {
        name: value.cpu().clone(memory_format=torch.contiguous_format)
        for name, value in run.model.state_dict().items()
    }
