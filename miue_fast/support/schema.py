"""What a JSON file that anybody may have written has to look like: one ValueError line for the
first value that does not fit.

A rule is a function of (where, value) that fails or returns nothing; `record` and its like make
rules out of rules."""

import math

from .messages import fail, printable

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


def number(low=-LARGEST, high=LARGEST, *, whole=False):
    """A finite number from low to high; bool is none."""

    def rule(where, value):
        kinds = int if whole else int | float
        if not isinstance(value, kinds) or isinstance(value, bool) or not low <= value <= high:
            _wrong(
                where,
                f"{'a whole number' if whole else 'a number'} from {low:g} to {high:g}",
                value,
            )

    return rule


def text(most=10_000):
    def rule(where, value):
        if not isinstance(value, str) or len(value) > most:
            _wrong(where, f"text of at most {most} characters", value)

    return rule


def boolean(where, value):
    if not isinstance(value, bool):
        _wrong(where, "true or false", value)


def scalar(where, value):
    """What an option of a function can be."""
    if (isinstance(value, float) and not math.isfinite(value)) or not (
        value is None or isinstance(value, str | int | float)
    ):
        _wrong(where, "a number, text, true, false or null", value)
    if isinstance(value, int) and not isinstance(value, bool):
        number(whole=True)(where, value)
    elif isinstance(value, str):
        text()(where, value)


def optional(rule):
    """None, or what the rule takes."""
    return lambda where, value: None if value is None else rule(where, value)


def one_of(choices):
    def rule(where, value):
        if not isinstance(value, str) or value not in choices:
            _wrong(where, f"one of {', '.join(choices)}", value)

    return rule


def array(rule, least=0, most=1_000_000):
    """A list of so many values that the rule takes."""

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


def table(rule, key=None, most=10_000):
    """An object with any keys (that the rule `key` takes) and values that the rule takes."""

    def check(where, value):
        if not isinstance(value, dict) or len(value) > most:
            _wrong(where, "an object", value)
        for name, item in value.items():
            if key is not None:
                key(f"{where} (a key)", name)
            rule(f"{where}.{printable(name, most=40)}", item)

    return check


def record(rules, maybe=()):
    """An object with these keys, those of `maybe` not necessarily; others are passed over."""

    def check(where, value):
        if not isinstance(value, dict):
            _wrong(where, "an object", value)
        for name, rule in rules.items():
            if name in value:
                rule(f"{where}.{name}", value[name])
            elif name not in maybe:
                _wrong(where, f"the key {name}", "none")

    return check
