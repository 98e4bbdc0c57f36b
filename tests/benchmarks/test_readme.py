"""benchmarks/README.md names every committed result and every command in it can be given as it
stands.
"""

import argparse
import importlib
import re
import shlex
import subprocess
from pathlib import Path

import pytest

from miue_fast.cli import commands

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "benchmarks" / "README.md").read_text()
SPANS = re.findall(r"`([^`]+)`", PAGE)
COMMANDS = [span for span in SPANS if span.split()[0] in ("python", "miue-fast", "bash", "make")]


class Parsed(Exception):
    """The words of a command were understood; nothing was run."""


def test_every_result_is_named_with_its_command():
    rows = re.findall(r"^\| (`.*?`) \| .*?`((?:python|bash|miue-fast) .*?)`", PAGE, re.M)
    named = {name: command for cell, command in rows for name in re.findall(r"`(.*?)`", cell)}
    there = {path.name for path in (ROOT / "benchmarks/results").iterdir()}
    assert there <= set(named), "a result that benchmarks/README.md does not name"
    absent = PAGE[PAGE.index("these files do not exist") :]
    assert {name for name in named if f"| `{name}`" in absent} == set(named) - there


@pytest.mark.parametrize("command", COMMANDS)
def test_the_command_is_understood(command, monkeypatch):
    parse = argparse.ArgumentParser.parse_args

    def only_parse(self, *args, **kwargs):
        parse(self, *args, **kwargs)
        raise Parsed

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", only_parse)
    words = shlex.split(command)
    if words[0] == "make":
        assert re.search(rf"^{words[1]}:", (ROOT / "Makefile").read_text(), re.M)
    elif words[0] == "bash":
        subprocess.run(["bash", "-n", ROOT / words[1]], check=True)
    else:
        module = importlib.import_module(words[2]) if words[0] == "python" else commands
        with pytest.raises(Parsed):
            module.main(words[3:] if words[0] == "python" else words[1:])


def test_a_wrong_command_is_noticed(monkeypatch, capsys):
    with pytest.raises(SystemExit):
        importlib.import_module("benchmarks.bench").main(["--no-such-option"])
    assert "--no-such-option" in capsys.readouterr().err


def test_every_program_is_named():
    """Whatever can be started with `python -m` has its command on the page."""
    programs = {
        ".".join(path.relative_to(ROOT).with_suffix("").parts)
        for path in (ROOT / "benchmarks").rglob("*.py")
        if '__name__ == "__main__"' in path.read_text()
    }
    assert programs == {command.split()[2] for command in COMMANDS if command[0] == "p"}
