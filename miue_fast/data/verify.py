"""Proves from the files alone that a poisoned copy is complete, within its budget and as it was
written.
"""

import hashlib
import json
import os
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

from ..support.messages import LONGEST, printable
from . import cifar
from .dataset import Dataset
from .export import (
    NOTE,
    NOTE_FORMAT,
    combined_digest,
    exported_files,
    files_digest,
    image_digest,
    pixels_digest,
    tree_paths,
)
from .images import UnreadableError, quiet_decoding, read_file, read_image
from .owned import LIST, Owned
from .poison import apply_poison, budget, is_poison, load_poison
from .sources import MAX_SIZE, Source, check_selection, is_tree, load, resize
from .tree import first_per_class, list_tree, target_names, tell_skipped

LISTED = 20


@dataclass
class Verification:
    """What `verify` found.

    Attributes:
        count: how many images were compared.
        unchanged: how many of them equal their clean originals.
        max_linf: the largest difference, in levels of 1/255.
        problems: the first 20 problems. problem_count: how many there are.
        listed: whether an exported folder has a list of checksums; None if it was no folder of
            images.
        unreadable: (name, reason) of clean files that cannot be read, so that nobody could poison
            them.
    """

    count: int = 0
    unchanged: int = 0
    max_linf: float = 0
    problems: list[str] = field(default_factory=list)
    problem_count: int = 0
    listed: bool | None = None
    unreadable: list[tuple[str, str]] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        """Whether something was compared and no problem was found."""
        return self.problem_count == 0 and self.count > 0

    def add(self, problem: str) -> None:
        problem = printable(problem, most=LONGEST)
        self.problem_count += 1
        if len(self.problems) < LISTED:
            self.problems.append(problem)


def verify(
    clean: Source, out: str | Path, *, eps: float, per_class: int | None = None
) -> Verification:
    """Reads `out` again and proves count, names, sizes, modes, labels and L-inf <= 255 * eps
    against `clean`.

    Of a folder that `export_folder` wrote it also proves that every file has the checksum on its
    list, and that the clean images are the ones that were poisoned (their pixels at the size they
    were loaded at).

    Args:
        clean: a Dataset, or what `load` takes.
        out: an exported folder, an .npz file or (images, labels) of poisoned images, or a poison
            (whatever `load_poison` reads), whose own values are then held against eps.
        per_class: as in `load`, where `clean` is not a Dataset.

    Returns a Verification. Its `ok` is False if anything is missing, too many, changed in size or
    mode, or over the budget. Clean files that cannot be read and have no copy are not missing; they
    are listed in `unreadable`. ValueError: `clean` or `out` cannot be compared at all (a missing
    folder, a damaged poison).
    """
    check_selection(None, per_class)
    proof = Verification()
    levels = budget(eps)
    path = Path(out) if isinstance(out, (str, os.PathLike)) else None
    if path is not None and is_poison(path):
        delta, manifest = load_poison(path)
        _verify_poison(proof, _dataset(clean, per_class, delta.shape), delta, manifest, eps)
    elif path is not None and path.is_dir() and cifar.find(path) is None:
        _verify_folder(proof, clean, path, levels, per_class)
    else:
        copy = load(out)
        _verify_arrays(proof, _dataset(clean, per_class, copy.images.shape), copy, levels)
    return proof


def _dataset(clean, per_class, shape):
    """The clean images at the copy's size."""
    if isinstance(clean, Dataset):
        return clean
    return load(clean, size=shape[2] if shape[2] == shape[3] else None, per_class=per_class)


def _verify_poison(proof, clean, delta, manifest, eps):
    if manifest is not None and manifest["fingerprint"] != clean.fingerprint:
        proof.add("the poison was made for another data set (fingerprint)")
    if delta.shape == (len(clean.classes), *clean.images.shape[1:]) != clean.images.shape:
        delta = delta[clean.labels]
    if delta.shape != clean.images.shape:
        proof.add(f"shape {list(delta.shape)}, the clean images have {list(clean.images.shape)}")
        return
    over = delta.abs().flatten(1).amax(1).double() > eps * (
        1 + 1e-6
    )  # eps itself, rounded to fp32, passes
    for row in over.nonzero()[:, 0].tolist():
        proof.add(
            f"{clean.names[row]}: {255 * float(delta[row].abs().max()):.3f} levels, "
            f"more than {255 * eps:g}"
        )
    _levels(proof, clean, apply_poison(clean.images, delta, 1.0))


def _levels(proof, clean, images):
    """Largest difference of every image [N]."""
    linf = (images.to(torch.int16) - clean.images).abs().flatten(1).amax(1)
    proof.count, proof.max_linf, proof.unchanged = (
        len(linf),
        int(linf.max()),
        int((linf == 0).sum()),
    )
    proof.unreadable += clean.unreadable
    return linf


def _verify_arrays(proof, clean, copy, levels):
    if copy.images.shape != clean.images.shape:
        proof.add(
            f"shape {list(copy.images.shape)}, the clean images have {list(clean.images.shape)}"
        )
        return
    if [copy.classes[k] for k in copy.labels] != [
        clean.classes[k] for k in clean.labels
    ] and not torch.equal(copy.labels, clean.labels):
        proof.add("labels differ from those of the clean images")
    linf = _levels(proof, clean, copy.images)
    for row in (linf > levels).nonzero()[:, 0].tolist():
        proof.add(f"{clean.names[row]}: {int(linf[row])} levels, more than {levels}")


