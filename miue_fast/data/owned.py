"""Remembers which files are this package's own: a list of checksums lies beside them, and nothing
that is not on it is ever replaced or removed.
"""

import contextlib
import errno
import logging
import os
import threading
from collections.abc import Callable, Iterable
from pathlib import Path, PurePosixPath
from typing import BinaryIO

from ..support.messages import fail
from .atomic import check_system, locked, sha256_of, write_file, write_files
from .files import open_regular

# as sha256sum writes it: `sha256sum -c miue-files.sha256` checks what a folder holds
LIST = "miue-files.sha256"
HEADER = (
    "# What miue_fast wrote here. "
    "It replaces or removes nothing that is not on this list with its checksum."
)
MOST = 1 << 28  # bytes of a list: two million names of 60 bytes
log = logging.getLogger("miue_fast")


class Owned:
    """The files in and below one folder that this package wrote and nobody has changed since.

    A file is owned if `miue-files.sha256` in that folder names it with the sha256 that it has now.
    The list gets a file's new checksum before the file takes its name, so a killed process leaves
    either the old file or the new one, and owns both. Names are posix paths relative to the folder.
    An object may be used by several threads. ValueError: the list is damaged or somebody else's.
    """

    def __init__(self, folder: str | os.PathLike):
        self.folder = Path(folder)
        self._lock = threading.Lock()
        self._known, self._read = _read(
            self.folder / LIST
        )  # name -> checksums, the newest last; how much of which file that was
        self._seen = {}  # name -> (state, checksum) of files that were hashed here

    def names(self) -> list[str]:
        """The names on the list, sorted. Whether the files are still what was written is answered
        by `owns`.
        """
        return sorted(self._known)

    def checksums(self, name: str) -> list[str]:
        """The checksums (sha256, hex) that the list has for `name`: one, or two if writing the file
        was cut short.
        """
        return self._known.get(name, [])

    def owns(self, name: str) -> bool:
        """Whether the file `name` exists, is a file of its own (no link), and has a checksum from
        the list.
        """
        path = self.folder / name
        if (
            name not in self._known
            or path.is_symlink()
            or not path.is_file()
            or not self._inside(path)
        ):
            return False
        state = _state(path)
        if self._seen.get(name, (None,))[0] != state:
            self._seen[name] = state, sha256_of(path)
        return self._seen[name][1] in self._known[name]

    def check(self, op: str, names: Iterable[str]) -> None:
        """Raises ValueError if one of `names` belongs to somebody else and would be replaced."""
        for name in names:
            path = self.folder / name
            if os.path.lexists(path) and not self.owns(name):
                reason = "was changed since" if name in self._known else "miue_fast did not write"
                fail(
                    op,
                    "output",
                    "a new name, or a file that miue_fast wrote and nobody changed",
                    f"{path}, which {reason}; move it away or choose another place",
                )

    def check_access(self, op: str) -> None:
        """Raises ValueError if this process may not change the list, or a folder with files on it.
        Like `check` it is meant for the time before the work.
        """
        for path in [
            self.folder / LIST,
            *sorted({self.folder / os.path.dirname(name) for name in self._known}),
        ]:
            if os.path.exists(path) and not os.access(path, os.W_OK):
                fail(
                    op,
                    "output",
                    "files and folders that may be changed",
                    f"{path}: {os.strerror(errno.EACCES)}; choose another place",
                )

    def adopt(self, name: str) -> None:
        """Puts a file on the list that has proved by a checksum of its own that this package wrote
        it.
        """
        if not self.owns(name):
            with self._list() as file:
                self._record(file, {name: sha256_of(self.folder / name)}, durable=True, adopts=True)

    def write(
        self,
        writers: dict[str, Callable[[BinaryIO], object]],
        *,
        durable: bool = True,
        tidy: bool = True,
    ) -> None:
        """Writes {name: function of one binary stream} as `atomic.write_files` does. Only new names
        and owned files are taken.

        With tidy=False older entries stay on the list until `tidy` removes them all at once; that
        is for writing many files, or for several processes in one folder. ValueError: a file
        belongs to somebody else. After any error, OSError included, everything is as it was.
        """
        recorded = []

        try:
            with (
                contextlib.ExitStack() as held
            ):  # until the files have their names: nobody tidies away what is on the list before

                def before(digests):
                    self._record(
                        held.enter_context(self._list()),
                        dict(zip(writers, digests.values())),
                        durable,
                    )
                    recorded.extend(writers)

                write_files(
                    {self.folder / name: writer for name, writer in writers.items()},
                    durable=durable,
                    before=before,
                )
        except BaseException:
            if recorded and tidy:
                with contextlib.suppress(
                    OSError
                ):  # what caused this is raised; a line too many does no harm
                    self.tidy()
            raise
        for name in writers:
            self._seen[name] = _state(self.folder / name), self._known[name][-1]
        if tidy:
            with contextlib.suppress(
                OSError
            ):  # the files are there, and an untidy list is a right one
                self.tidy()

    def remove(self, names: Iterable[str]) -> list[str]:
        """Removes the owned files among `names`, and the folders below this one that are then
        empty.

        Returns the names that were not owned. Their files stay, and a log line names the first.
        """
        kept = []
        for name in names:
            path = self.folder / name
            if self.owns(name):
                path.unlink()
                for parent in list(PurePosixPath(name).parents)[:-1]:
                    if any((self.folder / parent).iterdir()):
                        break
                    (self.folder / parent).rmdir()
            elif os.path.lexists(path):
                kept.append(name)
        if kept:
            log.warning(
                (
                    "%d files that were changed since miue_fast wrote them are left "
                    "as they are, first: %s"
                ),
                len(kept),
                self.folder / kept[0],
            )
        self.tidy()
        return kept

    def tidy(self) -> None:
        """Writes the list anew: sorted, with one line for each file that exists. An empty list is
        removed.
        """
        path = self.folder / LIST
        if not os.path.lexists(path):
            return
        with self._list() as file:
            self._refresh(file)
            lines = []
            for name in self.names():
                there = self.folder / name
                if os.path.lexists(there):
                    digests = (
                        self._known[name]
                        if len(self._known[name]) == 1 or not self.owns(name)
                        else [self._seen[name][1]]
                    )
                    lines += [_line(digest, name) for digest in digests]
                    self._known[name] = digests
                else:
                    del self._known[name]
            if lines:
                write_file(
                    path,
                    lambda file: file.write("".join([f"{HEADER}\n", *lines]).encode()),
                    durable=False,
                )
            else:
                path.unlink(missing_ok=True)

    @contextlib.contextmanager
    def _list(self):
        """Opens the list, makes it where there is none, and holds it against whoever else writes
        it: another process, or another thread of this one.
        """
        check_system()
        path = self.folder / LIST
        flags = os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
        while True:
            try:
                file = os.fdopen(os.open(path, flags, 0o666), "r+b", buffering=0)
            except OSError as error:
                raise self._unwritten(error) from error
            with file, contextlib.ExitStack() as held:
                with contextlib.suppress(OSError):  # network file systems: as without a lock
                    held.enter_context(locked(file.fileno()))
                if os.path.lexists(path) and os.path.samestat(
                    os.fstat(file.fileno()), os.lstat(path)
                ):  # nobody tidied meanwhile
                    try:
                        yield file
                    finally:
                        if os.fstat(file.fileno()).st_size <= len(HEADER) + 1:  # nothing came of it
                            path.unlink(missing_ok=True)
                    return

    def _refresh(self, file):
        """Reads what others have written to the list since it was last read."""
        if _amount(file) != self._read:
            with self._lock:
                self._known, self._read = _read(self.folder / LIST)

    def _record(self, file, digests, durable, adopts=False):
        if not os.fstat(file.fileno()).st_size:
            self._append(file, f"{HEADER}\n", durable=False)
        self._refresh(file)
        if not adopts:
            self.check("output", digests)
        text = "".join(_line(digest, name) for name, digest in digests.items())
        torn = (
            file.seek(-1, os.SEEK_END) >= 0 and file.read(1) != b"\n"
        )  # a process died in the middle of a line
        self._append(file, f"{chr(10) * torn}{text}", durable)
        with self._lock:
            for name, digest in digests.items():
                self._known[name] = [
                    *(known for known in self._known.get(name, []) if known != digest),
                    digest,
                ]
            self._read = _amount(file)

    def _append(self, file, text, durable):
        size = file.seek(0, os.SEEK_END)
        left = memoryview(text.encode())
        try:
            while left:
                left = left[file.write(left) :]
            if durable:
                os.fsync(file.fileno())
        except OSError as error:
            file.truncate(size)
            raise self._unwritten(error) from error

    def _unwritten(self, error):
        return OSError(
            error.errno,
            (
                f"cannot write {self.folder / LIST}: {error.strerror}; "
                "what was there before is unchanged"
            ),
        )

    def _inside(self, path):
        return path.parent.resolve().is_relative_to(self.folder.resolve())


