"""Turns the collected cells into what the report says: headings, sentences, tables and figures in
their order, without any layout.
"""

import itertools
import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from ..analysis import spearman
from ..evaluation.defences import defence
from ..evaluation.defences.adversarial import Adversarial
from ..evaluation.defences.jpeg import Jpeg
from .cells import STANDARD, Cells, duels, gaps, spread
from .paper import ORDER, PAPER, differences
from .summary import sentences

Section = tuple[str, list[tuple[Any, ...]]]  # heading, parts
TEXT, TABLE, FIGURE = "text", "table", "figure"


def sections(report: Mapping[str, Any]) -> list[Section]:
    """[(heading, [(kind, ...)])]: ("text", str), ("table", header, rows) or ("figure", name)."""
    cells = Cells(report)
    parts = [
        _summary(report, cells),
        _setting(report, cells),
        _standard(report, cells),
        _defences(report, cells),
        _jpeg(cells),
        _losses(cells),
        _information(report, cells),
        _depth(cells),
        _layers(cells),
        _noise(report),
        _pictures(),
        _cost(report, cells),
    ]
    return [part for part in parts if part]


def _summary(report, cells):
    return "In short", [(TEXT, " ".join(sentences(report, cells))), (FIGURE, "summary")]


def _setting(report, cells):
    s = report["setting"]
    seeds = sorted({cell["seed"] for cell in report["cells"]})
    side = " x ".join(map(str, s["image"]))
    lines = [
        (
            f"{s['train_images']:,} training and {s['test_images']:,} clean test images "
            f"of {report['classes']} classes, {side}; {len(report['cells'])} trained victims; "
            f"seeds {', '.join(map(str, seeds))}. Accuracies in percent, mean ± standard deviation "
            "over the seeds (smallest to largest). Lower is the better poison."
        )
    ]
    machines = sorted(
        {
            (
                f"{c['device']} ({c['cpu_level']}), "
                f"{c['threads']} thread{'s' * (c['threads'] > 1)} per run, torch {c['torch']}"
            )
            for c in (*report["cells"], *report["poisons"])
        }
    )
    lines.append("Measured on: " + "; ".join(machines) + ".")
    if report["paper"]:
        other = differences(PAPER[report["paper"]], report)
        lines.append(
            f"Paper: {PAPER[report['paper']]['setting']}. "
            + (
                (
                    f"Not the setting of this report ({'; '.join(other)}), "
                    "so its numbers stand beside ours for orientation only."
                )
                if other
                else "No difference to that setting was found."
            )
        )
    rows = [[entry["name"], _listed(entry["options"])] for entry in report["poisons"]]
    victims = [[name, _listed(plan)] for name, plan in s["recipes"].items()]
    tables: list[tuple[Any, ...]] = [
        (TABLE, ["poison", "options (else the preset's)"], rows),
        (TABLE, ["victim", "recipe"], victims),
    ]
    if report["missing"]:
        tables += [
            (TEXT, "**Not finished**, and not in any number below:"),
            (TABLE, ["what", "why"], report["missing"]),
        ]
    return "Setting", [*((TEXT, line) for line in lines), *tables]


def _listed(options):
    return ", ".join(f"{name} {value}" for name, value in options.items() if value is not None)


def _standard(report, cells):
    paper = PAPER[report["paper"]]["standard"] if report["paper"] else {}
    head = [
        "trained on",
        *(f"{victim}: clean test" for victim in cells.victims),
        *([f"{cells.main}: own images"] if cells.main else []),
    ]
    rows = []
    for poison in cells.order:
        row = [
            poison,
            *(spread(cells.values(poison, victim, STANDARD)) for victim in cells.victims),
            spread(cells.values(poison, cells.main, STANDARD, "train")),
        ]
        rows.append(row + ([f"{paper[poison]:.2f}" if poison in paper else ""] if paper else []))
    blocks: list[tuple[Any, ...]] = [(TABLE, head + (["paper (ResNet-18)"] if paper else []), rows)]
    if paper:
        told = {
            name: value
            for name, value in PAPER[report["paper"]]["transfer"].items()
            if name in cells.victims
        }
        blocks += (
            [
                (
                    TEXT,
                    (
                        "Paper, MI-UE on other victims: "
                        f"{', '.join(f'{name} {value:.2f}' for name, value in told.items())}."
                    ),
                )
            ]
            if told
            else []
        )
    return "Standard training", blocks


