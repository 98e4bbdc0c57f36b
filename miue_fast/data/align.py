"""Images poisoned elsewhere, matched with the clean ones by name."""

import os

import torch

from ..support.messages import fail
from ..support.written import option, shown
from .dataset import Dataset
from .export import target_paths
from .sources import Source, load


def align(clean: Dataset, copy: Dataset) -> tuple[torch.Tensor, torch.Tensor]:
    """The images of `clean` that have a poisoned counterpart in `copy`.

    Rows are matched by name: arrays keep theirs, and exported files have the path of the clean file
    with another suffix. Classes must agree by name; where the copy has only numbers (arrays without
    class names), they are indices into the clean classes.

    Returns (rows, images): positions in `clean`, int64 [M], ascending, and the poisoned images,
    uint8 [M, C, H, W]. ValueError: a name without a clean image, another shape, another class.
    """
    names = clean.names
    if not set(copy.names) <= set(names):
        names = list(target_paths(clean, os.path.splitext(copy.names[0])[1]).values())
    place = {name: row for row, name in enumerate(names)}
    strange = [name for name in copy.names if name not in place]
    if strange:
        same = shown("data", "per_class and split")
        fail(
            "data",
            "poisoned",
            f"images with the names of the clean ones (same {same}?)",
            f"{strange[0]} and {len(strange) - 1} more without a clean image",
        )
    rows, order = torch.tensor([place[name] for name in copy.names], dtype=torch.int64).sort()
    images = copy.images[order]
    if images.shape[1:] != clean.images.shape[1:]:
        fail(
            "data",
            "poisoned",
            f"images {list(clean.images.shape[1:])} (or a size to resize to)",
            list(images.shape[1:]),
        )
    numbered = not set(copy.classes) <= set(clean.classes)
    labels = [str(k) for k in range(len(clean.classes))] if numbered else clean.classes
    for row, ours, theirs in zip(
        rows.tolist(), clean.labels[rows].tolist(), copy.labels[order].tolist()
    ):
        if labels[ours] != copy.classes[theirs]:
            fail(
                "data",
                "poisoned",
                f"class {labels[ours]} for {clean.names[row]}",
                copy.classes[theirs],
            )
    return rows, images


def poison_from_images(clean: Dataset, copy: Source, *, partial: bool = False) -> torch.Tensor:
    """The perturbation that turns `clean` into the poisoned images `copy`.

    Args:
        clean: the clean images.
        copy: the poisoned images, as `load` takes them (a folder of PNG files, an .npz file, arrays
            or a Dataset), matched by `align`. They must have the size of the clean images: the
            difference of resized images is not the perturbation, so nothing is resized.
        partial: whether images without a poisoned copy stay clean (a delta of 0). Without it every
            clean image needs a copy.

    Returns (copy - clean) / 255 as float32 [N, C, H, W]. It is exact: `apply_poison(clean.images,
    delta, 1.0)` gives the very same images. ValueError: as `align` and `load`, and where a copy is
    missing.
    """
    copy = copy if isinstance(copy, Dataset) else load(copy)
    rows, images = align(clean, copy)
    if len(rows) != len(clean) and not partial:
        left = sorted(set(range(len(clean))) - set(rows.tolist()))
        fail(
            "data",
            "poisoned",
            (
                f"a poisoned copy of all {len(clean)} images (or {option('partial', True)}: "
                "delta 0 without one)"
            ),
            f"none of {clean.names[left[0]]} and {len(left) - 1} more",
        )
    delta = torch.zeros(clean.images.shape)
    delta[rows] = (images.to(torch.int16) - clean.images[rows]).float() / 255
    return delta
