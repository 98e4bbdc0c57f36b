"""What the commands print: a name cannot forge a second line, and a terminal that is gone never
ends the work.
"""

import contextlib
import logging
import os
import sys

from tqdm import tqdm

from .messages import printable


def say(text="", *, error=False):
    """Prints `text` (which may have several lines) on stdout or, with `error`, on stderr, and
    flushes. The stream's troubles raise nothing.

    What the stream's encoding cannot show is written as an escape (\\xe9). A stream that is closed,
    or whose reader or disk is gone, is
    pointed at the null device: neither this call nor a later one nor the end of the process fails
        because of it.
    """
    stream = sys.stderr if error else sys.stdout
    if stream is None or stream.closed:  # no file behind it since the start, or closed by somebody
        return
    encoding = getattr(stream, "encoding", None) or "utf-8"
    try:
        print(text.encode(encoding, "backslashreplace").decode(encoding), file=stream, flush=True)
    except OSError:
        _discard(stream)


def progress_bar(*, disable: bool, **options) -> tqdm:
    """A progress bar on stderr that ends no work: where stderr is closed there is none, and where
    it breaks nothing more is shown.
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
    """What waits in the stream's buffer, and all that follows, goes nowhere."""
    with contextlib.suppress(
        OSError, ValueError
    ):  # a stream without a descriptor keeps no process from ending
        descriptor = stream.fileno()
        null = os.open(os.devnull, os.O_WRONLY)
        try:
            os.dup2(null, descriptor)
        finally:
            os.close(null)


class OneLine(logging.Formatter):
    """Log records as one line each, whatever names they hold; a traceback stays below it as it
    is.
    """

    def formatMessage(self, record):
        return printable(super().formatMessage(record), most=None)


def start_log():
    """The log of the commands, on stderr."""
    handler = logging.StreamHandler()
    handler.setFormatter(OneLine("miue-fast: %(message)s"))
    logging.basicConfig(handlers=[handler])
