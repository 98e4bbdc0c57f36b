"""Names options as the user wrote them: `target_shift` in Python, `--target-shift` on the command
line.

Messages are made where a fault is found, and that code knows only the names of Python;
`messages.fail` and `option` ask here for the others.
"""

import contextlib
from collections.abc import Generator, Mapping
from contextvars import ContextVar

# {Python's name, or "op.name" for one op alone: name to show}
_names: ContextVar[Mapping[str, str] | None] = ContextVar("names", default=None)


@contextlib.contextmanager
def written_as(names: Mapping[str, str]) -> Generator[None, None, None]:
    """A context in which messages show these names. Names of an outer block still hold for what is
    not in `names`.
    """
    token = _names.set({**(_names.get() or {}), **names})
    try:
        yield
    finally:
        _names.reset(token)


def shown(op: str, argument: str) -> str:
    """The argument of `op`, or several joined by " and ", as the user wrote it."""
    names = _names.get() or {}
    return " and ".join(
        names.get(f"{op}.{part}", names.get(part, part)) for part in argument.split(" and ")
    )


def option(name: str, value: object) -> str:
    """How the user sets an option: overwrite=True in Python and --overwrite on the command line,
    size=N and --size N.
    """
    flag = (_names.get() or {}).get(name)
    if flag is None or not flag.startswith("--"):
        return f"{flag or name}={value}"
    if isinstance(value, bool):
        return flag if value else f"--no-{flag[2:]}"
    return f"{flag} {value}"
