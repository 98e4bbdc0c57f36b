"""Decides which files of an ImageFolder tree count, and what they are called after an export."""

import logging
import multiprocessing
import os
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

from ..support.messages import printable
from .atomic import TEMPORARY
from .files import open_regular
from .images import SUFFIXES

log = logging.getLogger("miue_fast.data")
# Pictures that somebody would miss, of kinds that are not read here.
PICTURES = (
    ".apng",
    ".arw",
    ".avif",
    ".cr2",
    ".cr3",
    ".dng",
    ".emf",
    ".eps",
    ".exr",
    ".hdr",
    ".heic",
    ".heif",
    ".hif",
    ".icns",
    ".ico",
    ".j2k",
    ".jfif",
    ".jp2",
    ".jpe",
    ".jpf",
    ".jpx",
    ".jxl",
    ".mpo",
    ".nef",
    ".nrw",
    ".orf",
    ".pbm",
    ".pcx",
    ".pef",
    ".pgm",
    ".pnm",
    ".psd",
    ".raf",
    ".raw",
    ".rw2",
    ".srw",
    ".svg",
    ".svgz",
    ".tga",
    ".wmf",
    ".xcf",
)
MAGIC = (b"\x89PNG", b"\xff\xd8\xff", b"GIF8", b"II*\0", b"MM\0*")  # an image under another name


def list_tree(root: Path) -> tuple[list[str], list[str], list[tuple[str, str]], list[str]]:
    """Lists ROOT/CLASS/**/image: (class names, image names, refused, skipped), all sorted;
    `refused` has (name, reason).

    Links to folders are not followed, so there are no loops, and links to files must stay inside
    the root. Skipped are the files in class folders that are no images by name and content
    (Thumbs.db, .DS_Store, notes.txt). Hidden images are ignored, and so are other files beside the
    class folders.
    """
    root = Path(root)
    real = root.resolve()
    names, refused, skipped = [], [], []

    folders: list[tuple[str | Path, str]] = [(root, "")]
    while folders:  # no recursion: a path may have 2,000 parts
        folder, prefix = folders.pop()
        try:
            entries = list(os.scandir(folder))
        except OSError as error:
            refused.append((prefix.rstrip("/"), f"cannot be listed: {error.strerror}"))
            continue
        for entry in entries:
            name = prefix + entry.name
            if entry.name.startswith("."):
                if (
                    prefix
                    and not entry.name.lower().endswith((*SUFFIXES, TEMPORARY))
                    and entry.is_file(follow_symlinks=False)
                ):
                    skipped.append(name.encode(errors="backslashreplace").decode())
                continue
            reason = _refuse(entry, real, inside=bool(prefix))
            if reason is not None:
                refused.append((name.encode(errors="backslashreplace").decode(), reason))
            elif entry.is_dir(follow_symlinks=False):
                folders.append((entry.path, name + "/"))
            elif entry.name.lower().endswith(SUFFIXES):
                names.append(name)
            elif prefix:
                skipped.append(name)
    names.sort()
    return sorted({name.split("/")[0] for name in names}), names, sorted(refused), sorted(skipped)


def tell_skipped(skipped: Sequence[str]) -> None:
    """Writes one log line about the files that are no images. The worker processes of a report
    leave it to their parent.
    """
    if skipped and multiprocessing.parent_process() is None:
        shown = [printable(name, most=80) for name in skipped[:5]]
        more = [f"{len(skipped) - len(shown)} more"] if len(skipped) > len(shown) else []
        log.warning(
            "%d files that are not images were skipped: %s",
            len(skipped),
            ", ".join([*shown, *more]),
        )


def _refuse(entry, real, inside):
    """Why a directory entry is left out, or None if it is not."""
    try:
        entry.name.encode()
    except UnicodeEncodeError:
        return "the name is not UTF-8"
    image = entry.name.lower().endswith(SUFFIXES)
    try:
        if entry.is_symlink():
            target = Path(entry.path).resolve(strict=True)
            if target.is_dir():
                return "a link to a folder is not followed"
            if not target.is_relative_to(real):
                return "a link out of the data set is not followed" if inside or image else None
        if entry.is_dir():
            return None
        if not entry.is_file():
            return "not a regular file"
    except (OSError, RuntimeError) as error:
        return f"broken link: {getattr(error, 'strerror', None) or 'loop'}"
    if not inside:
        return "not in a class folder" if image else None
    try:
        return (
            None
            if image or not _is_picture(entry)
            else f"not an image type that is read here ({', '.join(s[1:] for s in SUFFIXES)})"
        )
    except OSError as error:
        return f"cannot be read: {error.strerror}"


def _is_picture(entry):
    """Whether a file that is not read here, going by its name, is a picture all the same, going by
    its suffix or its first bytes.
    """
    if entry.name.lower().endswith(PICTURES):
        return True
    with open_regular(entry.path) as file:
        head = file.read(12)
    return head.startswith(MAGIC) or (head[:4] == b"RIFF" and head[8:] == b"WEBP")


def first_per_class(names: list[str], per_class: int | None) -> list[str]:
    """The first `per_class` of the sorted names in each class, or all of them for None."""
    if per_class is None:
        return names
    seen = Counter()
    kept = []
    for name in names:
        seen[name.split("/")[0]] += 1
        if seen[name.split("/")[0]] <= per_class:
            kept.append(name)
    return kept


def target_names(names: Iterable[str], others: Iterable[str], suffix: str) -> dict[str, str]:
    """Maps each name to its name after an export: the suffix is replaced, or kept in the stem where
    two files would meet ("a.jpg.png", "a.png.png").

    `others` are names of images in the tree that are not exported. They count as well, so that the
    result does not depend on which files are damaged.
    """
    everything = sorted({*names, *(name for name in others if name.lower().endswith(SUFFIXES))})
    kept_suffix = set()
    while True:
        target = {
            name: name + suffix if name in kept_suffix else _stem(name) + suffix
            for name in everything
        }
        count = Counter(target.values())
        clashing = {name for name in everything if count[target[name]] > 1} - kept_suffix
        if not clashing:
            return {name: target[name] for name in names}
        kept_suffix |= clashing


def _stem(name):
    return os.path.splitext(name)[0] if name.lower().endswith(SUFFIXES) else name
