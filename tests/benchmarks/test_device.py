"""benchmarks/device.py where there is no GPU: it runs to its end, and what it would do on one runs
here on the CPU at small sizes.
"""

import copy
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from _schema import check_schema

from benchmarks import device
from benchmarks.harness import (
    ceilings,
    children,
    epoch,
    gpu_step,
    layers,
    machine,
    measure,
    roofline,
    tables,
    targets,
    workloads,
)
from benchmarks.pages import readme
from miue_fast.dispatch import measured, native
from miue_fast.dispatch.registry import OPS

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


def script(*words):
    return subprocess.run(
        [sys.executable, "-m", "benchmarks.device", *map(str, words)],
        capture_output=True,
        text=True,
        timeout=240,
        env=os.environ | {"TRITON_INTERPRET": "0"},
        cwd=BENCHMARKS.parent,
    )


def on_gpu():
    """(op, backend) of every kernel for a GPU; JPEG has none."""
    gpu = {"triton", "cuda", "wgmma"}
    return {(name, i.backend) for name, op in OPS.items() for i in op.impls if i.backend in gpu}


def reasons(record):
    rows = (
        record["rows"]
        + record["ceilings"]
        + record["layer_times"]
        + record["pgd_step"]["rows"]
        + record["epoch"]
    )
    return {row["reason"] for row in rows}


@pytest.mark.skipif(
    torch.cuda.is_available(), reason="a GPU is here: run benchmarks/device.py itself"
)
@pytest.mark.parametrize("quick", [True, False])
def test_without_a_gpu(tmp_path, quick):
    done = script(*["--quick"] * quick, "--out", tmp_path / "device.json")
    assert done.returncode == 0, done.stderr
    record = tables.load(tmp_path / "device.json")
    check_schema(record)
    assert reasons(record) == {"no CUDA device"}
    assert record["stages"] == list(device.STAGES) and record["seconds"] < 240
    assert {p["op"] for p in record["parity"]} == {op for op, _ in on_gpu()}
    assert all(p["outcome"].startswith("not run: ") for p in record["parity"])
    assert {tuple(row["key"]) for row in record["layers"]} == {row.key for row in roofline.rows()}
    assert {row["batch"] for row in record["layer_times"]} == ({512} if quick else {512, 2048})
    assert all(target["met"] is None for target in record["targets"])
    assert tables.markdown(record) in done.stdout
    assert os.listdir(tmp_path) == ["device.json"]


def test_losses_pass_the_checks():
    """In Triton's interpreter, as the parity stage runs them."""
    pytest.importorskip("triton")
    code = (
        "from benchmarks import device; from benchmarks.harness import measure; "
        "measure.GPU = 'cpu';"
        "device.parity_of({'op': 'nt_xent', 'implementation': 'triton', 'dtype': 'float16'}, print)"
    )
    environment = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": str(BENCHMARKS.parent)}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment
    )
    assert "'outcome': 'right'" in done.stdout, done.stdout + done.stderr


@pytest.mark.skipif(
    torch.cuda.is_available(), reason="a GPU is here: run benchmarks/device.py itself"
)
def test_only_some_stages():
    assert not script("--stages", "ceilings").returncode
    assert not (BENCHMARKS / "results" / "device.json").exists(), "written without a GPU"


EVERY = layers.distinct


