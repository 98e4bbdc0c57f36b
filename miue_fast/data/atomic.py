"""Files that are either whole or not there: temporary file in the same folder, fsync,
os.replace.
"""

import contextlib
import errno
import hashlib
import io
import logging
import os
import secrets
import shutil
from collections.abc import Callable, Generator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

from ..dispatch.registry import BackendError
from ..support.messages import fail
from ..support.ranges import reachable
from .files import open_regular

try:
    import fcntl
except ImportError:  # Windows, where `check_system` refuses to write anything
    fcntl: Any = None

TEMPORARY = ".miue-tmp"
Writer = Callable[[BinaryIO], object]  # writes the content of one file


class _Sink(io.FileIO):
    """Unbuffered file that writes all it is given, hashes it, and remembers the OSError that
    torch.save turns into a RuntimeError.
    """

    error = None

    def __init__(self, *args):
        super().__init__(*args)
        self.digest = hashlib.sha256()

    def write(self, data):
        view = memoryview(data).cast("B")
        done = 0
        try:
            while done < len(view):
                done += super().write(view[done:])
        except OSError as error:
            self.error = error
            raise
        if self.digest is not None:
            self.digest.update(view)
        return done

    def seek(self, offset, whence=os.SEEK_SET):
        here = self.tell()
        there = super().seek(offset, whence)
        if there != here:
            self.digest = None  # written out of order: the file is read once more
        return there


def write_files(
    writers: Mapping[Path, Writer],
    *,
    durable: bool = True,
    before: Callable[[dict[Path, str]], object] | None = None,
) -> None:
    """Writes several files as one: all are complete on disk before the first takes its final name.

    Args:
        writers: {path: function of one binary stream}, called in order.
        durable: fsync files and folder, so that a power cut cannot leave an empty file (costs
            milliseconds per file).
        before: function of {path: sha256 (hex)}, called once all are complete; if it raises,
            everything is as it was.

    Errors: OSError of one line (full disk, no permission); then every earlier file is unchanged and
        no temporary file stays.
    """
    made, digests = {}, {}
    try:
        for path, writer in writers.items():
            temporary = Path(path).with_name(f".{secrets.token_hex(8)}{TEMPORARY}")
            made[temporary] = Path(path)
            digests[Path(path)] = _write(temporary, path, writer, durable)
        for path in made.values():
            if path.is_dir():
                raise OSError(
                    errno.EISDIR,
                    f"cannot write {path}: it is a folder; what was there before is unchanged",
                )
        if before is not None:
            before(digests)
        for temporary, path in made.items():
            os.replace(temporary, path)
        if durable:
            for folder in {path.parent for path in made.values()}:
                _sync_folder(folder)
    finally:
        for temporary in made:
            temporary.unlink(missing_ok=True)


def write_file(path: Path, writer: Writer, *, durable: bool = True) -> None:
    """`write_files` for one file."""
    write_files({path: writer}, durable=durable)


def _write(temporary, path, writer, durable):
    """Lets `writer` fill the temporary file and returns the sha256 of what it wrote."""
    sink = None
    try:
        with _Sink(temporary, "xb") as sink:
            writer(sink)
            if durable:
                os.fsync(sink.fileno())
        return sha256_of(temporary) if sink.digest is None else sink.digest.hexdigest()
    except (OSError, RuntimeError) as error:
        cause = sink.error if sink is not None and sink.error else error
        if not isinstance(cause, OSError):
            raise
        raise OSError(
            cause.errno,
            f"cannot write {path}: {cause.strerror}; what was there before is unchanged",
        ) from error


def _sync_folder(folder):
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sha256_of(path: str | Path) -> str:
    """sha256 (hex) of a file's bytes, read in blocks. Errors: OSError."""
    digest = hashlib.sha256()
    with open_regular(path) as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def sweep(folder: Path) -> None:
    """Removes the temporary files and folders that a killed run left in `folder` (not below it)."""
    for leftover in Path(folder).glob(f".*{TEMPORARY}"):
        if leftover.is_dir() and not leftover.is_symlink():
            shutil.rmtree(leftover)
        else:
            leftover.unlink(missing_ok=True)


def check_system() -> None:
    """BackendError where folders cannot be locked, opened and flushed: on Windows nothing is
    written.
    """
    if fcntl is None:
        raise BackendError(
            "output: writing files needs Linux or macOS (no fcntl here): "
            "use WSL, or the Python API without a folder"
        )


@contextlib.contextmanager
def only_writer(folder: Path) -> Generator[None, None, None]:
    """Holds the existing folder `folder` against every other run, which would sweep this one's
    temporary files and write between them.

    The lock is on the folder itself, so no file stays, and it ends with the process however that
    ends. ValueError: another run holds the folder. BackendError: as in `check_system`.
    """
    check_system()
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with contextlib.ExitStack() as held:
            try:
                held.enter_context(locked(descriptor, fcntl.LOCK_NB))
            except BlockingIOError:
                fail(
                    "output",
                    "folder",
                    "one that no other run is writing to",
                    f"{folder}, where one is at work",
                )
            except OSError as error:  # network file systems
                logging.getLogger("miue_fast").warning(
                    "%s cannot be locked (%s): let no other run write there", folder, error.strerror
                )
            yield
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def locked(descriptor: int, flags: int = 0) -> Generator[None, None, None]:
    """Holds an open file or folder against everybody else who asks. Errors: OSError.

    The lock is released explicitly: a process that was forked meanwhile shares the open file, and
    would otherwise hold the lock as long as it lives.
    """
    fcntl.flock(descriptor, fcntl.LOCK_EX | flags)
    try:
        yield
    finally:
        fcntl.flock(descriptor, fcntl.LOCK_UN)


def check_outside(folder: Path, images: Path) -> None:
    """Raises ValueError if `folder` lies in the tree of the images, where its files would be read
    as images.
    """
    if Path(os.path.realpath(folder)).is_relative_to(
        os.path.realpath(images)
    ):  # Path.resolve raises where links go round
        fail("output", "folder", f"one outside the images' own, {images}", str(folder))


def check_writable(folder: Path) -> Path:
    """Makes `folder` and proves that a file can be written there. ValueError: it is a file;
    OSError: one line with the reason.

    Permission bits say nothing to root or on a read-only mount, so a file is really created and
    removed."""
    check_system()
    folder = Path(folder)
    reachable("output", "folder", folder)
    if folder.exists() and not folder.is_dir():
        fail("output", "folder", "a folder or a new name", f"the file {folder}")
    if folder.is_symlink() and not folder.exists():
        fail(
            "output",
            "folder",
            "a folder or a new name",
            f"{folder}, a link that leads to no folder",
        )
    probe = folder / f".{secrets.token_hex(8)}{TEMPORARY}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with open(probe, "xb") as file:
            file.write(b"probe")
    except OSError as error:
        raise OSError(
            error.errno, f"cannot write to the folder {folder}: {error.strerror}"
        ) from error
    finally:
        with contextlib.suppress(OSError):
            probe.unlink(missing_ok=True)
    return folder
