"""Several processes that write into one folder, each its own files: every file stays on the list,
whoever else adds to it or tidies it.
"""

import multiprocessing
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from miue_fast import data
from miue_fast.data.owned import LIST, Owned, check_owned

WRITER = """
import sys
from pathlib import Path
from miue_fast.data.owned import write_owned
for k in range(60):
    write_owned({Path(sys.argv[1]) / f"{sys.argv[2]}-{k}.json": lambda file: file.write(b"ours")}, \
durable=False)
"""


def test_no_process_takes_the_entries_of_another_off_the_list(tmp_path):
    running = [subprocess.Popen([sys.executable, "-c", WRITER, tmp_path, str(k)]) for k in range(3)]
    assert [process.wait(120) for process in running] == [0, 0, 0]
    files = Owned(tmp_path)
    assert len(files.names()) == 180 and all(map(files.owns, files.names()))
    assert sorted(os.listdir(tmp_path)) == sorted([LIST, *files.names()])


def test_an_entry_is_not_tidied_away_before_its_file_has_its_name(tmp_path, monkeypatch):
    Owned(tmp_path).write({"first": lambda file: file.write(b"ours")})
    tidied, rename = [], os.replace

    def replace(source, target):
        if not tidied and Path(target).name == "second":
            tidied.append(
                multiprocessing.get_context("fork").Process(target=lambda: Owned(tmp_path).tidy())
            )
            tidied[0].start()
            tidied[0].join(1)  # it waits for the list
        rename(source, target)

    monkeypatch.setattr(os, "replace", replace)
    Owned(tmp_path).write({"second": lambda file: file.write(b"ours")}, tidy=False)
    tidied[0].join(60)
    assert tidied[0].exitcode == 0 and Owned(tmp_path).owns("second")


def test_a_file_that_another_process_wrote_meanwhile_may_be_replaced(tmp_path):
    early = Owned(tmp_path)
    Owned(tmp_path).write({"x": lambda file: file.write(b"theirs")})
    early.write({"x": lambda file: file.write(b"ours")})
    assert (tmp_path / "x").read_bytes() == b"ours" and Owned(tmp_path).owns("x")


def test_a_list_that_grows_while_it_is_read_is_read(tmp_path, monkeypatch):
    Owned(tmp_path).write({"x": lambda file: file.write(b"ours")})
    whole = (tmp_path / LIST).read_bytes()
    stat = os.fstat

    def grown(descriptor):
        found = stat(descriptor)
        with open(tmp_path / LIST, "ab") as file:
            file.write(b"0" * 64 + b"  y\n")
        return found

    monkeypatch.setattr(os, "fstat", grown)
    assert "x" in Owned(tmp_path).names()
    monkeypatch.undo()
    assert (tmp_path / LIST).read_bytes().startswith(whole)


def test_a_refused_write_leaves_no_list(tmp_path):
    (tmp_path / "x").write_bytes(b"theirs")
    with pytest.raises(ValueError, match="which miue_fast did not write"):
        Owned(tmp_path).write({"x": lambda file: file.write(b"ours")})
    assert os.listdir(tmp_path) == ["x"]


def test_somebody_elses_list_is_refused_before_the_work_that_ends_in_a_new_file(tmp_path):
    (tmp_path / LIST).write_text("my own list\n")
    with pytest.raises(ValueError, match=r"somebody else's file: .*; move it away$"):
        check_owned("evaluate", [tmp_path / "new.json"])


def test_tidying_makes_no_list_and_no_folder(tmp_path):
    for folder in (tmp_path, tmp_path / "none"):
        data.Owned(folder).remove([])
    assert not os.listdir(tmp_path)


def test_a_forked_process_does_not_go_on_holding_a_folder(tmp_path):
    with data.only_writer(tmp_path):
        child = os.fork()
        if not child:
            signal.pause()
            os._exit(0)
    try:
        with data.only_writer(tmp_path):
            pass
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


def test_a_list_that_another_process_has_just_made_is_nobody_elses(tmp_path):
    (tmp_path / LIST).touch()
    files = Owned(tmp_path)
    files.write({"x": lambda file: file.write(b"ours")})
    assert Owned(tmp_path).names() == files.names() and Owned(tmp_path).owns("x")