@pytest.fixture
def small(monkeypatch, tmp_path_factory):
    """Everything that device.py's processes do, on the CPU in this one: sizes of a few pixels, and
    a stand-in for the GPU's backends.
    """
    monkeypatch.setattr(measure, "GPU", "cpu")
    monkeypatch.setattr(device, "no_gpu", lambda: None)
    monkeypatch.setattr(device, "END", -60)  # this process is slow
    monkeypatch.setattr(
        ceilings,
        "names",
        lambda quick: ["copy", "GEMM bf16 64", "GEMM fp32 64", "GEMM fp8 64", "L2 read"],
    )
    monkeypatch.setattr(ceilings, "COPIED", 1 << 12)
    monkeypatch.setattr(layers, "BATCHES", (2, 3))
    chosen = [
        entry
        for entry in layers.distinct()
        if entry[0].layer in ("conv1", "layers.4.conv1", "layers.4.conv3", "layers.5.conv2")
    ]
    monkeypatch.setattr(layers, "distinct", lambda: chosen)
    for op in (*layers.PASSES.values(), "projected_step_"):
        on_cpu = {
            "triton": OPS[op].reference.fn,
            "cuda": next(i.fn for i in OPS[op].impls if i.backend == "cpu"),
        }
        impls = tuple(
            replace(i, fn=on_cpu[i.backend]) if i.backend in on_cpu else i for i in OPS[op].impls
        )
        monkeypatch.setitem(OPS, op, replace(OPS[op], impls=impls))
    few = [
        w
        for w in workloads.cpu(quick=True)
        if w.op in ("nt_xent", "projected_step_", "perturbed_input")
    ]
    monkeypatch.setattr(workloads, "gpu_loss", lambda quick: few[:1])
    monkeypatch.setattr(workloads, "gpu_pixels", lambda quick: few[1:])
    for name, value in (
        ("BATCH", 12),
        ("WIDTH", 8),
        ("SIDE", 16),
        ("BACKENDS", ("auto", "triton")),
    ):
        monkeypatch.setattr(gpu_step, name, value)
    monkeypatch.setattr(gpu_step, "FIRST", {k: v for k, v in gpu_step.FIRST.items() if k != "cuda"})
    monkeypatch.setattr(gpu_step, "ROUNDS", (gpu_step.FIRST, gpu_step.ROUNDS[1]))
    for name, value in (("COUNT", 24), ("SIDE", 16), ("WIDTH", 8), ("CHUNK", 8)):
        monkeypatch.setattr(epoch, name, value)
    monkeypatch.setattr(epoch, "count", lambda quick: 24)
    monkeypatch.setattr(measured, "TABLE", measured.TABLE)

    def run(spec, seconds):
        path = tmp_path_factory.mktemp("child") / "rows"
        path.touch()
        device.child(json.loads(json.dumps(spec)) | {"rows": str(path)})
        return [json.loads(line) for line in path.read_text().splitlines()], None

    monkeypatch.setattr(children, "run", run)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *args: "a CPU")


def options(quick=True):
    return type("Options", (), {"quick": quick})


def test_ceilings_run(small):
    rows = {row["name"]: row for row in device.run_stages(["ceilings"], 60, options(), None)}
    assert rows["copy"]["rate"] > 0 and rows["GEMM bf16 64"]["rate"] > 0
    assert rows["GEMM fp8 64"]["rate"] or rows["GEMM fp8 64"]["reason"].startswith("failed: ")
    assert rows["L2 read"]["reason"].startswith("failed: "), (
        "Triton has no kernel for a CPU, and the run goes on"
    )


def test_layers_run_and_fill_the_tables(small, tmp_path, monkeypatch):
    refused = {"layers.4.conv1/forward/triton": "failed: alone, it crashed"}
    rows = device.run_stages(["layers"], 600, options(quick=False), None, refused=refused)
    assert len(rows) == 2 * (4 * 2 * 4 + 3)
    bad = [row for row in rows if row["reason"]]
    assert {(row["layer"], row["pass"], row["implementation"]) for row in bad} == {
        ("layers.4.conv1", "forward", "triton")
    }
    timed = [
        row for row in rows if row["implementation"] not in layers.LIBRARY and not row["reason"]
    ]
    assert timed and all(0 <= row["error_of_allowed"] <= 1 and row["median_s"] > 0 for row in timed)
    table = layers.table(rows)
    assert len(table) == 4 + 4 + 1 and set(table.values()) <= {"cuda", "triton"}
    assert table["conv_forward 128->256 3x3/2 @16x16 bfloat16"] == "cuda"
    fastest = {row["layer"]: row for row in layers.fastest(rows)}
    assert (
        fastest["layers.4.conv1"]["forward"] == "cuda"
        and fastest["layers.4.conv1"]["forward_s"] > 0
    )
    monkeypatch.setattr(readme, "SHIPPED", tmp_path / "table.json")
    (tmp_path / "table.json").write_text('{"another GPU": {"a layer": "triton"}}')
    assert readme.write_table(
        {"layer_times": rows, "rows": [], "environment": {"gpu": "a CPU"}}
    ) == len(table)
    assert json.loads((tmp_path / "table.json").read_text()) == {
        "another GPU": {"a layer": "triton"},
        "a CPU": table,
    }


