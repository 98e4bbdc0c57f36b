"""Markdown tables from the records of the benchmarks, and the records as files."""

import json
from pathlib import Path

from benchmarks.baselines import strong
from benchmarks.harness import measure
from miue_fast.dispatch.registry import OPS

FORMAT = 1
ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks" / "results"


def save(record, path):
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_text(json.dumps(record, indent=1, allow_nan=False) + "\n")


def load(path):
    record = json.loads(Path(path).read_text())
    if record.get("format") != FORMAT:
        raise ValueError(
            f"{Path(path).name}: format: expected {FORMAT}, got {record.get('format')}"
        )
    return record


def fastest(rows, role):
    """The fastest timed row of a role, or None. This library's reference is a PyTorch form like the
    others, so it counts as "strong" too.
    """
    roles = (role, "reference") if role == "strong" else (role,)
    return min(
        (r for r in rows if r["role"] in roles and r["median_s"] is not None),
        key=lambda r: r["median_s"],
        default=None,
    )


def times(other, ours):
    """How many times the time of `ours` the row took: of one round each where the record has it,
    else by their medians.
    """
    return (
        other.get("times_ours", {}).get(ours["implementation"])
        or other["median_s"] / ours["median_s"]
    )


def seconds(value):
    unit, scale = next((u for u in (("s", 1), ("ms", 1e-3)) if abs(value) >= u[1]), ("us", 1e-6))
    return f"{value / scale:.3g} {unit}"


def size(value):
    return f"{value / 1e9:.3g} GB" if value >= 1e9 else f"{value / 1e6:.3g} MB"


def ratio(value):
    return f"{value:.0f}x" if value >= 10 else f"{value:.2f}x"


def table(head, rows):
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    return "\n".join(lines + ["| " + " | ".join(map(str, row)) + " |" for row in rows])


def _groups(rows):
    names = dict.fromkeys(r["workload"] for r in rows)
    return {name: [r for r in rows if r["workload"] == name] for name in names}


def _cell(row):
    if row is None:
        return "-"
    if row["samples"] == 1:
        return f"{seconds(row['median_s'])} (n = 1)"
    few = f"n = {row['samples']}: " if row["samples"] < measure.ROUNDS else ""
    return f"{seconds(row['median_s'])} ({few}{seconds(row['p10_s'])} - {seconds(row['p90_s'])})"


def _summary(rows):
    """One line per workload: the published path, the fastest PyTorch form known, the reference,
    the best of this library; one more for the plain matmul form of a similarity loss.
    """
    for name, group in _groups(rows).items():
        eager, best, plain, ours = (
            fastest(group, role) for role in ("eager", "strong", "reference", "ours")
        )
        faster = [ratio(times(other, ours)) if ours and other else "-" for other in (eager, best)]
        memory = " / ".join(
            size(r["extra_bytes"]) if r and r["extra_bytes"] is not None else "-"
            for r in (ours, best, eager)
        )
        which = f": {best['implementation']}" if best else ""
        mine = f": {ours['implementation']}" if ours else ""
        memory = memory if any(r["extra_bytes"] is not None for r in group) else "-"
        yield (
            name,
            _cell(eager),
            _cell(best) + which,
            _cell(plain),
            _cell(ours) + mine,
            *faster,
            memory,
        )
        yield from _plain_matmul(name, group, ours)


def _plain_matmul(name, group, ours):
    """A line of its own for the similarity losses: what the matrix product alone gives, written as
    anybody would, with PyTorch's autograd.
    """
    found = fastest(
        [r for r in group if r["implementation"] == strong.PLAIN.get(r["op"])], "strong"
    )
    if found and ours:
        cells = "-", _cell(found), "-", _cell(ours), "-", ratio(times(found, ours)), "-"
        yield f"{name}, plain matmul form: {found['implementation']}", *cells


def _others(rows):
    """What other packages take for a similar loss, beside this library."""
    for name, group in _groups(rows).items():
        found, ours = fastest(group, "other"), fastest(group, "ours")
        if found and ours:
            memory = (
                f", {size(found['extra_bytes'])} of extra memory"
                if found["extra_bytes"] is not None
                else ""
            )
            yield (
                f"{name}: {found['implementation']} "
                f"(another loss: the logarithm before the sum) takes {seconds(found['median_s'])}, "
                f"{ratio(times(found, ours))} this library's time{memory}."
            )


