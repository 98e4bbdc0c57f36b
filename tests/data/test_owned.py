"""Only what this package wrote, and nobody changed since, is replaced or removed: the list of
checksums in every output folder.
"""

import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest

from miue_fast import data
from miue_fast.data import owned
from miue_fast.data.owned import HEADER, LIST, Owned

ODD = [
    "plain.png",
    "two  spaces",
    "back\\slash",
    "line\nbreak",
    "\\n",
    "é/ü.png",
    " leading",
    "trailing ",
    "a/b/c/d.png",
    "return\r",
]


def put(files, name, content=b"ours"):
    (files.folder / name).parent.mkdir(parents=True, exist_ok=True)
    files.write({name: lambda file: file.write(content)})


def test_what_was_written_is_owned_and_may_be_replaced(tmp_path):
    for name in ODD:
        put(Owned(tmp_path), name)
    assert all(Owned(tmp_path).owns(name) for name in ODD) and Owned(tmp_path).names() == sorted(
        ODD
    )
    put(Owned(tmp_path), ODD[0], b"newer")
    assert (tmp_path / ODD[0]).read_bytes() == b"newer" and Owned(tmp_path).owns(ODD[0])
    assert (tmp_path / LIST).read_text().count("plain.png") == 1


@pytest.mark.skipif(shutil.which("sha256sum") is None, reason="no sha256sum")
def test_sha256sum_reads_the_list(tmp_path):
    for name in ODD:
        put(Owned(tmp_path), name)
    check = [shutil.which("sha256sum"), "--strict", "-c", LIST]
    assert subprocess.run(check, cwd=tmp_path, capture_output=True).returncode == 0
    (tmp_path / ODD[3]).write_bytes(b"0urs")
    assert subprocess.run(check, cwd=tmp_path, capture_output=True).returncode == 1


def foreign(tmp_path):
    """Every way in which a file is somebody else's: (name, its maker)."""

    def changed(path):
        put(Owned(tmp_path), "x")
        path.write_bytes(b"0urs")

    def same_size_and_time(path):
        put(Owned(tmp_path), "x")
        before = path.stat()
        path.write_bytes(b"0urs")
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))

    def link(path):
        put(Owned(tmp_path), "y")
        put(Owned(tmp_path), "x")
        path.unlink()
        path.symlink_to(tmp_path / "y")

    def unlisted(path):
        put(Owned(tmp_path), "x")
        (tmp_path / LIST).unlink()

    def folder(path):
        put(Owned(tmp_path), "x")
        path.unlink()
        path.mkdir()

    return {
        "new": lambda path: path.write_bytes(b"ours"),
        "changed": changed,
        "same size and time": same_size_and_time,
        "link": link,
        "unlisted": unlisted,
        "folder": folder,
        "broken link": lambda path: path.symlink_to("nowhere"),
    }


@pytest.mark.parametrize(
    "kind", ["new", "changed", "same size and time", "link", "unlisted", "folder", "broken link"]
)
def test_what_is_somebody_elses_is_neither_replaced_nor_removed(tmp_path, kind, caplog):
    foreign(tmp_path)[kind](tmp_path / "x")
    before = {path: path.lstat().st_mtime_ns for path in tmp_path.iterdir() if path.name != LIST}
    files = Owned(tmp_path)
    assert not files.owns("x")
    with pytest.raises(
        ValueError,
        match=(
            r"^generate: output: expected a new name, .*, got .*/x, which .*; "
            r"move it away or choose"
        ),
    ):
        files.check("generate", ["x"])
    with pytest.raises((ValueError, OSError), match="/x"):
        files.write({"x": lambda file: file.write(b"new")})
    assert files.remove(["x"]) == ["x"] and "left as they are" in caplog.text
    assert {
        path: path.lstat().st_mtime_ns for path in tmp_path.iterdir() if path.name != LIST
    } == before