def test_the_table_has_the_faster_loss():
    def row(workload, implementation, seconds, role="ours"):
        return {
            "workload": workload,
            "implementation": implementation,
            "median_s": seconds,
            "role": role,
        }

    large, fused = (
        "nt_xent B=8192 D=512 bfloat16",
        "mi_ue_value_and_grad B=512 D=512 zeta={} bfloat16",
    )
    rows = [
        row(large, "triton", 2.0),
        row(large, "cuda", 1.0),
        row(large, "closed form, compiled", 0.5, "strong"),
    ]
    rows += [row(fused.format(0.1), "triton", 2.0), row(fused.format(0.1), "cuda", 3.0)]
    rows += [row(fused.format(0), "triton", 2.0), row(fused.format(0), "cuda", 1.5)]
    rows += [row("nt_xent B=512 D=512", "triton", 1.0), row("nt_xent B=512 D=512", "cuda", None)]
    rows += [
        row("intra_class_distance B=512 D=512", "triton", 2.0),
        row("intra_class_distance B=512 D=512", "cuda", 1.0),
    ]
    assert workloads.loss_table(rows) == {
        "nt_xent 8192 bfloat16": "cuda",
        "mi_ue_value_and_grad 512 bfloat16": "triton",
    }


def test_the_layer_that_wgmma_takes(small, monkeypatch):
    """It is checked, timed beside the others where there is a Hopper, and in the table where it is
    the fastest.
    """
    entry = next(entry for entry in EVERY() if entry[0].layer == "layers.0.conv1")
    monkeypatch.setattr(layers, "distinct", lambda: [entry])
    rows = device.run_stages(["layers"], 600, options(), None, refused={})
    assert {row["reason"] for row in rows if row["implementation"] == "wgmma"} == {
        native.wgmma_missing()
    }
    assert set(layers.table(rows).values()) <= {"cuda", "triton"} and not device.wrong(
        {"layer_times": rows, "epoch": [], "parity": [], "rows": [], "pgd_step": {"rows": []}}
    )
    for op in ("conv_forward", "conv_input_grad"):
        there = [
            replace(i, fn=OPS[op].reference.fn, missing=lambda: None) if i.backend == "wgmma" else i
            for i in OPS[op].impls
        ]
        monkeypatch.setitem(OPS, op, replace(OPS[op], impls=tuple(there)))
    seen = []
    layers.check(0, seen.append)
    assert [(row["pass"], row["implementation"], row["reason"]) for row in seen] == [
        (name, backend, None)
        for name in ("forward", "input gradient")
        for backend in ("triton", "wgmma")
    ]
    assert device._layer_outcome(0, seen[:3], "its process ended with SIGSEGV") == {
        "layers.0.conv1/input gradient/wgmma": "failed: alone, its process ended with SIGSEGV"
    }
    rows = device.run_stages(
        ["layers"],
        600,
        options(),
        None,
        refused={"layers.0.conv1/forward/wgmma": "failed: alone, it crashed"},
    )
    timed = {(row["pass"], row["implementation"]) for row in rows if row["median_s"]}
    assert (
        ("input gradient", "wgmma") in timed
        and ("forward", "wgmma") not in timed
        and ("forward", "triton") in timed
    )
    for row in rows:
        row["median_s"] = 1.0 if row["implementation"] == "wgmma" else 2.0
    assert set(layers.table(rows).values()) == {"wgmma"}
    assert {(row["forward"], row["backward"]) for row in layers.fastest(rows)} <= {
        ("wgmma", "wgmma"),
        (None, None),
    }