def _missing(rows):
    """What this library could not show here, once per backend and reason."""
    reasons = dict.fromkeys(
        (r["implementation"], r["reason"]) for r in rows if r["role"] == "ours" and r["reason"]
    )
    return (
        "Without numbers in this run: "
        + "; ".join(f"{name} ({reason})" for name, reason in reasons)
        + "."
        if reasons
        else ""
    )


def _rate(r):
    if not r["rate"]:
        return "-"
    if r["op"] == "pgd_step":
        return f"{r['rate']:.3g} image-steps/s"
    return f"{r['rate'] / 1e9:.3g} {'GB/s' if OPS[r['op']].kind == 'pointwise' else 'GFLOP/s'}"


def _all_rows(rows):
    for r in rows:
        memory = size(r["extra_bytes"]) if r["extra_bytes"] is not None else "-"
        error = "-" if r["error_of_allowed"] is None else f"{r['error_of_allowed']:.2f}"
        timed = (_cell(r), error) if r["median_s"] is not None else ("-", "-")
        yield r["workload"], r["implementation"], *timed, _rate(r), memory, r["reason"] or ""


def target_rows(targets):
    for t in targets:
        show, sign, what = {
            "speed": (ratio, ">=", f"speed against {t['against']}"),
            "memory": (size, "<", "extra memory"),
            "overhead": (seconds, "<", "public call less kernel"),
            "smaller": (ratio, ">=", f"memory, {t['against']} over ours"),
            "time": (seconds, "<", "time"),
            "flops": (
                lambda v: f"{v / 1e12:.3g} TFLOP/s",
                ">=",
                "value and gradient, counted as 5 B^2 D",
            ),
            "rate": (lambda v: f"{v:,.0f} image-steps/s", ">=", "rate"),
            "fraction": (lambda v: f"{v:.0%}", ">=", f"share of {t['against']}"),
        }[t["kind"]]
        measured = "not measured" if t["measured"] is None else show(t["measured"])
        yield (
            f"{t['workload']}: {what}",
            f"{sign} {show(t['needed'])}",
            measured,
            {True: "met", False: "**missed**", None: "-"}[t["met"]],
        )


def _layers(rows):
    """One line per convolution, batch and pass."""
    groups = {}
    for row in rows:
        groups.setdefault((row["layer"], row["batch"], row["pass"]), []).append(row)
    for (layer, batch, name), group in groups.items():
        c, k, r, stride, h, w = group[0]["key"][:6]
        shape = f"{c} -> {k}, {r}x{r}{f' / {stride}' if stride > 1 else ''} @ {h}x{w}"
        found = {row["implementation"]: row for row in group}
        cells = [_median(found.get(column)) for column in LAYER_COLUMNS]
        ours = [
            row
            for row in group
            if row["median_s"] and row["implementation"] in ("cuda", "triton", "wgmma")
        ]
        best = min(ours, key=lambda row: row["median_s"], default=None)
        ceiling = (
            f"{best['of_ceiling']:.0%} ({best['implementation']})"
            if best and best["of_ceiling"]
            else "-"
        )
        yield (
            layer,
            shape,
            batch,
            name,
            *cells,
            ceiling,
            "; ".join(dict.fromkeys(row["reason"] for row in group if row["reason"])),
        )


LAYER_COLUMNS = ("cudnn, any", "cudnn", "cuda", "triton", "wgmma", "triton, two steps")


def _median(row):
    return seconds(row["median_s"]) if row and row["median_s"] else "-"


def _epochs(rows):
    for row in rows:
        parts = [
            seconds(row[field]) if row[field] else "-"
            for field in ("train_s", "poison_s", "first_s")
        ]
        rate = f"{row['image_steps_per_s']:,.0f}" if row["image_steps_per_s"] else "-"
        yield (
            row["name"],
            _cell(row if row["median_s"] else None),
            *parts,
            rate,
            size(row["peak_bytes"]) if row["peak_bytes"] else "-",
            row["reason"] or "",
        )


