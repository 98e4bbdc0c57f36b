"""CIFAR-10 and CIFAR-100 in their standard python form, unpickled without running anything."""

import codecs
import pickle

import numpy as np

from .._checks import fail
from .images import one_line

CIFAR10 = {
    "train": [f"data_batch_{k}" for k in range(1, 6)],
    "test": ["test_batch"],
    "meta": "batches.meta",
    "labels": "labels",
    "classes": "label_names",
}
CIFAR100 = {"train": ["train"], "test": ["test"], "meta": "meta", "labels": "fine_labels", "classes": "fine_label_names"}
FORMS = {"cifar-10-batches-py": CIFAR10, "cifar-100-python": CIFAR100}
PICKLE_ERRORS = (
    pickle.UnpicklingError, EOFError, ValueError, TypeError, AttributeError, LookupError, ImportError, OverflowError, MemoryError,
    RecursionError,
)  # fmt: skip


class _Dtype:
    """Stands for numpy.dtype: only its code is kept."""

    def __init__(self, code=None, *_):
        self.code = code

    def __setstate__(self, state):
        pass


class _Array:
    """Stands for numpy.ndarray. No numpy code sees the pickle: a forged dtype there can turn bytes into pointers."""

    pixels = None

    def __setstate__(self, state):
        _, shape, dtype, fortran, raw = state
        if not isinstance(dtype, _Dtype) or dtype.code not in ("u1", b"u1") or fortran or not isinstance(raw, bytes):
            raise pickle.UnpicklingError("an array that is not plain uint8")
        self.pixels = np.frombuffer(raw, dtype=np.uint8).reshape(shape)


def _new_array(*_):
    return _Array()


def _encode(text, encoding):
    """Bytes in a protocol 2 pickle written by Python 3."""
    if encoding != "latin1":
        raise pickle.UnpicklingError("an encoding other than latin1")
    return codecs.latin_1_encode(text)[0]


ALLOWED = {
    ("numpy.core.multiarray", "_reconstruct"): _new_array,
    ("numpy._core.multiarray", "_reconstruct"): _new_array,
    ("numpy", "ndarray"): _Array,
    ("numpy", "dtype"): _Dtype,
    ("_codecs", "encode"): _encode,
}


class _Unpickler(pickle.Unpickler):
    def find_class(self, module, name):
        if (module, name) not in ALLOWED:
            raise pickle.UnpicklingError(f"refused to load {module}.{name}")
        return ALLOWED[module, name]


def find(folder):
    """(folder, form) of the CIFAR files in `folder` or in its standard subfolder, or None."""
    for name, form in FORMS.items():
        for candidate in (folder, folder / name):
            if (candidate / form["meta"]).is_file() and any((candidate / part).is_file() for part in form["train"] + form["test"]):
                return candidate, form
    return None


def read(folder, form, split):
    """uint8 [N, 3, 32, 32], int64 [N] and the class names of one split. ValueError: a file is missing, damaged or not CIFAR."""
    if split not in ("train", "test"):
        fail("data", "split", "'train' or 'test'", repr(split))
    classes = [_text(name) for name in _unpickle(folder / form["meta"]).get(form["classes"], [])]
    images, labels = [], []
    for part in form[split]:
        content = _unpickle(folder / part)
        array, found = content.get("data"), content.get(form["labels"])
        pixels = array.pixels if isinstance(array, _Array) else None
        right = pixels is not None and pixels.ndim == 2 and pixels.shape[1] == 3072 and isinstance(found, list)
        if not right or len(found) != len(pixels) or not all(type(v) is int and 0 <= v < len(classes) for v in found):
            fail("data", str(folder / part), f"uint8 data [N, 3072] and N {form['labels']} below {len(classes)}", "something else")
        images.append(pixels.reshape(-1, 3, 32, 32))
        labels.extend(found)
    return np.concatenate(images), np.array(labels, dtype=np.int64), classes


def _unpickle(path):
    """The dict of one CIFAR file with text keys."""
    if not path.is_file():
        fail("data", "CIFAR file", str(path), "no such file")
    try:
        with open(path, "rb") as file:
            content = _Unpickler(file, encoding="bytes").load()
        return {_text(key): value for key, value in content.items()}
    except PICKLE_ERRORS as error:
        raise ValueError(f"data: {path}: expected a CIFAR file in python form, got a damaged or foreign one ({one_line(error)})") from error


def _text(value):
    return value.decode() if isinstance(value, bytes) else str(value)
