"""Writes poisoned images to a folder with the tree and names of the clean one, a list of checksums,
and a note that says what it was made from.
"""

import hashlib
import io
import json
import os
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from ..support.messages import fail
from ..support.written import option
from .atomic import check_writable, only_writer, sweep
from .dataset import Dataset
from .export_file import check_content
from .images import UnreadableError, quiet_decoding, read_file, read_image, read_look
from .owned import Owned
from .poison import CHUNK, apply_poison, budget, random_noise
from .preflight import check_names, check_room, check_sizes, file_bytes
from .tree import list_tree, target_names

# Pillow's save options.
LOSSLESS = {
    "png": (".png", {"format": "PNG"}),
    "webp": (".webp", {"format": "WEBP", "lossless": True}),
    "tiff": (".tiff", {"format": "TIFF"}),
    "bmp": (".bmp", {"format": "BMP"}),
}
LOSSY = {"jpeg": (".jpg", {"format": "JPEG", "quality": 100, "subsampling": 0})}
FORMATS = LOSSLESS | LOSSY
IMAGES = "images"  # the folder of the images in that of a run
NOTE = "miue-export.json"  # in an exported folder, written last: what it was made from
NOTE_FORMAT = "miue_fast export 1"
SAMPLES = 3  # images that are encoded to estimate the room on the disk


def export_folder(
    dataset: Dataset,
    delta: torch.Tensor,
    out: str | Path,
    *,
    eps: float,
    image_format: str = "png",
    allow_lossy: bool = False,
    rounding: str = "nearest",
    overwrite: bool = False,
    progress: Callable[[int, int], object] | None = None,
) -> int:
    """Writes every image of `dataset` plus its perturbation to `out`, in the same tree and under
    the same names (with another suffix).

    Args:
        delta: float [N, C, H, W] at the size of the data set, on the [0, 1] scale. `apply_poison`
            describes eps and rounding.
        out: a new or empty folder, not inside the clean one. With overwrite=True an earlier export
            there is replaced: the files that its list of checksums names and that nobody has
            changed. Other images in it are refused.
        image_format: "png", "webp" (lossless), "tiff" or "bmp"; "jpeg" needs allow_lossy=True
            because it breaks the budget.
        progress: a function of (images done, N) that is called after each image.

    An image whose original has another size is read again at full size, and delta is enlarged
    bilinearly (a convex combination, so it stays within eps; antialiased where it shrinks). Arrays
    become out/CLASS/00000017.png. Where two names would meet, both keep their old suffix
    ("a.jpg.png"). Each file appears whole or not at all. Files are 8-bit RGB of one frame, without
    alpha. Of the original's metadata, the orientation (png, webp, jpeg) and an RGB colour profile
    (not bmp) are kept, because they say how the pixels look. Beside the class folders lie
    miue-files.sha256, the checksum of every file, and miue-export.json; `verify` reads both.

    Returns the number of files. Errors: ValueError and OSError. All are found before the first
    image is written, except a disk that fills up and an image file that is no longer the one that
    was loaded.
    """
    check_content(dataset, delta, eps, rounding)
    targets = check_folder(
        dataset,
        out,
        eps=eps,
        image_format=image_format,
        allow_lossy=allow_lossy,
        overwrite=overwrite,
    )
    out, options = Path(out), FORMATS[image_format][1]
    files = Owned(out)

    def write(job):
        row, pixels = job
        files.write(
            {
                targets[row]: lambda file: file.write(
                    _encoded(dataset, delta, row, eps, rounding, options, pixels)
                )
            },
            durable=False,
            tidy=False,
        )

    def jobs(start):
        rows = range(start, min(start + CHUNK, len(dataset)))
        small = [row for row in rows if _in_memory(dataset, row)]
        done = dict(
            zip(small, apply_poison(dataset.images[small], delta[small], eps, rounding=rounding))
        )
        return [(row, done.get(row)) for row in rows]

    count = 0
    with (
        only_writer(out),
        quiet_decoding(),
        ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool,
    ):
        for folder in sorted({(out / target).parent for target in targets}):
            folder.mkdir(parents=True, exist_ok=True)
            sweep(folder)
        try:
            for start in range(0, len(dataset), CHUNK):
                for _ in pool.map(write, jobs(start)):
                    count += 1
                    if progress is not None:
                        progress(count, len(dataset))
        finally:
            pool.shutdown(cancel_futures=True)
        files.remove(other_files(dataset, out, image_format))
        note = {
            "format": NOTE_FORMAT,
            "image_format": image_format,
            "rounding": rounding,
            "eps": eps,
            "count": count,
            "size": list(_size(dataset)),
            "pixels_sha256": pixels_digest(dataset),
            "files_sha256": files_digest(files),
        }
        files.write({NOTE: lambda file: file.write((json.dumps(note, indent=1) + "\n").encode())})
    return count


