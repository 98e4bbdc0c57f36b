"""The tables of benchmarks/results/strength.json: what poisons of 3,000 images withstand."""

import statistics
from collections.abc import Iterable
from typing import Any

from benchmarks.harness import tables

CLEAN = "clean"
DEFENCES = {
    "none": "as it is",
    "jpeg:90": "JPEG 90",
    "jpeg:60": "JPEG 60",
    "jpeg:30": "JPEG 30",
    "jpeg:10": "JPEG 10",
    "resize:24": "24 x 24",
    "resize:16": "16 x 16",
    "grayscale": "grey",
}
SHORT = CLEAN, "fast", "publish", "em"
MISSING = "No results yet: `python -m benchmarks.studies.strength --data CIFAR`."


def text(record: dict[str, Any] | None) -> str:
    """Every poison and defence, and the time of the generations; None: a sentence instead."""
    if record is None:
        return MISSING
    poisons = dict.fromkeys(row["poison"] for row in record["rows"])
    made = {f"{r['machine']['cpu']}, {r['machine']['threads']} threads" for r in record["rows"]}
    return (
        "Accuracy on held-out training images in percent: the mean over the generation seeds, in "
        f"brackets the worst. {'; '.join(sorted(made))}; the machine did other work meanwhile.\n\n"
        + _table(record, poisons, DEFENCES, times=True)
    )


def short(record: dict[str, Any] | None) -> str:
    """What the README shows of it."""
    return MISSING if record is None else _table(record, SHORT, [*DEFENCES][:4] + [*DEFENCES][5:])


def _table(
    record: dict[str, Any], poisons: Iterable[str], defences: Iterable[str], times: bool = False
) -> str:
    newest = {(r["poison"], r["seed"], r["defence"]): r for r in record["rows"]}
    defences, lines = list(defences), []
    for poison in poisons:
        rows = [row for key, row in newest.items() if (key[0], key[2]) == (poison, "none")]
        seeds = ", ".join(str(row["seed"]) for row in rows)
        line = [poison, seeds, *(_cell(newest, poison, name) for name in defences)]
        if times:
            taken = [row["generation_s"] for row in rows if "generation_s" in row]
            line.append(tables.seconds(statistics.median(taken)) if taken else "")
        lines.append(line)
    head = ["trained on", "seeds", *(DEFENCES[name] for name in defences)]
    return tables.table([*head, *["generation"] * times], lines)


def _cell(newest, poison, defence):
    found = [
        statistics.fmean(row["tests"])
        for (name, _, behind), row in newest.items()
        if (name, behind) == (poison, defence)
    ]
    if not found:
        return ""
    worst = min(found) if poison == CLEAN else max(found)
    several = f" ({100 * worst:.1f})" if len(found) > 1 else ""
    return f"{100 * statistics.fmean(found):.1f}{several}"
