"""benchmarks/studies/busy.py: its rows and its verdict from made-up times, and the shape of what
was committed.
"""

import json
import os
from pathlib import Path

import pytest

from benchmarks.harness import tables
from benchmarks.studies import busy

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.mark.parametrize("slow, met", [(2.4, True), (2.6, False)])
def test_rows_and_target(tmp_path, monkeypatch, capsys, slow, met):
    asked = []

    def run(images, words, variables, hogs, limit):
        name = next(name for name, given in busy.WAITING.items() if given == variables)
        asked.append((name, hogs))
        return (4.0 if not hogs else None if name == "active" else 4.0 * slow), 8.0

    monkeypatch.setattr(busy, "run", run)
    assert busy.main(["--out", str(tmp_path / "busy.json"), "--rounds", "3", "--limit", "60"]) == 0
    cores = os.cpu_count()
    assert asked[:6] == [
        (name, hogs) for name in ("passive", "short spin", "active") for hogs in (0, cores)
    ]
    assert (
        asked.count(("passive", cores)) == asked.count(("active", 0)) == 3
        and asked.count(("active", cores)) == 1
    )
    record = tables.load(tmp_path / "busy.json")
    passive, _, active = record["rows"]
    assert passive["times_idle"] == pytest.approx(slow) and passive["idle_walls_s"] == [4.0] * 3
    assert active["busy_wall_s"] is None and active["times_idle"] is None
    assert (
        record["targets"][0]["met"] is met
        and record["targets"][0]["measured"] == passive["times_idle"]
    )
    assert f"{slow:.2f}x" in busy.markdown(
        record
    ) and "more than 60 s | more than 15x" in busy.markdown(record)
    assert busy.markdown(record) in capsys.readouterr().out


@pytest.mark.parametrize(
    "path", sorted((BENCHMARKS / "results").glob("busy*.json")), ids=lambda p: p.name
)
def test_committed(path):
    record = tables.load(path)
    assert (
        record["kind"] == "busy"
        and not record["quick"]
        and record["environment"]["load_before"] < 0.5
    )
    assert [row["waiting"] for row in record["rows"]] == list(busy.WAITING) and busy.markdown(
        record
    )
    assert not any(
        word in json.dumps(record)
        for word in ("/home", "/root", "/work", "/tmp", os.uname().nodename)
    ), "a path or host name"
