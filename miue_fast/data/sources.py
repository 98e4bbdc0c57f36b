"""Reads images from ImageFolder trees, CIFAR python files, npz archives and arrays."""

import hashlib
import logging
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from ..dispatch.checks import INTEGERS
from ..support import ranges
from ..support.messages import describe, fail
from ..support.written import option
from . import cifar
from .archive import read_arrays
from .dataset import Dataset
from .files import ARCHIVE_ERRORS
from .images import UnreadableError, one_line, quiet_decoding, read_file, read_image
from .tree import first_per_class, list_tree, tell_skipped

log = logging.getLogger("miue_fast")
CHUNK = 1024  # images at a time


MAX_SIZE = 4096  # pixels a side that images are resized to

ArrayLike = torch.Tensor | np.ndarray
Source = str | os.PathLike[str] | Dataset | tuple[ArrayLike, ArrayLike]  # what `load` takes


def load(
    source: Source,
    *,
    size: int | None = None,
    split: str | None = None,
    per_class: int | None = None,
) -> Dataset:
    """Reads labelled images as one `Dataset`.

    Args:
        source: an ImageFolder root (ROOT/CLASS/**/image of the kinds png jpg jpeg webp bmp tif tiff
            ppm gif; classes and names are sorted; pixels as in `images.read_image`), a folder of
            CIFAR-10 or CIFAR-100 python files, an .npz file with `images` and `labels`, a pair
            (images, labels), or a Dataset. Arrays are [N, C, H, W] or [N, H, W, C] with C = 1 or 3,
            in uint8, or in float on [0, 1] and then rounded to the nearest multiple of 1/255 (half
            to even; a warning says so if that changes a value). Labels are integers, and their
            sorted values become the classes.
        size: the network's size in pixels. Every image is resized to size x size (bilinear,
            antialiased). With None all images must have one size already.
        split: "train" or "test". Of CIFAR files "train" is the default; of a folder ROOT/split is
            read. Archives and arrays have no split.
        per_class: keep only the first images of each class, by name in a folder and in order
            elsewhere.

    Files that cannot be used (damaged, bombs, more than 8 bits per channel, links to folders or out
    of the root) are left out and listed in `unreadable`. Files in class folders that are no images
    (Thumbs.db, notes.txt) are listed in `skipped` and named in one log line. The result is
    deterministic. ValueError: no images, fewer than 2 classes, unequal sizes with size=None, wrong
    arrays.
    """
    check_selection(size, per_class)
    if isinstance(source, (str, os.PathLike)):
        path = Path(source)
        if path.is_dir():
            found = cifar.find(path)
            if found is None:
                return _two_classes(_load_folder(path / (split or ""), size, per_class), path)
            return _finish(_from_cifar(*found, split or "train"), size, per_class, path)
        if not path.exists() or path.suffix.lower() != ".npz":
            fail(
                "data",
                "source",
                "a folder of images or CIFAR files, or an .npz file (unpack archives first)",
                _what(path),
            )
        data, name = _load_npz(path), path
    elif isinstance(source, Dataset):
        data, name = source, "data set"
    elif isinstance(source, (tuple, list)) and len(source) == 2:
        data, name = from_arrays(*source), "arrays"
    else:
        fail(
            "data", "source", "a path, a pair (images, labels) or a Dataset", type(source).__name__
        )
    if split is not None:
        fail("data", "split", "None for arrays and archives", repr(split))
    return _finish(data, size, per_class, name)


def check_selection(size: int | None, per_class: int | None) -> None:
    """Checks what `load` checks before it looks at its source. Errors: ValueError."""
    if size is not None:
        ranges.whole("data", "size", size, 1, MAX_SIZE)
    if per_class is not None:
        ranges.whole("data", "per_class", per_class)


def is_tree(path: str | Path) -> bool:
    """Whether `load` reads this path as ROOT/CLASS/**/image."""
    return Path(path).is_dir() and cifar.find(Path(path)) is None


