"""What is printed: a name stays one harmless line, and a stream that is narrow, closed or broken
never ends the work.
"""

import io
import logging
import os
import subprocess
import sys

import pytest

from miue_fast.support import messages, output

NASTY = [
    *("a\nmiue-fast: ok", "a\r\x1b[2K", "\x1b]0;title\x07", "\u202egnp.exe", "\u2028", "\ud800"),
    *("\x00", "\x85", "\u200b", "\ufeff", "\x9b31m"),
]


@pytest.mark.parametrize("name", NASTY, ids=ascii)
def test_a_name_is_one_line_without_controls(name):
    told = messages.printable(name)
    assert told.isprintable() and len(told.splitlines()) == 1 and told.encode()
    assert told == name.encode("unicode_escape").decode()
    with pytest.raises(ValueError) as error:
        messages.fail("data", name, "x", name)
    assert str(error.value) == f"data: {told}: expected x, got {told}"


def test_letters_of_every_script_stay():
    for name in (
        "Katze",
        "köpek",
        "кот",
        "猫\u3000三毛",
        "حصان",
        "a\u00a0b",
        "e\u0301",
        "🐈",
        "\\n",
        "$x$",
        "<b>",
    ):
        assert messages.printable(name) == name


def test_long_names_lose_their_middle():
    told = messages.printable("a" * 5000 + "z" * 5000)
    assert len(told) == 200 and told.startswith("aaa") and told.endswith("zzz") and " ... " in told
    assert (
        messages.printable("b" * 200) == "b" * 200
        and len(messages.printable("b" * 5000, most=None)) == 5000
    )
    with pytest.raises(ValueError) as error:
        messages.fail("data", "class", "a name", "n" * 10**6)
    assert len(str(error.value)) == messages.LONGEST


def child(code, **options):
    """`say` in a process of its own; stdout is what the test wants it to be."""
    text = (
        "import sys, os\n"
        "from miue_fast.support.output import say\n"
        f"{code}\n"
        "print('done', file=sys.stderr)"
    )
    return subprocess.run(
        [sys.executable, "-c", text], stderr=subprocess.PIPE, text=True, timeout=120, **options
    )


def test_an_encoding_that_cannot_show_it():
    env = {**os.environ, "PYTHONIOENCODING": "ascii"}
    found = child("say('caf\\u00e9 \\udc80')", stdout=subprocess.PIPE, env=env)
    assert (found.returncode, found.stdout, found.stderr) == (0, "caf\\xe9 \\udc80\n", "done\n")


def test_a_pipe_whose_reader_is_gone():
    read, write = os.pipe()
    os.close(read)
    found = child("say('x' * 100_000)\nsay('again')\nprint('and others')", stdout=write)
    os.close(write)
    assert (found.returncode, found.stderr) == (0, "done\n"), (
        "nothing is said at the end of the process either"
    )


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_a_full_disk():
    with open("/dev/full", "w") as full:
        found = child("say('x')\nsay('y')", stdout=full)
    assert (found.returncode, found.stderr) == (0, "done\n")


@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_a_stdout_that_was_never_open_or_is_closed(unbuffered):
    env = {**os.environ, "PYTHONUNBUFFERED": unbuffered}
    for found in (
        child("assert sys.stdout is None\nsay('x')", preexec_fn=lambda: os.close(1), env=env),
        child("sys.stdout.close()\nsay('x')", env=env),
        child("os.close(1)\nsay('x')\nsay('y')", stdout=subprocess.PIPE, env=env),
    ):
        assert (found.returncode, found.stderr) == (0, "done\n")


def test_streams_of_programs_that_catch_it(monkeypatch, capsys):
    stream = io.StringIO()
    monkeypatch.setattr(sys, "stdout", stream)
    output.say("é")
    assert stream.getvalue() == "é\n"
    output.say("to stderr", error=True)
    assert capsys.readouterr().err == "to stderr\n"


def test_a_log_record_is_one_line():
    record = logging.LogRecord(
        "miue_fast", logging.WARNING, "f", 1, "left out: %s", ("a\nmiue-fast: ok\x1b[1m",), None
    )
    assert (
        output.OneLine("miue-fast: %(message)s").format(record)
        == r"miue-fast: left out: a\nmiue-fast: ok\x1b[1m"
    )
