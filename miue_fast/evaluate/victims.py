"""Standard training of one victim network (algorithm.md 3), with its accuracy on the training and on clean test images."""

import contextlib
import math
import time
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F

from .. import models
from .._checks import fail
from ..ops import perturbed_input

# epochs, lr, batch: the first is the standard of the literature; the second was tuned for a few thousand images on a CPU.
RECIPES = {"resnet18": (200, 0.5, 128), "small_resnet": (20, 0.1, 64)}
CURVE_IMAGES = 2000  # the per-epoch test curve looks at this many evenly spaced test images; the last epoch at all of them


@dataclass
class Run:
    """One trained victim. Accuracies from 0 to 1; the curves have one entry per epoch, the numbers are those of the last epoch."""

    seed: int
    train_curve: list[float] = field(default_factory=list)  # on the augmented batches, as trained on
    test_curve: list[float] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def train(self):
        return self.train_curve[-1]

    @property
    def test(self):
        return self.test_curve[-1]


@dataclass(frozen=True)
class Recipe:
    victim: object  # a name that models.build knows, or a callable: number of classes -> module
    epochs: int
    lr: float
    batch: int
    crop: int | None = None  # pixels of zero padding on each side before the random crop; None: an eighth of the width, 4 at 32
    momentum: float = 0.9
    weight_decay: float = 1e-4

    def learning_rate(self, epoch):
        """Cosine per epoch from `lr` to 1e-6."""
        return 1e-6 + (self.lr - 1e-6) * 0.5 * (1 + math.cos(math.pi * epoch / self.epochs))


def recipe(victim, epochs, lr, batch, crop=None):
    """Fills what is None with the victim's default; a victim of the caller's own must come with epochs and lr."""
    known = RECIPES.get(victim) if isinstance(victim, str) else None
    if known is None and (isinstance(victim, str) or not callable(victim)):
        fail("evaluate", "victim", f"{', '.join(RECIPES)} or a callable (classes -> module)", repr(victim))
    if known is None and (epochs is None or lr is None):
        fail("evaluate", "epochs and lr", "both, for a victim of your own", f"epochs={epochs}, lr={lr}")
    epochs, lr, batch = (given if given is not None else usual for given, usual in zip((epochs, lr, batch), known or (None, None, 128)))
    for name, value in (("epochs", epochs), ("batch", batch)):
        if not isinstance(value, int) or value < 1:
            fail("evaluate", name, "a whole number >= 1", value)
    if not 0 < lr < float("inf"):
        fail("evaluate", "lr", "a finite number > 0", lr)
    if crop is not None and (not isinstance(crop, int) or crop < 0):
        fail("evaluate", "crop", "None or a whole number >= 0", crop)
    return Recipe(victim, epochs, lr, batch, crop)


def build(victim, classes, shape):
    """A victim for images of `shape` (C, H, W) on the [0, 1] scale, without normalisation (algorithm.md 2)."""
    channels, height, width = shape
    if isinstance(victim, str):
        model = models.build(victim, classes, normalize=False, size=min(height, width), channels=channels)
    else:
        model = victim(classes)
    return model.to(memory_format=torch.channels_last)


def padding(crop, images):
    return images.shape[-1] // 8 if crop is None else crop


def crops(images, pad):
    """A view [N, T, L, C, H, W] of every crop of the images with `pad` zeros on each side: nothing is copied until a crop is drawn."""
    height, width = images.shape[-2:]
    return F.pad(images, (pad,) * 4).unfold(2, height, 1).unfold(3, width, 1).permute(0, 2, 3, 1, 4, 5)


@contextlib.contextmanager
def _seeded(seed, device):
    """Weights and the victim's own randomness follow the seed; the caller's generators are left as they were."""
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield torch.Generator().manual_seed(seed)


@torch.no_grad()
def accuracy(model, images, labels, *, batch=1000):
    """Top-1 accuracy in eval mode of uint8 `images` [N, C, H, W], on the model's device."""
    model.eval()
    right = 0
    for start in range(0, len(images), batch):
        logits = model(perturbed_input(images[start : start + batch]))
        right += int((logits.argmax(1) == labels[start : start + batch]).sum())
    return right / len(images)


def train(recipe, images, labels, test_images, test_labels, classes, seed, *, on_epoch=None):
    """Trains one victim on uint8 `images` and follows its accuracy.

    SGD, cross-entropy, random crop with zero padding and horizontal flip. Two calls with one seed and equally many images share
    initial weights, order of images, crops and flips. Deterministic on the CPU for a given thread count.
    Errors: ValueError when the loss stops being finite.
    """
    device = images.device
    started = time.perf_counter()
    run = Run(seed)
    every = max(1, -(-len(test_images) // CURVE_IMAGES))
    views = crops(images, padding(recipe.crop, images))
    with _seeded(seed, device) as draw:
        model = build(recipe.victim, classes, images.shape[1:]).to(device)
        optimizer = torch.optim.SGD(model.parameters(), recipe.lr, recipe.momentum, weight_decay=recipe.weight_decay)
        for epoch in range(recipe.epochs):
            optimizer.param_groups[0]["lr"] = recipe.learning_rate(epoch)
            run.train_curve.append(_one_epoch(model, optimizer, views, labels, recipe.batch, draw, epoch))
            step = 1 if epoch == recipe.epochs - 1 else every
            run.test_curve.append(accuracy(model, test_images[::step].contiguous(), test_labels[::step]))
            if on_epoch:
                on_epoch(run)
    run.seconds = time.perf_counter() - started
    return run


def _one_epoch(model, optimizer, views, labels, batch, draw, epoch):
    model.train()
    count, tops, lefts = views.shape[:3]
    device = labels.device
    order = torch.randperm(count, generator=draw).to(device)
    top = torch.randint(tops, (count,), generator=draw).to(device)
    left = torch.randint(lefts, (count,), generator=draw).to(device)
    flip = (torch.rand(count, generator=draw) < 0.5).to(device)
    right, total = torch.zeros((), dtype=torch.int64, device=device), torch.zeros((), device=device)
    batches = order.split(batch)
    if len(batches) > 1 and len(batches[-1]) == 1:  # batch normalisation cannot train on one image
        batches = (*batches[:-2], torch.cat(batches[-2:]))
    for chosen in batches:
        drawn = views[chosen, top[chosen], left[chosen]].contiguous()
        logits = model(perturbed_input(drawn, flip=flip[chosen]))
        loss = F.cross_entropy(logits, labels[chosen])
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        right += (logits.argmax(1) == labels[chosen]).sum()
        total += loss.detach()
    if not torch.isfinite(total):
        fail("evaluate", "lr", f"a finite training loss in epoch {epoch + 1}; try a smaller one", f"loss {total.item()}")
    return right.item() / count
