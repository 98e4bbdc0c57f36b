"""The configuration of a report: a JSON file, checked as a whole before anything is trained."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from .. import models
from ..analysis import ESTIMATORS
from ..data.kept import is_whole, read_json
from ..dispatch import checks
from ..evaluation.defences import defence
from ..evaluation.defences.none import NoDefence
from ..evaluation.victims import recipe
from ..generation import PRESETS, Options
from ..generation.presets import DEFAULT, choose
from ..support import messages, ranges
from ..support.schema import scalar, table, text
from ..support.written import written_as
from .paper import PAPER
from .schema import CLEAN, MOST_POISONS, MOST_VICTIMS, RECIPE_RULE, check_report
from .schema import name as check_name

_GENERATE = ("preset", "model", "feature")  # what `generate` takes beside its options
RECIPE = ("epochs", "lr", "batch", "crop")
_VICTIM = (*RECIPE, "model", "pretrain")
_PRETRAIN = {"per_class": None, "epochs": None}
_RUN: dict[str, Any] = {
    "poisons": None,
    "victims": None,
    "defences": [NoDefence.name],
    "seeds": [0],
}
_ANALYSIS: dict[str, Any] = {
    "victims": [],
    "seeds": [0],
    "estimators": ["histogram"],
    "slices": 200,
    "points": 2000,
    "layers": None,
}


@dataclass(frozen=True)
class Config:
    """What is poisoned how, and who is trained on it. docs/report.md describes the file, and `read`
    makes an object from it.

    Attributes:
        data, test: what `data.load` takes.
        poisons: by name, options of `generate`, or {"path": a poison or poisoned folder}, or {"of":
            another poison, "ratio": the share of its images that keep it}.
        victims: recipes by name.
        runs: blocks of cells, each the product of its poisons, victims, defences and seeds.
        analysis: which victims' features are analysed, and how.
        paper: the table of `paper.py` whose numbers are printed beside ours, or None.
    """

    name: str
    data: str
    test: str
    poisons: dict
    runs: list
    victims: dict
    size: int | None = None
    per_class: int | None = None
    test_per_class: int | None = None
    generation: dict = field(default_factory=dict)
    analysis: dict = field(default_factory=dict)
    paper: str | None = None

    def cells(self) -> list[tuple[str, str, str, int]]:
        """(poison, victim, defence, seed), each once, in the order of the blocks."""
        found = {}
        for run in self.runs:
            for defended in run["defences"]:
                for poison in [CLEAN, *self.poisons] if run["poisons"] is None else run["poisons"]:
                    for victim in run["victims"] or self.victims:
                        found.update(
                            {
                                (poison, victim, defence(defended).spec, seed): None
                                for seed in run["seeds"]
                            }
                        )
        return list(found)

    def analysed(self, victim: str, defended: str, seed: int) -> bool:
        """Whether the features of this cell's victim are to be analysed."""
        return (
            defended == NoDefence.name
            and victim in self.analysis["victims"]
            and seed in self.analysis["seeds"]
        )


def load(path: str | Path) -> dict[str, Any] | None:
    """The content of a report.json, or None if the file is something else. ValueError: a report
    that is not as it was written.
    """
    content = read_json(path, "report")
    if not isinstance(content, dict) or not str(content.get("format", "")).startswith(
        "miue_fast report"
    ):
        return None
    if not is_whole(content):
        messages.fail(
            "report",
            str(path),
            "a report.json as it was written (sha256)",
            "a changed or damaged one",
        )
    check_report(content, str(path))
    return content


def read(path: str | Path, **changes: str | None) -> Config:
    """The Config in a JSON file; `changes` (data, test) replace its entries. ValueError: one line
    that says what is wrong.
    """
    content = read_json(path, "report")
    if isinstance(content, dict):
        content = {
            **content,
            **{name: str(value) for name, value in changes.items() if value is not None},
        }
    return check(content)


