"""`evaluate`: victims on clean, poisoned and random-noise images, and checks of its arguments."""

import functools
import operator
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict
from typing import Any

import torch
from torch import nn

from .. import data
from ..dispatch import checks
from ..dispatch.precision import check_unscaled, compute_dtype
from ..models import Recipe
from ..support import calls, messages, ranges
from ..support.messages import fail
from ..support.output import progress_bar
from .cell import run_cell
from .defences import Defence
from .defences import defence as make_defence
from .defences.none import NoDefence
from .kept import Kept
from .poisoned import poisoned_images
from .start import class_numbers, poisoned_rows, read_state
from .table import Table
from .victims import padding, recipe

NOISES = ("sign", "uniform")
MOST_SEEDS = 10_000


@calls.ordinary()
def evaluate(
    clean: Any,
    poisoned: Any,
    test: Any,
    *,
    victim: str | Callable[[int], nn.Module] = "small_resnet",
    epochs: int | None = None,
    seeds: int | Iterable[int] = 1,
    lr: float | None = None,
    batch: int | None = None,
    crop: int | None = None,
    eps: float | None = None,
    noise: str = "sign",
    size: int | None = None,
    device: str | torch.device | None = None,
    dtype: str = "float32",
    progress: bool = True,
    defence: str | Defence = NoDefence.name,
    poison_ratio: float = 1.0,
    unseen: str | int | Sequence[str | int] | None = None,
    init: dict[str, torch.Tensor] | str | os.PathLike[str] | None = None,
    curve: bool = True,
    keep: str | os.PathLike[str] | None = None,
) -> Table:
    """Trains one victim per training set and seed and returns a Table of train and clean-test
    accuracies.

    Args:
        clean: data.Dataset, or what data.load takes. Images that have no poisoned copy are left
            out.
        poisoned: an exported folder or .npz of images, a poison (folder, .safetensors, .pt, .npz)
            that is applied to `clean`, a Dataset, or a perturbation: float [N, C, H, W] on the
            [0, 1] scale.
        test: clean test images of the same classes, as for `clean`.
        victim: a name of `models.NETWORKS`, or a callable (number of classes -> module on [0, 1]
            images) with epochs and lr.
        epochs, lr, batch: None takes those of `models.NETWORKS[victim].recipe` (resnet18: 200,
            0.5, 128, SGD with momentum 0.9, weight decay 1e-4, cosine to 1e-6). Random crop and
            flip, no input normalisation.
        crop: zero padding of the random crop in pixels; None: an eighth of the width (4 at 32, the
            standard); 0: flips only.
        seeds: how many (0, 1, ...), or the seeds. With one seed the three rows share weights,
            order, crops and flips.
        eps: budget of the random-noise row, [0, 1] scale; None: the largest change found in the
            poisoned images.
        noise: "sign" (every value -eps or +eps: the whole budget) or "uniform" (from -eps to eps),
            rounded and clamped to 8 bits.
        size: images are resized to it when they are loaded; None: they must agree.
        dtype: what the victims compute in: "float32", "bfloat16" (autocast; weights and loss stay
            float32), or "auto": bfloat16 where the device has matrix units for it, else float32.
        defence: what the victim's owner does, as text (`miue_fast.evaluation.defences`): "jpeg:10",
            "cutmix", "adversarial:4"... In every row alike; adversarial training also gives the
            accuracy on attacked test images.
        poison_ratio: share of each class that is poisoned (or noisy), drawn with the victim's seed;
            the rest stays clean.
        unseen: names or indices of classes that stay clean; the test accuracy is given apart for
            them and for the others.
        init: pretrained weights (see `pretrain`): every victim starts from them. None: from the
            seed.
        curve: False takes the test accuracy after the last epoch only, which saves time.
        keep: a folder where each finished victim becomes a file, named after all it depends on: the
            same call, interrupted or not, trains only what is missing there. For built-in victims
            from the seed. None: nothing is kept.

    Deterministic on the CPU for given seeds, versions and thread count. Errors: ValueError,
    OSError, BackendError.
    """
    calls.default_dtype("evaluate")
    plan, made, chosen_seeds, on = check_options(
        victim=victim,
        epochs=epochs,
        seeds=seeds,
        lr=lr,
        batch=batch,
        crop=crop,
        eps=eps,
        noise=noise,
        device=device,
        dtype=dtype,
        defence=defence,
        poison_ratio=poison_ratio,
    )
    place = torch.device(on or ("cuda" if torch.cuda.is_available() else "cpu"))
    computes_in = compute_dtype(dtype, place)
    if keep is not None and (not isinstance(victim, str) or init is not None):
        fail("evaluate", "keep", "None for a victim of your own or from given weights", repr(keep))
    init = read_state(init) if init is not None else None
    clean = clean if isinstance(clean, data.Dataset) else data.load(clean, size=size)
    test = test if isinstance(test, data.Dataset) else data.load_test(test, size=size)
    clean, images = poisoned_images(clean, poisoned, size=size)
    check_pair("evaluate", clean, test)
    made.check(clean.images.shape[1:], len(clean.classes))
    apart = class_numbers(unseen, clean.classes)
    if eps is None:
        eps = int((images.to(torch.int16) - clean.images).abs().amax()) / 255
    test_images = test.images.contiguous()
    kept = (
        Kept(
            keep,
            plan={"victim": victim, **asdict(plan)},
            defence=made.spec,
            classes=len(clean.classes),
            labels=clean.labels,
            test=test_images,
            test_labels=test.labels,
            unseen=apart,
            curve=curve,
            device=on,
            dtype=computes_in,
        )
        if keep is not None
        else Kept(None)
    )
    rows = {"clean": [], "poisoned": [], "random noise": []}
    with progress_bar(
        total=len(rows) * len(chosen_seeds) * plan.epochs,
        unit="epoch",
        disable=not progress,
        leave=False,
    ) as bar:

        def tick(run):
            known = {"train": run.train, **({"test": run.test} if run.test_curve else {})}
            bar.set_postfix(
                {name: f"{100 * value:.0f}%" for name, value in known.items()}, refresh=False
            )
            bar.update()

        for seed in chosen_seeds:
            noisy = data.apply_poison(
                clean.images, data.random_noise(clean, eps, seed, kind=noise), eps
            )
            chosen = poisoned_rows(clean.labels, poison_ratio, apart, seed)[:, None, None, None]
            for name, used in zip(rows, (clean.images, images, noisy)):
                bar.set_description(f"{name}, seed {seed}", refresh=False)
                used = torch.where(chosen, used, clean.images).contiguous()
                make = functools.partial(
                    run_cell,
                    used,
                    clean.labels,
                    test_images,
                    test.labels,
                    len(clean.classes),
                    victim=victim,
                    defence=made,
                    seed=seed,
                    epochs=plan.epochs,
                    lr=plan.lr,
                    batch=plan.batch,
                    crop=plan.crop,
                    init=init,
                    unseen=apart,
                    curve=curve,
                    device=on,
                    dtype=computes_in,
                    on_epoch=tick,
                )
                rows[name].append(kept.run(used, seed, make))
    options = {
        "victim": victim
        if isinstance(victim, str)
        else getattr(victim, "__name__", type(victim).__name__),
        "epochs": plan.epochs,
        "lr": plan.lr,
        "batch": plan.batch,
        "crop": padding(plan.crop, made.shape(clean.images.shape[1:])[-1]),
        "optimizer": plan.optimizer,
        "schedule": plan.schedule,
        "momentum": plan.momentum,
        "weight_decay": plan.weight_decay,
        "seeds": chosen_seeds,
        "eps": eps,
        "noise": noise,
        "dtype": computes_in,
        "classes": len(clean.classes),
        "train_images": len(clean.images),
        "test_images": len(test.images),
        "defence": made.spec,
        "defended_test": made.tests,
        "poison_ratio": poison_ratio,
        "unseen": [clean.classes[number] for number in apart],
        "pretrained": init is not None,
    }
    return Table(rows, options)