def write_owned(writers: dict[Path, Callable[[BinaryIO], object]], *, durable: bool = True) -> None:
    """Writes {path: function of one binary stream} through the lists of their folders. Errors: as
    `Owned.write`.
    """
    for folder in {path.parent for path in writers}:
        Owned(folder).write(
            {path.name: writer for path, writer in writers.items() if path.parent == folder},
            durable=durable,
        )


def check_owned(op: str, paths: Iterable[Path]) -> None:
    """Raises ValueError if one of `paths`, or the list beside it, exists and belongs to somebody
    else. It is meant for the time before the work that ends in writing them.
    """
    for path in paths:
        files = Owned(path.parent)
        files.check(op, [path.name])
        files.check_access(op)


def _state(path):
    found = path.stat()
    return found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns


def _line(digest, name):
    """One line of sha256sum: a name with a line break or a backslash is escaped, which a backslash
    before the line says.
    """
    plain = name.replace("\\", "\\\\").replace("\n", "\\n").replace("\r", "\\r")
    return f"{chr(92) if plain != name else ''}{digest}  {plain}\n"


def _amount(file):
    """Identifies the state of a list: which file it is, how many bytes it has, and of when. Lists
    are only added to, or replaced as a whole.
    """
    found = os.fstat(file.fileno())
    return found.st_ino, found.st_size, found.st_mtime_ns


