"""Every option of every command and every field of `Options` with extreme values: taken, or one
line that names it, before any data.

The data that the command lines name do not exist, so who looks at them first complains about a
path."""

import argparse
import json
import math
import re
import time
from dataclasses import fields

import pytest
import torch

import miue_fast
from miue_fast import data, models, report
from miue_fast.cli import arguments, commands
from miue_fast.generation import Options

NOWHERE = "/nowhere/at/all"
HUGE = str(2**70)
NEVER = [
    f"-{HUGE}",
    "-1",
    "nan",
    "inf",
    "-inf",
    "1e39",
    "1e400",
    "-1e39",
    "9" * 5000,
    "",
    "x",
    "1/0",
    "0x10",
    "1e-400/0",
    "--",
    "\0",
    "१e",
]
SOMETIMES = [
    "0",
    "1",
    "2",
    "8",
    "0.5",
    "8/255",
    "1e-30",
    "1e30",
    "2147483647",
    "2147483648",
    "9223372036854775807",
    "9223372036854775808",
]
COMMANDS = arguments._parser()._subparsers._group_actions[0].choices
SMALLEST = {
    "generate": ["--data", NOWHERE],
    "export": [NOWHERE, "--data", NOWHERE],
    "verify": [NOWHERE, NOWHERE],
    "evaluate": ["--data", NOWHERE, "--poisoned", NOWHERE, "--test", NOWHERE],
    "report": [NOWHERE],
    "demo": [],
    "info": [],
}
WIDE = ("lr", "zeta", "weight_decay")  # up to 1e30
NUMERIC = (arguments._whole, arguments._number)
OPTIONS = [
    (name, action)
    for name, sub in COMMANDS.items()
    for action in sub._actions
    if action.option_strings and action.dest != "help"
]


def output(command, tmp_path):
    flag = {"generate": "--out", "export": "--to", "report": "--out", "demo": "--out"}.get(command)
    return [flag, str(tmp_path / "never")] if flag else []


def run(words, capsys):
    """(exit code, the one line on stderr), within a second of processor time."""
    started = time.process_time()
    code = commands.main(words)
    assert time.process_time() - started < 1, words
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and lines[0].startswith("miue-fast: ") and len(lines[0]) < 2500, (
        words,
        lines,
    )
    return code, lines[0]


def about(flag, line):
    """Whether the option is what is complained about; `got` and what follows may hold anything."""
    return (
        re.search(rf"(?<![\w-]){re.escape(flag)}(?![\w-])", line.partition(", got ")[0]) is not None
    )


def is_about_the_data(line):
    return NOWHERE in line