def test_a_wrong_layer_is_not_timed(small, monkeypatch):
    op = OPS["conv_input_grad"]
    wrong = [
        replace(i, fn=lambda *args: op.reference.fn(*args) * 1.1) if i.backend == "triton" else i
        for i in op.impls
    ]
    monkeypatch.setitem(OPS, "conv_input_grad", replace(op, impls=tuple(wrong)))
    rows = device.run_stages(["layers"], 600, options(), None, refused={})
    bad = {(row["pass"], row["implementation"]) for row in rows if row["reason"]}
    assert bad == {("input gradient", "triton"), ("step", "triton, two steps")} or bad == {
        ("input gradient", "triton")
    }
    assert all(row["reason"].startswith("refused: error") for row in rows if row["reason"])
    assert set(layers.table(rows)) == {row["table_key"] for row in rows}


def test_ops_run(small):
    rows = device.run_stages(["loss", "update", "input"], 60, options(), None)
    assert {row["op"] for row in rows} == {"nt_xent", "projected_step_", "perturbed_input"}
    ours = [row for row in rows if row["implementation"] == "cpu"]
    assert ours and all(row["median_s"] > 0 and row["launch"] == "graph" for row in ours)
    assert all(row["launch"] == "calls" for row in rows if row["role"] == "eager")


def test_the_step_runs(small):
    rows = device.run_stages(["step"], 600, options(), None)
    found = {(row["workload"], row["implementation"]): row for row in rows}
    network, loss, _, step = gpu_step.parts()
    for name in ("eager", "attack library", gpu_step.PYTORCH, "auto", gpu_step.FP8):
        row = found[step, name]
        assert row["reason"] is None and row["median_s"] > 0 and 0.5 < row["agreement"] <= 1, row
        assert (
            row["rate"] == pytest.approx(12 / row["median_s"])
            and found[network, name]["median_s"] > 0
        )
        assert row["launch"] == ("calls" if name in ("eager", "attack library") else "graph")
    assert found[step, "eager"]["agreement"] > 0.999, "float32 against float32"
    assert (
        found[loss, "attack library"]["reason"] == "not apart from its loop"
        and found[loss, "auto"]["median_s"] > 0
    )
    assert found[step, "triton"]["reason"].startswith("failed: BackendError"), (
        "no such backend here, and the run goes on"
    )
    assert all(
        found[step, name]["reason"].startswith("left out by --quick") for name in gpu_step.COMPILED
    )
    assert len(rows) == len(list(gpu_step.blanks(True)))


def test_compiled_paths_come_last_beside_ours(small, monkeypatch):
    """In the second round the first one's `auto` is timed again and keeps its row."""
    monkeypatch.setattr(torch, "compile", lambda fn, **options: fn)
    rounds, real = [], measure.interleaved
    monkeypatch.setattr(
        measure,
        "interleaved",
        lambda calls, *rest: rounds.append(list(calls)) or real(calls, *rest),
    )
    rows = device.run_stages(["step"], 600, options(quick=False), None)
    step = gpu_step.parts()[3]
    compiled = [row for row in rows if row["implementation"] in gpu_step.COMPILED]
    assert len(compiled) == 8 and all(row["median_s"] > 0 for row in compiled)
    assert rounds[3] == [
        "eager",
        "attack library",
        gpu_step.PYTORCH,
        "auto",
        gpu_step.FP8,
    ] and rounds[7] == ["auto", *gpu_step.COMPILED]
    assert sum(row["implementation"] == "auto" and row["workload"] == step for row in rows) == 1


def test_a_step_that_disagrees_is_refused(small, monkeypatch):
    monkeypatch.setattr(
        gpu_step.Ours, "step", lambda self, c, index, delta: delta.copy_(torch.ones_like(delta))
    )
    rows = device.run_stages(["step"], 600, options(), None)
    assert all(
        row["reason"].startswith(("refused: ", "failed: ")) for row in rows if row["role"] == "ours"
    )
    record = {"layer_times": [], "epoch": [], "parity": [], "rows": [], "pgd_step": {"rows": rows}}
    assert any(row["reason"].startswith("refused: ") for row in device.wrong(record))


