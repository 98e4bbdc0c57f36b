"""numpy's .npz archives, member by member: each is inflated only if the reader has room for it."""

import ast
import math
import struct
import zipfile
from collections.abc import Collection
from pathlib import Path

import numpy as np

from .files import open_regular, read_member, room

HEADER = 10_000  # bytes of a member's header; numpy writes 118
PER_ITEM = 256  # bytes that every name, label and image costs beside its content
ERRORS = (
    SyntaxError,
    TypeError,
    AttributeError,
    AssertionError,
    struct.error,
)  # of a hostile header


def read_arrays(
    path: str | Path, wanted: Collection[str], most: int | None = None
) -> dict[str, np.ndarray]:
    """Reads the members NAME.npy of an .npz file whose names are among `wanted`. They hold numbers
    or text only; nothing is unpickled.

    Args:
        wanted: names without the suffix.
        most: how many bytes of content there is room for. None allows a fixed multiple of the
            file's size (`files.room`), which refuses an archive of little but zeros.

    Returns {name: array}. Errors: those of ARCHIVE_ERRORS in `files`; their text says what was
    refused.
    """
    found = {}
    with open_regular(path) as file, zipfile.ZipFile(file) as archive:
        left = room(file) if most is None else most
        for name in archive.namelist():
            if name.removesuffix(".npy") in wanted and name.endswith(".npy"):
                raw = read_member(archive, name, left)
                left -= len(raw)
                try:
                    found[name.removesuffix(".npy")] = array = _array(raw)
                except ERRORS as error:
                    raise ValueError(f"a damaged header of {name}") from error
                if array.ndim and most is None and len(array) * PER_ITEM > room(file):
                    raise ValueError(
                        f"{len(array)} items in {name}, "
                        f"where {room(file) // PER_ITEM} are the most that is read"
                    )
    return found


def _array(raw):
    """A writable array on the bytes of a .npy file, versions 1 and 2."""
    if raw[:6] != b"\x93NUMPY" or raw[6] not in (1, 2):
        raise ValueError("a member that is no array of numbers or text")
    start, form = (10, "<H") if raw[6] == 1 else (12, "<I")
    (length,) = struct.unpack_from(form, raw, 8)
    if length > HEADER:
        raise ValueError(f"a header of {length} bytes")
    header = ast.literal_eval(bytes(raw[start : start + length]).decode("latin1").strip())
    descr, shape = header["descr"], header["shape"]
    dtype = np.dtype(descr) if isinstance(descr, str) else None
    if dtype is None or dtype.kind not in "biufU" or dtype.itemsize == 0:
        raise ValueError("a member of another type than numbers and text")
    if (
        not isinstance(shape, tuple)
        or len(shape) > 8
        or not all(type(side) is int and side >= 0 for side in shape)
    ):
        raise ValueError("a shape that is no list of sizes")
    if math.prod(shape) * dtype.itemsize != len(raw) - start - length:
        raise ValueError(f"an array of shape {list(shape)} whose bytes are not there")
    if 0 in shape:
        return np.empty(shape, dtype)  # numpy makes no view of nothing
    values = np.frombuffer(raw, dtype, offset=start + length)
    return values.reshape(shape, order="F" if header["fortran_order"] else "C")