@pytest.mark.parametrize("command", COMMANDS)
def test_every_numeric_option_refuses_what_no_number_of_it_can_be(
    command, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr(
        data, "load", lambda *args, **options: pytest.fail("the data were looked at")
    )
    for action in (
        action for name, action in OPTIONS if name == command and action.type in NUMERIC
    ):
        flag = action.option_strings[0]
        for value in NEVER + [HUGE] * (action.type is arguments._whole or action.dest not in WIDE):
            words = [command, *SMALLEST[command], *output(command, tmp_path), f"{flag}={value}"]
            code, line = run(words, capsys)
            assert code == 2 and about(flag, line) and not is_about_the_data(line), (words, line)
    assert not (tmp_path / "never").exists()


@pytest.mark.parametrize("command", [name for name in COMMANDS if name not in ("demo", "info")])
def test_every_numeric_option_is_taken_or_refused_by_name(command, tmp_path, capsys):
    """What is taken goes on to the data, and no further. Outside its range stands what Python
    refuses too.
    """
    for action in (
        action for name, action in OPTIONS if name == command and action.type in NUMERIC
    ):
        flag = action.option_strings[0]
        for value in SOMETIMES:
            words = [command, *SMALLEST[command], *output(command, tmp_path), f"{flag}={value}"]
            code, line = run(words, capsys)
            assert code == 2 and about(flag, line) != is_about_the_data(line), (words, line)
            if (
                command == "generate"
                and hasattr(Options(), action.dest)
                and action.type is arguments._number
            ):
                assert about(flag, line) == bool(refusal(action.dest, arguments._number(value))), (
                    words,
                    line,
                )


@pytest.mark.parametrize("command", [name for name in COMMANDS if name != "info"])
def test_every_other_option_names_itself(command, tmp_path, capsys):
    """Choices, texts and switches; a path that cannot be followed."""
    for action in (
        action for name, action in OPTIONS if name == command and action.type not in NUMERIC
    ):
        flag = action.option_strings[0]
        if action.type is arguments._path:
            given = [
                action
                for action in (
                    "x" * 5000,
                    "\0",
                    str(tmp_path / "loop"),
                    str(tmp_path / "file" / "below"),
                )
            ]
            (tmp_path / "file").touch()
            if not (tmp_path / "loop").is_symlink():
                (tmp_path / "loop").symlink_to("loop")
        elif action.nargs == 0 or isinstance(action, argparse.BooleanOptionalAction):
            given = ["5"]
        elif action.dest in ("unseen",):
            continue  # names of classes: only the data know them
        else:
            given = ["", "no such", "\0", HUGE]
        if command == "generate" and action.dest == "feature":
            given = ["no such", HUGE]
        if command == "generate" and action.dest == "robust":
            given = ["no such", "\0", HUGE]  # an empty list has no transforms
        for value in given:
            words = [command, *SMALLEST[command], *output(command, tmp_path), f"{flag}={value}"]
            code, line = run(words, capsys)
            named = about(flag, line) or (action.dest == "defence" and "defence: " in line)
            assert code == 2 and named and not is_about_the_data(line), (words, line)
    assert not (tmp_path / "never").exists()


# in Python

WHOLE = [2**70, -(2**70), 10**5000, -(10**5000), -1, 0, 1, 2, 8, 2**31, 2**63]
REAL = [0.5, 1e-30, 1e30, 1e39, -1e39, math.nan, math.inf, -math.inf]
ODD = [*WHOLE, *REAL, "x", "", "0.1", None, True, False, [], {}, 1j, b"1", torch.tensor(1), object]


def out_of_range(name, value):
    """Of any option: no number at all, below zero, or larger than 64 bits (a rate or weight: than
    1e30).
    """
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return not 0 <= value <= (1e30 if name in WIDE else 2**63)


def refusal(name, value):
    """The message of Options, or None."""
    try:
        Options(**{name: value})
    except ValueError as error:
        return str(error)
    return None


@pytest.mark.parametrize("field", fields(Options), ids=lambda field: field.name)
def test_every_field_of_options(field):
    for value in ODD:
        told = refusal(field.name, value)
        assert told is None or (
            re.match(rf"option: {field.name}[ :]", told)
            and len(told.splitlines()) == 1
            and len(told) < 500
        ), told
        if out_of_range(field.name, value):
            assert told, f"{field.name} took {value}"


SINGLE = {
    "epochs",
    "seeds",
    "lr",
    "batch",
    "crop",
    "eps",
    "poison_ratio",
    "noise",
    "victim",
    "device",
    "defence",
}


@pytest.mark.parametrize("name", sorted(SINGLE))
def test_every_option_of_evaluate(name):
    for value in ODD:
        with pytest.raises((ValueError, miue_fast.BackendError)) as error:
            miue_fast.evaluate(NOWHERE, NOWHERE, NOWHERE, **{name: value})
        told = str(error.value)
        assert len(told.splitlines()) == 1 and len(told) < 500, told
        if name == "victim" and callable(value):
            assert "epochs and lr: " in told
            continue
        assert (
            f"{name}:" in told
            or (name == "defence" and told.startswith("defence: "))
            or is_about_the_data(told)
        ), (value, told)
        if out_of_range(name, value):
            assert not is_about_the_data(told), (name, value)


@pytest.mark.parametrize("name", ["size", "per_class", "eps"])
def test_every_option_of_load_and_verify(name):
    call = (
        (lambda **given: data.verify(NOWHERE, NOWHERE, **given))
        if name == "eps"
        else (lambda **given: data.load(NOWHERE, **given))
    )
    for value in [value for value in ODD if value is not None or name == "eps"]:
        with pytest.raises(ValueError) as error:
            call(**{name: value})
        told = str(error.value)
        assert len(told.splitlines()) == 1 and (f" {name}: " in told or is_about_the_data(told)), (
            told
        )
        if out_of_range(name, value):
            assert not is_about_the_data(told), (name, value)


@pytest.mark.parametrize("name", ["width", "num_classes", "size"])
def test_every_number_of_a_model(name):
    for value in (2**70, -1, 0, math.nan, math.inf, "x", 1.5, True):
        with pytest.raises(ValueError, match=rf"models.build: {name}: expected a whole number"):
            models.build("small_resnet", **{"num_classes": 2, name: value})


CONFIG = {
    "name": "a",
    "data": NOWHERE,
    "test": NOWHERE,
    "poisons": {"em": {"objective": "em"}},
    "victims": {"linear": {"epochs": 1}},
    "runs": [{}],
}
PLACES = [
    *((("poisons", "em", field.name), f"poisons.em.{field.name}") for field in fields(Options)),
    *(
        (("generation", field.name), f"generation.{field.name}")
        for field in fields(Options)
        if field.name != "objective"
    ),
    *(
        (("victims", "linear", name), f"victims.linear.{name}")
        for name in ("epochs", "lr", "batch", "crop")
    ),
    *(((name,), name) for name in ("size", "per_class", "test_per_class")),
    *((("analysis", name), f"analysis.{name}") for name in ("slices", "points")),
]


@pytest.mark.parametrize("place, shown", PLACES, ids=[shown for _, shown in PLACES])
def test_every_number_of_a_report(place, shown):
    for value in (
        2**70 if place[-1] not in WIDE else 10**40,
        -(2**70),
        -1,
        math.nan,
        math.inf,
        1e39,
    ):
        config = json.loads(json.dumps(CONFIG))
        entry = config
        for key in place[:-1]:
            entry = entry.setdefault(key, {})
        entry[place[-1]] = value
        with pytest.raises(ValueError) as error:
            report.check(config)
        assert (
            re.search(rf": {shown}[ :]", str(error.value))
            and len(str(error.value).splitlines()) == 1
        ), error.value