def load_test(
    source: Source,
    *,
    size: int | None = None,
    split: str | None = None,
    per_class: int | None = None,
) -> Dataset:
    """Reads test images as `load` does; of a folder of CIFAR python files the test part, unless
    `split` says otherwise.
    """
    if (
        split is None
        and isinstance(source, (str, os.PathLike))
        and Path(source).is_dir()
        and cifar.find(Path(source)) is not None
    ):
        split = "test"
    return load(source, size=size, split=split, per_class=per_class)


def _what(path):
    return f"{path}, which {'is neither' if path.exists() else 'does not exist'}"


def _two_classes(data, name):
    found = len(data.labels.unique())
    if found < 2:
        reason = (
            f" ({len(data.unreadable)} unreadable, first: {': '.join(data.unreadable[0])})"
            if data.unreadable
            else ""
        )
        fail(
            "data",
            str(name),
            "readable images of at least 2 classes",
            f"{len(data)} images of {found} classes{reason}",
        )
    return data


def _finish(data, size, per_class, name):
    if per_class is not None:
        data = data.select(_first_rows(data.labels, per_class))
    if size is not None and len(data) and tuple(data.images.shape[2:]) != (size, size):
        if data.root is not None:
            fail(
                "data",
                "size",
                (
                    "the size this folder was loaded at, "
                    f"{list(data.images.shape[2:])} (load it again)"
                ),
                size,
            )
        planes = data.images.reshape(-1, *data.images.shape[2:]).numpy()
        resized = np.stack([resize(Image.fromarray(plane), size) for plane in planes])
        images = torch.from_numpy(resized).reshape(*data.images.shape[:2], size, size)
        data = Dataset(images, data.labels, data.classes, data.names)
    return _two_classes(data, name)


def _first_rows(labels, per_class):
    """The first rows of each class, ascending; one sort, however many classes there are."""
    order = labels.argsort(stable=True)
    counts = labels.bincount()
    starts = (counts.cumsum(0) - counts).repeat_interleave(
        counts
    )  # of the class of each sorted row
    return order[torch.arange(len(labels)) - starts < per_class].sort().values


def resize(image: Image.Image, size: int) -> np.ndarray:
    """Resizes an image as `load` does: uint8 [size, size, ...]."""
    return np.asarray(
        image
        if image.size == (size, size)
        else image.resize((size, size), Image.Resampling.BILINEAR)
    )


def _load_folder(root, size, per_class):
    if not root.is_dir():
        fail("data", "source", "a folder", str(root))
    classes, names, unreadable, skipped = list_tree(root)
    tell_skipped(skipped)
    kept, pixels, sizes, digests = [], [], [], []

    def read(name):
        try:
            raw = read_file(root / name)
            image = read_image(root / name, raw=raw)
            return (
                image.size,
                np.asarray(image) if size is None else resize(image, size),
                hashlib.sha256(raw).hexdigest(),
            )
        except UnreadableError as error:
            return None, str(error), None

    with quiet_decoding(), ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        jobs = first_per_class(names, per_class)
        try:
            for name, (original, result, digest) in zip(jobs, pool.map(read, jobs)):
                if original is None:
                    unreadable.append((name, result))
                    continue
                if pixels and result.shape != pixels[0].shape:
                    first = (
                        f"{kept[0]} is {sizes[0][0]} x {sizes[0][1]}, "
                        f"{name} is {original[0]} x {original[1]}"
                    )
                    fail(
                        "data",
                        "size",
                        (
                            f"images of one size, or {option('size', 'N')} to resize "
                            "them for the model"
                        ),
                        first,
                    )
                kept.append(name)
                pixels.append(result)
                sizes.append(original)
                digests.append(digest)
        finally:
            pool.shutdown(cancel_futures=True)
    filled = {name.split("/")[0] for name in kept}
    unreadable += [
        (label, "class folder without a readable image") for label in classes if label not in filled
    ]
    classes = [label for label in classes if label in filled]
    number = {label: k for k, label in enumerate(classes)}
    labels = torch.tensor([number[name.split("/")[0]] for name in kept], dtype=torch.int64)
    images = torch.empty(
        (len(kept), 3, *(pixels[0].shape[:2] if pixels else (1, 1))), dtype=torch.uint8
    )
    for row in range(
        len(kept) - 1, -1, -1
    ):  # from the end, so that each decoded image is freed once copied
        images[row] = torch.from_numpy(pixels.pop().copy()).permute(2, 0, 1)
    return Dataset(
        images, labels, classes, kept, root.absolute(), sizes, sorted(unreadable), skipped, digests
    )


