"""Runs what a report misses, keeps what is finished, and may be stopped at any moment."""

import json
import logging
import multiprocessing
import signal
from pathlib import Path

import torch
from tqdm import tqdm

from .. import data
from . import tasks
from .config import CLEAN, Config

log = logging.getLogger("miue_fast")
_sources = None  # of a worker process


def run(config, folder, *, jobs=1, progress=True):
    """Makes every poison and cell of `config` that `folder` does not have yet; (the report as one dict, its Sources) for `render`.

    The dict (see `collect`) is also written to folder/report.json.

    jobs: processes that work at once, with an equal share of the threads each. A finished cell is a file in folder/cells, named after
    what it depends on (images, options, recipe, defence, seed): a changed configuration makes only what changed. After Ctrl-C or a kill
    the same call goes on; a poison goes on from its checkpoint. Errors: ValueError, OSError, BackendError, KeyboardInterrupt.
    """
    if not isinstance(config, Config):
        raise ValueError(f"report: config: expected a Config (see report.read), got {type(config).__name__}")
    if not isinstance(jobs, int) or jobs < 1:
        raise ValueError(f"report: jobs: expected a whole number >= 1, got {jobs!r}")
    folder = data.check_writable(folder)
    sources = tasks.Sources(config, folder)
    _same_classes(sources)
    missing = [name for name in config.poisons if not sources.path(sources.poison_key(name)).exists()]
    parts = [name for name in missing if "of" in config.poisons[name]]
    starts = [name for name, options in config.victims.items() if "pretrain" in options and not sources.start_path(name).exists()]
    cells = [(tasks.make_cell, cell) for cell in config.cells() if not sources.path(sources.cell_key(*cell)).exists()]
    stages = {
        "poisons": [(tasks.make_poison, (name,)) for name in missing if name not in parts],
        "parts of poisons": [(tasks.make_poison, (name,)) for name in parts],
        "pretraining": [(tasks.make_start, (name,)) for name in starts],
        "cells": cells,
    }
    for what, work in stages.items():
        with tqdm(total=len(work), desc=what, unit="", disable=not progress, dynamic_ncols=True) as bar:
            for _ in _done(work, sources, jobs):
                bar.update()
    found = collect(sources)
    tasks.write(folder / "report.json", found)
    return found, sources


def _same_classes(sources):
    if sources.test.classes != sources.clean.classes:
        raise ValueError(f"report: test: expected the {len(sources.clean.classes)} classes of the data, got {len(sources.test.classes)}, "
                         f"{sources.test.classes[:3]}...")  # fmt: skip


def _done(work, sources, jobs):
    if jobs == 1 or len(work) < 2:
        for make, arguments in work:
            yield make(sources, *arguments)
        return
    threads = max(1, torch.get_num_threads() // jobs)
    pool = multiprocessing.get_context("spawn").Pool(jobs, _start, (sources.config, sources.folder, threads), maxtasksperchild=8)
    try:
        yield from pool.imap_unordered(_work, work)
    finally:
        pool.terminate()
        pool.join()


def _start(config, folder, threads):
    global _sources
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent process ends its workers
    torch.set_num_threads(threads)
    _sources = tasks.Sources(config, folder)


def _work(task):
    make, arguments = task
    make(_sources, *arguments)


def collect(sources):
    """The finished poisons and cells of a configuration as one dict, in its order: all that `render` needs beside the images.

    Keys: format, name, paper, setting, classes, poisons (clean first), cells. Paths of the configuration are left out.
    """
    config = sources.config
    poisons = [_read(sources.path(sources.poison_key(name))) for name in config.poisons]
    cells = [_read(sources.path(sources.cell_key(*cell))) for cell in config.cells()]
    for entry in (*poisons, *cells):
        entry.pop("key")
    for entry, name in zip(poisons, config.poisons):
        entry["options"] = _shown(config, config.poisons[name])
    setting = {"train_images": len(sources.clean.images), "test_images": len(sources.test.images), "victims": config.victims,
               "image": list(sources.clean.images.shape[1:]), "analysis": config.analysis}  # fmt: skip
    return {"format": "miue_fast report 1", "name": config.name, "paper": config.paper, "setting": setting,
            "classes": len(sources.clean.classes), "poisons": poisons, "cells": cells, "order": [CLEAN, *config.poisons]}  # fmt: skip


def _shown(config, entry):
    """A poison's options for the page; a path is nobody else's business."""
    return entry if "of" in entry else {} if "path" in entry else {**config.generation, **entry}


def _read(path):
    try:
        return json.loads(Path(path).read_text())
    except ValueError:
        raise ValueError(f"report: {path}: expected a finished cell, got a damaged file; remove it and run again") from None
