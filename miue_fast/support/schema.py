"""Rules for JSON that anybody may have written: the first value that breaks one is reported in one
line (ValueError).

A rule is a function of (where, value) that fails or returns nothing; `record`, `array` and `table`
make rules out of rules.
"""

import math
from collections.abc import Callable, Collection, Mapping
from typing import Any

from .messages import fail, printable

Rule = Callable[[str, Any], None]
LARGEST = 1e30  # of any number: sums and squares of such stay finite


def _wrong(where, expected, value):
    """`where` is the file and the place in it, as `op: place`."""
    op, _, place = where.partition(": ")
    told = (
        printable(repr(value), most=80)
        if value is None or isinstance(value, str | int | float)
        else type(value).__name__
    )
    fail(op, place, expected, told)


def number(low: float = -LARGEST, high: float = LARGEST, *, whole: bool = False) -> Rule:
    """A rule for a finite number from `low` to `high`. A bool is no number."""

    def rule(where, value):
        kinds = int if whole else int | float
        if not isinstance(value, kinds) or isinstance(value, bool) or not low <= value <= high:
            _wrong(
                where,
                f"{'a whole number' if whole else 'a number'} from {low:g} to {high:g}",
                value,
            )

    return rule


def text(most: int = 10_000) -> Rule:
    """A rule for text of at most `most` characters."""

    def rule(where, value):
        if not isinstance(value, str) or len(value) > most:
            _wrong(where, f"text of at most {most} characters", value)

    return rule


def boolean(where: str, value: object) -> None:
    """The rule for true or false."""
    if not isinstance(value, bool):
        _wrong(where, "true or false", value)


def scalar(where: str, value: object) -> None:
    """The rule for what an option of a function can be: a number, text, true, false or null."""
    if (isinstance(value, float) and not math.isfinite(value)) or not (
        value is None or isinstance(value, str | int | float)
    ):
        _wrong(where, "a number, text, true, false or null", value)
    if isinstance(value, int) and not isinstance(value, bool):
        number(whole=True)(where, value)
    elif isinstance(value, str):
        text()(where, value)


def optional(rule: Rule) -> Rule:
    """A rule for null, or what `rule` takes."""
    return lambda where, value: None if value is None else rule(where, value)


def one_of(choices: Collection[str]) -> Rule:
    """A rule for one of these texts."""

    def rule(where, value):
        if not isinstance(value, str) or value not in choices:
            _wrong(where, f"one of {', '.join(choices)}", value)

    return rule


def array(rule: Rule, least: int = 0, most: int = 1_000_000) -> Rule:
    """A rule for a list of `least` to `most` values that `rule` takes."""

    def check(where, value):
        if not isinstance(value, list) or not least <= len(value) <= most:
            _wrong(
                where,
                f"a list of {least} to {most} values",
                f"{len(value)} values" if isinstance(value, list) else value,
            )
        for place, item in enumerate(value):
            rule(f"{where}[{place}]", item)

    return check


def table(rule: Rule, key: Rule | None = None, most: int = 10_000) -> Rule:
    """A rule for an object of any keys (that `key` takes) whose values `rule` takes."""

    def check(where, value):
        if not isinstance(value, dict) or len(value) > most:
            _wrong(where, "an object", value)
        for name, item in value.items():
            if key is not None:
                key(f"{where} (a key)", name)
            rule(f"{where}.{printable(name, most=40)}", item)

    return check


def record(rules: Mapping[str, Rule], maybe: Collection[str] = ()) -> Rule:
    """A rule for an object with these keys, of which those in `maybe` may be absent. Further keys
    are ignored.
    """

    def check(where, value):
        if not isinstance(value, dict):
            _wrong(where, "an object", value)
        for name, rule in rules.items():
            if name in value:
                rule(f"{where}.{name}", value[name])
            elif name not in maybe:
                _wrong(where, f"the key {name}", "none")

    return check
