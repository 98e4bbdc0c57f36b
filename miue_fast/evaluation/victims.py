"""Training of one victim network (docs/method.md), plain or with a defence, and its accuracy on
training and clean test images.
"""

import contextlib
import functools
import math
import time
from dataclasses import dataclass, field, replace

import torch
import torch.nn.functional as F

from .. import models
from ..ops import perturbed_input
from ..support import ranges
from ..support.calls import borrowed
from ..support.draws import Draws, backward_of, seeded_globally
from ..support.messages import describe, fail, short
from .adversarial import robust_accuracy
from .defences import defence as make_defence
from .start import read_state, start_from

# the per-epoch test curve looks at this many evenly spaced test images; the last epoch at all of
# them
CURVE_IMAGES = 2000


@dataclass
class Run:
    """One trained victim. Accuracies from 0 to 1; the curves have one entry per epoch, the numbers
    are those of the last epoch.
    """

    seed: int
    train_curve: list[float] = field(
        default_factory=list
    )  # on the augmented batches, as trained on (mixed images: the larger share)
    test_curve: list[float] = field(default_factory=list)  # with curve=False the last epoch alone
    seconds: float = 0.0
    robust: float | None = (
        None  # on test images attacked within the budget of adversarial training (PGD-20)
    )
    test_poisoned: float | None = (
        # on the test images of the poisoned classes, and of those without poison: with `unseen`
        None
    )
    test_unseen: float | None = None
    model: torch.nn.Module | None = field(
        default=None, repr=False, compare=False
    )  # with keep_model, in eval mode

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
    crop: int | None = (
        # pixels of zero padding on each side before the random crop; None: an eighth of the width,
        # 4 at 32
        None
    )
    momentum: float = 0.9
    weight_decay: float = 1e-4
    optimizer: str = "sgd"  # or adamw
    schedule: str = "cosine"  # or steps

    def learning_rate(self, epoch):
        """Per epoch: a cosine from `lr` to 1e-6, or `lr`, divided by 10 after 40 % and again after
        80 % of the epochs.
        """
        if self.schedule == "steps":
            return self.lr * 0.1 ** sum(5 * epoch >= share * self.epochs for share in (2, 4))
        return 1e-6 + (self.lr - 1e-6) * 0.5 * (1 + math.cos(math.pi * epoch / self.epochs))

    def new_optimizer(self, model):
        if self.optimizer == "adamw":
            return torch.optim.AdamW(model.parameters(), self.lr, weight_decay=self.weight_decay)
        return torch.optim.SGD(
            model.parameters(), self.lr, self.momentum, weight_decay=self.weight_decay
        )


# The large ones as the literature trains them on CIFAR; small_resnet was tuned for a few thousand
# images on a CPU; of the shallow networks only the order of magnitude is known to be right.
RECIPES = {
    plan.victim: plan
    for plan in (
        Recipe("resnet18", 200, 0.5, 128),
        Recipe("small_resnet", 20, 0.1, 64),
        Recipe("resnet50", 200, 0.1, 128),
        Recipe("vgg11", 200, 0.05, 128, weight_decay=5e-4),
        Recipe("vgg16", 200, 0.05, 128, weight_decay=5e-4),
        Recipe("densenet121", 200, 0.1, 64),
        Recipe("vit", 200, 5e-4, 128, weight_decay=0.05, optimizer="adamw"),
        Recipe("lenet5", 60, 0.02, 64),
        Recipe("linear", 40, 0.01, 64),
        Recipe("mlp2", 60, 0.01, 64),
        Recipe("mlp3", 60, 0.01, 64),
    )
}


def recipe(victim, epochs, lr, batch, crop=None, *, adversarial=False):
    """Fills what is None with the victim's default; a victim of the caller's own must come with
    epochs and lr.

    adversarial: the recipe of adversarial training (docs/method.md): at most 100 epochs and lr 0.1,
        weight decay 5e-4 (AdamW: its own),
    divided by 10 at 40 and 80 %.
    """
    usual = RECIPES.get(victim) if isinstance(victim, str) else None
    if usual is None and (isinstance(victim, str) or not callable(victim)):
        fail(
            "evaluate",
            "victim",
            f"{', '.join(RECIPES)} or a callable (classes -> module)",
            short(victim),
        )
    if usual is None and (epochs is None or lr is None):
        fail(
            "evaluate",
            "epochs and lr",
            "both, for a victim of your own",
            f"epochs={epochs}, lr={lr}",
        )
    usual = usual or Recipe(victim, epochs, lr, 128)
    if adversarial:
        decay = usual.weight_decay if usual.optimizer == "adamw" else 5e-4
        usual = replace(
            usual,
            epochs=min(usual.epochs, 100),
            lr=min(usual.lr, 0.1),
            weight_decay=decay,
            schedule="steps",
        )
    given = {"epochs": epochs, "lr": lr, "batch": batch, "crop": crop}
    plan = replace(usual, **{name: value for name, value in given.items() if value is not None})
    for name, value in (("epochs", plan.epochs), ("batch", plan.batch)):
        ranges.whole("evaluate", name, value)
    ranges.positive("evaluate", "lr", plan.lr)
    if crop is not None:
        ranges.whole("evaluate", "crop", crop, 0, 4096)
    return plan