def _defences(report, cells):
    blocks = []
    for victim in cells.victims:
        names = [
            name
            for name in cells.defences(victim)
            if name != STANDARD and not isinstance(defence(name), Jpeg)
        ]
        if not names:
            continue
        rows, poisons = [], cells.tried(victim, names)
        for name in sorted(names, key=lambda text: defence(text).stage):
            told = f"{name} (test images too)" if defence(name).tests else name
            rows.append([told, *(spread(cells.values(poison, victim, name)) for poison in poisons)])
            if any(cells.values(poison, victim, name, "robust") for poison in poisons):
                rows.append(
                    [
                        f"{name}: robust accuracy",
                        *(
                            spread(cells.values(poison, victim, name, "robust"))
                            for poison in poisons
                        ),
                    ]
                )
        blocks += [
            (TEXT, f"Victim {victim}, clean test accuracy by training set:"),
            (TABLE, ["defence", *poisons], rows),
        ]
    if not blocks:
        return None
    known = PAPER[report["paper"]]["adversarial"] if report["paper"] else {}
    if (
        any(
            isinstance(defence(name), Adversarial)
            for victim in cells.victims
            for name in cells.defences(victim)
        )
        and known
    ):
        told = ", ".join(f"{eps}/255 {value:.2f}" for eps, value in known.items())
        blocks.append((TEXT, f"Paper, adversarial training (PGD-10, ResNet-18) on MI-UE: {told}."))
    return "Defences", blocks


def _jpeg(cells):
    blocks = []
    for victim in cells.victims:
        names = {Jpeg(q).spec: str(q) for q in cells.jpeg_qualities(victim)}
        poisons = cells.tried(victim, names)
        if names:
            rows = [
                [told, *(spread(cells.values(poison, victim, name)) for poison in poisons)]
                for name, told in {STANDARD: STANDARD, **names}.items()
            ]
            blocks += [(TEXT, f"Victim {victim}:"), (TABLE, ["quality", *poisons], rows)]
    if not blocks:
        return None
    text = "The training images are compressed once before training; test images are not."
    return "JPEG quality", [(TEXT, text), *blocks, (FIGURE, "jpeg")]


def _losses(cells):
    found = duels(cells)
    if not found:
        return None
    lost = [
        [victim, name, best, f"{low:.1f}", f"{ours:.1f}"]
        for victim, name, best, low, ours in found
        if low < ours
    ]
    text = (
        f"Of {len(found)} pairs of victim and defence in which MI-UE and other poisons were tried, "
        f"another one leaves a lower mean accuracy in {len(lost)}."
    )
    table = (
        [(TABLE, ["victim", "defence", "best other poison", "its accuracy", "MI-UE"], lost)]
        if lost
        else []
    )
    return "Where MI-UE loses", [(TEXT, text), *table]


def ordering(values: Mapping[str, Sequence[float]], what: str) -> str:
    """In words, whether the paper's order (random > em > mi-ue) holds for {poison: [one number per
    seed]}, by means and by seeds.
    """
    known = [name for name in ORDER if values.get(name)]
    if len(known) < 2:
        return f"{what}: too few of {', '.join(ORDER)} were analysed to speak of an order."
    means = {name: statistics.fmean(values[name]) for name in known}
    told = " > ".join(
        f"{name} {means[name]:.4g}" for name in sorted(known, key=lambda name: -means[name])
    )
    each = [
        all(a > b for a, b in itertools.pairwise(row))
        for row in zip(*(values[name] for name in known))
    ]
    holds = all(means[a] > means[b] for a, b in itertools.pairwise(known))
    return (
        f"{what}: the paper's order ({' > '.join(known)}) "
        f"{'holds' if holds else 'does **not** hold'} here: {told} (means; "
        f"it holds in {sum(each)} of {len(each)} seeds)."
    )