def check_folder(
    dataset: Dataset,
    out: str | Path,
    *,
    eps: float,
    image_format: str = "png",
    allow_lossy: bool = False,
    overwrite: bool = False,
    beside: int = 0,
) -> list[str]:
    """Finds everything that would stop `export_folder`, before there is a perturbation: a wrong
    format or budget, files that somebody else put there, names and sizes that the file system or
    the format cannot hold, and too little room on the disk, which is estimated from a few images
    with noise.

    `beside` is how many bytes other files will take of the disk first. The folder `out` is made.

    Returns the paths of the images in `out`, in the order of the data set. Errors: ValueError,
    OSError.
    """
    if image_format not in FORMATS:
        fail("export", "image_format", " or ".join(FORMATS), repr(image_format))
    if image_format in LOSSY and not allow_lossy:
        fail(
            "export",
            "image_format",
            f"a lossless one, or {option('allow_lossy', True)} (JPEG breaks the budget)",
            repr(image_format),
        )
    budget(eps)
    out, (suffix, options) = Path(out), FORMATS[image_format]
    targets = list(target_paths(dataset, suffix).values())
    if dataset.root is not None:
        real, clean = Path(os.path.realpath(out)), Path(os.path.realpath(dataset.root))
        if real.is_relative_to(clean) or clean.is_relative_to(real):
            fail("export", "out", f"a folder apart from the clean one, {clean}", str(real))
    if out.is_dir() and any(out.iterdir()) and not overwrite:
        fail(
            "export",
            "out",
            f"a new or empty folder (or {option('overwrite', True)})",
            f"{out}, which is not empty",
        )
    check_writable(out)
    files = Owned(out)
    files.check("export", [NOTE, *targets, *list_tree(out)[1]])
    files.check_access("export")
    for folder in {
        parent
        for target in targets
        for parent in (out / target).parents
        if parent.is_relative_to(out)
    }:
        if os.path.lexists(folder) and not (
            folder.is_dir() and folder.resolve().is_relative_to(out.resolve())
        ):
            fail(
                "export",
                "out",
                "folders inside it for the classes",
                f"{folder}, a file or a link out of it",
            )
    check_names(out, targets)
    check_sizes(dataset.sizes or [_size(dataset)] * bool(len(dataset)), image_format, options)
    freed = sum(
        file_bytes((out / name).stat().st_size)
        for name in {*targets} & {*files.names()}
        if (out / name).is_file()
    )
    check_room(
        "export",
        out,
        _needed(dataset, eps, options) + beside - freed,
        f"{len(dataset)} {image_format} images",
    )
    return targets