def build(victim, classes, shape, draws, device):
    """A victim for images of `shape` (C, H, W) on the [0, 1] scale, without normalisation
    (docs/method.md), initialised from `draws`.
    """
    channels, height, width = shape
    if isinstance(victim, str):
        if victim in models.SQUARE and height != width:
            fail(
                "evaluate",
                "victim",
                "square images, or a convolutional victim",
                f"{victim} and {width} x {height}",
            )
        with draws:
            model = models.build(
                victim, classes, normalize=False, size=min(height, width), channels=channels
            )
    else:
        with seeded_globally(draws, device):
            model = victim(classes)
    for tensor in [*model.parameters(), *model.buffers()]:
        if tensor.is_floating_point() and (tensor.dtype != torch.float32 or tensor.is_inference()):
            fail(
                "evaluate",
                "victim",
                "ordinary float32 weights",
                describe(tensor) + " (inference mode)" * tensor.is_inference(),
            )
    return model.to(memory_format=torch.channels_last)


def padding(crop, images):
    return images.shape[-1] // 8 if crop is None else crop


def crops(images, pad):
    """A view [N, T, L, C, H, W] of every crop of the images with `pad` zeros on each side: nothing
    is copied until a crop is drawn.
    """
    height, width = images.shape[-2:]
    return (
        F.pad(images, (pad,) * 4).unfold(2, height, 1).unfold(3, width, 1).permute(0, 2, 3, 1, 4, 5)
    )


@torch.no_grad()
def accuracy(model, images, labels, *, batch=1000):
    """Top-1 accuracy in eval mode of uint8 `images` [N, C, H, W], on the model's device."""
    model.eval()
    right = 0
    for start in range(0, len(images), batch):
        logits = model(perturbed_input(images[start : start + batch]))
        right += int((logits.argmax(1) == labels[start : start + batch]).sum())
    return right / len(images)


def train(
    recipe,
    images,
    labels,
    test_images,
    test_labels,
    classes,
    seed,
    *,
    defence="none",
    init=None,
    unseen=(),
    curve=True,
    keep_model=False,
    on_epoch=None,
):
    """Trains one victim on uint8 `images` and follows its accuracy.

    Cross-entropy, random crop with zero padding and horizontal flip, then what the defence does to
    a batch (what it does once to all images is `run_cell`'s part). Two calls with one seed and
    equally many images share initial weights, order of images, crops and flips. Deterministic on
    the CPU for a given thread count. init, curve, keep_model: as for `run_cell`; unseen: class
    indices.
    Errors: ValueError, also when the loss stops being finite.
    """
    device = images.device
    started = time.perf_counter()
    run = Run(seed)
    defence = make_defence(defence)
    every = max(1, -(-len(test_images) // CURVE_IMAGES))
    views = crops(images, padding(recipe.crop, images))
    draws, draw = Draws("evaluate", seed), torch.Generator().manual_seed(seed)
    model = build(recipe.victim, classes, images.shape[1:], draws, device)
    own = (
        contextlib.nullcontext() if isinstance(recipe.victim, str) else draws
    )  # a built-in network draws nothing after this
    if init is not None:
        start_from(model, read_state(init))
    model = model.to(device)
    optimizer = recipe.new_optimizer(model)
    change = functools.partial(defence.batch, classes=classes) if defence.batch else None
    with borrowed("evaluate", model):
        for epoch in range(recipe.epochs):
            optimizer.param_groups[0]["lr"] = recipe.learning_rate(epoch)
            run.train_curve.append(
                _one_epoch(
                    model, optimizer, views, labels, recipe.batch, draw, epoch, change, draws, own
                )
            )
            last = epoch == recipe.epochs - 1
            if curve or last:
                step = 1 if last else every
                with own:
                    run.test_curve.append(
                        accuracy(model, test_images[::step].contiguous(), test_labels[::step])
                    )
            if on_epoch:
                on_epoch(run)
        if len(unseen):
            with own:
                run.test_poisoned, run.test_unseen = _by_class(
                    model, test_images, test_labels, unseen
                )
        if defence.attack:
            with draws:
                run.robust = robust_accuracy(model, test_images, test_labels, defence.attack)
    run.seconds = time.perf_counter() - started
    if keep_model:
        run.model = model.eval()
    return run


def _by_class(model, images, labels, unseen):
    """Accuracy on the images of all other classes, and on those of `unseen`; None without such
    images.
    """
    apart = torch.isin(labels, torch.tensor(unseen, device=labels.device))
    return [
        accuracy(model, images[rows], labels[rows]) if rows.any() else None
        for rows in (~apart, apart)
    ]


def _one_epoch(model, optimizer, views, labels, batch, draw, epoch, change, draws, own):
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
        inputs, targets = perturbed_input(drawn, flip=flip[chosen]), labels[chosen]
        if change:
            with draws:
                inputs, targets = change(model, inputs, targets)
        draws.drew = False
        with own:
            logits = model(inputs)
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