def _information(report, cells):
    victims = [
        victim
        for victim in cells.victims
        if any(cells.analyses(poison, victim) for poison in cells.order)
    ]
    if not victims:
        return None
    victim, estimators = victims[0], report["setting"]["analysis"]["estimators"]
    options = report["setting"]["analysis"]
    rows = []
    for poison in cells.order:
        found = cells.analyses(poison, victim)
        if found:
            each = [
                spread([row["mutual_information"][name]["value"] for row in found], 4)
                for name in estimators
            ]
            other = [
                _with_infinities([row["poisoned"][what] for row in found])
                for what in ("trace", "logdet", "effective_rank")
            ]
            rows.append([poison, *each, *other])
    told = (
        "Sliced I(g(X); g(X')) in nats between features of the clean and of the poisoned training "
        f"images, g the {victim} trained on that row's images, {options['slices']} slices with "
        f"one direction for both, {options['points']:,} images at most. In the clean row X' = X: "
        "its mutual information is infinite, and the number only says how fine the estimator "
        "looks. Covariance within a class, of the poisoned images' features: trace, "
        "log-determinant after Ledoit-Wolf shrinkage, effective rank, means over the classes."
    )
    blocks = [
        (TEXT, told),
        (TABLE, ["trained on", *estimators, "trace", "log-determinant", "effective rank"], rows),
    ]
    for estimator in estimators:
        values = {
            p: [row["mutual_information"][estimator]["value"] for row in cells.analyses(p, victim)]
            for p in cells.order
        }
        ceiling = (
            f", clean (the estimator's ceiling) {statistics.fmean(values['clean']):.4g}"
            if values.get("clean")
            else ""
        )
        blocks.append((TEXT, ordering(values, f"Mutual information ({estimator}{ceiling})")))
        blocks += [
            (TEXT, text)
            for text in [
                _correlation(cells, victim, cells.analysed(victim, estimator), estimator, report)
            ]
            if text
        ]
    for what, name in (("trace", "Covariance (trace"), ("logdet", "Covariance (log-determinant")):
        values = {
            p: [_number(row["poisoned"][what]) for row in cells.analyses(p, victim)]
            for p in cells.order
        }
        clean = f", clean {statistics.fmean(values['clean']):.4g}" if values.get("clean") else ""
        blocks.append((TEXT, ordering(values, f"{name}{clean})")))
    if report["paper"]:
        told = ", ".join(
            f"{name} {value}"
            for name, value in PAPER[report["paper"]]["mutual_information"].items()
        )
        blocks.append((TEXT, f"Paper (histogram estimator): {told}."))
    return "Mutual information and covariance", [*blocks, (FIGURE, "gap"), (FIGURE, "scatter")]


def _number(logdet):
    """JSON has no -inf: a class without variance is stored as None."""
    return -math.inf if logdet is None else logdet


def _with_infinities(values):
    known = [value for value in values if value is not None]
    lost = len(values) - len(known)
    return (
        f"{spread(known, 3)}{'; ' if known and lost else ''}"
        f"{f'-inf in {lost} of {len(values)} seeds' if lost else ''}"
    )


def _correlation(cells, victim, values, estimator, report):
    pairs = gaps(cells, victim, values)
    if (
        len(pairs) < 3
        or len({m for m, _ in pairs.values()}) < 2
        or len({a for _, a in pairs.values()}) < 2
    ):
        return None
    several = len(cells.variants & pairs.keys())
    variants = f", {several} of them by MI-UE and so not independent" if several > 1 else ""
    found = spearman([m for m, _ in pairs.values()], [a for _, a in pairs.values()])
    text = (
        f"MI gap ({estimator}) against accuracy gap over {len(pairs)} poisons{variants}: "
        f"Spearman's rho {found.rho:.2f}, permutation p {found.p:.2g}"
    )
    return text + (
        f" (paper: {PAPER[report['paper']]['spearman']} over its poisons)."
        if report["paper"]
        else "."
    )