def test_an_epoch_runs(small):
    rows = device.run_stages(["epoch"], 600, options(), None)
    for row in rows:
        assert row["reason"] is None and row["samples"] > 0, row
    whole, large = rows
    assert (
        whole["train_s"] + whole["poison_s"] == pytest.approx(whole["median_s"], rel=0.5)
        and whole["first_s"] > 0
    )
    assert large["image_steps_per_s"] > 0


@pytest.mark.parametrize("op", sorted(OPS))
def test_parity_cases_run(op, monkeypatch):
    monkeypatch.setattr(measure, "GPU", "cpu")
    half = torch.bfloat16 in OPS[op].reference.dtypes and op != "nt_xent"
    dtype = "bfloat16" if half else "float32"
    seen = []
    device.parity_of(
        {"op": op, "implementation": "cpu", "dtype": dtype if op != "projected_step_" else "int8"},
        seen.append,
    )
    (row,) = seen
    assert row["samples"] > 3 and row["outcome"].startswith(
        "same bits" if OPS[op].exact else "right"
    ), row


def test_a_crash_is_told_where_it_happened():
    rows = [{"outcome": None} for _ in range(4)]
    device._parity_outcome(rows, [{"outcome": "same bits"}], "its process ended with SIGSEGV")
    assert [row["outcome"] for row in rows] == [
        "same bits",
        "failed: its process ended with SIGSEGV",
    ] + ["not run: its process ended with SIGSEGV"] * 2
    rows = [{"outcome": None}]
    device._parity_outcome(rows, [], measure.LATE)
    assert rows[0]["outcome"].startswith("not run: left out")


def test_parity_shares_its_work_out(small, monkeypatch):
    """Every op, backend and dtype has a row, every layer a check; late ones are not failures."""
    asked = []

    def run(spec, seconds):
        asked.append(spec)
        return ([{"samples": 1, "outcome": "same bits"}] if spec["job"] == "parity" else []), None

    monkeypatch.setattr(children, "run", run)
    for name, op in list(OPS.items()):
        monkeypatch.setitem(
            OPS, name, replace(op, impls=tuple(replace(i, missing=lambda: None) for i in op.impls))
        )
    rows, refused = device.parity(60, None)
    assert refused == {}
    assert {(row["op"], row["implementation"]) for row in rows} == on_gpu()
    assert {("nt_xent", "triton"), ("nt_xent", "cuda"), ("conv_forward", "wgmma")} <= on_gpu()
    assert sum(spec["job"] == "layer" for spec in asked) == len(layers.distinct())
    assert sum(len(spec["cases"]) for spec in asked if spec["job"] == "parity") == len(rows)
    monkeypatch.setattr(device, "END", 3)
    assert {row["outcome"] for row in device.parity(1, None)[0]} == {f"not run: {measure.LATE}"}


def test_a_wrong_parity_case_is_told(small, monkeypatch):
    op = OPS["perturbed_input"]
    wrong = replace(op.reference, backend="cpu", fn=lambda *args: op.reference.fn(*args) + 1)
    monkeypatch.setitem(OPS, "perturbed_input", replace(op, impls=(wrong, op.reference)))
    seen = []
    device.parity_of(
        {"op": "perturbed_input", "implementation": "cpu", "dtype": "float32"}, seen.append
    )
    assert seen[0]["outcome"].startswith("failed: sample 1: AssertionError: output 0")


def test_the_check_of_a_layer_runs(small):
    seen = []
    layers.check(0, seen.append)
    assert [(row["layer"], row["pass"], row["reason"]) for row in seen] == [
        ("conv1", name, None) for name in layers.PASSES
    ]
    assert device._layer_outcome(0, seen[:1], "its process ended with SIGSEGV") == {
        "conv1/input gradient/triton": "failed: alone, its process ended with SIGSEGV"
    }
    assert device._layer_outcome(0, seen[:1], measure.LATE) == {}