def check_options(
    *,
    victim: str | Callable[[int], nn.Module],
    epochs: int | None,
    seeds: int | Iterable[int],
    lr: float | None,
    batch: int | None,
    crop: int | None,
    eps: float | None,
    noise: str,
    device: str | torch.device | None,
    dtype: str,
    defence: str | Defence,
    poison_ratio: float,
) -> tuple[Recipe, Defence, list[int], str | None]:
    """What `evaluate` makes of its options before it looks at any data: (Recipe, Defence, seeds,
    device). Errors: ValueError, BackendError.
    """
    made = make_defence(defence)
    plan = recipe(victim, epochs, lr, batch, crop, made)
    ranges.number(
        "evaluate", "poison_ratio", poison_ratio, lambda v: 0 < v <= 1, "a number in (0, 1]"
    )
    if noise not in NOISES:
        fail("evaluate", "noise", " or ".join(map(repr, NOISES)), messages.short(noise))
    if eps is not None:
        ranges.budget("evaluate", "eps", eps)
    check_unscaled("evaluate", dtype)
    return plan, made, _seeds(seeds), checks.device("evaluate", device)


def _seeds(seeds):
    try:
        found = [_plain(seed) for seed in seeds]
    except TypeError:  # not a sequence: how many
        ranges.whole("evaluate", "seeds", seeds, 1, MOST_SEEDS)
        return list(range(seeds))
    for seed in found:
        checks.seed("evaluate", seed, "seeds")
    if not found:
        fail("evaluate", "seeds", "at least one", messages.short(seeds))
    return found


def _plain(number):
    """A whole number of any library as Python's own; what is no whole number stays."""
    try:
        return operator.index(number)
    except TypeError:
        return number


def check_pair(op: str, clean: data.Dataset, test: data.Dataset) -> None:
    """Judges whether training and test images have the same classes and size and are not the same
    images. Errors: ValueError.
    """
    if test.classes != clean.classes:
        fail(
            op,
            "test",
            f"the {len(clean.classes)} classes of the clean images, {clean.classes[:3]}...",
            f"{len(test.classes)} classes, {test.classes[:3]}...",
        )
    if test.images.shape[1:] != clean.images.shape[1:]:
        fail(
            op,
            "test",
            f"images {list(clean.images.shape[1:])} (or a size to resize to)",
            list(test.images.shape[1:]),
        )
    if len(clean.images) < 2 or len(clean.labels.unique()) < 2:
        fail(
            op,
            "clean",
            "images of two or more classes",
            f"{len(clean.images)} images, {len(clean.labels.unique())} classes",
        )
    if test.images.shape == clean.images.shape and torch.equal(test.images, clean.images):
        fail(op, "test", "other images than the clean training images", "the same")
