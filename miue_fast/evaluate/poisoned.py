"""The clean images a poison belongs to, and their poisoned forms in the same order."""

import os
import zipfile
from pathlib import Path

import torch

from .. import data
from .._checks import describe, fail
from ..data.export import target_paths
from ..data.poison import TENSOR_FILE


def poisoned_images(clean, poisoned, *, size=None):
    """(Dataset, uint8 [N, C, H, W]): the rows of `clean` that were poisoned, and their poisoned forms.

    Args:
        clean: data.Dataset. poisoned: as for `evaluate`. size: exported images are resized to it; None: they must agree.

    Errors: ValueError: another data set, other classes, names without a clean image.
    """
    if isinstance(poisoned, torch.Tensor):
        return clean, _applied(clean, poisoned, 1.0)
    if isinstance(poisoned, data.Dataset):
        return _aligned(clean, poisoned)
    if not isinstance(poisoned, (str, os.PathLike)):
        fail("evaluate", "poisoned", "a folder, a file, a Dataset or a float tensor", describe(poisoned))
    path = Path(poisoned)
    if _is_store(path):
        delta, manifest = data.load_poison(path, clean)
        return clean, _applied(clean, delta, manifest["eps"] if manifest else 1.0)
    return _aligned(clean, data.load(path, size=size))


def _is_store(path):
    """A file or folder that holds perturbations, not images."""
    if path.suffix == ".npz" and zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            return "delta.npy" in archive.namelist()
    return path.suffix in (".safetensors", ".pt", ".pth") or (path / TENSOR_FILE).is_file()


def _applied(clean, delta, eps):
    if delta.shape != clean.images.shape:
        fail("evaluate", "poisoned", f"a perturbation {list(clean.images.shape)}, like the clean images", describe(delta))
    return data.apply_poison(clean.images, delta, eps)


def _aligned(clean, copy):
    """Rows are matched by name: arrays keep theirs, exported files have the clean file's path with another suffix."""
    names = clean.names
    if not set(copy.names) <= set(names):
        names = list(target_paths(clean, os.path.splitext(copy.names[0])[1]).values())
    place = {name: row for row, name in enumerate(names)}
    strange = [name for name in copy.names if name not in place]
    if strange:
        fail("evaluate", "poisoned", "images with the names of the clean ones (same --per-class, --split?)", f"{strange[0]} and "
             f"{len(strange) - 1} more without a clean image")  # fmt: skip
    rows, order = torch.tensor([place[name] for name in copy.names], dtype=torch.int64).sort()
    clean, images = clean.select(rows), copy.images[order]
    if images.shape != clean.images.shape:
        fail("evaluate", "poisoned", f"images {list(clean.images.shape[1:])} (or a size to resize to)", list(images.shape[1:]))
    for name, ours, theirs in zip(clean.names, clean.labels.tolist(), copy.labels[order].tolist()):
        if clean.classes[ours] != copy.classes[theirs]:
            fail("evaluate", "poisoned", f"class {clean.classes[ours]} for {name}", copy.classes[theirs])
    return clean, images
