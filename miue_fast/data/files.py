"""Reads files that somebody else may have made: only regular files are opened, no more is read than
was allowed, and what was checked is what is used.
"""

import errno
import json
import os
import stat
import zipfile
import zlib
from pathlib import Path
from typing import IO, Any, BinaryIO

FLAGS = os.O_RDONLY | sum(
    getattr(os, name, 0) for name in ("O_NONBLOCK", "O_NOCTTY", "O_CLOEXEC", "O_BINARY")
)
KINDS = {
    stat.S_IFDIR: "a folder",
    stat.S_IFIFO: "a pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}
# An archive of n bytes may hold ROOM + RATIO * n: deflate reaches 1,032 on zeros, photographs 2.
ROOM, RATIO = 1 << 25, 64
# What reading an archive of hostile bytes raises.
ARCHIVE_ERRORS = (
    OSError,
    ValueError,
    LookupError,
    EOFError,
    RuntimeError,
    OverflowError,
    MemoryError,
    zipfile.BadZipFile,
    zlib.error,
)


def open_regular(path: str | Path) -> BinaryIO:
    """Opens a file as a binary stream. OSError: it cannot be read, or it is no regular file (a pipe
    would be waited for without end, and a device never ends).

    All questions about the stream are answered by the one opened file, whatever its name leads to a
    moment later.
    """
    _refuse_special(
        os.stat(path).st_mode, path
    )  # before it is opened: opening a device can have effects
    descriptor = os.open(path, FLAGS)
    try:
        _refuse_special(os.fstat(descriptor).st_mode, path)
        return os.fdopen(descriptor, "rb")
    except BaseException:
        os.close(descriptor)
        raise


def _refuse_special(mode, path):
    if not stat.S_ISREG(mode):
        raise OSError(
            errno.EINVAL,
            f"{KINDS.get(stat.S_IFMT(mode), 'something else')}, not a regular file",
            str(path),
        )


def read_bytes(path: str | Path, most: int) -> bytes:
    """The content of a regular file. OSError: as in `open_regular`; the file has more than `most`
    bytes; it grew or shrank while it was read.
    """
    with open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        if size > most:
            raise OSError(
                errno.EFBIG,
                f"a file of {size} bytes, where {most} are the most that is read",
                str(path),
            )
        content = file.read(size + 1)
    if len(content) != size:
        raise OSError(errno.EIO, "it changed while it was read", str(path))
    return content


def parse_json(text: str | bytes | bytearray, *, strict: bool = True) -> Any:
    """Parses JSON text or bytes. ValueError or RecursionError: it is no JSON.

    With `strict`, extensions of Python's reader are refused as well: NaN, infinities, and a key
    that comes twice, of which the last one would win.
    """
    return (
        json.loads(text, parse_constant=_no_number, object_pairs_hook=_once)
        if strict
        else json.loads(text)
    )


def _no_number(text):
    raise ValueError(f"{text}, which is no JSON number")


def _once(pairs):
    content = dict(pairs)
    if len(content) != len(pairs):
        raise ValueError("a key that comes twice")
    return content


def room(file: IO[bytes]) -> int:
    """How many bytes of content an archive of this size is allowed to have."""
    return ROOM + RATIO * os.fstat(file.fileno()).st_size


def read_member(archive: zipfile.ZipFile, name: str, most: int) -> bytearray:
    """Reads one member of an open zipfile.ZipFile into a bytearray and checks its checksum.
    ValueError: it has more than `most` bytes of content.

    Only stored and deflated members are read, which is what numpy and PyTorch write; the other
    methods cannot be unpacked piece by piece.
    """
    member = archive.getinfo(name)
    if member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise ValueError(
            f"a member of compression method {member.compress_type}, neither stored nor deflated"
        )
    if member.file_size > most:
        raise ValueError(
            f"{member.file_size} bytes of content, where {most} are the most that is read"
        )
    content = bytearray(member.file_size)
    with archive.open(member) as stream:
        done = 0
        while block := stream.read(1 << 20):  # never more than the declared size
            content[done : done + len(block)] = block
            done += len(block)
    if done != len(content):
        raise ValueError(f"a damaged member {name}")
    return content
