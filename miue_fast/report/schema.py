"""What a report.json and a finished part have to look like, whoever wrote them. Both are checked
right after they are read, and before they are rendered.
"""

import base64
import binascii
import math
import zlib
from collections.abc import Mapping
from typing import Any

import torch

from ..analysis import ESTIMATORS
from ..evaluation.defences import defence
from ..support.messages import fail
from ..support.schema import array, boolean, number, one_of, optional, record, scalar, table, text
from .paper import PAPER

CLEAN = "clean"  # the row of the images as they are; always there
FORMAT = "miue_fast report 1"
PICTURES, SIDE = (
    8,
    64,
)  # perturbations that travel with a report: how many, and of how many pixels at most
POINTS = 500  # of a scatter
MOST_POISONS = 100  # each is a row of the grid of perturbations and a column of most tables
MOST_VICTIMS = 1000
MOST_LETTERS = 60  # of a name: it stands at an axis and above a column

SHARE = number(0, 1)
COUNT = number(0, 2**63, whole=True)
POSITIVE = number(1, 2**63, whole=True)
SECONDS = number(0, 1e12)


def name(where: str, value: object) -> None:
    """The rule for the name of a poison or victim: what a file, a table and a figure can take."""
    fits = isinstance(value, str) and 0 < len(value) <= MOST_LETTERS and value[0] != "."
    if not fits or not all(letter.isalnum() or letter in "-_." for letter in value):
        op, _, place = where.partition(": ")
        fail(op, place, f"names of letters, digits, - _ . ({MOST_LETTERS} at most)", repr(value))


def _defence(where, value):
    text()(where, value)
    if defence(value).spec != value:
        op, _, place = where.partition(": ")
        fail(
            op, place, f"a defence with its options written out, {defence(value).spec}", repr(value)
        )


CIRCUMSTANCES = {
    "threads": POSITIVE,
    "torch": text(100),
    "miue_fast": text(100),
    "cpu_level": optional(text(100)),
    "device": text(200),
}
COVARIANCE = record({"trace": number(0), "logdet": optional(number()), "effective_rank": number(0)})
LAYER = {
    "layer": text(200),
    "mutual_information": table(record({"value": number()}), one_of(ESTIMATORS)),
    "clean": COVARIANCE,
    "poisoned": COVARIANCE,
}
ANALYSED = {
    "feature": text(200),
    "layers": array(record(LAYER), 1, 10_000),
    "scatter": array(array(number(), 2, 2), 1, POINTS),
    "scatter_labels": array(COUNT, 1, POINTS),
}
CELL = {
    "poison": name,
    "victim": name,
    "defence": _defence,
    "seed": COUNT,
    "train": SHARE,
    "test": SHARE,
    "robust": optional(SHARE),
    "seconds": SECONDS,
    "all_seconds": SECONDS,
    "analysis": record(ANALYSED, ("scatter", "scatter_labels")),
    **CIRCUMSTANCES,
}
NOISE = {
    "linf": number(0, 255, whole=True),
    "l2": number(0),
    "separability": record({"train": SHARE, "test": SHARE, "chance": SHARE}),
}
POISON = {
    "name": name,
    "cost": optional(
        record({"seconds": SECONDS, "image_steps_per_s": number(0), "peak_memory": COUNT})
    ),
    "noise": record(NOISE),
    **CIRCUMSTANCES,
}
PICTURE = {
    "titles": array(text(), 1, PICTURES),
    "shape": array(number(1, SIDE, whole=True), 4, 4),
    "levels": text(4 * PICTURES * 3 * SIDE * SIDE),
}
RECIPE_RULE = record(
    {
        **{
            "victim": text(100),
            "epochs": POSITIVE,
            "lr": number(0),
            "batch": POSITIVE,
            "crop": optional(COUNT),
            "momentum": number(0),
        },
        **{"weight_decay": number(0), "optimizer": text(100), "schedule": text(100)},
        "pretrain": optional(record({"per_class": POSITIVE, "epochs": POSITIVE})),
    }
)
ANALYSIS = {
    "estimators": array(one_of(ESTIMATORS), 1, len(ESTIMATORS)),
    "slices": POSITIVE,
    "points": POSITIVE,
}
SETTING = {
    **{
        "train_images": POSITIVE,
        "test_images": POSITIVE,
        "jpeg": boolean,
        "image": array(POSITIVE, 3, 3),
    },
    "victims": table(table(lambda where, value: None), name, MOST_VICTIMS),
    "recipes": table(RECIPE_RULE, name, MOST_VICTIMS),
    "analysis": record(ANALYSIS),
}
REPORT = {
    "format": one_of([FORMAT]),
    "name": text(),
    "paper": optional(one_of(PAPER)),
    "setting": record(SETTING),
    "missing": array(array(text(), 2, 2)),
    "classes": POSITIVE,
    "poisons": array(
        record({**POISON, "options": table(scalar), "pictures": record(PICTURE)}), most=MOST_POISONS
    ),
    "cells": array(record(CELL, ("analysis",))),
    "order": array(name, 1, MOST_POISONS + 1),
}


