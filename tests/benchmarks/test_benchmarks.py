"""The benchmarks run to their end, refuse wrong kernels, and what they committed has the promised
shape.
"""

import json
import os
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from _schema import check_schema

from benchmarks import bench
from benchmarks.baselines import other, strong
from benchmarks.harness import machine, measure, pgd_step, tables, workloads
from benchmarks.pages import readme
from benchmarks.studies import fp8_study, packed
from miue_fast.dispatch.registry import OPS

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"

SMALL = list(workloads.cpu(quick=True))


def script(name, *words):
    env = os.environ | {"TRITON_INTERPRET": "0"}
    return subprocess.run(
        [sys.executable, "-m", f"benchmarks.{name}", *map(str, words)],
        capture_output=True,
        text=True,
        timeout=240,
        env=env,
        cwd=BENCHMARKS.parent,
    )


RESULTS = sorted((BENCHMARKS / "results").glob("*.json"))
VICTIMS = [path for path in RESULTS if path.name.startswith("cifar")]


@pytest.mark.parametrize("path", VICTIMS, ids=lambda p: p.name)
def test_committed_victims(path):
    record = json.loads(path.read_text())
    assert record["poison"]["options"]["eps"] == pytest.approx(8 / 255) == record["options"]["eps"]
    assert record["environment"]["threads"] and record["options"]["test_images"] == 10000
    for row in ("clean", "poisoned", "random noise"):
        for part in ("train", "test"):
            ends = [run[f"{part}_curve"][-1] for run in record["rows"][row]["runs"]]
            assert len(ends) == len(record["options"]["seeds"])
            assert record["rows"][row][part]["mean"] == pytest.approx(sum(ends) / len(ends))
    assert not any(
        word in path.read_text()
        for word in ("/home", "/root", "/work", "/tmp", os.uname().nodename)
    ), "a path or host name"


def check_study(record):
    assert (
        record["format"] == tables.FORMAT
        and record["kind"] == "fp8"
        and record["environment"]["threads"]
    )
    seeds, forms = sorted({row["seed"] for row in record["victims"]}), list(fp8_study.FORMS)
    wanted = [(seed, epoch) for seed in seeds for epoch in range(1, record["source"]["epochs"] + 1)]
    assert [(row["seed"], row["epoch"]) for row in record["signs"]] == wanted
    for row in record["signs"]:
        assert all(
            0 <= row[form]["of_magnitude"] <= row[form]["flipped"] <= 1 for form in forms[1:]
        ), "large gradients flip last"
    assert [(row["seed"], row["poison"]) for row in record["deltas"]] == [
        (seed, form) for seed in seeds for form in forms[1:]
    ]
    assert [(row["seed"], row["poison"]) for row in record["victims"]] == [
        (seed, form) for seed in seeds for form in ("none", *forms)
    ]
    assert all(0 <= row["same_sign_of_delta"] <= 1 for row in record["deltas"])
    assert all(0 <= row[part] <= 1 for row in record["victims"] for part in ("train", "test"))
    assert not any(
        word in json.dumps(record)
        for word in ("/home", "/root", "/work", "/tmp", os.uname().nodename)
    ), "a path or host name"


def test_committed_packed_study():
    record = tables.load(packed.RESULT)
    page = packed.NOTES.read_text()
    assert packed.with_table(page, record) == page, (
        "run `python -m benchmarks.studies.packed --notes`"
    )
    assert not record["quick"] and {row["level"] for row in record["rows"]} == set(packed.ISA)
    for name in ("own", "library"):  # what the engine was asked for
        assert record["network"][f"{name}, float32"]["flipped"] <= 1e-3
        assert record["network"][f"{name}, float32"]["of_magnitude"] <= 1e-5
    flipped = [record["network"][f"{name}, bfloat16"]["flipped"] for name in ("own", "library")]
    assert flipped[0] <= flipped[1] <= 0.1  # untrained weights
    assert not any(word in json.dumps(record) for word in ("/home", "/root", "/work", "/tmp"))