def _needed(dataset, eps, options):
    """About how many bytes the images take as files: a few are encoded with noise of the budget."""
    rows = sorted({len(dataset) * k // SAMPLES for k in range(SAMPLES)}) if len(dataset) else []
    few = dataset.select(rows)
    noise = random_noise(few, eps, 0, "sign")
    sizes = few.sizes or [_size(few)] * len(few)
    with quiet_decoding():
        written = sum(
            len(_encoded(few, noise, row, eps, "nearest", options)) for row in range(len(few))
        )
    per_pixel = written / max(1, sum(width * height for width, height in sizes))
    whole = dataset.sizes or [_size(dataset)] * len(dataset)
    return sum(file_bytes(per_pixel * width * height) for width, height in whole)


def _encoded(dataset, delta, row, eps, rounding, options, pixels=None):
    """Encodes one poisoned image and returns the bytes of its file. pixels: uint8 [C, H, W], where
    the poisoned image was already made at the data set's size.
    """
    look = {}
    if dataset.root is not None:
        path, raw = _original(dataset, row)
        try:
            look = read_look(path, raw)
            if not _in_memory(dataset, row):
                pixels = _enlarged(
                    np.array(read_image(path, raw=raw)), delta[row : row + 1], eps, rounding
                )
        except UnreadableError as error:
            fail("export", str(path), "the image that was loaded", str(error))
    if pixels is None:
        pixels = apply_poison(
            dataset.images[row : row + 1], delta[row : row + 1], eps, rounding=rounding
        )[0]
    if options["format"] == "TIFF":
        look.pop("exif", None)  # who reads it with Pillow would get other pixels
    image = Image.fromarray(
        (pixels[0] if len(pixels) == 1 else pixels.permute(1, 2, 0)).contiguous().numpy()
    )
    image.save(content := io.BytesIO(), **options, **look)
    return content.getbuffer()


def _enlarged(clean, delta, eps, rounding):
    clean = torch.from_numpy(clean).permute(2, 0, 1)
    wide = F.interpolate(
        delta.cpu().float(), clean.shape[1:], mode="bilinear", align_corners=False, antialias=True
    )
    return apply_poison(clean[None], wide.clamp_(-eps, eps), eps, rounding=rounding)[0]


def _original(dataset, row):
    """Reads (path, bytes) of an image file. It must still be the file that was loaded: another
    picture would get this one's perturbation.
    """
    path = dataset.root / dataset.names[row]
    try:
        raw = read_file(path)
    except UnreadableError as error:
        fail("export", str(path), "the image that was loaded", str(error))
    if dataset.digests is not None and hashlib.sha256(raw).hexdigest() != dataset.digests[row]:
        fail(
            "export",
            str(path),
            "the image that was loaded (sha256)",
            "another one; put back the one that was loaded, or generate anew",
        )
    return path, raw


def pixels_digest(dataset: Dataset) -> str:
    """sha256 (hex) of the images as they were loaded, in the order of their paths in a folder: what
    a folder was made from.
    """
    rows = dataset.images.permute(0, 2, 3, 1)
    return combined_digest(
        {path: image_digest(row.numpy()) for path, row in zip(tree_paths(dataset), rows)}
    )


def files_digest(files: Owned) -> str:
    """The sha256 (hex) of what the list says about the images. An export that was cut short, alone
    or over another one, has a different one.
    """
    lines = [
        f"{digest}  {name}\n"
        for name in files.names()
        if "/" in name
        for digest in files.checksums(name)
    ]
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def image_digest(pixels: np.ndarray | None) -> str:
    """The sha256 (hex) of uint8 pixels [H, W, C], or of nothing for None."""
    content = b"" if pixels is None else np.ascontiguousarray(pixels).data
    return hashlib.sha256(content).hexdigest()


def combined_digest(digests: Mapping[str, str]) -> str:
    """`pixels_digest` from {path: `image_digest`}."""
    return hashlib.sha256("".join(digests[path] for path in sorted(digests)).encode()).hexdigest()


def other_files(dataset: Dataset, out: str | Path, image_format: str) -> list[str]:
    """Names of the files in `out` that an earlier export wrote and one of `dataset` in this format
    would not.
    """
    mine = {NOTE, *target_paths(dataset, FORMATS[image_format][0]).values()}
    return [
        name
        for name in exported_files(out)
        if name not in mine and os.path.lexists(Path(out) / name)
    ]


def exported_files(out: str | Path) -> list[str]:
    """Names on the list of a folder that are an export's: its images, all of them in class folders,
    and its note.
    """
    return [name for name in Owned(out).names() if "/" in name or name == NOTE]


def _in_memory(dataset, row):
    return dataset.sizes is None or tuple(dataset.sizes[row]) == _size(dataset)


def _size(dataset):
    return dataset.images.shape[3], dataset.images.shape[2]


def tree_paths(dataset: Dataset) -> list[str]:
    """Where each image stands in a folder: its name, below its class for arrays. ValueError: a name
    that would leave the folder.
    """
    paths = [
        name if "/" in name else f"{dataset.classes[label]}/{name}"
        for name, label in zip(dataset.names, dataset.labels.tolist())
    ]
    for path in paths:
        if any(part in ("", ".", "..") or "\0" in part for part in path.split("/")):
            fail("export", "names", "relative paths without empty, '.' and '..' parts", repr(path))
    for label in dataset.classes:
        if dataset.root is None and "/" in label:
            fail("export", "classes", "names without '/'", repr(label))
    if len(set(paths)) != len(paths):
        fail("export", "names", "a different path for each image", "two images with the same")
    return paths


def target_paths(dataset: Dataset, suffix: str) -> dict[str, str]:
    """{path: path after an export with `suffix`} in the data set's order."""
    return target_names(tree_paths(dataset), [name for name, _ in dataset.unreadable], suffix)
