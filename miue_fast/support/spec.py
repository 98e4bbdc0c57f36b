"""An object with a few numbers as a short text, `jpeg:10` or `adversarial:4:steps=3`: its name,
then its options behind colons. The options are the fields of a dataclass.
"""

from collections.abc import Sequence
from dataclasses import MISSING, dataclass, field, fields
from typing import Any, ClassVar, NoReturn, TypeVar

from .messages import fail, short


def option(default: Any, low: float, high: float, *, whole: bool = True) -> Any:
    """A field: an option that the text may set, from `low` to `high`. None: the object chooses;
    `dataclasses.MISSING`: the text has to set it.
    """
    return field(default=default, metadata={"low": low, "high": high, "whole": whole})


Made = TypeVar("Made", bound="Spec")


@dataclass(frozen=True)
class Spec:
    """What a text describes. The first option may be written without its name: `jpeg:10` is
    `jpeg:quality=10`.

    name: what the text begins with.
    Errors on creation: ValueError: an option is out of range.
    """

    name: ClassVar[str]

    def __post_init__(self) -> None:
        for own in fields(self):
            value = getattr(self, own.name)
            if not (value is None and own.default is None) and not _within(value, **own.metadata):
                self._out_of_range(own, value)

    @classmethod
    def read(cls: type[Made], parts: Sequence[str]) -> Made:
        """What the parts of a text behind the name describe. Errors: ValueError."""
        own = {each.name: each for each in fields(cls)}
        given: dict[str, Any] = {}
        for place, part in enumerate(parts):
            name, equals, text = part.rpartition("=")
            name = name if equals else next(iter(own), "") if place == 0 else ""
            if name not in own or name in given:
                known = ", ".join(f"{each}=" for each in own) or "none"
                expected = f"each at most once of {known}"
                cls.refuse(f"option of {cls.name}", expected, repr(part))
            limits = own[name].metadata
            try:
                given[name] = int(text) if limits["whole"] else float(text)
            except ValueError:
                given[name] = None
            if not _within(given[name], **limits):
                cls._out_of_range(own[name], text)
        for name, each in own.items():
            if name not in given and each.default is MISSING:
                cls._out_of_range(each, None)
        return cls(**given)

    @property
    def spec(self) -> str:
        """The text with every option written out."""
        values = {own.name: getattr(self, own.name) for own in fields(self)}
        written = [f"{name}={value:g}" for name, value in values.items() if value is not None]
        return ":".join([self.name, *written])

    @classmethod
    def refuse(cls, what: str, expected: str, got: str) -> NoReturn:
        """Raises the ValueError of objects of this kind about the part `what` of a text."""
        fail(cls.name, what, expected, got)

    @classmethod
    def _out_of_range(cls, own: Any, value: object) -> NoReturn:
        kind = "a whole number" if own.metadata["whole"] else "a number"
        limits = f"{kind} from {own.metadata['low']} to {own.metadata['high']}"
        cls.refuse(f"{own.name} of {cls.name}", limits, short(value))


def _within(value: Any, *, low: float, high: float, whole: bool) -> bool:
    kind = int if whole else int | float
    return isinstance(value, kind) and not isinstance(value, bool) and low <= value <= high
