"""CIFAR-10 and CIFAR-100 in their standard python form, unpickled without running anything."""

from pathlib import Path
from typing import Any

import numpy as np

from ..support.messages import fail
from . import inert
from .files import read_bytes
from .images import one_line

Form = dict[str, Any]  # names of the files, and of the keys in them
CIFAR10: Form = {
    "train": [f"data_batch_{k}" for k in range(1, 6)],
    "test": ["test_batch"],
    "meta": "batches.meta",
    "labels": "labels",
    "classes": "label_names",
}
CIFAR100: Form = {
    "train": ["train"],
    "test": ["test"],
    "meta": "meta",
    "labels": "fine_labels",
    "classes": "fine_label_names",
}
FORMS = {"cifar-10-batches-py": CIFAR10, "cifar-100-python": CIFAR100}


def find(folder: Path) -> tuple[Path, Form] | None:
    """(folder, form) of the CIFAR files in `folder` or in its standard subfolder, or None."""
    for name, form in FORMS.items():
        for candidate in (folder, folder / name):
            if (candidate / form["meta"]).is_file() and any(
                (candidate / part).is_file() for part in form["train"] + form["test"]
            ):
                return candidate, form
    return None


def read(folder: Path, form: Form, split: str) -> tuple[np.ndarray, np.ndarray, list[str]]:
    """uint8 [N, 3, 32, 32], int64 [N] and the class names of one split. ValueError: a file is
    missing, damaged or not CIFAR.
    """
    if split not in ("train", "test"):
        fail("data", "split", "'train' or 'test'", repr(split))
    classes = _unpickle(folder / form["meta"]).get(form["classes"], [])
    if not isinstance(classes, list) or not all(isinstance(name, bytes | str) for name in classes):
        fail(
            "data",
            str(folder / form["meta"]),
            f"a list of text {form['classes']!r}",
            "something else",
        )
    classes = [_text(name) for name in classes]
    images, labels = [], []
    for part in form[split]:
        content = _unpickle(folder / part)
        array, found = content.get("data"), content.get(form["labels"])
        try:
            pixels = array.numpy() if isinstance(array, inert.Array) else None
        except inert.ERRORS:
            pixels = None
        right = (
            pixels is not None
            and pixels.dtype == np.uint8
            and pixels.ndim == 2
            and pixels.shape[1] == 3072
            and isinstance(found, list)
        )
        if (
            not right
            or len(found) != len(pixels)
            or not all(type(v) is int and 0 <= v < len(classes) for v in found)
        ):
            fail(
                "data",
                str(folder / part),
                f"uint8 data [N, 3072] and N {form['labels']} below {len(classes)}",
                "something else",
            )
        images.append(pixels.reshape(-1, 3, 32, 32))
        labels.extend(found)
    return np.concatenate(images), np.array(labels, dtype=np.int64), classes


def _unpickle(path):
    """The dict of one CIFAR file with text keys."""
    if not path.exists():
        fail("data", "CIFAR file", str(path), "no such file")
    try:
        content = inert.loads(read_bytes(path, inert.MAX_BYTES))
        if not isinstance(content, dict):
            raise ValueError(f"a {type(content).__name__}")
        return {_text(key): value for key, value in content.items()}
    except (OSError, *inert.ERRORS) as error:
        fail(
            "data",
            str(path),
            "a CIFAR file in python form",
            f"a damaged or foreign one ({one_line(error)})",
        )


def _text(value):
    if isinstance(value, bytes):
        return value.decode(errors="backslashreplace")
    return value if isinstance(value, str) else object.__repr__(value)
