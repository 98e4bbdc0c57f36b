"""The clean images a poison belongs to, and their poisoned forms in the same order."""

import os
from typing import Any

import torch

from .. import data
from ..support.messages import describe, fail


def poisoned_images(
    clean: data.Dataset, poisoned: Any, *, size: int | None = None
) -> tuple[data.Dataset, torch.Tensor]:
    """(Dataset, uint8 [N, C, H, W]): the rows of `clean` that were poisoned, and their poisoned
    forms.

    Args:
        clean: data.Dataset. poisoned: as for `evaluate`. size: exported images are resized to it;
            None: they must agree.

    Errors: ValueError: another data set, other classes, names without a clean image.
    """
    if isinstance(poisoned, torch.Tensor):
        return clean, _applied(clean, poisoned, 1.0)
    if isinstance(poisoned, data.Dataset):
        return _aligned(clean, poisoned)
    if not isinstance(poisoned, (str, os.PathLike)):
        fail(
            "evaluate",
            "poisoned",
            "a folder, a file, a Dataset or a float tensor (of a Result: its delta)",
            describe(poisoned),
        )
    if data.is_poison(poisoned):
        delta, manifest = data.load_poison(poisoned, clean)
        return clean, _applied(clean, delta, manifest["eps"] if manifest else 1.0)
    return _aligned(clean, data.load(poisoned, size=size))


def _aligned(clean, copy):
    rows, images = data.align(clean, copy)
    return clean.select(rows), images


def _applied(clean, delta, eps):
    if delta.shape != clean.images.shape:
        fail(
            "evaluate",
            "poisoned",
            f"a perturbation {list(clean.images.shape)}, like the clean images",
            describe(delta),
        )
    return data.apply_poison(clean.images, delta, eps)