def check(content: Any) -> Config:
    """A Config from a dict, with the defaults filled in. Errors: ValueError."""
    names = {entry.name for entry in fields(Config)}
    _only("the file", content, names)
    missing = [
        name
        for name in ("name", "data", "test", "poisons", "runs", "victims")
        if name not in content
    ]
    if missing:
        messages.fail(
            "report",
            "configuration",
            "the keys name, data, test, poisons, runs and victims",
            f"none of {', '.join(missing)}",
        )
    checked: dict[str, Any] = {
        **content,
        "analysis": {**_ANALYSIS, **_only("analysis", content.get("analysis", {}), _ANALYSIS)},
    }
    for key, kind in {
        "name": str,
        "data": str,
        "test": str,
        "poisons": dict,
        "runs": list,
        "victims": dict,
        "generation": dict,
    }.items():
        if not isinstance(checked.get(key, kind()), kind):
            messages.fail("report", key, f"a {kind.__name__}", repr(checked[key]))
    text()("report: name", checked["name"])
    for key in ("data", "test"):
        _place(key, checked[key])
    for key in ("size", "per_class", "test_per_class"):
        if checked.get(key) is not None:
            ranges.whole("report", key, checked[key], 1, 4096 if key == "size" else ranges.MOST)
    for key, most in (("poisons", MOST_POISONS), ("victims", MOST_VICTIMS)):
        if len(checked[key]) > most:
            messages.fail("report", key, f"{most} at most", len(checked[key]))
    for name, options in checked["poisons"].items():
        _poison(name, options, checked)
    for name, options in checked["victims"].items():
        _victim(name, options, checked.get("per_class"))
    checked["runs"] = [_run(k, block, checked) for k, block in enumerate(checked["runs"])]
    _analysis(checked)
    if checked.get("paper") is not None and checked["paper"] not in list(PAPER):
        messages.fail(
            "report", "paper", f"null or one of {', '.join(PAPER)}", repr(checked["paper"])
        )
    config = Config(**checked)
    trained = {
        (poison, victim, seed)
        for poison, victim, defended, seed in config.cells()
        if defended == NoDefence.name
    }
    seeds = config.analysis["seeds"]
    for victim in config.analysis[
        "victims"
    ]:  # who is to be analysed is trained, and so is the clean row it is compared with
        if not any((CLEAN, victim, seed) in trained for seed in seeds):
            wanted = (
                f"a run of {CLEAN}, {victim}, without a defence, "
                f"of a seed among {', '.join(map(str, seeds))}"
            )
            messages.fail("report", "analysis", wanted, "no such cell")
    return config


def _texts(where, given, known=None):
    """A list of text, each one of `known`."""
    right = isinstance(given, list) and all(isinstance(item, str) for item in given)
    if not right or (known is not None and not set(given) <= set(known)):
        wanted = (
            "a list of text"
            if known is None
            else f"a list of {', '.join(known) or 'nothing (there are none)'}"
        )
        messages.fail("report", where, wanted, repr(given))


def _only(where, given, known):
    if not isinstance(given, dict):
        messages.fail("report", where, "an object", type(given).__name__)
    for name in given:
        if name not in known:
            messages.fail("report", where, f"the keys {', '.join(sorted(known))}", repr(name))
    return given


def _place(where, path):
    """Checks the entry that says where images or a poison lie."""
    if not isinstance(path, str) or not path.strip() or "\0" in path:
        messages.fail("report", where, "text that names a file or folder", repr(path))