def _verify_folder(proof, clean, out, levels, per_class):
    if not isinstance(clean, Dataset) and (
        not isinstance(clean, (str, os.PathLike)) or not is_tree(Path(clean))
    ):
        clean = load(clean, per_class=per_class)
    if isinstance(clean, Dataset):
        paths, refused, root = tree_paths(clean), clean.unreadable, clean.root
    else:
        root = Path(clean)
        _, names, refused, skipped = list_tree(root)
        tell_skipped(skipped)
        paths = first_per_class(names, per_class)
    proof.unreadable += refused
    gray = root is None and clean.images.shape[1] == 1
    _, found, strange, others = list_tree(out)
    files, note = Owned(out), None
    # A list of other files (an evaluation's, in a folder that another program exported) says
    # nothing about these.
    proof.listed = os.path.lexists(out / NOTE) or bool(exported_files(out))
    if proof.listed:
        note = _read_note(proof, files)
    for name, reason in strange:
        proof.add(f"{name}: {reason}")
    for name in others:
        if not os.path.basename(name).startswith("."):  # what a file manager leaves there
            proof.add(f"{name}: not an image type that is read here")
    suffix = (
        Counter(os.path.splitext(name)[1] for name in found).most_common(1)[0][0]
        if found
        else ".png"
    )
    targets = target_names(paths, [name for name, _ in refused], suffix)
    for name in sorted(set(found) - set(targets.values())):
        proof.add(f"{name}: no such clean image")
    present, loaded = set(found), {}

    def compare(job):
        row, name = job
        try:
            if root is None:
                before = clean.images[row].permute(1, 2, 0).numpy()
            else:
                image = read_image(root / name)
                before = np.asarray(image)
                if note is not None:
                    loaded[name] = image_digest(_loaded(image, note["size"]))
        except UnreadableError as error:
            return (
                f"{targets[name]}: its clean image is unreadable"
                if targets[name] in present
                else error
            )
        if targets[name] not in present:
            return f"{targets[name]}: missing"
        try:
            raw = read_file(out / targets[name])
            after = np.asarray(
                read_image(out / targets[name], mode="L" if gray else "RGB", raw=raw)
            )
        except UnreadableError as error:
            return f"{targets[name]}: {error}"
        if after.shape[:2] != before.shape[:2]:
            return (
                f"{targets[name]}: {after.shape[1]} x {after.shape[0]}, "
                f"the clean image is {before.shape[1]} x {before.shape[0]}"
            )
        linf = int(
            np.abs(after[..., :1].astype(np.int16) - before).max()
            if gray
            else np.abs(after.astype(np.int16) - before).max()
        )
        if (
            linf <= levels
            and proof.listed
            and hashlib.sha256(raw).hexdigest() not in files.checksums(targets[name])
        ):
            return (
                f"{targets[name]}: within the budget, but not the file that was written "
                f"(its sha256 is not on {LIST})"
            )
        return linf

    with quiet_decoding(), ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        for name, result in zip(paths, pool.map(compare, enumerate(paths))):
            if isinstance(result, str):
                proof.add(result)
            elif isinstance(result, UnreadableError):
                proof.unreadable.append((name, str(result)))
            else:
                proof.count += 1
                proof.unchanged += result == 0
                proof.max_linf = max(proof.max_linf, result)
                if result > levels:
                    proof.add(f"{targets[name]}: {result} levels, more than {levels}")
    if note is not None:
        now = pixels_digest(clean) if root is None else combined_digest(loaded)
        if now != note["pixels_sha256"]:
            proof.add(
                "the clean images are not those that were poisoned (fingerprint): "
                "one was replaced, added or removed since"
            )


def _read_note(proof, files):
    """The note that says what the folder was made from, or None, which is a problem because it is
    written last.
    """
    if not files.owns(NOTE):
        proof.add(f"{NOTE}: missing or changed: the export was not finished")
        return None
    try:
        note = json.loads((files.folder / NOTE).read_bytes())
        sides = note["size"]
        whole = (
            note["format"] == NOTE_FORMAT
            and len(sides) == 2
            and all(type(side) is int and side > 0 for side in sides)
        )
        whole = whole and isinstance(note["pixels_sha256"], str)
        done = note["files_sha256"] == files_digest(files)
    except (ValueError, LookupError, TypeError, RecursionError):
        whole = done = False
    if whole and not done:
        proof.add(f"{NOTE}: it is of other files than {LIST}: the last export was not finished")
    if whole:
        return note
    proof.add(f"{NOTE}: expected the note of an export of this version, got something else")
    return None


def _loaded(image, size):
    """The pixels of the image at the (width, height) it was loaded at, [H, W, 3], or None if it
    could not have been loaded.
    """
    if image.size == tuple(size):
        return np.asarray(image)
    return resize(image, size[0]) if size[0] == size[1] <= MAX_SIZE else None
