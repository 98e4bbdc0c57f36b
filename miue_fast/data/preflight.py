"""Finds what would stop a folder of images from being written before the work whose result it is:
names, sizes, and room on the disk.
"""

import io
import os
import re
import secrets
import shutil
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path, PurePosixPath

from PIL import Image

from ..support.messages import fail
from .atomic import TEMPORARY
from .images import one_line

PLAIN = re.compile(r"[A-Za-z0-9_./ -]{1,120}")
BLOCK = 4096  # bytes that a file system gives to a file at a time


def check_names(out: Path, targets: Sequence[str]) -> None:
    """Makes the folders and the doubtful files of `targets` (posix paths) once, empty, in a
    temporary folder of `out`, because only the file system knows what it takes.

    Every name is doubtful that is not short, of plain letters and different from all others. What
    is found are names and paths that are too long, names that are the same to the file system
    (case, accents), a file where a folder has to be, and characters that it cannot store.
    ValueError names the file; `out` is then as it was.
    """
    folders = sorted(
        {str(parent) for target in targets for parent in list(PurePosixPath(target).parents)[:-1]}
    )
    alike = Counter(name.casefold() for name in [*folders, *targets])
    odd = [name for name in targets if not PLAIN.fullmatch(name) or alike[name.casefold()] > 1]
    if not odd and all(alike[name.casefold()] == 1 for name in folders):
        return
    probe = out / f".{secrets.token_hex(8)}{TEMPORARY}"
    try:
        for folder in ["", *folders]:
            _try(folder, lambda folder=folder: (probe / folder).mkdir())
        for target in odd:
            _try(
                target,
                lambda target=target: os.close(
                    os.open(probe / target, os.O_CREAT | os.O_EXCL | os.O_WRONLY)
                ),
            )
    finally:
        shutil.rmtree(probe, ignore_errors=not probe.exists())


def _try(name, make):
    try:
        make()
    except (OSError, ValueError) as error:
        told = {
            FileExistsError: "another image has this name on this file system",
            IsADirectoryError: "a folder of images has this name",
            NotADirectoryError: "another image has the name of this folder",
        }
        reason = told.get(type(error)) or getattr(error, "strerror", None) or one_line(error)
        wanted = "names that this file system can hold, with the suffix of the format"
        fail("export", "names", wanted, f"{str(name)[-200:]}: {reason}; rename it")


def check_sizes(sizes: Iterable[tuple[int, int]], image_format: str, options: dict) -> None:
    """Raises ValueError if the format cannot hold the widest or the highest image, which is found
    by asking its encoder. sizes: (width, height) in pixels.
    """
    sizes = list(sizes)
    if not sizes:
        return
    for width, height in (
        (max(width for width, _ in sizes), 1),
        (1, max(height for _, height in sizes)),
    ):
        try:
            Image.new("RGB", (width, height)).save(io.BytesIO(), **options)
        except (OSError, ValueError, MemoryError, OverflowError) as error:
            fail(
                "export",
                "image_format",
                (
                    f"one that holds images of {width if height == 1 else height} pixels "
                    "a side (png does)"
                ),
                f"{image_format!r}: {one_line(error)}",
            )


def file_bytes(size: float) -> int:
    """How many bytes of the disk a file of `size` bytes takes."""
    return -(-int(size) // BLOCK) * BLOCK


def check_room(op: str, folder: Path, needed: int, what: str) -> None:
    """Raises ValueError if the disk of `folder` has fewer than `needed` bytes left."""
    free = shutil.disk_usage(folder).free
    if free < needed:
        fail(
            op,
            "output",
            f"about {_told(needed)} of room for {what}",
            f"{_told(free)} free in {folder}; make room or choose another disk",
        )


def _told(size):
    for unit in ("bytes", "KB", "MB", "GB"):
        if size < 1000 or unit == "GB":
            return f"{size:.4g} {unit}"
        size /= 1000
