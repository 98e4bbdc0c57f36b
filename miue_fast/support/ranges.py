"""Ranges of options. Each option is judged before anything is read or made, and a wrong one is
reported in one line (`messages.fail`).
"""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from .messages import fail, short

MOST = 2**31 - 1  # of counts: what is larger is a slip, and fits no memory
LARGEST = 1e30  # of weights and rates: products of two stay finite, and float32 holds it
WIDEST = 2**24  # filters, hidden units: the weights of any network can still be counted


def whole(op: str, name: str, value: object, least: int = 1, most: int = MOST) -> None:
    """Raises ValueError unless `value` is a whole number (bool is none) from `least` to `most`."""
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        fail(op, name, f"a whole number >= {least}", short(value))
    if value > most:
        fail(op, name, f"a whole number from {least} to {most}", short(value))


def number(op: str, name: str, value: object, good: Callable[[Any], bool], expected: str) -> None:
    """Raises ValueError unless `value` is a number for which `good` holds. A bool is no number
    here, and NaN is never good.
    """
    if not isinstance(value, int | float) or isinstance(value, bool) or not good(value):
        fail(op, name, expected, short(value))


def positive(op: str, name: str, value: object) -> None:
    """Raises ValueError unless `value` is a number above 0."""
    number(op, name, value, lambda v: 0 < v <= LARGEST, f"a number above 0, at most {LARGEST:g}")


def budget(op: str, name: str, value: object, *, zero: bool = False) -> None:
    """Raises ValueError unless `value` is a size on the [0, 1] image scale, above 0 (or 0 with
    `zero`).
    """
    expected = (
        f"a number {'from 0 to 1' if zero else 'in (0, 1]'} ([0, 1] image scale: 8/255, not 8)"
    )
    if isinstance(value, int | float) and 1 < value <= 255:
        fail(op, name, expected, f"{value:g}; did you mean {value:g}/255?")
    number(op, name, value, lambda v: 0 < v <= 1 or (zero and v == 0), expected)


def switch(op: str, name: str, value: object) -> None:
    """Raises ValueError if the value is neither True nor False."""
    if not isinstance(value, bool):
        fail(op, name, "True or False", short(value))


def reachable(op: str, name: str, path: str | Path) -> None:
    """Raises ValueError if the system cannot even look `path` up: a link loop, a name that is too
    long, a file in place of a folder above it.
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
