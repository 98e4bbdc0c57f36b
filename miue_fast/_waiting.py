"""Imported before torch: in this program's own processes idle threads sleep instead of spinning.

Two threads that spin for each other on a busy machine take several times the wall time
(docs/performance-notes.md). OpenMP reads the environment as it is loaded, with torch, and `python
-m miue_fast` imports the package first: so the package itself must see whose process this is. In
any other process nothing is changed."""

import os
import sys
from pathlib import Path

PROGRAMS = ("miue_fast", "miue_fast.__main__")


def own_process(words: list[str], argv: list[str]) -> bool:
    """Whether the interpreter that was started with `words` (sys.orig_argv) and now has `argv` runs
    `miue-fast`, or `-m` and a program.
    """
    if not 0 < len(argv) < len(words):  # an embedded interpreter
        return False
    if (
        argv[0] == "-m"
    ):  # so it stands until the module is found; the words after the module are its own
        return words[len(words) - len(argv)].removeprefix("-m") in PROGRAMS
    return Path(argv[0]).name == "miue-fast"  # the console script


if own_process(sys.orig_argv, getattr(sys, "argv", [])):
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # workers of `report --jobs` inherit it
