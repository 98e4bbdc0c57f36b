"""Options by the names under which the user wrote them: `target_shift` in Python, `--target-shift`
on the command line.

Messages are made where the fault is found, which knows Python's names only; `messages.fail` and
`option` ask here for the others."""

import contextlib
from contextvars import ContextVar

_names = ContextVar(
    "names", default=None
)  # {Python's name, or "op.name" for one op alone: name to show}


@contextlib.contextmanager
def written_as(names):
    """Meanwhile messages show these names; those of an outer block hold for what is not in
    `names`.
    """
    token = _names.set({**(_names.get() or {}), **names})
    try:
        yield
    finally:
        _names.reset(token)


def shown(op, argument):
    """The argument of `op`, or several joined by " and ", as the user wrote it."""
    names = _names.get() or {}
    return " and ".join(
        names.get(f"{op}.{part}", names.get(part, part)) for part in argument.split(" and ")
    )


def option(name, value):
    """What sets an option: overwrite=True in Python, --overwrite on the command line; size=N there
    is --size N.
    """
    flag = (_names.get() or {}).get(name)
    if flag is None or not flag.startswith("--"):
        return f"{flag or name}={value}"
    if isinstance(value, bool):
        return flag if value else f"--no-{flag[2:]}"
    return f"{flag} {value}"