# archives and arrays


def _from_cifar(folder, form, split):
    images, labels, classes = cifar.read(folder, form, split)
    return Dataset(
        torch.from_numpy(images), torch.from_numpy(labels), classes, _numbered(len(images))
    )


def _numbered(count):
    return [f"{i:08d}" for i in range(count)]


def _load_npz(path):
    try:
        content = read_arrays(path, ("images", "labels", "classes", "names"))
    except ARCHIVE_ERRORS as error:
        fail(
            "data",
            str(path),
            "an .npz of plain arrays",
            f"a damaged or foreign file ({one_line(error)})",
        )
    for key in ("images", "labels"):
        if key not in content:
            fail("data", str(path), "the arrays 'images' and 'labels'", f"{sorted(content)}")
    texts = {
        key: _texts(content.pop(key), f"{path}: {key}")
        for key in ("classes", "names")
        if key in content
    }
    return from_arrays(
        _tensor(content.pop("images"), "images", copy=False),
        _tensor(content.pop("labels"), "labels"),
        **texts,
    )


def _texts(array, name):
    if not isinstance(array, np.ndarray) or array.ndim != 1 or array.dtype.kind != "U":
        fail(
            "data", name, "an array of text [N]", f"{getattr(array, 'dtype', type(array).__name__)}"
        )
    return array.tolist()


def from_arrays(
    images: ArrayLike,
    labels: ArrayLike,
    *,
    classes: Sequence[str] | None = None,
    names: Sequence[str] | None = None,
) -> Dataset:
    """A Dataset of arrays or tensors, as `load` describes them. With `classes`, a list of names,
    labels are indices into it.
    """
    images, labels = _tensor(images, "images"), _tensor(labels, "labels")
    if images.dim() != 4 or not (images.shape[1] in (1, 3) or images.shape[3] in (1, 3)):
        fail("data", "images", "[N, C, H, W] or [N, H, W, C] with C = 1 or 3", describe(images))
    if labels.dtype in (torch.uint16, torch.uint32, torch.uint64):  # PyTorch has little for them
        labels = labels.to(torch.int64)
    if labels.shape != images.shape[:1] or labels.dtype not in INTEGERS:
        fail("data", "labels", f"integers [{len(images)}]", describe(labels))
    if images.shape[1] not in (1, 3):
        images = images.permute(0, 3, 1, 2)
    if images.dtype.is_floating_point:
        images = _to_8_bits(images)
    elif images.dtype != torch.uint8:
        fail("data", "images", "uint8, or floats in [0, 1]", describe(images))
    labels = labels.to(torch.int64)
    if classes is None:
        values, labels = labels.unique(return_inverse=True)
        classes = [str(value) for value in values.tolist()]
    names = _numbered(len(images)) if names is None else list(names)
    return Dataset(
        images.clone(memory_format=torch.contiguous_format), labels.clone(), list(classes), names
    )


def _tensor(value, name, copy=True):
    if isinstance(value, torch.Tensor):
        return value.detach().cpu()
    try:
        return torch.from_numpy(np.array(value, copy=copy or None))
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"data: {name}: expected an array of numbers, got {type(value).__name__} "
            f"({one_line(error)})"
        ) from error


def _to_8_bits(images):
    if len(images) and not (images.min() >= 0 and images.max() <= 1):
        fail(
            "data",
            "images",
            "floats in [0, 1]",
            f"values from {float(images.min())} to {float(images.max())}",
        )
    result = torch.empty_like(images, dtype=torch.uint8)
    farthest = 0
    for part, made in zip(images.split(CHUNK), result.split(CHUNK)):  # bounds the temporaries
        scaled = part.double() * 255
        rounded = scaled.round()
        farthest = max(farthest, float((scaled - rounded).abs().max())) if len(part) else 0
        made.copy_(rounded)
    if farthest > 255 * 2 * torch.finfo(images.dtype).eps:
        log.warning("data: the float images are not multiples of 1/255: rounded to 8 bits")
    return result
