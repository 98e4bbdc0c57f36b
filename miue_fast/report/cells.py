"""The cells of a report, and what is computed from them: means, spreads, gaps."""

import statistics
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from ..evaluation.defences import defence
from ..evaluation.defences.jpeg import Jpeg
from ..evaluation.defences.none import NoDefence
from ..generation import Options

STANDARD = NoDefence.name  # training without a defence
OWN = Options.objective  # the paper's objective, and the name of its poison


class Cells:
    """The cells of a report, by poison, victim and defence."""

    def __init__(self, report: Mapping[str, Any]) -> None:
        self.report, self.order = report, report["order"]
        self.found = {}
        for cell in report["cells"]:
            self.found.setdefault((cell["poison"], cell["victim"], cell["defence"]), []).append(
                cell
            )
        self.victims = [
            name
            for name in report["setting"]["victims"]
            if any(key[1] == name for key in self.found)
        ]
        self.main = self.victims[0] if self.victims else None
        options = {entry["name"]: entry["options"] for entry in report["poisons"]}
        self.whole = [
            name for name in self.order if "of" not in options.get(name, {})
        ]  # not a part of another poison
        # the poisons of MI-UE: the one of that name, its parts, and those of other seeds or options
        bases = {name: options[name].get("of", name) for name in options}
        self.variants = {
            k
            for k, base in bases.items()
            if "made" not in options[base] and options[base].get("objective", OWN) == OWN
        }

    def values(self, poison: str, victim: str, defence: str, what: str = "test") -> list[float]:
        """The numbers of a cell in percent, one per seed; empty if there is none."""
        return [
            100 * cell[what]
            for cell in self.found.get((poison, victim, defence), [])
            if cell[what] is not None
        ]

    def mean(self, *where: str) -> float | None:
        """The mean of `values`, or None if there is none."""
        values = self.values(*where)
        return statistics.fmean(values) if values else None

    def defences(self, victim: str) -> list[str]:
        """The defences that were tried on a victim, in order."""
        return list(dict.fromkeys(key[2] for key in self.found if key[1] == victim))

    def tried(self, victim: str, defences: Collection[str]) -> list[str]:
        """The poisons that at least one of the defences was tried on, in order."""
        return [
            poison
            for poison in self.order
            if any(self.values(poison, victim, name) for name in defences)
        ]

    def jpeg_qualities(self, victim: str) -> list[int]:
        """The JPEG qualities that were tried on a victim, the best one first."""
        made = [defence(name) for name in self.defences(victim)]
        return sorted((each.quality for each in made if isinstance(each, Jpeg)), reverse=True)

    def analyses(self, poison: str, victim: str) -> list[dict[str, Any]]:
        """The analysis of the feature layer, one per seed."""
        cells = self.found.get((poison, victim, STANDARD), [])
        return [cell["analysis"]["layers"][-1] for cell in cells if "analysis" in cell]

    def analysed(self, victim: str, estimator: str) -> dict[str, float]:
        """The sliced mutual information of each poison, averaged over the seeds: {poison: nats}."""
        means = {
            p: [row["mutual_information"][estimator]["value"] for row in self.analyses(p, victim)]
            for p in self.order
        }
        return {poison: statistics.fmean(values) for poison, values in means.items() if values}


def spread(values: Sequence[float], digits: int = 1) -> str:
    """The mean ± the sample standard deviation over the seeds (smallest to largest), or the number
    alone if there is one seed.
    """
    if not values:
        return ""
    if len(values) == 1:
        return f"{values[0]:.{digits}f}"
    return (
        f"{statistics.fmean(values):.{digits}f} ± {statistics.stdev(values):.{digits}f} "
        f"({min(values):.{digits}f} to {max(values):.{digits}f})"
    )


def duels(cells: Cells, ours: str = OWN) -> list[tuple[str, str, str, float, float]]:
    """Where MI-UE and another poison were both tried: [(victim, defence, best other poison, its
    mean, MI-UE's mean)]. Variants of MI-UE do not count as others.
    """
    found = []
    for victim in cells.victims:
        for name in cells.defences(victim):
            means = {
                poison: cells.mean(poison, victim, name)
                for poison in cells.order
                if poison != "clean" and poison not in cells.variants
            }
            means = {poison: value for poison, value in means.items() if value is not None}
            own = cells.mean(ours, victim, name)
            if own is not None and means:
                best = min(means, key=lambda poison: means[poison])
                found.append((victim, name, best, means[best], own))
    return found


def gaps(cells: Cells, victim: str, values: Mapping[str, float]) -> dict[str, tuple[float, float]]:
    """The gaps of each whole poison to the clean row: {poison: (in mutual information, in
    accuracy)}.
    """
    clean = cells.mean("clean", victim, STANDARD)
    if "clean" not in values or clean is None:
        return {}
    means = {p: cells.mean(p, victim, STANDARD) for p in cells.whole if p != "clean"}
    return {
        p: (values["clean"] - mi, clean - mean)
        for p, mi in values.items()
        if (mean := means.get(p)) is not None
    }
