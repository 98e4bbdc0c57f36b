"""What is chosen by its name: objectives, defences, networks and presets each have one such
table.
"""

from typing import Protocol, TypeVar

from .messages import fail, short


class HasName(Protocol):
    """Anything with a name."""

    @property
    def name(self) -> str: ...


T = TypeVar("T", bound=HasName)


class Named(dict[str, T]):
    """A table of entries by name, in the order in which they were added."""

    def add(self, entry: T) -> T:
        """Adds an entry under its own name and returns it. Errors: ValueError where the name is
        taken or is no text.
        """
        if not isinstance(entry.name, str) or entry.name in self:
            fail("register", "name", "a text that is not taken yet", short(entry.name))
        self[entry.name] = entry
        return entry

    def choose(self, op: str, argument: str, name: object, more: str = "") -> T:
        """The entry of a name. Errors: ValueError that lists the names, and then what `more` says
        is also taken.
        """
        if isinstance(name, str) and name in self:
            return self[name]
        fail(op, argument, f"one of {', '.join(self)}{more}", short(name))
