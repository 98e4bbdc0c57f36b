"""Runs what a report misses, keeps what is finished, and may be stopped at any moment."""

import contextlib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from .. import data, models
from ..data.kept import pack, read_part
from ..evaluation import check_pair
from ..evaluation.defences import defence
from ..evaluation.victims import build
from ..frozen import find_layer
from ..generation import Interrupted
from ..support.draws import Draws
from ..support.messages import LONGEST, fail, printable
from ..support.output import progress_bar
from ..support.ranges import whole
from . import tasks
from .config import Config, split
from .figures import thumbnails
from .pages import NUMBERS, check_pages, replace
from .pool import Task, done
from .schema import CLEAN, FORMAT, check_part

MOST_JOBS = 1024


def run(
    config: Config, folder: str | Path, *, jobs: int = 1, progress: bool = True, make: bool = True
) -> tuple[dict[str, Any], tasks.Sources]:
    """Makes every poison and cell of `config` that `folder` does not have yet.

    Args:
        jobs: how many processes work at once, each with an equal share of the threads.
        make: False trains nothing and gives the report of what is there.

    A finished cell is a file in folder/cells, named after what it depends on (images, options,
    recipe, defence, seed), so a changed configuration makes only what changed. A cell that fails,
    because its loss is no number, is named in the report with the reason, and the others are made
    all the same. After Ctrl-C (Interrupted) or a kill the same call goes on; a poison goes on from
    its checkpoint. Everything that can be checked before the first training is checked then.

    Returns (the report as one dict, its Sources) for `render`; the dict (see `collect`) is also
    written to folder/report.json. Errors: ValueError, OSError, BackendError, Interrupted.
    """
    if not isinstance(config, Config):
        fail("report", "config", "a Config (see report.read)", type(config).__name__)
    check_jobs(jobs)
    folder = data.check_writable(Path(folder))
    check_pages("report", folder)
    sources = tasks.Sources(config, folder)
    _check(sources)
    failures = {}
    with data.only_writer(folder) if make else contextlib.nullcontext():
        if make:
            for part in (folder, data.check_writable(folder / "cells"), folder / "pretrained"):
                data.sweep(part)
        for what, work in _stages(sources).items() if make else ():
            with progress_bar(total=len(work), desc=what, unit="", disable=not progress) as bar:
                try:
                    for task, error in done(
                        [task for task in work if not _in_vain(sources, task, failures)],
                        sources,
                        jobs,
                    ):
                        failures |= {task: error} if error else {}
                        bar.update()
                except KeyboardInterrupt:
                    kept = len(list((sources.folder / "cells").glob("*.json")))
                    told = (
                        f"interrupted: {kept} finished parts are kept in {sources.folder}; "
                        "the same command goes on"
                    )
                    raise Interrupted(told) from None
    found = collect(sources, failures)
    replace(folder, {NUMBERS: pack(found)})
    return found, sources


def check_jobs(jobs: object) -> None:
    """Raises ValueError unless `jobs` is a number of processes."""
    whole("report", "jobs", jobs, 1, MOST_JOBS)


def _stages(sources):
    """{stage: [(name of a function of `tasks`, its arguments)]} of what is not there yet."""
    config = sources.config
    missing = [
        name
        for name in config.poisons
        if not (sources.path(sources.poison_key(name)).exists() and sources.has(name))
    ]
    starts = [
        name
        for name, options in config.victims.items()
        if "pretrain" in options and not sources.start_path(name).exists()
    ]
    return {
        "poisons": [
            ("make_poison", (name,)) for name in missing if "of" not in config.poisons[name]
        ],
        "parts of poisons": [
            ("make_poison", (name,)) for name in missing if "of" in config.poisons[name]
        ],
        "pretraining": [("make_start", (name,)) for name in starts],
        "cells": [
            ("make_cell", cell)
            for cell in config.cells()
            if not sources.path(sources.cell_key(*cell)).exists()
        ],
    }


def _in_vain(sources, task, failures):
    """Whether something that the task needs could not be made."""
    config, (name, arguments) = sources.config, task
    poison = config.poisons.get(arguments[0], {})
    needed = {("make_poison", (poison.get("of"),))}
    if name == "make_cell":
        needed |= {("make_poison", arguments[:1]), ("make_start", arguments[1:2])}
    return bool(needed & failures.keys())