def _read(path):
    """Reads a list. Returns ({name: [checksum, ...]}, `_amount` of what was read), or ({}, None) if
    there is none. A line that is not whole is ignored.
    """
    if not os.path.lexists(path):
        return {}, None
    if path.is_symlink():  # it would be written through
        fail(
            "output",
            LIST,
            "the list of checksums that miue_fast writes",
            f"{path}, a link; move it away",
        )
    try:
        with open_regular(path) as file:
            amount = _amount(file)
            content = file.read(min(amount[1], MOST + 1))  # another process may add to it now
    except FileNotFoundError:  # another process emptied it
        return {}, None
    except OSError as error:
        fail(
            "output",
            LIST,
            "the list of checksums that miue_fast writes",
            f"{path}: {error.strerror}; move it away",
        )
    if len(content) > MOST:
        fail(
            "output",
            LIST,
            f"a list of at most {MOST} bytes",
            f"{path}, which is larger; move it away",
        )
    if not content:  # another process has just made it and writes its first line next
        return {}, None
    lines = content.split(b"\n")
    if lines[0] != HEADER.encode():
        fail(
            "output",
            LIST,
            "the list of checksums that miue_fast writes",
            f"somebody else's file: {path}; move it away",
        )
    known = {}
    for line in lines[1:]:
        entry = _parse(line)
        if entry is not None:
            digest, name = entry
            known[name] = [*(seen for seen in known.get(name, []) if seen != digest), digest]
    return known, amount


def _parse(line):
    """(checksum, name) of a line, or None for what no list of this package holds: a torn line, or a
    name that leaves the folder.
    """
    try:
        text = line.decode()
    except UnicodeDecodeError:
        return None
    escaped = text.startswith("\\")
    digest, _, name = text[escaped:].partition("  ")
    if len(digest) != 64 or not set(digest) <= set("0123456789abcdef") or not name:
        return None
    if escaped:
        pairs = {"\\\\": "\\", "\\n": "\n", "\\r": "\r"}
        name = "".join(pairs.get(part, part) for part in _pairs(name))
    if "\0" in name or any(part in ("", ".", "..") for part in name.split("/")):
        return None
    return digest, name


def _pairs(text):
    """Splits the text into pieces of one character, or of two where a backslash comes first."""
    at = 0
    while at < len(text):
        step = 2 if text[at] == "\\" else 1
        yield text[at : at + step]
        at += step