def test_committed_fp8_study():
    record = tables.load(fp8_study.RESULT)
    check_study(record)
    assert (
        not record["quick"] and record["data"] == "shapes" and record["environment"]["threads"] == 1
    )
    page = fp8_study.NOTES.read_text()
    assert fp8_study.with_tables(page, record) == page, (
        "run `python -m benchmarks.studies.fp8_study --notes`"
    )


def test_quick_fp8_study(tmp_path):
    done = script("studies.fp8_study", "--quick", "--out", tmp_path / "fp8.json")
    assert done.returncode == 0, done.stderr
    record = tables.load(tmp_path / "fp8.json")
    check_study(record)
    assert record["quick"] and fp8_study.markdown(record) in done.stdout
    # gradients near zero flip, and more of them in the coarser form
    assert all(
        0 < row["bfloat16"]["flipped"] < row["fp8"]["flipped"] < 0.5 for row in record["signs"]
    )


@pytest.mark.parametrize(
    "path", [p for p in RESULTS if p.name.startswith(("cpu", "device"))], ids=lambda p: p.name
)
def test_committed_results(path):
    record = tables.load(path)
    check_schema(record)
    assert not record["quick"] and not measure.broken(record["rows"])
    assert tables.markdown(record)


def test_every_op_has_committed_rows():
    """Not all of them from one machine: an op that came later has a file of its own. An op without
    a workload has none; no op loses its workload unnoticed.
    """
    committed = {
        r["op"]
        for path in RESULTS
        if path.name.startswith("cpu")
        for r in tables.load(path)["rows"]
    }
    assert committed == set(bench.TIMED) == set(workloads.PUBLIC) <= set(OPS)


def test_quick_run(tmp_path):
    done = script("bench", "--quick", "--out", tmp_path / "cpu.json")
    assert done.returncode == 0, done.stderr
    record = tables.load(tmp_path / "cpu.json")
    check_schema(record)
    assert {r["op"] for r in record["rows"]} == {o["op"] for o in record["overhead"]}
    assert {r["op"] for r in record["rows"]} == set(bench.TIMED)
    for name in bench.TIMED:
        found = {r["implementation"] for r in record["rows"] if r["op"] == name}
        baselines = {"eager", *strong.PATHS[name], *other.PATHS.get(name, ())}
        assert found == {*(i.backend for i in OPS[name].impls), *baselines}, (
            "every backend and baseline has a row"
        )
    assert {r["role"] for r in record["pgd_step"]["rows"] if r["median_s"]} == {
        "eager",
        "strong",
        "ours",
    }
    assert 0 < record["pgd_step"]["convolution_share"] <= 1
    measured = [r for r in record["rows"] if r["role"] == "eager" and r["extra_bytes"]]
    assert measured, "no extra memory was measured"
    assert tables.markdown(record) in done.stdout


def test_only_some_ops(tmp_path):
    done = script("bench", "--quick", "--ops", "projected_step", "--out", tmp_path / "some.json")
    assert done.returncode == 0, done.stderr
    assert {r["op"] for r in tables.load(tmp_path / "some.json")["rows"]} == {"projected_step"}


@pytest.mark.parametrize(
    "workload, half",
    [(w, False) for w in SMALL] + [(w, True) for w in SMALL if OPS[w.op].kind == "loss"],
    ids=lambda v: getattr(v, "name", "bfloat16" if v else ""),
)
def test_baselines_agree_with_the_float64_reference(workload, half, monkeypatch):
    """The compiled ones without their compiler; bench.py passes them through the same gate
    compiled.
    """
    monkeypatch.setattr(strong, "_compiled", lambda path: path)
    op, args = OPS[workload.op], workload.make(workload.batch, "cpu", 3)
    if half:
        args = (args[0].bfloat16(), *args[1:])
    want, plain = measure.truth(op, args), measure.results(op, op.reference.fn, args)
    chosen = [
        c for c in measure.candidates(workload, "cpu", args, False) if c.role in ("eager", "strong")
    ]
    assert {c.name for c in chosen if not c.reason} == {"eager", *strong.PATHS[op.name]}
    for candidate in chosen:
        more = measure.PUBLISHED.get(op.name, 0.0)
        assert measure.gate(op, args, want, plain, candidate.fn, exact=False, more=more) <= 1, (
            candidate.name
        )


