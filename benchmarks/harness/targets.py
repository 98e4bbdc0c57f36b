"""What a run of device.py is to reach, and what it reached. None where nothing was measured."""

from benchmarks.harness import tables


def device(record):
    """Targets in the shape of bench.py's: kind, workload, needed, against, measured, met."""
    rows, steps = record["rows"], record["pgd_step"]["rows"]
    copy = next((c["rate"] for c in record["ceilings"] if c["name"] == "copy"), None)

    def timed(role, workload, rows=rows):
        return tables.fastest([r for r in rows if r["workload"] == workload], role)

    def ratio(workload, role, rows=rows):
        ours, other = timed("ours", workload, rows), timed(role, workload, rows)
        return tables.times(other, ours) if ours and other else None

    def value(row, measure):
        return row and measure(row)

    small, large = "nt_xent B=512 D=512 bfloat16", "nt_xent B=8192 D=512 bfloat16"
    yield _judged("time", small, 15e-6, value(timed("ours", small), lambda r: r["median_s"]))
    yield _judged("speed", small, 200, ratio(small, "eager"), "eager")
    yield _judged(
        "flops",
        large,
        400e12,
        value(timed("ours", large), lambda r: 5 * 8192**2 * 512 / r["median_s"]),
    )
    yield _judged("memory", large, 64e6, value(timed("ours", large), lambda r: r["extra_bytes"]))
    for batch in (512, 2048, 8192, 50_000):
        for dtype in (" bfloat16", ""):
            name = f"nt_xent B={batch} D=512{dtype}"
            yield _judged("speed", name, 1.0, ratio(name, "strong"), "strong")
    for batch in (512, 8192):
        name = f"nt_xent B={batch} D=512"
        ours, other = timed("ours", name), timed("other", name)
        yield _judged("speed", name, 1.0, ratio(name, "other"), "SupConLoss")
        yield _judged(
            "smaller",
            name,
            1.0,
            other["extra_bytes"] / ours["extra_bytes"] if ours and other else None,
            "SupConLoss",
        )
    for name in (
        "projected_step_ 50000x3x32x32 store bfloat16",
        "perturbed_input 50000x3x32x32 channels-last bfloat16",
    ):
        yield _judged(
            "fraction",
            name,
            0.85,
            value(timed("ours", name), lambda r: copy and r["rate"] / copy),
            "the copy bandwidth",
        )
    step = "PGD step ResNet-18 B=512"
    yield _judged("rate", step, 180_000, value(timed("ours", step, steps), lambda r: r["rate"]))
    yield _judged("speed", step, 1.5, ratio(step, "strong", steps), "strong")
    yield _judged("speed", step, 8, ratio(step, "eager", steps), "eager")
    whole = next((e for e in record["epoch"] if e["name"].startswith("epoch")), None)
    yield _judged(
        "time",
        whole["name"] if whole else "epoch of ResNet-18",
        6.0,
        value(whole, lambda r: r["median_s"]),
    )


LESS = ("time", "memory", "overhead")


def _judged(kind, workload, needed, measured, against=None):
    met = None if measured is None else measured < needed if kind in LESS else measured >= needed
    return {
        "kind": kind,
        "workload": workload,
        "needed": needed,
        "against": against,
        "measured": measured,
        "met": met,
    }
