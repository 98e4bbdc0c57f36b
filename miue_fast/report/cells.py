"""The cells of a report, and what is computed from them: means, spreads, gaps."""

import statistics

from ..evaluation.defences import defence
from ..evaluation.defences.jpeg import Jpeg
from ..evaluation.defences.none import NoDefence
from ..generation import Options

STANDARD = NoDefence.name  # training without a defence
OWN = Options.objective  # the paper's objective, and the name of its poison


class Cells:
    """The cells of a report, by poison, victim and defence."""

    def __init__(self, report):
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

    def values(self, poison, victim, defence, what="test"):
        """Percent, one number per seed; empty where there is none."""
        return [
            100 * cell[what]
            for cell in self.found.get((poison, victim, defence), [])
            if cell[what] is not None
        ]

    def mean(self, *where):
        values = self.values(*where)
        return statistics.fmean(values) if values else None

    def defences(self, victim):
        return list(dict.fromkeys(key[2] for key in self.found if key[1] == victim))

    def tried(self, victim, defences):
        """The poisons that one of the defences was tried on, in order."""
        return [
            poison
            for poison in self.order
            if any(self.values(poison, victim, name) for name in defences)
        ]

    def jpeg_qualities(self, victim):
        """The qualities that were tried, best first."""
        made = [defence(name) for name in self.defences(victim)]
        return sorted((each.quality for each in made if isinstance(each, Jpeg)), reverse=True)

    def analyses(self, poison, victim):
        """The analysis of the feature layer, one per seed."""
        cells = self.found.get((poison, victim, STANDARD), [])
        return [cell["analysis"]["layers"][-1] for cell in cells if "analysis" in cell]

    def analysed(self, victim, estimator):
        """{poison: mean sliced MI over the seeds}"""
        means = {
            p: [row["mutual_information"][estimator]["value"] for row in self.analyses(p, victim)]
            for p in self.order
        }
        return {poison: statistics.fmean(values) for poison, values in means.items() if values}


def spread(values, digits=1):
    """Mean +- sample standard deviation over the seeds (smallest to largest); one number alone for
    one seed.
    """
    if not values:
        return ""
    if len(values) == 1:
        return f"{values[0]:.{digits}f}"
    return (
        f"{statistics.fmean(values):.{digits}f} ± {statistics.stdev(values):.{digits}f} "
        f"({min(values):.{digits}f} to {max(values):.{digits}f})"
    )


def duels(cells, ours=OWN):
    """[(victim, defence, best other poison, its mean, ours)] wherever both were tried; variants of
    MI-UE are not others.
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


def gaps(cells, victim, values):
    """{poison: (clean MI - its MI, clean accuracy - its accuracy)}, without parts of poisons"""
    clean = cells.mean("clean", victim, STANDARD)
    if "clean" not in values or clean is None:
        return {}
    return {
        p: (values["clean"] - mi, clean - cells.mean(p, victim, STANDARD))
        for p, mi in values.items()
        if p in cells.whole and p != "clean"
    }
