"""The tables of docs/full-size.md, from benchmarks/results/full_size.json."""

import statistics

from benchmarks.harness import tables
from benchmarks.studies import full_size

COMMAND = "python -m benchmarks.studies.full_size --data CIFAR --out WORK"
DEFENCES = {
    "none": "as published",
    "jpeg:90": "JPEG 90",
    "jpeg:75": "JPEG 75",
    "jpeg:60": "JPEG 60",
    "jpeg:30": "JPEG 30",
    "jpeg:10": "JPEG 10",
    "resize:24": "24 x 24",
    "resize:16": "16 x 16",
    "grayscale": "grayscale",
    full_size.ATTACKED: "adversarial training, 8/255",
}
SETS = (full_size.CLEAN, *full_size.POISONS)


def text(record: dict | None) -> str:
    """The tables of a record; without one, and for pieces that are missing, cells are empty."""
    rows = [] if record is None else record["pieces"]
    rows = [row for row in rows if row["settings"]["images"] == full_size.IMAGES]
    victims = [row for row in rows if row["settings"]["piece"] == "victim"]
    made = [row for row in rows if row["settings"]["piece"] == "generation"]
    wanted = [p for p in full_size.pieces() if isinstance(p, full_size.Victim)]
    others = list(dict.fromkeys(p.network for p in wanted if p.network != "resnet18"))
    parts = [
        f"Made by `{COMMAND}`; an empty cell is a piece that has not been made yet.",
        "ResNet-18 victims, accuracy on the 10,000 clean test images in percent, one number per "
        "seed. Columns: what the victim's owner does; smaller and grey images are tested as such.",
        tables.table(
            ("trained on", *DEFENCES.values()),
            [(name, *(_tests(victims, name, d) for d in DEFENCES)) for name in SETS],
        ),
        "Other networks, without a defence:",
        tables.table(
            ("victim", *SETS),
            [(n, *(_tests(victims, name, "none", n) for name in SETS)) for n in others],
        ),
        _classes(record, victims),
        "What it took:",
        tables.table(
            ("poison", "epochs", "minutes", "processor minutes", "source fits, %", "computed in"),
            [_cost(row) for row in made],
        ),
        _times(victims),
    ]
    return "\n\n".join(part for part in parts if part)


def _found(victims, trained_on, defence, network):
    key = {"trained_on": trained_on, "defence": defence, "network": network}
    chosen = [row for row in victims if key.items() <= row["settings"].items()]
    return {row["settings"]["seed"]: row for row in chosen}  # the newest of each seed


def _tests(victims, trained_on, defence, network="resnet18"):
    found = _found(victims, trained_on, defence, network)
    return ", ".join(f"{100 * found[seed]['test']:.1f}" for seed in sorted(found))


def _classes(record, victims):
    if record is None:
        return ""
    rows = []
    for name in SETS:
        found = _found(victims, name, "none", "resnet18")
        if 0 in found:
            rows.append((name, *(f"{100 * share:.1f}" for share in found[0]["test_classes"])))
    head = ("trained on", *record["classes"])
    return f"ResNet-18 without a defence, by class (seed 0):\n\n{tables.table(head, rows)}"


def _cost(row):
    fits = row["source_accuracy"]
    minutes = (f"{row[name] / 60:.0f}" for name in ("seconds", "processor_seconds"))
    shown = "" if fits is None else f"{100 * fits:.1f}"
    return row["settings"]["poison"], row["epochs"], *minutes, shown, row["dtype"]


def _times(victims):
    """One line about a victim's time, or none."""
    chosen = [row for row in victims if row["settings"]["network"] == "resnet18"]
    if not chosen:
        return ""
    wall, processor = (
        statistics.median(row[name] for row in chosen) / 60
        for name in ("seconds", "processor_seconds")
    )
    epochs = sorted({row["settings"]["recipe"]["epochs"] for row in chosen})
    machines = sorted(
        {f"{row['machine']['cpu']}, {row['machine']['threads']} threads" for row in chosen}
    )
    kinds = sorted({row["dtype"] for row in chosen})
    return (
        f"A ResNet-18 victim, {' or '.join(map(str, epochs))} epochs in {' or '.join(kinds)}: "
        f"{wall:.0f} minutes, {processor:.0f} of the processor (median of {len(chosen)}). "
        f"{'; '.join(machines)}. The machine did other work meanwhile."
    )