def _poison(name, options, content):
    check_name("report: poisons", name)
    if name == CLEAN:
        messages.fail("report", "poisons", f"other names than {CLEAN!r}", repr(name))
    where, poisons = f"poisons.{name}", content["poisons"]
    if "path" in _only(where, options, options):
        _only(where, options, ("path",))
        _place(f"{where}.path", options["path"])
    elif "of" in options:
        _only(where, options, ("of", "ratio"))
        whole = [
            key for key, entry in poisons.items() if isinstance(entry, dict) and "of" not in entry
        ]
        if options["of"] not in whole:
            messages.fail(
                "report", f"{where}.of", f"one of {', '.join(whole)}", repr(options["of"])
            )
        if not isinstance(options.get("ratio"), int | float) or not 0 < options["ratio"] < 1:
            messages.fail(
                "report", f"{where}.ratio", "a number between 0 and 1", repr(options.get("ratio"))
            )
    else:
        given = {**content.get("generation", {}), **options}
        with written_as(
            {key: f"{where if key in options else 'generation'}.{key}" for key in given}
        ):
            split(given)
        table(scalar)(f"report: {where}", given)


def _victim(name, options, per_class):
    check_name("report: victims", name)
    _only(f"victims.{name}", options, _VICTIM)
    for key, kind, what in (("model", str, "text"), ("lr", int | float, "a number")):
        if key in options and not isinstance(options[key], kind):
            messages.fail("report", f"victims.{name}.{key}", what, repr(options[key]))
    where = f"victims.{name}.pretrain"
    with written_as({key: f"victims.{name}.{key}" for key in RECIPE}):
        model = options.get("model", name)
        plan = recipe(model, *(options.get(key) for key in RECIPE))
    filled = {"victim": model, **asdict(plan), "pretrain": None}
    RECIPE_RULE(f"report: victims.{name}", filled)
    if "pretrain" not in options:
        return
    for key, value in {**_PRETRAIN, **_only(where, options["pretrain"], _PRETRAIN)}.items():
        ranges.whole("report", f"{where}.{key}", value)
    if per_class is None:
        messages.fail(
            "report",
            where,
            "per_class: the images after the first ones of each class are disjoint from them",
            "no per_class",
        )


def split(options: Mapping[str, Any]) -> tuple[dict[str, Any], Options]:
    """(arguments of generate, Options) of one poison's entry. Errors: ValueError."""
    arguments = {name: options[name] for name in _GENERATE if name in options}
    rest = {name: value for name, value in options.items() if name not in _GENERATE}
    for name, known in (("model", models.NETWORKS), ("preset", PRESETS)):
        if name in arguments and (
            not isinstance(arguments[name], str) or arguments[name] not in known
        ):
            messages.fail("report", name, f"one of {', '.join(known)}", repr(arguments[name]))
    return arguments, choose(arguments.get("preset", DEFAULT.name), rest)


def _run(number, block, content):
    where = f"runs[{number}]"
    block = {**_RUN, **_only(where, block, _RUN)}
    for key, known in (("poisons", [CLEAN, *content["poisons"]]), ("victims", content["victims"])):
        if block[key] is not None:
            _texts(f"{where}.{key}", block[key], known)
    _seeds(f"{where}.seeds", block["seeds"])
    _texts(f"{where}.defences", block["defences"])
    if not block["defences"]:
        messages.fail("report", f"{where}.defences", "one at least", "none")
    for spec in block["defences"]:
        defence(spec)
    return block


def _seeds(where, seeds):
    if not isinstance(seeds, list) or not seeds:
        messages.fail("report", where, "a list of whole numbers", repr(seeds))
    for seed in seeds:
        checks.seed("report", seed, where)


def _analysis(content):
    analysis = content["analysis"]
    _texts("analysis.victims", analysis["victims"], content["victims"])
    _texts("analysis.estimators", analysis["estimators"], ESTIMATORS)
    if not analysis["estimators"]:
        messages.fail("report", "analysis.estimators", "one at least", "none")
    _seeds("analysis.seeds", analysis["seeds"])
    for key, least in (("slices", 2), ("points", 20)):
        ranges.whole("report", f"analysis.{key}", analysis[key], least)
    if analysis["layers"] is not None and analysis["layers"] not in analysis["victims"]:
        messages.fail(
            "report",
            "analysis.layers",
            f"null or one of analysis.victims ({', '.join(analysis['victims'])})",
            repr(analysis["layers"]),
        )
