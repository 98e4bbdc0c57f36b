"""The processes of `miue-fast report --jobs 2`: they end with their parent however it ends, and the
same command goes on.
"""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from miue_fast import data

pytestmark = pytest.mark.skipif(
    not Path("/proc/self/stat").exists(), reason="needs /proc to see who lives"
)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("processes")
    for name, seed in (("train", 1), ("test", 2)):
        drawn = data.shapes(300, seed=seed, size=16, classes=3)
        np.savez(folder / f"{name}.npz", images=drawn.images.numpy(), labels=drawn.labels.numpy())
    config = {
        **{
            "name": "x",
            "data": str(folder / "train.npz"),
            "test": str(folder / "test.npz"),
            "poisons": {},
        },
        "victims": {"lenet5": {"epochs": 20}},
        "runs": [{"seeds": [0, 1, 2, 3]}],
    }
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def start(place, out):
    command = [
        sys.executable,
        "-m",
        "miue_fast",
        "report",
        place / "config.json",
        "--out",
        out,
        "--jobs",
        "2",
        "--quiet",
    ]
    return subprocess.Popen(
        list(map(str, command)), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def children(parent):
    """Of a process: the spawned workers that live (a zombie does not)."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, ppid = stat.read_text().rpartition(")")[2].split()[:2]
            command = stat.with_name("cmdline").read_text()
        except OSError:  # ended meanwhile
            continue
        if int(ppid) == parent and state != "Z" and "spawn_main" in command:
            found.append(int(stat.parent.name))
    return found


def alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def until(condition, seconds=120):
    deadline = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    return found


def goes_on(place, out, kept):
    """The same command makes what is missing and nothing else."""
    before = {path: path.stat().st_mtime_ns for path in kept}
    process = start(place, out)
    told = process.communicate(timeout=300)
    assert process.returncode == 0, told
    assert len(list((out / "cells").glob("*.json"))) == 4 and not list(out.rglob("*.miue-tmp"))
    assert all(path.stat().st_mtime_ns == when for path, when in before.items())
    assert not json.loads((out / "report.json").read_text())["missing"]


def test_workers_end_with_a_parent_that_is_killed(place, tmp_path):
    process = start(place, tmp_path)
    until(lambda: list(tmp_path.glob("cells/*.json")) or process.poll() is not None)
    workers = children(process.pid)
    assert len(workers) == 2
    process.send_signal(signal.SIGKILL)
    process.wait()
    until(lambda: not any(map(alive, workers)), seconds=10)
    process.communicate()
    goes_on(place, tmp_path, list(tmp_path.glob("cells/*.json")))


def test_a_worker_that_is_killed_is_one_line(place, tmp_path):
    process = start(place, tmp_path)
    until(lambda: list(tmp_path.glob("cells/*.json")) or process.poll() is not None)
    workers = children(process.pid)
    assert len(workers) == 2
    os.kill(workers[0], signal.SIGKILL)
    out, told = process.communicate(timeout=120)
    line = (
        "report: a process was killed, probably out of memory: lower --jobs (2); "
        "the same command goes on"
    )
    assert (process.returncode, out, told) == (2, "", f"miue-fast: {line}\n")
    until(lambda: not any(map(alive, workers)), seconds=10)
    goes_on(place, tmp_path, list(tmp_path.glob("cells/*.json")))
