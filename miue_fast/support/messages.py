"""One wording for every bad input: `op: argument: expected X, got Y`, on one harmless line."""

import unicodedata
from pathlib import Path
from typing import NoReturn

import torch

from . import written

# characters of a message: enough for a path of any length that opens, and for a list of keys
LONGEST = 2000


def fail(op: str, argument: str, expected: object, got: object) -> NoReturn:
    """Raises ValueError: `op: argument: expected X, got Y`, on one harmless line."""
    argument = written.shown(op, argument)
    raise ValueError(printable(f"{op}: {argument}: expected {expected}, got {got}", most=LONGEST))


def printable(text: object, most: int | None = 200) -> str:
    """Makes `text` one harmless line of at most `most` characters (None: any length), for
    terminals, pages and figures.

    Control characters, line ends, escape sequences, invisible and direction-changing characters and
    halves of surrogate pairs become the escapes that Python writes for them (\\n, \\x1b, \\u202e).
    Letters of every script and all spaces stay. A longer text loses its middle.
    """
    text = str(text)
    if most is not None and len(text) > most:
        head = most // 2
        text = f"{text[:head]} ... {text[len(text) - (most - head - 5) :]}"
    if text.isprintable():
        return text
    return "".join(
        c if c.isprintable() or unicodedata.category(c) == "Zs" else repr(c)[1:-1] for c in text
    )


def describe(tensor: object) -> str:
    """The dtype, shape and device of a tensor, or the type of anything else, for a message."""
    if not isinstance(tensor, torch.Tensor):
        return f"{type(tensor).__name__}"
    return f"{str(tensor.dtype)[6:]} {list(tensor.shape)} on {tensor.device}"


def short(value: object) -> str:
    """Shows a value in a message; numbers of thousands of digits and texts of thousands of
    characters lose their middle.
    """
    if (
        isinstance(value, int) and value.bit_length() > 128
    ):  # Python refuses to write out very long ones
        return f"a {'negative ' if value < 0 else ''}number of {value.bit_length()} bits"
    text = str(value) if isinstance(value, Path) else repr(value)
    return text if len(text) <= 120 else f"{text[:60]}...{text[-55:]}"