def test_the_loss_of_another_package_has_an_oracle_of_its_own(monkeypatch):
    """SupConLoss is checked against its own formula, timed, and named; with a wrong formula it is
    refused, without its package left out.
    """
    workload = next(w for w in SMALL if w.op == "nt_xent")

    def found():
        rows = measure.run(workload, "cpu", quick=True, budget=0.001)
        return next(r for r in rows if r["implementation"] == other.SUPCON)

    row = found()
    assert row["median_s"] > 0 and row["reason"] is None and row["error_of_allowed"] <= 1
    ours = row | {"implementation": "cpu", "role": "ours", "median_s": row["median_s"] / 2}
    (line,) = tables._others([ours, row | {"extra_bytes": 5_000_000, "times_ours": {"cpu": 2.0}}])
    assert "takes " in line and "2.00x this library's time, 5 MB of extra memory" in line
    fn, oracle = other.PATHS["nt_xent"][other.SUPCON]
    monkeypatch.setitem(other.PATHS["nt_xent"], other.SUPCON, (fn, partial(wrong_nt_xent, oracle)))
    assert found()["reason"].startswith("refused: error")
    monkeypatch.setattr(other.importlib.util, "find_spec", lambda name: None)
    assert "not installed (pip install pytorch-metric-learning)" in found()["reason"]


def wrong_nt_xent(fn, *args):
    loss, grad = fn(*args)
    return loss, grad * 1.001


def wrong_bits(fn, *args):
    """One value, one unit in the last place."""
    out = fn(*args)
    first = (0,) * out.dim()
    out[first] = torch.nextafter(out[first], torch.tensor(torch.inf))
    return out


def writes_nothing(fn, *args):
    return None


@pytest.mark.parametrize(
    "name, wrong",
    [
        ("nt_xent", wrong_nt_xent),
        ("perturbed_input", wrong_bits),
        ("projected_step", wrong_bits),
        ("projected_step_", writes_nothing),
    ],
)
def test_a_wrong_implementation_is_refused(name, wrong, monkeypatch):
    """It gets a row with its error and no time, and the run ends badly."""
    op = OPS[name]
    bad = replace(
        op.reference, backend="cpu", fn=partial(wrong, op.reference.fn), missing=lambda: None
    )
    monkeypatch.setitem(OPS, name, replace(op, impls=(bad, op.reference)))
    workload = next(w for w in SMALL if w.op == name)
    rows = measure.run(workload, "cpu", quick=True, budget=0.001)
    (refused,) = measure.broken(rows)
    assert (
        refused["implementation"] == "cpu"
        and refused["reason"].startswith("refused: ")
        and refused["median_s"] is None
    )
    assert next(r for r in rows if r["role"] == "reference")["median_s"] > 0
    monkeypatch.setattr(bench, "add_memory", lambda *args: None)
    assert bench.main(["--quick", "--ops", name]) == 1


def test_a_wrong_float64_reference_is_noticed(monkeypatch):
    op = OPS["nt_xent"]
    bad = replace(op, impls=(replace(op.reference, fn=partial(wrong_nt_xent, op.reference.fn)),))
    args = workloads.nt_xent(measure.ORACLE_ROWS + 1, "cpu", 1, width=8)
    measure.truth(op, args)
    with pytest.raises(measure.WrongResult, match=r"differs from op\.truth"):
        measure.truth(bad, args)


