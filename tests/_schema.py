"""What every committed benchmark record has to be: numbers or the reason for their absence,
possible ones, no path, no host name.
"""

import json
import os
from pathlib import Path

from benchmarks.harness import pgd_step, roofline, tables
from miue_fast.dispatch.registry import OPS

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"

ROW = {
    "workload",
    "op",
    "implementation",
    "role",
    "reason",
    "error_of_allowed",
    "median_s",
    "p10_s",
    "p90_s",
    "samples",
    "rate",
    "extra_bytes",
    "extra_bytes_reason",
}
PAIRED = {"times_ours"}  # not in the records of before 2026-11-24
TIMES = ("median_s", "p10_s", "p90_s")
LESS = ("memory", "overhead", "time")  # kinds of target where less is better


LAYER = {
    "layer",
    "layers",
    "key",
    "batch",
    "pass",
    "table_key",
    "implementation",
    "reason",
    "error_of_allowed",
    "samples",
    "flop",
    "bytes",
    "of_ceiling",
    *TIMES,
}
EPOCH = {
    "name",
    "images",
    "reason",
    "samples",
    "first_s",
    "train_s",
    "poison_s",
    "image_steps_per_s",
    "peak_bytes",
    *TIMES,
}


def numbers_or_reason(row):
    if row["reason"]:
        assert all(row[name] is None for name in TIMES) and row["samples"] == 0, row
    else:
        assert 0 < row["p10_s"] <= row["median_s"] <= row["p90_s"] and row["samples"] > 0, row


def check_device(record):
    """The parts that only device.py makes."""
    assert {
        "stages",
        "seconds",
        "parity",
        "ceilings",
        "layer_times",
        "layers",
        "epoch",
    } <= record.keys()
    assert (record["environment"]["gpu"] is None) == ("device" not in record["environment"])
    for row in record["ceilings"]:
        assert row.keys() == {"name", "unit", "rate", "p10", "p90", "reason"}
        assert (row["rate"] is None) == bool(row["reason"]) and (
            row["reason"] or 0 < row["p10"] <= row["rate"] <= row["p90"]
        )
    for row in record["parity"]:
        assert row["op"] in OPS and row["outcome"].startswith(
            ("not run: ", "failed: ", "same bits", "right")
        ), row
    known = {tuple(row.key): row for row in roofline.rows()}
    for row in record["layer_times"]:
        assert row.keys() == LAYER and tuple(row["key"]) in known, row
        numbers_or_reason(row)
        assert row["of_ceiling"] is None or 0 < row["of_ceiling"] < 1.2, row
    for row in record["layers"]:
        assert tuple(row["key"]) in known and {"forward_s", "backward_s"} <= row.keys()
    for row in record["epoch"]:
        assert row.keys() == EPOCH, row
        numbers_or_reason(row)


def nameless(record):
    text = json.dumps(record)
    assert not any(
        word in text
        for word in ("/home", "/root", "/work", "/tmp", "\\\\Users", os.uname().nodename)
    ), "a path or host name"


def check_generation(record):
    """A record of benchmarks/generation.py."""
    assert (
        record["format"] == tables.FORMAT
        and record["kind"] == "generation"
        and "commit" in record["environment"]
    )
    assert 0 < record["linf"] <= round(255 * record["options"]["eps"])
    assert [row["epoch"] for row in record["history"]] == list(range(1, record["epochs"] + 1))
    assert record["seconds"] > 0 and record["image_steps_per_s"] > 0
    for row in record["victims"]:
        assert (
            row["trained_on"] in ("poisoned", "clean", "random")
            and 0 <= row["train"] <= 1
            and 0 <= row["test"] <= 1
        )
    for target in record["targets"]:
        assert target["met"] == (
            None if target["measured"] is None else target["measured"] <= target["needed"]
        )
    nameless(record)


def check_schema(record):
    """Every row has either numbers or the reason for their absence; every number is possible; no
    path, no host name.
    """
    assert record["format"] == tables.FORMAT and record["kind"] in ("cpu", "device")
    assert {
        "cpu",
        "threads",
        "torch",
        "triton",
        "build_flags",
        "cpu_level",
        "commit",
        "load_before",
    } <= record["environment"].keys()
    launch = {"launch"} if record["kind"] == "device" else set()
    for row in record["rows"]:
        assert row.keys() - launch - PAIRED == ROW, row
        assert all(value > 0 for value in row.get("times_ours", {}).values()), row
        assert row["op"] in OPS and row["role"] in ("ours", "reference", "eager", "strong", "other")
        if row["reason"]:
            assert (
                row["median_s"] is row["rate"] is row["extra_bytes"] is None and row["samples"] == 0
            ), row
        else:
            assert 0 < row["p10_s"] <= row["median_s"] <= row["p90_s"] and row["samples"] > 0, row
            assert 0 <= row["error_of_allowed"] <= 1, row
            assert row["extra_bytes"] is None or row["extra_bytes"] >= 0, row
            assert (row["extra_bytes"] is None) == (row["extra_bytes_reason"] is not None), row
    for row in record.get("pgd_step", {"rows": []})["rows"]:
        assert row.keys() - PAIRED == ROW | {"agreement"} | launch and row["role"] in (
            "ours",
            "eager",
            "strong",
            "library",
            "e4m3",
        )
        assert row["reason"] or 0 < row["p10_s"] <= row["median_s"] <= row["p90_s"], row
        kind = "bfloat16" if row["implementation"].endswith("bfloat16") else "float32"
        least = 0 if launch else pgd_step.AGREEING[kind]
        assert row["agreement"] is None or least <= row["agreement"] <= 1, row
    for row in record["overhead"]:
        assert row["op"] in OPS and (row["overhead_s"] is None) == (row["reason"] is not None)
    for target in record["targets"]:
        assert (target["met"] is None) == (target["measured"] is None)
        if target["met"] is not None:
            less = target["kind"] in LESS
            assert target["met"] == (
                target["measured"] < target["needed"]
                if less
                else target["measured"] >= target["needed"]
            )
    if record["kind"] == "device":
        check_device(record)
    nameless(record)