def _agreements(rows):
    for row in rows:
        if row["workload"].startswith("PGD") and (row["agreement"] is not None or row["median_s"]):
            agree = "-" if row["agreement"] is None else f"{row['agreement']:.4%}"
            yield (
                row["implementation"],
                _cell(row if row["median_s"] else None),
                _rate(row),
                agree,
                row["reason"] or "",
            )


def _device(env):
    """What a GPU result depends on, on one line."""
    found, state = env["device"], env["device"]["state"] or {}
    after = env["device"].get("state_after_layers") or {}
    clocks = f"clocks (SM, memory) {state.get('clocks.sm')}, {state.get('clocks.mem')} before"
    versions = (
        f"CUDA {env['cuda']}, driver {state.get('driver_version', 'unknown')}, "
        f"cuDNN {found['cudnn']}"
    )
    chip = (
        f"capability {found['capability']}, {found['multiprocessors']} multiprocessors, "
        f"L2 {size(found['l2_bytes'])}"
    )
    clocks += (
        f", {after.get('clocks.sm')}, {after.get('clocks.mem')} after the layers; "
        f"power limit {state.get('power.limit')}"
    )
    return f"{versions}, {chip}; {clocks}"


def environment_line(env):
    where = env["gpu"] or env["cpu"]
    parts = [
        where,
        f"{env['threads']} threads",
        env["system"],
        f"torch {env['torch']}",
        f"triton {env['triton']}",
    ]
    parts += [
        f"C++ level {env['cpu_level'] or 'not built'}",
        f"commit {(env['commit'] or 'unknown')[:12]}",
    ]
    return (
        ", ".join(parts)
        + (" with changes" if env["uncommitted_changes"] else "")
        + f"; load before the run {env['load_before']}"
    )


def _parity(rows):
    failed = [
        f"{p['op']}, {p['implementation']}, {p['dtype']}: {p['outcome']}"
        for p in rows
        if p["outcome"].startswith("failed")
    ]
    passed = sum(p["outcome"].startswith(("same bits", "right")) for p in rows)
    return (
        f"Parity on this device: {passed} of {len(rows)} cases right"
        + (f"; {len(failed)} failed: {'; '.join(failed)}" if failed else "")
        + "."
    )


def closing(record, wrong):
    """The end of a run's output, for who sees only that: targets, and what failed."""
    lines = [
        (
            f"{row.get('workload') or row.get('layer') or row.get('op') or row.get('name')}, "
            f"{row.get('implementation', '')} {row.get('pass') or row.get('dtype') or ''}: "
            f"{row.get('reason') or row.get('outcome')}"
        )
        for row in wrong
    ]
    parts = [_parity(record["parity"])] if record["parity"] else []
    parts += (
        [table(("target", "needed", "measured", ""), target_rows(record["targets"]))]
        if record["targets"]
        else []
    )
    return "\n\n".join(
        [*parts, f"{len(wrong)} rows of this library failed or were refused.", *lines]
    )


