"""The poison store: the perturbation of a run, [N, C, H, W], or one row per class."""

import logging

import torch

from .. import data as datasets
from ..ops import projected_step_
from . import batches
from .options import Options

log = logging.getLogger("miue_fast")


def empty(dataset: datasets.Dataset, options: Options, device: torch.device) -> torch.Tensor:
    """Zeros of options.delta_dtype on `device`: one row per image, or per class with
    options.classwise. int8 holds levels of eps / 127.
    """
    rows = len(dataset.classes) if options.classwise else len(dataset.images)
    return torch.zeros(
        (rows, *dataset.images.shape[1:]), dtype=getattr(torch, options.delta_dtype), device=device
    )


def levels(eps: float, options: Options) -> int:
    """How many levels of an int8 store, options.eps / 127 each, the budget `eps` holds."""
    return int(127 * (eps / options.eps))


def start_randomly(delta: torch.Tensor, images: torch.Tensor, options: Options) -> None:
    """Puts uniform noise in the budget of the first epoch (or its levels) into the store, projected
    so that image + delta stays in [0, 1]. images: [N, C, H, W] on the device of the store.
    """
    o, g = options, batches.generator(options.seed, 0, "random start")
    budget, whole = o.budget(1), o.delta_dtype == "int8"
    grid = o.transforms.grid
    for start in range(0, len(delta), o.batch):
        rows = slice(start, start + o.batch)
        noise = torch.rand(delta[rows].shape, generator=g, dtype=torch.float32) * 2 - 1
        if grid > 1:  # the upper left corner of a cell is the whole cell's
            height, width = noise.shape[2:]
            noise = noise[:, :, ::grid, ::grid].repeat_interleave(grid, 2)[:, :, :height]
            noise = noise.repeat_interleave(grid, 3)[..., :width]
        delta[rows] = (
            (noise * levels(budget, o)).round().to(torch.int8) if whole else noise * budget
        )
        if o.classwise:  # a class has no image of its own to stay within
            continue
        still = torch.zeros(noise.shape, device=delta.device)
        projected_step_(
            delta[rows],
            None,
            still,
            images[rows],
            alpha=0.0,
            eps=o.eps if whole else budget,
            backend=o.backend,
        )


def finished(delta: torch.Tensor, labels: torch.Tensor, options: Options) -> torch.Tensor:
    """The perturbation that a store holds: float32 [N, C, H, W] on the CPU, within +-eps. labels:
    int64 [N] on the CPU.
    """
    values = delta.float()
    if delta.dtype == torch.int8:
        values *= options.eps / 127
    values = values.clamp_(-options.eps, options.eps).cpu()
    return values[labels] if options.classwise else values


def warn_unchanged(delta: torch.Tensor, eps: float) -> None:
    """Logs how many images a perturbation leaves as they are. A published image has 8 bits: what
    rounds to zero there protects nothing.
    """
    unchanged = int((~datasets.quantise(delta, eps).flatten(1).any(1)).sum())
    if unchanged:
        log.warning(
            (
                "%d of %d images stay as they are: their perturbation is zero, "
                "or below half a level of 8-bit images"
            ),
            unchanged,
            len(delta),
        )