def test_targets_are_judged():
    row = measure.blank(SMALL[0], measure.Candidate("cpu", "ours", None, None))
    speed = bench.TARGETS[0]
    rows = [row | {"workload": speed.workload, "median_s": 1.0, "extra_bytes": 9_000_000}]
    rows += [
        rows[0] | {"role": "eager", "median_s": 299.0},
        rows[0] | {"role": "strong", "median_s": 1.31},
    ]
    overhead = [
        {"op": op, "overhead_s": s}
        for op, s in (("nt_xent", 1e-6), ("conv_forward", 16e-6), ("perturbed_input", None))
    ]
    judged = {
        (t["kind"], t["workload"], t["against"]): t["met"] for t in bench.judged(rows, overhead)
    }
    assert (
        judged["speed", speed.workload, "eager"] is False
        and judged["speed", speed.workload, "strong"] is True
    )
    assert (
        judged["memory", speed.workload, None] is False
        and judged["overhead", "every op, tiny inputs", None] is False
    )
    assert judged["memory", "nt_xent B=8192 D=512", None] is None, (
        "nothing measured is neither met nor missed"
    )
    known = {w.name for w in workloads.cpu()} | set(pgd_step.names(512))
    assert all(t.workload in known for t in bench.TARGETS if t.kind != "overhead")


def test_interleaved_counts_every_call():
    calls = {"a": 0, "b": 0}

    def call(name):
        calls[name] += 1

    samples = measure.interleaved(
        {n: partial(call, n) for n in calls},
        lambda fn, number: [fn() for _ in range(number)] and 2e-4,
        0.1,
        4,
    )
    assert {n: len(s) for n, s in samples.items()} == {"a": 4, "b": 4}
    assert calls == {"a": 1 + 4 * (1 + 5), "b": 1 + 4 * (1 + 5)}
    slow = measure.interleaved({"a": lambda: None}, lambda fn, number: 12.0, 3.0)
    assert slow == {"a": [12.0] * measure.ROUNDS}


def test_the_median_of_two_is_between_them():
    few = measure.spread([4.0, 2.0])
    assert few["median_s"] == 3.0 and few["samples"] == 2
    assert 2 < few["p10_s"] < 3 < few["p90_s"] < 4
    assert measure.spread([7.0]) == {"median_s": 7.0, "p10_s": 7.0, "p90_s": 7.0, "samples": 1}
    many = measure.spread([float(k) for k in range(101)])
    assert (many["p10_s"], many["median_s"], many["p90_s"]) == (10.0, 50.0, 90.0)
    row = measure.blank(SMALL[0], measure.Candidate("cpu", "ours", None, None))
    assert tables._cell(row | few) == "3 s (n = 2: 2.2 s - 3.8 s)"
    assert tables._cell(row | measure.spread([7.0])) == "7 s (n = 1)"
    assert tables._cell(row | many) == "50 s (10 s - 90 s)"


def test_strong_is_the_fastest_form_of_pytorch():
    """This library's own reference included; its plain matmul form has a line of its own."""
    row = measure.blank(SMALL[0], measure.Candidate("cpu", "ours", None, None))
    row |= {"workload": "w", "op": "nt_xent", "p10_s": 1.0, "p90_s": 9.0, "samples": 5}
    rows = [
        row | {"median_s": 1.0},
        row | {"implementation": "closed form", "role": "strong", "median_s": 31.4},
        row | {"implementation": "matmul, autograd", "role": "strong", "median_s": 40.0},
        row | {"implementation": "reference", "role": "reference", "median_s": 11.7},
        row | {"implementation": "eager", "role": "eager", "median_s": 34.4},
    ]
    first, plain = tables._summary(rows)
    assert first[2].endswith(": reference") and first[5:7] == ("34x", "12x")
    assert plain[0] == "w, plain matmul form: matmul, autograd" and plain[6] == "40x"
    name = "nt_xent B=512 D=512"
    judged = bench.judged([r | {"workload": name} for r in rows], [])
    found = {t["against"]: t["measured"] for t in judged if t["workload"] == name}
    assert found["strong"] == 11.7 and found["eager"] == 34.4


def test_ratios_are_of_one_round():
    """Another program takes the machine for one round of three, of which the slower implementation
    has two: no ratio moves.
    """
    row = measure.blank(SMALL[0], measure.Candidate("cpu", "ours", None, None))
    rows = [
        row,
        row | {"implementation": "eager", "role": "eager"},
        row | {"implementation": "left out", "role": "strong"},
    ]
    measure.enter(rows, {"cpu": [1.0, 8.0, 9.0], "eager": [2.0, 16.0]})
    assert rows[0]["times_ours"] == rows[2]["times_ours"] == {} and rows[2]["median_s"] is None
    assert rows[1]["times_ours"] == {"cpu": 2.0} and tables.times(rows[1], rows[0]) == 2.0
    older = {k: v for k, v in rows[1].items() if k != "times_ours"}
    assert tables.times(older, rows[0]) == older["median_s"] / 8.0