def markdown(record, *, details=True):
    """The record as Markdown; without `details` what docs/benchmarks.md shows."""
    parts = [
        environment_line(record["environment"])
        + (". Quick run: sizes too small to mean anything." if record["quick"] else "")
    ]
    if record["environment"].get("device"):
        parts.append(_device(record["environment"]) + f". The run took {record['seconds']:.0f} s.")
    if record["targets"]:
        parts.append(table(("target", "needed", "measured", ""), target_rows(record["targets"])))
    if record.get("ceilings"):
        rows = [
            (
                c["name"],
                f"{c['rate'] / 1e12:.3g} {c['unit']}" if c["rate"] else "-",
                c["reason"] or "",
            )
            for c in record["ceilings"]
        ]
        parts.append(table(("ceiling", "measured", "why not"), rows))
    if record.get("layer_times"):
        head = ("convolution", "shape", "B", "pass", *LAYER_COLUMNS, "of the ceiling", "why not")
        shown = [row for row in record["layer_times"] if details or row["batch"] == 512]
        parts.append(
            "Medians; cudnn: the convolution without its epilogue.\n\n"
            + table(head, _layers(shown))
        )
    step = record.get("pgd_step", {"rows": []})
    rows = record["rows"] + step["rows"]
    if rows:
        head = (
            "workload",
            "eager (published path)",
            "strong (fastest PyTorch form known, the reference included)",
            "reference",
            "this library",
            "vs eager",
            "vs strong",
            "extra memory: ours / strong / eager",
        )
        parts.append(
            f"Median of a call (10th - 90th percentile; n: how many samples, where fewer than "
            f"{measure.ROUNDS}).\n\n" + table(head, _summary(rows))
        )
        parts += _others(record["rows"])
        parts += [_missing(record["rows"])] * bool(_missing(record["rows"]))
    if details and rows:
        head = (
            "workload",
            "implementation",
            "time",
            "error / allowed",
            "rate",
            "extra memory",
            "why not",
        )
        parts.append(table(head, _all_rows(rows)))
    if record["kind"] == "device" and (found := list(_agreements(step["rows"]))):
        parts.append(
            table(("PGD step", "time", "rate", "signs as in float32 autograd", "why not"), found)
        )
    if record.get("epoch"):
        head = (
            "epoch",
            "time",
            "model step",
            "poison step",
            "the first one",
            "image-steps/s",
            "peak memory",
            "why not",
        )
        parts.append(table(head, _epochs(record["epoch"])))
    if share := step.get("convolution_share"):
        agree = [r["agreement"] for r in step["rows"] if r["agreement"] and r["role"] == "ours"]
        parts.append(
            f"PGD step in float32: {share:.0%} of this library's time is PyTorch's convolutions; "
            f"{agree[0]:.4%} of delta's signs are as in the eager path."
        )
    if record.get("overhead"):
        timed = [
            (
                o["op"],
                *(
                    seconds(o[k]) if o[k] is not None else "-"
                    for k in ("public_s", "kernel_s", "overhead_s")
                ),
                o["reason"] or "",
            )
            for o in record["overhead"]
        ]
        parts.append(
            table(("op on tiny inputs", "public call", "kernel", "overhead", "why not"), timed)
        )
    if record.get("parity") and not details:
        parts.append(_parity(record["parity"]))
    if record.get("parity") and details:
        rows = [
            (p["op"], p["implementation"], p["dtype"], p["samples"], p["outcome"])
            for p in record["parity"]
        ]
        parts.append(table(("parity", "implementation", "dtype", "samples", "outcome"), rows))
    return "\n\n".join(parts)


def brief(record: dict, workloads: tuple[str, ...]) -> str:
    """Times and ratios alone, of those of these workloads that were measured, in this order."""
    rows = record["rows"] + record.get("pgd_step", {"rows": []})["rows"]
    found = {row[0]: row for row in _summary(rows)}
    head = ("workload", "published path", "best of PyTorch", "this library", "faster by")
    lines = []
    for name in (name for name in workloads if name in found):
        _, eager, strong, _, ours, *faster, _ = found[name]
        medians = (cell.split(" (")[0] for cell in (eager, strong, ours))
        lines.append((name, *medians, " and ".join(faster)))
    return table(head, lines)


def generation(record):
    """A record of benchmarks/generation.py."""
    options = record["options"]
    head = (
        f"{record['train_images']:,} training images, {record['model']}, "
        f"{record['epochs']} epochs of {options['steps']} steps, preset {record['preset']}, "
        f"{options['dtype']}, seed {options['seed']}: {record['seconds']:,.0f} s in all, "
        f"{record['image_steps_per_s']:,.0f} image-steps/s in the poison step (median), "
        f"L-inf {record['linf']}/255."
    )
    rows = [
        (
            v["trained_on"],
            f"{v['victim']}, {v['epochs']} epochs, seed {v['seed']}",
            f"{v['train']:.1%}",
            f"{v['test']:.1%}",
            f"{v['seconds']:,.0f}",
        )
        for v in record["victims"]
    ]
    targets = [
        (
            t["name"],
            t["needed"],
            f"{t['measured']:.3g}" if t["measured"] is not None else "not measured",
            {True: "met", False: "**missed**", None: "-"}[t["met"]],
        )
        for t in record["targets"]
    ]
    parts = [
        environment_line(record["environment"]),
        head,
        table(("trained on", "victim", "train", "clean test", "seconds"), rows),
    ]
    return "\n\n".join(
        parts + ([table(("target", "at most", "measured", ""), targets)] if targets else [])
    )
