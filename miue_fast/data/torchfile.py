"""Reads what torch.save wrote as plain data: tensors and dicts of tensors.

`torch.load(weights_only=True)` runs nothing either, but a few bytes make it allocate gigabytes
(`bytearray(10**10)`), keys that hash alike take it minutes, and no checksum is looked at. Here the
pickle is interpreted by `inert`, and every storage is read once, at its declared size, into memory
of its own.
"""

import math
import os
import zipfile
from pathlib import Path
from typing import Any

import torch

from . import inert
from .files import open_regular, read_member

DTYPES = {
    "Float": torch.float32,
    "Double": torch.float64,
    "Half": torch.float16,
    "BFloat16": torch.bfloat16,
    "Long": torch.int64,
    "Int": torch.int32,
    "Short": torch.int16,
    "Char": torch.int8,
    "Byte": torch.uint8,
    "Bool": torch.bool,
}
MAGIC = 0x1950A86A20F9469CFC6C  # of files before PyTorch 1.6
FOREIGN = {
    "_rebuild_sparse_tensor": "a sparse tensor",
    "_rebuild_meta_tensor_no_storage": "a tensor on meta",
}


class NotDenseError(ValueError):
    """A tensor whose values are not all there."""


class _Machine(inert.Machine):
    """The interpreter of `inert` with PyTorch's names. `storages`: {key: tensor to be filled}, at
    most `most` bytes together.
    """

    def __init__(self, size, most):
        super().__init__(size, KNOWN)
        self.storages, self.left = {}, most

    def name(self, module, name):
        if name in FOREIGN:
            raise NotDenseError(FOREIGN[name])
        super().name(module, name)

    def persistent(self, told: Any) -> Any:
        """("storage", type, key, place, number of values), and in files before PyTorch 1.6 a view,
        which nobody wrote.
        """
        if (
            type(told) is not tuple
            or len(told) not in (5, 6)
            or told[0] != "storage"
            or told[5:] not in ((), (None,))
        ):
            raise inert.refused("a persistent id that is no storage")
        kind, key, _, count = told[1:5]
        if (
            type(kind) is not inert.Name
            or kind not in TYPES
            or type(key) is not str
            or type(count) is not int
            or count < 0
        ):
            raise inert.refused("a storage of an unknown type")
        if key not in self.storages:
            size = count * TYPES[kind].itemsize
            if size > self.left:
                raise inert.refused(
                    f"{size} bytes of content, where {self.left} are the most that is read"
                )
            self.left -= size
            self.storages[key] = torch.empty(count, dtype=TYPES[kind])
        if self.storages[key].shape != (count,) or self.storages[key].dtype != TYPES[kind]:
            raise inert.refused("a storage of two kinds")
        return self.storages[key]

    def tensor(self, storage, offset, size, stride, *_):
        """A view of a storage. A tensor that repeats values of its memory is refused: its copies
        take any amount.
        """
        sides = [*size, *stride, offset] if type(size) is type(stride) is tuple else [None]
        whole = all(type(n) is int and 0 <= n < 1 << 48 for n in sides)
        if (
            not isinstance(storage, torch.Tensor)
            or not whole
            or len(size) != len(stride)
            or len(size) > 8
        ):
            raise inert.refused("a tensor of unknown shape")
        if math.prod(size) > len(storage):
            raise NotDenseError(f"{list(size)} that share theirs")
        if 0 not in size and offset + sum((n - 1) * step for n, step in zip(size, stride)) >= len(
            storage
        ):
            raise inert.refused("a tensor that leaves its storage")
        return storage.as_strided(size, stride, offset if 0 not in size else 0)

    def no_call(self, *_):
        raise inert.refused("a call of a storage's type")

    def ordered(self, pairs=()):
        self.push({})
        for pair in pairs:
            self.update(list(pair))
        return self.stack.pop()

    def build(self):
        if (
            type(self.stack[-2]) is dict
        ):  # an OrderedDict's attributes: the versions of a state dict's modules
            self.stack.pop()
        else:
            super().build()


TYPES = {f"torch.{name}Storage": dtype for name, dtype in DTYPES.items()}
KNOWN = {
    **inert.CALLS,
    **dict.fromkeys(TYPES, _Machine.no_call),
    "torch._utils._rebuild_tensor": _Machine.tensor,
    "torch._utils._rebuild_tensor_v2": _Machine.tensor,
    "torch._utils._rebuild_parameter": lambda machine, tensor, *_: tensor,
    "collections.OrderedDict": _Machine.ordered,
}


def read_torch(path: str | Path, most: int) -> Any:
    """The tensor, or the dict, list or tuple of tensors and plain values, in a file of torch.save,
    on the CPU wherever it was.

    `most` is how many bytes its tensors may take together. Errors: those of `files.ARCHIVE_ERRORS`
    and `inert.ERRORS`; NotDenseError for tensors that are sparse, without content, or larger than
    their memory.
    """
    with open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        most = min(most, size)  # nothing in it is compressed
        if not zipfile.is_zipfile(file):
            file.seek(0)
            return _read_old(file, size, most)
        with zipfile.ZipFile(file) as archive:
            return _read_zip(archive, most)


def _read_zip(archive, most):
    names = [member.filename for member in archive.infolist()]
    if any(member.compress_type != zipfile.ZIP_STORED for member in archive.infolist()):
        raise ValueError("compressed members, which torch.save does not write")
    (top,) = [name for name in names if name.rpartition("/")[2] == "data.pkl"]
    folder = top.removesuffix("data.pkl")
    if (
        f"{folder}byteorder" in names
        and read_member(archive, f"{folder}byteorder", 16) != b"little"
    ):
        raise ValueError("big-endian numbers")
    pickled = bytes(read_member(archive, top, inert.MAX_BYTES))
    machine = _Machine(len(pickled), most)
    content = machine.run(pickled)
    wanted = {f"{folder}data/{key}": storage for key, storage in machine.storages.items()}
    for name in names:  # the others too: a damaged bit anywhere is found
        storage = wanted.pop(name, None)
        raw = read_member(archive, name, most if storage is None else storage.nbytes)
        if storage is not None:
            _fill(storage, raw)
    if wanted:
        raise ValueError(f"no member {min(wanted)}")
    return content


def _fill(storage, raw):
    if len(raw) != storage.nbytes:
        raise ValueError(f"{len(raw)} bytes for {len(storage)} values of {str(storage.dtype)[6:]}")
    if raw:
        storage.copy_(torch.frombuffer(raw, dtype=storage.dtype))


def _read_old(file, size, most):
    """Five pickles (magic number, version, machine, content, keys), then each storage: its number
    of values and their bytes.
    """

    def value(machine):
        return machine.run(file)

    machine = _Machine(size, most)
    if value(inert.Machine(size)) != MAGIC:
        raise ValueError("no file of torch.save")
    value(inert.Machine(size)), value(inert.Machine(size))
    content, keys = value(machine), value(inert.Machine(size))
    if (
        not isinstance(keys, list)
        or not all(type(key) is str for key in keys)
        or sorted(keys) != sorted(machine.storages)
    ):
        raise ValueError("a list of storages that does not fit")
    for key in keys:
        storage = machine.storages[key]
        if int.from_bytes(file.read(8), "little") != len(storage):
            raise ValueError("a storage of another size")
        _fill(storage, bytearray(file.read(storage.nbytes)))
    return content
