"""What a report says first: a few sentences and one figure, from its collected cells."""

import itertools
import statistics
from collections.abc import Mapping
from typing import Any

from .cells import OWN, STANDARD, Cells, duels
from .paper import ORDER


def sentences(report: Mapping[str, Any], cells: Cells) -> list[str]:
    """At most five sentences; each is left out where the report has no numbers for it."""
    told = (
        _strongest(report, cells),
        _ours(cells),
        _defended(cells),
        _information(report, cells),
        _size(report),
    )
    return [text for text in told if text]


def _chance(report):
    return 100 / report["classes"]


def _strongest(report, cells):
    means = {p: cells.mean(p, cells.main, STANDARD) for p in cells.order}
    clean = means.pop("clean", None)
    poisons = {name: value for name, value in means.items() if value is not None}
    if clean is None or not poisons:
        return None
    best = min(poisons, key=lambda name: poisons[name])
    return (
        f"A {cells.main} that was trained on {report['setting']['train_images']:,} clean images "
        f"gets {clean:.1f} % of clean test images right, and {poisons[best]:.1f} % where they were "
        f"poisoned by {best}, the strongest poison here (chance: {_chance(report):.1f} %)."
    )


def _ours(cells):
    values, found = cells.values(OWN, cells.main, STANDARD), duels(cells)
    if not values or not found:
        return None
    lost = sum(low < own for *_, low, own in found)
    several = f" ({min(values):.1f} to {max(values):.1f} by seed)" if len(values) > 1 else ""
    return (
        f"MI-UE leaves {statistics.fmean(values):.1f} %{several}; another poison leaves less in "
        f"{lost} of {len(found)} pairs of victim and defence."
    )


def _defended(cells):
    names = [name for name in cells.defences(cells.main) if name != STANDARD]
    found = {name: cells.mean(OWN, cells.main, name) for name in names}
    known = {name: value for name, value in found.items() if value is not None}
    if len(known) < 2:
        return None
    best, worst = (choose(known, key=lambda name: known[name]) for choose in (max, min))
    clean = cells.mean("clean", cells.main, best)
    against = "" if clean is None else f" ({clean:.1f} % on clean images)"
    return (
        f"Of {len(known)} defences {best} undoes most, with {known[best]:.1f} %{against}, and "
        f"{worst} least, with {known[worst]:.1f} %."
    )


def _information(report, cells):
    estimators, held, told = report["setting"]["analysis"]["estimators"], 0, 0
    for estimator in estimators:
        values = cells.analysed(cells.main, estimator)
        known = [values[name] for name in ORDER if name in values]
        if len(known) == len(ORDER):
            told += 1
            held += all(a > b for a, b in itertools.pairwise(known))
    if not told:
        return None
    return (
        f"The paper's order of the mutual information ({' > '.join(ORDER)}) holds by {held} of "
        f"{told} estimators."
    )


def _size(report):
    victims, poisons = len(report["cells"]), len(report["poisons"])
    missing = f" ({len(report['missing'])} more did not finish)" if report["missing"] else ""
    return f"Poisons: {poisons}; trained victims: {victims}{missing}."