def _check(sources):
    """Raises ValueError for what would stop a run after hours of work."""
    config, clean = sources.config, sources.clean
    classes, shape = len(clean.classes), tuple(clean.images.shape[1:])
    check_pair("report", clean, sources.test)
    if (least := int(clean.labels.bincount(minlength=classes).min())) < 2:
        fail("report", "data", "two images of every class", f"{least} of one")
    for text in {cell[2] for cell in config.cells()}:
        defence(text).check(shape, classes)
    draws = Draws("report", 0)
    for name, options in config.victims.items():
        build(options.get("model", name), classes, shape, draws, torch.device("cpu"))
    with draws:
        for name, entry in config.poisons.items():
            if "path" in entry or ("of" not in entry and sources.has(name)):
                sources.images(name)
            elif "of" not in entry:
                _check_source_model({**config.generation, **entry}, classes, shape)
    for name, options in config.victims.items():
        if "pretrain" in options and sources.start_path(name).exists():
            sources.start(name)
        elif "pretrain" in options:
            sources.other_images(name)


def _check_source_model(entry, classes, shape):
    arguments, options = split(entry)
    if options.chosen.outputs is None:
        return
    name = options.chosen.source("report", arguments.get("model"))
    model = models.build(name, classes, width=options.width, size=min(shape[1:]), channels=shape[0])
    if models.NETWORKS[name].square and shape[1] != shape[2]:
        fail(
            "report", "model", f"a network for images {list(shape)}", f"{name}, which takes squares"
        )
    find_layer("report", model, arguments.get("feature") or options.chosen.layer(name))
    options.chosen.check("report", options, classes)


def collect(sources: tasks.Sources, failures: Mapping[Task, str] | None = None) -> dict[str, Any]:
    """The finished poisons and cells of a configuration as one dict, in its order: everything that
    `render` needs beside the images.

    Its keys are format, name, paper, setting, classes, poisons, cells, order (clean first) and
    missing (what, and why). Paths are left out.
    """
    config, failures = sources.config, failures or {}
    poisons, cells, missing = [], [], []
    for name, entry in config.poisons.items():
        whole = (
            "of" not in entry or sources.path(sources.poison_key(entry["of"])).exists()
        )  # a part is nothing without its whole
        if (
            whole
            and sources.has(name)
            and (
                found := _read(
                    sources.path(sources.poison_key(name)), "poison", sources.poison_key(name)
                )
            )
        ):
            pictures = thumbnails(*sources.images(name))
            poisons.append(
                {**found, "name": name, "options": _shown(config, entry), "pictures": pictures}
            )
        else:
            missing.append([f"poison {name}", _why(failures, "make_poison", name)])
    for cell in config.cells():
        if found := _read(sources.path(sources.cell_key(*cell)), "cell", sources.cell_key(*cell)):
            cells.append({**found, **dict(zip(("poison", "victim", "defence", "seed"), cell))})
        else:
            missing.append([", ".join(map(str, cell)), _why(failures, "make_cell", *cell)])
    _thin(cells)
    names = sources.clean.names
    setting = {
        "train_images": len(names),
        "test_images": len(sources.test.images),
        "victims": config.victims,
        "recipes": {victim: sources.recipe(victim) for victim in config.victims},
        "image": list(sources.clean.images.shape[1:]),
        "jpeg": any(os.path.splitext(name)[1].lower() in (".jpg", ".jpeg") for name in names),
        "analysis": config.analysis,
    }
    return {
        "format": FORMAT,
        "name": config.name,
        "paper": config.paper,
        "setting": setting,
        "missing": missing,
        "classes": len(sources.clean.classes),
        "poisons": poisons,
        "cells": cells,
        "order": [CLEAN, *config.poisons],
    }


def _why(failures, name, *arguments):
    return printable(failures.get((name, arguments), "not made"), most=LONGEST)


def _thin(cells):
    """Only the first analysed cell of a poison keeps the points of its scatter."""
    seen = set()
    for cell in cells:
        if "analysis" in cell and cell["poison"] in seen:
            cell["analysis"] = {
                name: value
                for name, value in cell["analysis"].items()
                if not name.startswith("scatter")
            }
        elif "analysis" in cell:
            seen.add(cell["poison"])


def _shown(config, entry):
    """The options of a poison as the page shows them, without paths, which are nobody else's
    business.
    """
    return (
        entry
        if "of" in entry
        else {"made": "elsewhere"}
        if "path" in entry
        else {**config.generation, **entry}
    )


def _read(path, kind, key):
    """A finished part without its key and checksum, or None if there is none. ValueError: it is not
    what was written for this key.
    """
    if not path.exists():
        return None
    found = read_part(path, key)
    if found is None:
        fail("report", str(path), "a finished part", "a damaged file; remove it and run again")
    check_part(path, kind, found)
    return {name: value for name, value in found.items() if name not in ("key", "sha256")}