def check_part(where: str, kind: str, found: Any) -> None:
    """Checks a finished part ("poison" or "cell") that was read from the file `where`. Errors:
    ValueError.
    """
    where = f"report: {where}"
    record({"kind": one_of([kind]), **(POISON if kind == "poison" else CELL)}, ("analysis",))(
        where, found
    )
    if "analysis" in found:
        _agree(f"{where}: analysis", found["analysis"], None)


def check_report(found: Any, where: str = "report.json") -> None:
    """Checks the content of a report.json, or what `collect` gives. ValueError: one line that names
    the first value that is wrong.
    """
    where = f"report: {where}"
    record(REPORT)(where, found)
    poisons = {entry["name"]: entry["options"] for entry in found["poisons"]}
    order, victims = found["order"], found["setting"]["victims"]
    estimators = found["setting"]["analysis"]["estimators"]
    op, _, file = where.partition(": ")
    if (
        order[0] != CLEAN
        or len({*order}) != len(order)
        or len(poisons) != len(found["poisons"])
        or not poisons.keys() <= {*order[1:]}
    ):
        fail(op, f"{file}.order", "clean and then every poison once", repr(order))
    if victims.keys() != found["setting"]["recipes"].keys():
        fail(
            op,
            f"{file}.setting.recipes",
            f"one of each of {', '.join(victims)}",
            ", ".join(found["setting"]["recipes"]) or "none",
        )
    for poison, options in poisons.items():
        if "of" in options and (options["of"] not in poisons or "of" in poisons[options["of"]]):
            fail(
                op,
                f"{file}.poisons.{poison}.options.of",
                "another whole poison of the report",
                repr(options["of"]),
            )
    seen = set()
    for row, cell in enumerate(found["cells"]):
        key = cell["poison"], cell["victim"], cell["defence"], cell["seed"]
        if key in seen or cell["poison"] not in order or cell["victim"] not in victims:
            fail(
                op,
                f"{file}.cells[{row}]",
                "a poison and a victim of the report, each pair once per defence and seed",
                repr(key),
            )
        seen.add(key)
        if "analysis" in cell:
            _agree(f"{where}.cells[{row}].analysis", cell["analysis"], estimators)
    for row, entry in enumerate(found["poisons"]):
        unpacked(entry["pictures"], f"{where}.poisons[{row}].pictures")


def _agree(where, found, estimators):
    """Checks that the last layer has every estimator of the report and the others have its first
    one, and that each point of the scatter has a label.
    """
    op, _, place = where.partition(": ")
    known = [list(row["mutual_information"]) for row in found["layers"]]
    estimators = known[-1] if estimators is None else estimators
    if (
        not estimators
        or {*known[-1]} != {*estimators}
        or not all(estimators[0] in names for names in known)
    ):
        fail(
            op,
            f"{place}.layers",
            f"mutual information by {', '.join(estimators) or 'an estimator'}",
            repr(known[-1]),
        )
    if len(found.get("scatter", ())) != len(found.get("scatter_labels", ())):
        fail(
            op,
            f"{place}.scatter_labels",
            f"{len(found.get('scatter', ()))} labels",
            len(found.get("scatter_labels", ())),
        )


def unpacked(picture: Mapping[str, Any], where: str = "report: pictures") -> torch.Tensor:
    """The perturbations in a part of a report that fits PICTURE: pixel levels of 1/255, int16 [N,
    C, H, W]. Errors: ValueError.

    Never more than the declared size is unpacked, and that is bounded.
    """
    op, _, place = where.partition(": ")
    shape, room = picture["shape"], 2 * math.prod(picture["shape"])
    if shape[0] != len(picture["titles"]) or shape[1] not in (1, 3):
        fail(op, f"{place}.shape", f"[{len(picture['titles'])}, 1 or 3, height, width]", shape)
    stream = zlib.decompressobj()
    try:
        content = stream.decompress(base64.b64decode(picture["levels"], validate=True), room + 1)
    except (binascii.Error, ValueError, zlib.error) as error:
        fail(op, f"{place}.levels", f"{room} packed bytes", f"others ({error})")
    if len(content) != room or not stream.eof or stream.unused_data:
        fail(op, f"{place}.levels", f"{room} packed bytes", "more, or fewer")
    levels = torch.frombuffer(bytearray(content), dtype=torch.int16).view(shape)
    if levels.abs().amax() > 255 or levels.amin() < -255:  # abs of -32,768 is itself
        fail(
            op, f"{place}.levels", "levels from -255 to 255", f"{levels.amin()} to {levels.amax()}"
        )
    return levels