def test_a_change_during_the_life_of_one_object_is_seen(tmp_path):
    files = Owned(tmp_path)
    put(files, "x")
    assert files.owns("x")
    (tmp_path / "x").write_bytes(b"0urs")
    with pytest.raises(ValueError, match="was changed since"):
        put(files, "x", b"newer")
    assert (tmp_path / "x").read_bytes() == b"0urs"


def test_remove_takes_owned_files_and_the_folders_that_are_then_empty(tmp_path):
    files = Owned(tmp_path)
    for name in ("a/b/1", "a/2", "c/3"):
        put(files, name)
    (tmp_path / "c" / "mine").write_bytes(b"")
    assert files.remove(files.names()) == []
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["c", "mine"]


def test_a_list_that_names_files_outside_removes_nothing_there(tmp_path):
    (tmp_path / "victim").write_bytes(b"ours")
    out = tmp_path / "out"
    out.mkdir()
    put(Owned(out), "x")
    digest = owned.sha256_of(tmp_path / "victim")
    (out / "link").symlink_to(tmp_path)
    with open(out / LIST, "a") as file:
        file.write(f"{digest}  ../victim\n{digest}  {tmp_path}/victim\n{digest}  link/victim\n")
    files = Owned(out)
    assert files.names() == ["link/victim", "x"] and files.remove(files.names()) == ["link/victim"]
    assert (tmp_path / "victim").exists()


@pytest.mark.parametrize("content", [b"my own list\n", HEADER.encode()[:-1], b"\xff" * 100])
def test_somebody_elses_list_is_refused(tmp_path, content):
    (tmp_path / LIST).write_bytes(content)
    with pytest.raises(ValueError, match=r"expected the list of checksums .* move it away"):
        Owned(tmp_path)


def test_a_torn_line_costs_nobody_anything(tmp_path):
    put(Owned(tmp_path), "x")
    with open(tmp_path / LIST, "a") as file:
        file.write("0123456789abcdef  torn-and-never-ren")
    files = Owned(tmp_path)
    files.write({"y": lambda file: file.write(b"y")}, tidy=False)
    assert Owned(tmp_path).names() == ["x", "y"] and Owned(tmp_path).owns("y")


CHILD = """
import os, sys
from pathlib import Path
from miue_fast.data import atomic, owned
files = owned.Owned(sys.argv[1])
if sys.argv[2] == "before":
    atomic.os.replace = lambda *a: os._exit(9)
else:
    replace = os.replace
    atomic.os.replace = lambda *a: (replace(*a), os._exit(9))
files.write({"x": lambda file: file.write(b"newer")})
"""


@pytest.mark.parametrize("moment", ["before", "after"])
def test_a_kill_beside_the_rename_leaves_a_file_that_is_owned(tmp_path, moment):
    put(Owned(tmp_path), "x")
    assert subprocess.run([sys.executable, "-c", CHILD, tmp_path, moment]).returncode == 9
    assert (tmp_path / "x").read_bytes() == (b"ours" if moment == "before" else b"newer")
    assert Owned(tmp_path).owns("x")
    Owned(tmp_path).tidy()
    assert Owned(tmp_path).owns("x") and (tmp_path / LIST).read_text().count("  x\n") == 1


def test_threads_and_objects_add_to_one_list(tmp_path):
    two = Owned(tmp_path), Owned(tmp_path)

    def add(k):
        two[k % 2].write({str(k): lambda file: file.write(b"%d" % k)}, tidy=False, durable=False)

    with ThreadPoolExecutor(8) as pool:
        assert len(list(pool.map(add, range(200)))) == 200
    two[0].tidy()
    assert all(Owned(tmp_path).owns(str(k)) for k in range(200))


def test_the_checksum_is_that_of_a_file_written_out_of_order(tmp_path):
    def writer(file):
        file.write(b"0000")
        file.seek(0)
        file.write(b"1")

    seen = {}
    data.write_files({tmp_path / "x": writer}, before=seen.update)
    assert (
        seen == {tmp_path / "x": owned.sha256_of(tmp_path / "x")}
        and (tmp_path / "x").read_bytes() == b"1000"
    )