def _depth(cells):
    victims = [
        victim
        for victim in cells.victims
        if len(cells.analyses("clean", victim))
        and any(cells.analyses(p, victim) for p in cells.order[1:])
    ]
    if len(victims) < 2:
        return None
    estimator = next(iter(cells.analyses("clean", victims[0])[0]["mutual_information"]))
    pairs = {victim: gaps(cells, victim, cells.analysed(victim, estimator)) for victim in victims}
    poisons = [p for p in cells.order[1:] if any(p in pairs[victim] for victim in victims)]
    rows = [
        [
            victim,
            *(
                f"{pairs[victim][p][0]:.3f} / {pairs[victim][p][1]:.1f}"
                if p in pairs[victim]
                else ""
                for p in poisons
            ),
        ]
        for victim in victims
    ]
    return "Depth", [
        (
            TEXT,
            (
                f"MI gap ({estimator}, nats) / accuracy gap (points) to the clean row, "
                "by kind of network:"
            ),
        ),
        (TABLE, ["victim", *poisons], rows),
    ]


def _layers(cells):
    """The table of the layers of the first victim whose layers were analysed, first seed."""
    for victim in cells.victims:
        chosen = {
            p: next(
                (
                    c["analysis"]["layers"]
                    for c in cells.found.get((p, victim, STANDARD), [])
                    if "analysis" in c
                ),
                [],
            )
            for p in cells.order
        }
        if any(len(rows) > 1 for rows in chosen.values()):
            break
    else:
        return None
    layers = list(dict.fromkeys(row["layer"] for rows in chosen.values() for row in rows))
    shown = [p for p in cells.order if chosen[p]]
    estimator = next(iter(chosen[shown[0]][0]["mutual_information"]))
    lookup = {(p, row["layer"]): row for p in shown for row in chosen[p]}
    rows = [
        [
            layer,
            *(
                (
                    f"{lookup[p, layer]['mutual_information'][estimator]['value']:.3f} / "
                    f"{lookup[p, layer]['poisoned']['trace']:.3g}"
                )
                if (p, layer) in lookup
                else ""
                for p in shown
            ),
        ]
        for layer in layers
    ]
    return "Layers", [
        (
            TEXT,
            (
                f"{victim}, first seed: sliced MI ({estimator}, nats) "
                "/ trace of the class covariance, layer by layer."
            ),
        ),
        (TABLE, ["layer", *shown], rows),
    ]


def _noise(report):
    rows = []
    for entry in report["poisons"]:
        noise, found = entry["noise"], entry["noise"]["separability"]
        rows.append(
            [
                entry["name"],
                f"{noise['linf']}/255",
                f"{noise['l2']:.3f}",
                f"{100 * found['train']:.1f}",
                f"{100 * found['test']:.1f}",
                f"{100 * found['chance']:.1f}",
            ]
        )
    text = (
        "Linear separability: a linear classifier fitted to the perturbations alone, 70 % of each "
        "class; accuracy in percent on both parts. L2: mean norm per image on the [0, 1] scale."
    )
    return "The noise itself", [
        (TEXT, text),
        (TABLE, ["poison", "L-inf", "L2", "train", "held out", "chance"], rows),
    ]


def _pictures():
    return "Pictures", [(FIGURE, "noise"), (FIGURE, "images")]


def _cost(report, cells):
    rows = []
    for entry in report["poisons"]:
        cost = entry["cost"]
        rows.append(
            [
                entry["name"],
                *(
                    [
                        f"{cost['seconds']:.0f}",
                        f"{cost['image_steps_per_s']:,.0f}",
                        f"{cost['peak_memory'] / 2**20:,.0f}",
                    ]
                    if cost
                    else [""] * 3
                ),
            ]
        )
    undefended = [c for c in report["cells"] if c["defence"] == STANDARD]
    trained = [
        [name, f"{statistics.median(c['seconds'] for c in undefended if c['victim'] == name):.0f}"]
        for name in cells.victims
        if any(c["victim"] == name for c in undefended)
    ]
    total = sum(cell["all_seconds"] for cell in report["cells"]) + sum(
        (entry["cost"] or {"seconds": 0})["seconds"] for entry in report["poisons"]
    )
    head = [
        "poison",
        "seconds",
        "image-steps/s (median of the epochs)",
        "peak resident MB of its process (all it has done so far)",
    ]
    return "Cost", [
        (TABLE, head, rows),
        (TABLE, ["victim", "median seconds of standard training"], trained),
        (TEXT, f"All poisons and victims together: {total / 3600:.1f} hours, one after the other."),
    ]