def test_readme_section(tmp_path, monkeypatch, capsys):
    record = {
        "format": 1,
        "kind": "cpu",
        "quick": False,
        "environment": machine.environment(),
        "method": {},
        "overhead": [],
        "targets": [],
    }
    workload = SMALL[0]
    rows = [
        measure.blank(workload, measure.Candidate(n, r, None, None))
        for n, r in (("cpu", "ours"), ("eager", "eager"))
    ]
    numbers = {
        "median_s": 1e-3,
        "p10_s": 9e-4,
        "p90_s": 2e-3,
        "samples": 5,
        "error_of_allowed": 0.5,
        "rate": 1e9,
    }
    record["rows"] = [
        rows[0] | numbers,
        rows[1] | numbers | {"median_s": 0.25},
        rows[0] | {"implementation": "cuda", "reason": "no GPU"},
    ]
    tables.save(record, tmp_path / "cpu.json")
    assert tables.load(tmp_path / "cpu.json") == record
    monkeypatch.setattr(tables, "RESULTS", tmp_path)
    monkeypatch.setattr(tables, "ROOT", tmp_path)
    cell = {"victim": "small_resnet", "defence": "none", "poison": "clean", "test": 0.45}
    monkeypatch.setattr(readme, "TRAINED_ON", {"clean": "clean images"})
    monkeypatch.setattr(readme, "DEFENCES", {"none": "no defence"})
    monkeypatch.setattr(readme, "SPEED", (workload.name,))
    cells = {"cells": [cell, cell | {"test": 0.47}, cell | {"poison": "em", "test": 0.1}]}
    (tmp_path / "report_cifar10_jpeg.json").write_text(json.dumps(cells))
    (tmp_path / "docs").mkdir()
    for page, sections in readme.PAGES.items():
        old = "".join(f"<!-- {name}:begin -->\nold\n<!-- {name}:end -->\n" for name in sections)
        (tmp_path / page).write_text(f"before\n{old}after\n")
    assert readme.main(["--check"]) == 1
    assert readme.main(["--readme"]) == 0 and readme.main(["--check"]) == 0
    text = {page: (tmp_path / page).read_text() for page in readme.PAGES}
    for content in text.values():
        assert content.startswith("before\n") and content.endswith("\nafter\n")
        assert "old" not in content
    assert "250x" in text["docs/benchmarks.md"] and "cuda (no GPU)" in text["docs/benchmarks.md"]
    assert "| clean images | 46.0 ± 1.4 |" in text["README.md"]
    assert f"| {workload.name} | 250 ms | - | 1 ms | 250x and - |" in text["README.md"]
    (tmp_path / "README.md").write_text("no markers")
    with pytest.raises(ValueError, match="markers"):
        readme.main(["--check"])
    (tmp_path / "cpu.json").write_text('{"format": 0}')
    with pytest.raises(ValueError, match="format: expected 1, got 0"):
        tables.load(tmp_path / "cpu.json")


@pytest.mark.parametrize("op", bench.TIMED)
def test_public_calls_match_the_kernels_they_are_compared_with(op):
    args = workloads.tiny(op)
    got = measure.results(OPS[op], workloads.PUBLIC[op], args)
    chosen = OPS[op].choose("auto", "cpu", OPS[op].dtype_of(*args))
    for ours, kernel in zip(got, measure.results(OPS[op], chosen.fn, args)):
        assert torch.equal(ours, kernel)


def test_the_roofline_page_is_current():
    done = script("harness.roofline", "--check")
    assert done.returncode == 0, (
        "docs/roofline.md is stale: run `python -m benchmarks.harness.roofline`"
    )