@pytest.mark.parametrize("stage", ["ceilings", "layers", "loss", "step"])
def test_time_is_kept(small, stage):
    """A stage whose time is over begins nothing and says so. (An epoch is never cut.)"""
    seen, late = [], time.monotonic() - 1
    if stage == "loss":
        device.timed(stage, True, late, seen.append)
    else:
        module, rest = {
            "ceilings": (ceilings, ()),
            "layers": (layers, ({},)),
            "step": (gpu_step, ()),
        }[stage]
        module.run(True, late, seen.append, *rest)
    before = {
        device.identity(stage, row): row["reason"] for row in device.blanks(stage, True, None)
    }
    assert before.keys() == {device.identity(stage, row) for row in seen}
    assert all(
        row["reason"] in (measure.LATE, before[device.identity(stage, row)]) and row["reason"]
        for row in seen
    )


CHILD = """
import json, os, sys, time
spec = json.loads(sys.argv[2])
with open(spec["rows"], "a") as rows:
    rows.write(json.dumps({"number": 1}) + "\\n")
    rows.flush()
    rows.write('{"half": ')
    rows.flush()
    exec(spec["then"])
"""


@pytest.mark.parametrize(
    "then, ended",
    [
        ("", None),
        ("sys.exit(3)", "exit code 3"),
        ("os.kill(os.getpid(), 11)", "SIGSEGV"),
        ("time.sleep(60)", "stopped after"),
    ],
)
def test_a_process_that_dies_keeps_its_rows(tmp_path, monkeypatch, then, ended):
    (tmp_path / "child.py").write_text(CHILD)
    monkeypatch.setattr(children, "COMMAND", [sys.executable, tmp_path / "child.py"])
    rows, how = children.run({"then": then}, 2)
    assert rows == [{"number": 1}]
    assert how is None if ended is None else ended in how


def test_a_stage_that_dies_says_so_in_its_rows(monkeypatch):
    first = next(ceilings.blanks(True))
    monkeypatch.setattr(
        children,
        "run",
        lambda spec, seconds: (
            [first | {"rate": 1.0, "p10": 1.0, "p90": 1.0}],
            f"its process ended with {signal.Signals(11).name}",
        ),
    )
    rows = device.run_stages(["ceilings"], 60, options(), None)
    assert rows[0]["rate"] == 1.0 and {row["reason"] for row in rows[1:]} == {
        "left out: its process ended with SIGSEGV"
    }
    assert {row["reason"] for row in device.run_stages(["ceilings"], 1, options(), None)} == {
        measure.LATE
    }


def made_up():
    """A record as a GPU would leave it. The numbers mean nothing."""
    record = {
        "format": 1,
        "kind": "device",
        "quick": False,
        "stages": list(device.STAGES),
        "seconds": 470.0,
        "method": {},
        "overhead": [],
    }
    record["environment"] = machine.environment() | {
        "gpu": "Some GPU",
        "device": {
            "capability": "9.0",
            "multiprocessors": 132,
            "memory_bytes": 1,
            "l2_bytes": 50 << 20,
            "cudnn": 91000,
            "state": dict.fromkeys(machine.GPU_STATE, "1 MHz"),
        },
    }
    times = {"median_s": 1e-4, "p10_s": 9e-5, "p90_s": 2e-4, "samples": 9}
    record["parity"] = [
        {
            "op": op,
            "implementation": "triton",
            "dtype": "bfloat16",
            "samples": 3,
            "outcome": "same bits",
        }
        for op in OPS
    ]
    record["ceilings"] = [
        row | {"rate": 8e14 if row["name"].startswith("GEMM") else 4e12, "p10": 1e12, "p90": 9e14}
        for row in ceilings.blanks(False)
    ]
    rows = []
    for row in layers.blanks(False):
        triton = row["implementation"] == "triton" and row["pass"] == "forward"
        seconds = (1.5e-4 if triton else 2e-4) * row["batch"] / 512
        rows.append(
            row
            | {
                "reason": None,
                "median_s": seconds,
                "p10_s": seconds,
                "p90_s": seconds,
                "samples": 9,
                "error_of_allowed": 0.5,
            }
        )
    record["layer_times"] = layers.with_ceilings(rows, record["ceilings"])
    record["layers"] = list(layers.fastest(rows))
    fill = {"error_of_allowed": 0.5, "rate": 1e9, "launch": "graph", "reason": None}
    record["rows"] = [
        row
        | times
        | fill
        | {"extra_bytes": 9_000_000 if row["extra_bytes_reason"] is None else None}
        for stage in device.TOGETHER
        for row in device.blanks(stage, False, None)
    ]
    record["pgd_step"] = {
        "rows": [row | times | fill | {"agreement": 0.97} for row in gpu_step.blanks(False)]
    }
    record["epoch"] = [
        row
        | times
        | {
            "first_s": 9.0,
            "train_s": 4.0,
            "poison_s": 2.0,
            "image_steps_per_s": 2e5,
            "peak_bytes": 10**9,
        }
        for row in epoch.blanks(False)
    ]
    record["targets"] = list(targets.device(record))
    return record


