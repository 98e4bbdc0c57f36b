"""The table of benchmarks/results/networks.json: whole networks beside the strongest PyTorch."""

from typing import Any

from benchmarks.harness import tables


def text(record: dict[str, Any] | None) -> str:
    """One line per form; None: a sentence instead."""
    if record is None:
        return "No results yet: `python -m benchmarks.studies.networks --out FILE`."
    best: dict[tuple[str, str], float] = {}
    for row in record["rows"]:
        if row["role"] == "ours":
            key = row["level"], row["what"]
            best[key] = min(best.get(key, row["seconds"]), row["seconds"])
    lines = [
        (
            row["level"],
            row["what"],
            row["form"],
            tables.seconds(row["seconds"]),
            tables.ratio(row["seconds"] / best[row["level"], row["what"]]),
        )
        for row in record["rows"]
    ]
    head = ("level", "what", "form", "time", "of the fastest of ours")
    return f"{tables.environment_line(record['environment'])}.\n\n{tables.table(head, lines)}"
