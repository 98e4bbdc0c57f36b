"""Ranges of options: each is judged before anything is read or made, and a wrong one is one line
(`messages.fail`).
"""

import os
from pathlib import Path

from .messages import fail, short

MOST = 2**31 - 1  # of counts: what is larger is a slip, and fits no memory
LARGEST = 1e30  # of weights and rates: products of two stay finite, and float32 holds it
WIDEST = 2**24  # filters, hidden units: the weights of any network can still be counted


def whole(op, name, value, least=1, most=MOST):
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        fail(op, name, f"a whole number >= {least}", short(value))
    if value > most:
        fail(op, name, f"a whole number from {least} to {most}", short(value))


def number(op, name, value, good, expected):
    """A number (bool is none) for which `good` holds; not a number (NaN) is never good."""
    if not isinstance(value, int | float) or isinstance(value, bool) or not good(value):
        fail(op, name, expected, short(value))


def positive(op, name, value):
    number(op, name, value, lambda v: 0 < v <= LARGEST, f"a number above 0, at most {LARGEST:g}")


def budget(op, name, value, *, zero=False):
    """A size on the image scale, above 0 (or 0 with `zero`)."""
    expected = (
        f"a number {'from 0 to 1' if zero else 'in (0, 1]'} ([0, 1] image scale: 8/255, not 8)"
    )
    if isinstance(value, int | float) and 1 < value <= 255:
        fail(op, name, expected, f"{value:g}; did you mean {value:g}/255?")
    number(op, name, value, lambda v: 0 < v <= 1 or (zero and v == 0), expected)


def reachable(op, name, path):
    """ValueError if the system cannot even look `path` up: a link loop, a name too long, a file in
    place of a folder above it.
    """
    try:
        os.stat(path)
    except FileNotFoundError:
        if os.path.islink(path):
            fail(op, name, "a path that the system can follow", f"{path}, a link to nothing")
    except OSError as error:
        fail(
            op, name, "a path that the system can follow", f"{short(Path(path))} ({error.strerror})"
        )
    except ValueError:  # a null character
        fail(op, name, "a path without null characters", short(Path(path)))