def test_report_and_plot_of_a_record(tmp_path, monkeypatch):
    record = made_up()
    check_schema(record)
    text = tables.markdown(record)
    for part in (
        "Some GPU",
        "GEMM bf16",
        "layers.0.conv1",
        "(triton)",
        "(cuda)",
        "attack library",
        "97.0000%",
        "epoch of ResNet-18",
        "9 s",
        "5 B^2 D",
        "180,000 image-steps/s",
        "share of the copy bandwidth",
        "driver 1 MHz",
        "triton, two steps",
    ):
        assert part in text, part
    short = tables.markdown(record, details=False)
    assert (
        f"{len(OPS)} of {len(OPS)} cases right" in short
        and "| 2048 |" in text
        and "| 2048 |" not in short
    )
    bad = [
        record["layer_times"][3] | {"reason": "refused: error 1"},
        record["parity"][0] | {"outcome": "failed: it crashed"},
    ]
    end = tables.closing(record, bad)
    assert (
        "2 rows of this library failed" in end
        and "conv1, triton forward: refused: error 1" in end
        and "it crashed" in end
    )
    assert {target["kind"] for target in record["targets"]} == {
        "time",
        "speed",
        "flops",
        "memory",
        "smaller",
        "fraction",
        "rate",
    }
    assert all(target["measured"] is not None for target in record["targets"])
    tables.save(record, tmp_path / "device.json")
    monkeypatch.setattr(readme, "SHIPPED", tmp_path / "table.json")
    assert not (tmp_path / "table.json").exists()
    assert readme.main([str(tmp_path / "device.json"), "--write-table"]) == 0
    table = json.loads((tmp_path / "table.json").read_text())["Some GPU"]
    losses = {
        f"nt_xent {batch} {kind}"
        for batch in (512, 2048, 8192, 50_000)
        for kind in ("bfloat16", "float32")
    }
    losses.add("mi_ue_value_and_grad 512 bfloat16")
    assert losses < set(table)
    assert set(table.values()) == {"cuda", "triton"} and len(table) == 11 + 11 + 1 + len(losses)
    pytest.importorskip("matplotlib")
    assert (
        readme.main([str(tmp_path / "device.json"), "--plot", str(tmp_path / "roofline.png")]) == 0
    )
    assert (tmp_path / "roofline.png").read_bytes()[:4] == b"\x89PNG"
    monkeypatch.setattr(tables, "RESULTS", tmp_path)
    page = roofline.page()
    assert "| 293.0 | 390.6 |" in page, "the times at B = 512 per image"


def test_the_schema_notices(monkeypatch):
    good = made_up()
    for part, change in (
        ("layer_times", {"median_s": -1.0}),
        ("epoch", {"reason": "late"}),
        ("ceilings", {"rate": None}),
        ("parity", {"outcome": "fine"}),
        ("rows", {"error_of_allowed": 2.0}),
        ("layers", {"key": [1]}),
    ):
        record = copy.deepcopy(good)
        record[part][0] |= change
        with pytest.raises(AssertionError):
            check_schema(record)
