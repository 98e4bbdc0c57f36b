"""Training of one victim network (docs/method.md), plain or with a defence, and its accuracy on
training and clean test images.
"""

import contextlib
import functools
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import torch
import torch.nn.functional as F
from torch import nn

from .. import models
from ..dispatch.precision import check_unscaled, compute_dtype
from ..frozen.training import packed_training
from ..ops import perturbed_input
from ..support import ranges
from ..support.calls import borrowed
from ..support.draws import Draws, backward_of, seeded_globally
from ..support.messages import describe, fail, short
from .defences import Defence
from .defences import defence as make_defence
from .defences.none import NoDefence
from .start import read_state, start_from

# the per-epoch test curve looks at this many evenly spaced test images; the last epoch at all of
# them
CURVE_IMAGES = 2000


@dataclass
class Run:
    """One trained victim. Accuracies are from 0 to 1; the curves have one entry per epoch, the
    numbers are those of the last epoch.

    train_curve: on the augmented batches, as trained on (mixed images: the larger share).
    test_curve: on clean test images; with curve=False the last epoch alone. robust: on test images
        that are attacked within the budget of adversarial training (PGD-20); None without it.
    test_classes: on the clean test images of each class, after the last epoch; None where there are
        none.
    test_poisoned, test_unseen: on the test images of the poisoned classes, and on those of the
        classes without poison; None without `unseen`.
    dtype: "float32" or "bfloat16": what the network computed in.
    network: with keep_network, in eval mode.
    """

    seed: int
    train_curve: list[float] = field(default_factory=list)
    test_curve: list[float] = field(default_factory=list)
    test_classes: list[float | None] = field(default_factory=list)
    seconds: float = 0.0
    robust: float | None = None
    test_poisoned: float | None = None
    test_unseen: float | None = None
    dtype: str = "float32"
    network: nn.Module | None = field(default=None, repr=False, compare=False)

    @property
    def train(self) -> float:
        """Accuracy on the training images in the last epoch."""
        return self.train_curve[-1]

    @property
    def test(self) -> float:
        """Accuracy on the clean test images in the last epoch."""
        return self.test_curve[-1]


def recipe(
    victim: str | Callable[[int], nn.Module],
    epochs: int | None,
    lr: float | None,
    batch: int | None,
    crop: int | None = None,
    defence: Defence | None = None,
    *,
    usual: models.Recipe | None = None,
) -> models.Recipe:
    """Fills what is None from the recipe `usual` (None: the victim's own), as the defence changes
    it; a victim of the caller's own must come with epochs and lr, or with a recipe. Errors:
    ValueError.
    """
    if isinstance(victim, str) and victim in models.NETWORKS:
        usual = usual or models.NETWORKS[victim].recipe
    elif isinstance(victim, str) or not callable(victim):
        fail(
            "evaluate",
            "victim",
            f"{', '.join(models.NETWORKS)} or a callable (number of classes -> module)",
            short(victim),
        )
    elif usual is None:
        if epochs is None or lr is None:
            fail(
                "evaluate",
                "epochs and lr",
                "both, for a victim of your own",
                f"epochs={epochs}, lr={lr}",
            )
        usual = models.Recipe(epochs, lr, 128)
    if defence is not None:
        usual = defence.recipe(usual)
    given = {"epochs": epochs, "lr": lr, "batch": batch, "crop": crop}
    plan = replace(usual, **{name: value for name, value in given.items() if value is not None})
    for name, value in (("epochs", plan.epochs), ("batch", plan.batch)):
        ranges.whole("evaluate", name, value)
    ranges.positive("evaluate", "lr", plan.lr)
    if crop is not None:
        ranges.whole("evaluate", "crop", crop, 0, 4096)
    return plan


