"""The table and the curve of benchmarks/protection.py."""

import statistics
from pathlib import Path

from benchmarks.harness import tables

COMMAND = "python -m benchmarks.protection --data CIFAR"
ABOUT = {
    "eager": "published loop, eager PyTorch",
    "eager-batch8": "published loop, eager PyTorch, training batch 8",
    "published": "the same loop on this library",
    "published-batch8": "the same loop on this library, training batch 8",
    "fast": "`fast`",
    "publish": "`publish`",
    "em": "em with the settings of `fast`",
    "em-publish": "em with the settings of `publish`",
}
COLOURS = {
    "eager": "#8c8c8c",
    "eager-batch8": "#4d4d4d",
    "published": "#b8860b",
    "published-batch8": "#d95f02",
    "fast": "#c51b29",
    "publish": "#7b3294",
    "em": "#3b6fb6",
    "em-publish": "#008080",
}


def reached(run: dict, needed: float) -> dict | None:
    """The first checkpoint whose victims are right in at most `needed` of the images on average,
    or None.
    """
    return next((p for p in run["checkpoints"] if statistics.fmean(p["tests"]) <= needed), None)


def _runs(record):
    """The runs with a checkpoint, in the order of `ABOUT`, then of the seeds."""
    found = [run for run in record["runs"] if run["checkpoints"]]
    return sorted(found, key=lambda run: (list(ABOUT).index(run["method"]), run["seed"]))


def text(record: dict | None) -> str:
    """The table of a record, one row per method and seed."""
    if record is None or not _runs(record):
        return f"No results yet: `{COMMAND}`."
    needed, runs = record["needed"], _runs(record)
    slow = {run["seed"]: reached(run, needed) for run in runs if run["method"] == "eager-batch8"}
    rows = []
    for run in runs:
        point, last = reached(run, needed), run["checkpoints"][-1]
        cells = ("not reached", "", "", "")
        if point:
            base = slow.get(run["seed"])
            times = tables.ratio(base["processor_s"] / point["processor_s"]) if base else ""
            shown = (f"{point[name]:,.1f}" for name in ("wall_s", "processor_s"))
            cells = (point["epoch"], *shown, times)
        end = (
            f"{100 * statistics.fmean(last['tests']):.1f} ({100 * max(last['tests']):.1f})",
            f"{last['epoch']} of {run['options']['epochs']}",
            f"{last['processor_s']:,.0f}",
        )
        rows.append((ABOUT[run["method"]], run["seed"], *cells, *end))
    head = (
        "method",
        "seed",
        f"epochs to {needed:.0%}",
        "seconds",
        "processor seconds",
        "faster by",
        "at the end: mean (worst), %",
        "epochs",
        "processor seconds in all",
    )
    where = tables.environment_line(runs[0]["machine"])
    return (
        f"Made by `{COMMAND}`. {where}.\n\n{tables.table(head, rows)}\n\n"
        '"faster by" compares processor seconds with the eager loop of training batch 8 and the '
        "same seed."
    )


def draw(record: dict, path: Path) -> None:
    """Draws accuracy against the seconds of the generation as an SVG: the mean of the victims, and
    a band from the best to the worst.
    """
    import matplotlib
    from matplotlib.figure import Figure

    from miue_fast.plots.evaluation import plain_text

    with plain_text(), matplotlib.rc_context({"svg.hashsalt": "protection"}):
        canvas = Figure(figsize=(8, 4.6), layout="constrained")
        axes = canvas.subplots()
        named = set()
        for run in _runs(record):
            method, points = run["method"], run["checkpoints"]
            at = [p["processor_s"] for p in points]
            values = [[100 * value for value in p["tests"]] for p in points]
            label = None if method in named else ABOUT[method].replace("`", "")
            named.add(method)
            axes.plot(
                at,
                [statistics.fmean(v) for v in values],
                color=COLOURS[method],
                label=label,
                marker="o",
                markersize=3,
            )
            low, high = [min(v) for v in values], [max(v) for v in values]
            axes.fill_between(at, low, high, color=COLOURS[method], alpha=0.15, linewidth=0)
        axes.axhline(100 * record["needed"], color="black", linewidth=0.9, linestyle=":")
        axes.set(
            xscale="log",
            ylim=(0, None),
            xlabel="processor seconds of the generation",
            ylabel="accuracy of victims, %",
        )
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(fontsize=8, frameon=False, loc="upper left", bbox_to_anchor=(1.0, 1.0))
        canvas.savefig(path, format="svg", metadata={"Date": None, "Creator": None})
