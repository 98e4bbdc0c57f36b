"""What the commands print. A name cannot forge a second line, and a terminal that is gone never
ends the work.
"""

import contextlib
import logging
import os
import sys
from typing import Any

from tqdm import tqdm

from .messages import printable


def say(text: str = "", *, error: bool = False) -> None:
    """Prints `text`, which may have several lines, on stdout or, with `error`, on stderr, and
    flushes. Trouble with the stream raises nothing.

    Characters that the encoding of the stream lacks are written as escapes (\\xe9). A stream that
    is closed, or whose reader or disk is gone, is pointed at the null device, so that neither this
    call nor a later one nor the end of the process fails because of it.
    """
    stream = sys.stderr if error else sys.stdout
    if stream is None or stream.closed:  # no file behind it since the start, or closed by somebody
        return
    encoding = getattr(stream, "encoding", None) or "utf-8"
    try:
        print(text.encode(encoding, "backslashreplace").decode(encoding), file=stream, flush=True)
    except OSError:
        _discard(stream)


def progress_bar(*, disable: bool, **options: Any) -> tqdm:
    """A progress bar on stderr that cannot end the work: where stderr is closed there is no bar,
    and where it breaks nothing more is shown. options: those of tqdm.
    """
    stream = None if disable or sys.stderr is None or sys.stderr.closed else _Steady(sys.stderr)
    return tqdm(disable=stream is None, file=stream, dynamic_ncols=True, **options)


class _Steady:
    """A stream whose writes raise no OSError."""

    def __init__(self, stream):
        self._stream = stream

    def __getattr__(self, name):
        return getattr(self._stream, name)

    def write(self, text):
        try:
            return self._stream.write(text)
        except OSError:
            _discard(self._stream)

    def flush(self):
        try:
            self._stream.flush()
        except OSError:
            _discard(self._stream)


def _discard(stream):
    """Sends what waits in the buffer of the stream, and everything that follows, to nowhere."""
    with contextlib.suppress(
        OSError, ValueError
    ):  # a stream without a descriptor keeps no process from ending
        descriptor = stream.fileno()
        null = os.open(os.devnull, os.O_WRONLY)
        if null == descriptor:  # it was closed, and the null device has taken its place
            return
        try:
            os.dup2(null, descriptor)
        finally:
            os.close(null)


class OneLine(logging.Formatter):
    """Formats each log record as one line, whatever names it holds; a traceback stays below it as
    it is.
    """

    def formatMessage(self, record: logging.LogRecord) -> str:
        return printable(super().formatMessage(record), most=None)


def start_log() -> None:
    """Starts the log of the commands on stderr."""
    handler = logging.StreamHandler()
    handler.setFormatter(OneLine("miue-fast: %(message)s"))
    logging.basicConfig(handlers=[handler])