def build(
    victim: str | Callable[[int], nn.Module],
    num_classes: int,
    shape: Sequence[int],
    draws: Draws,
    device: torch.device,
) -> nn.Module:
    """A victim for images of `shape` (C, H, W) on the [0, 1] scale, without normalisation,
    initialised from `draws`. Errors: ValueError.
    """
    channels, height, width = shape
    if isinstance(victim, str):
        if models.NETWORKS[victim].square and height != width:
            fail(
                "evaluate",
                "victim",
                "square images, or a convolutional victim",
                f"{victim} and {width} x {height}",
            )
        with draws:
            network: nn.Module = models.build(
                victim, num_classes, normalize=False, size=min(height, width), channels=channels
            )
    else:
        with seeded_globally(draws, device):
            network = victim(num_classes)
    for tensor in [*network.parameters(), *network.buffers()]:
        if tensor.is_floating_point() and (tensor.dtype != torch.float32 or tensor.is_inference()):
            fail(
                "evaluate",
                "victim",
                "ordinary float32 weights",
                describe(tensor) + " (inference mode)" * tensor.is_inference(),
            )
    return models.in_format(network, torch.channels_last)


class InBfloat16(nn.Module):
    """A network whose forward pass runs under autocast in bfloat16. Its weights stay float32, and
    so are the logits that it returns.
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        # No cache of cast weights: it would outlive their update within a caller's autocast.
        with torch.autocast(images.device.type, torch.bfloat16, cache_enabled=False):
            return self.network(images).float()


def padding(crop: int | None, width: int) -> int:
    """Pixels of zeros around images of a width before a crop; None: an eighth of the width."""
    return width // 8 if crop is None else crop


def crops(images: torch.Tensor, pad: int) -> torch.Tensor:
    """A view [N, T, L, C, H, W] of every crop of the images with `pad` zeros on each side: nothing
    is copied until a crop is drawn.
    """
    height, width = images.shape[-2:]
    return (
        F.pad(images, (pad,) * 4).unfold(2, height, 1).unfold(3, width, 1).permute(0, 2, 3, 1, 4, 5)
    )


@torch.no_grad()
def correct(
    network: nn.Module, images: torch.Tensor, labels: torch.Tensor, *, batch: int = 1000
) -> torch.Tensor:
    """Which uint8 `images` [N, C, H, W], on the network's device, it classifies as labelled, in
    eval mode: bool [N].
    """
    network.eval()
    right = torch.empty_like(labels, dtype=torch.bool)
    for start in range(0, len(images), batch):
        rows = slice(start, start + batch)
        right[rows] = network(perturbed_input(images[rows])).argmax(1) == labels[rows]
    return right


def accuracy(network: nn.Module, images: torch.Tensor, labels: torch.Tensor) -> float:
    """The share of `images` that is `correct`."""
    return int(correct(network, images, labels).sum()) / len(images)


def train(
    victim: str | Callable[[int], nn.Module],
    recipe: models.Recipe,
    images: torch.Tensor,
    labels: torch.Tensor,
    test_images: torch.Tensor,
    test_labels: torch.Tensor,
    num_classes: int,
    seed: int,
    *,
    defence: str | Defence = NoDefence.name,
    init: dict[str, torch.Tensor] | str | os.PathLike[str] | None = None,
    unseen: Sequence[int] = (),
    curve: bool = True,
    keep_network: bool = False,
    dtype: str = "float32",
    on_epoch: Callable[[Run], object] | None = None,
) -> Run:
    """Trains one victim on uint8 `images` and follows its accuracy.

    Cross-entropy, random crop with zero padding and horizontal flip, then what the defence does to
    a batch (what it does once to all images is `run_cell`'s part). Two calls with one seed and
    equally many images share initial weights, order of images, crops and flips. Deterministic on
    the CPU for a given thread count. init, curve, keep_network, dtype: as for `run_cell`; unseen:
    class indices. Errors: ValueError, also when the loss stops being finite.
    """
    device = images.device
    started = time.perf_counter()
    check_unscaled("evaluate", dtype)
    run = Run(seed, dtype=compute_dtype(dtype, device))
    made = make_defence(defence)
    every = max(1, -(-len(test_images) // CURVE_IMAGES))
    views = crops(images, padding(recipe.crop, images.shape[-1]))
    draws, draw = Draws("evaluate", seed), torch.Generator().manual_seed(seed)
    network = build(victim, num_classes, images.shape[1:], draws, device)
    # A built-in network draws nothing after this.
    own = contextlib.nullcontext() if isinstance(victim, str) else draws
    if init is not None:
        start_from(network, read_state(init))
    network = network.to(device)
    optimizer = recipe.new_optimizer(network)
    called = network if run.dtype == "float32" else InBfloat16(network)
    change = functools.partial(made.batch, num_classes=num_classes)
    with borrowed("evaluate", network), packed_training(network, "auto", device, run.dtype):
        for epoch in range(recipe.epochs):
            run.train_curve.append(
                _one_epoch(
                    called, optimizer, views, labels, recipe, draw, epoch, change, draws, own
                )
            )
            last = epoch == recipe.epochs - 1
            if curve or last:
                step = 1 if last else every
                with own:
                    right = correct(called, test_images[::step].contiguous(), test_labels[::step])
                run.test_curve.append(int(right.sum()) / len(right))
                if last:
                    run.test_classes = _each_class(right, test_labels, num_classes)
            if on_epoch:
                on_epoch(run)
        if len(unseen):
            with own:
                run.test_poisoned, run.test_unseen = _by_class(
                    called, test_images, test_labels, unseen
                )
        with draws:
            run.robust = made.robust(called, test_images, test_labels)
    run.seconds = time.perf_counter() - started
    if keep_network:
        run.network = network.eval()
    return run


def _each_class(right, labels, num_classes):
    """The share of `right` [N] in each class, or None for a class that `labels` [N] have not."""
    count, hits = (
        torch.bincount(chosen, minlength=num_classes).tolist() for chosen in (labels, labels[right])
    )
    return [hit / number if number else None for hit, number in zip(hits, count)]


def _by_class(network, images, labels, unseen):
    """Accuracy on the images of all other classes, and on those of `unseen`; None without such
    images.
    """
    apart = torch.isin(labels, torch.tensor(unseen, device=labels.device))
    return [
        accuracy(network, images[rows], labels[rows]) if rows.any() else None
        for rows in (~apart, apart)
    ]


def _one_epoch(network, optimizer, views, labels, recipe, draw, epoch, change, draws, own):
    network.train()
    count, tops, lefts = views.shape[:3]
    device = labels.device
    order = torch.randperm(count, generator=draw).to(device)
    top = torch.randint(tops, (count,), generator=draw).to(device)
    left = torch.randint(lefts, (count,), generator=draw).to(device)
    flip = (torch.rand(count, generator=draw) < 0.5).to(device)
    right, total = torch.zeros((), dtype=torch.int64, device=device), torch.zeros((), device=device)
    batches = order.split(recipe.batch)
    if len(batches) > 1 and len(batches[-1]) == 1:  # batch normalisation cannot train on one image
        batches = (*batches[:-2], torch.cat(batches[-2:]))
    for number, chosen in enumerate(batches):
        part = number / len(batches) if recipe.schedule == "one-cycle" else 0
        optimizer.param_groups[0]["lr"] = recipe.learning_rate(epoch + part)
        drawn = views[chosen, top[chosen], left[chosen]].contiguous()
        inputs, targets = perturbed_input(drawn, flip=flip[chosen]), labels[chosen]
        with draws:
            inputs, targets = change(network, inputs, targets)
        draws.drew = False
        with own:
            logits = network(inputs)
        loss = F.cross_entropy(logits, targets)
        optimizer.zero_grad(set_to_none=True)
        with backward_of(draws):
            loss.backward()
        optimizer.step()
        right += (logits.argmax(1) == (targets if targets.dim() == 1 else targets.argmax(1))).sum()
        total += loss.detach()
    if not torch.isfinite(total):
        fail(
            "evaluate",
            "lr",
            f"a finite training loss in epoch {epoch + 1}; try a smaller one",
            f"loss {total.item()}",
        )
    return right.item() / count
