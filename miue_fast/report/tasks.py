"""What a report is made of: poisons, cells (one victim on one training set) and noise measurements.
Each leaves one JSON file.
"""

import hashlib
import sys
import time
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import safetensors.torch
import torch

from .. import data, models
from ..analysis import analyse_layers, layer_features, linear_separability
from ..data import Dataset
from ..data.files import read_bytes
from ..data.kept import digest, pack
from ..dispatch.environment import cpu_level
from ..evaluation import poisoned_images, pretrain, run_cell
from ..evaluation.defences import defence
from ..evaluation.defences.none import NoDefence
from ..evaluation.start import MAX_STATE, poisoned_rows
from ..evaluation.victims import recipe
from ..generation import generate
from ..support.messages import fail
from ..support.version import __version__
from .config import RECIPE, Config, split
from .schema import CLEAN, POINTS, check_part

LEVEL = 255
FORMAT = 1  # of cells and of what they mean: another number, and everything is made anew


class Sources:
    """The images of a configuration and where its files lie; every process that works has one."""

    def __init__(self, config: Config, folder: Path) -> None:
        self.config, self.folder = config, Path(folder)
        self.clean = data.load(config.data, size=config.size, per_class=config.per_class)
        self.test = data.load_test(config.test, size=config.size, per_class=config.test_per_class)
        self.identity = {"data": self.clean.fingerprint, "test": self.test.fingerprint}
        self._images, self._content = {}, {}

    def poison_key(self, name: str) -> dict[str, Any]:
        """Everything that a poison depends on; for a folder or file that was made elsewhere, the
        poisoned images.
        """
        entry = self.config.poisons[name]
        if "path" in entry:
            return {"data": self.identity["data"], "images": self.content(name)}
        if "of" in entry:
            return {"part": self.poison_key(entry["of"]), "ratio": entry["ratio"]}
        arguments, options = split({**self.config.generation, **entry})
        return {"format": FORMAT, "data": self.identity["data"], **arguments, **options.as_dict()}

    def content(self, name: str) -> str:
        """The sha256 (hex) of the images of a poison."""
        if name not in self._content:
            self._content[name] = hashlib.sha256(
                self.images(name)[1].contiguous().numpy()
            ).hexdigest()
        return self._content[name]

    def poison_folder(self, name: str) -> Path:
        """The folder of a generated poison."""
        return self.folder / "poisons" / digest(self.poison_key(name))

    def has(self, name: str) -> bool:
        """Whether the perturbations of a poison exist: they were made elsewhere, or generated and
        not removed since.
        """
        entry = self.config.poisons[name]
        return "path" in entry or (
            self.has(entry["of"])
            if "of" in entry
            else (self.poison_folder(name) / data.POISON_FILES[0]).exists()
        )

    def cell_key(self, poison: str, victim: str, defence: str, seed: int) -> dict[str, Any]:
        """Everything that a cell depends on."""
        key = {
            "format": FORMAT,
            **self.identity,
            "poison": None if poison == CLEAN else self.poison_key(poison),
            "recipe": self.recipe(victim, defence),
            "defence": defence,
            "seed": seed,
        }
        if self.config.analysed(victim, defence, seed):
            key["analysis"] = {
                name: self.config.analysis[name] for name in ("estimators", "slices", "points")
            }
            key["analysis"]["layers"] = victim == self.config.analysis["layers"]
        return key

    def recipe(self, victim: str, defended: str = NoDefence.name) -> dict[str, Any]:
        """How a victim is trained, with every default filled in."""
        options = self.config.victims[victim]
        model = options.get("model", victim)
        given = [options.get(name) for name in RECIPE]
        plan = recipe(model, *given, defence(defended))
        return {"victim": model, **asdict(plan), "pretrain": options.get("pretrain")}

    def start_path(self, victim: str) -> Path:
        """The file of a victim's pretrained weights."""
        name = digest({"format": FORMAT, **self.identity, "recipe": self.recipe(victim)})
        return self.folder / "pretrained" / f"{name}.safetensors"

    def start(self, victim: str) -> dict[str, torch.Tensor]:
        """The pretrained weights of a victim, as they were written. Errors: ValueError."""
        path = self.start_path(victim)
        try:
            content = read_bytes(path, MAX_STATE)
        except OSError as error:
            fail(
                "report",
                str(path),
                "pretrained weights",
                f"{error.strerror}; remove it and run again",
            )
        name = path.relative_to(self.folder).as_posix()
        if hashlib.sha256(content).hexdigest() not in data.Owned(self.folder).checksums(name):
            fail(
                "report",
                str(path),
                f"the weights whose sha256 is in {data.LIST}",
                "a damaged file; remove it and run again",
            )
        return safetensors.torch.load(content)

    def other_images(self, victim: str) -> Dataset:
        """The images of each class that follow the first `per_class` ones, as many as the victim is
        pretrained on.
        """
        config, wanted = self.config, self.config.victims[victim]["pretrain"]["per_class"]
        more = data.load(config.data, size=config.size, per_class=config.per_class + wanted)
        own = set(self.clean.names)
        other = more.select([row for row, name in enumerate(more.names) if name not in own])
        least = int(other.labels.bincount(minlength=len(other.classes)).min())
        if least < 2:
            fail(
                "report",
                f"victims.{victim}.pretrain",
                f"images after the first {config.per_class} of each class",
                f"{least} of one class",
            )
        return other

    def path(self, key: Mapping[str, Any]) -> Path:
        """The file of the cell or poison with this key."""
        return self.folder / "cells" / f"{digest(key)}.json"

    def images(self, name: str) -> tuple[Dataset, torch.Tensor]:
        """The clean images that a poison has, and their poisoned forms: (Dataset, uint8 [N, C, H,
        W]).
        """
        if name not in self._images:
            entry = self.config.poisons.get(name, {})
            if name == CLEAN:
                self._images[name] = self.clean, self.clean.images
            elif "path" in entry:
                rows, images = poisoned_images(self.clean, entry["path"], size=self.config.size)
                if len(rows) != len(self.clean):
                    fail(
                        "report",
                        f"poisons.{name}.path",
                        f"a poisoned copy of all {len(self.clean)} images",
                        f"of {len(rows)}",
                    )
                self._images[name] = rows, images
            elif "of" in entry:
                clean, images = self.images(entry["of"])
                kept = poisoned_rows(clean.labels, entry["ratio"], (), seed=0)[:, None, None, None]
                self._images[name] = clean, torch.where(kept, images, clean.images)
            else:
                try:
                    self._images[name] = poisoned_images(self.clean, self.poison_folder(name))
                except ValueError as error:
                    raise ValueError(
                        f"{error}; remove {self.poison_folder(name)} and run again"
                    ) from None
        return self._images[name]


def _finish(sources, key, part):
    """Keeps a finished part. A part that a report could not take fails now, not when the pages are
    made.
    """
    path = sources.path(key)
    check_part(path.name, part["kind"], part)
    _keep(sources, path, pack(part))


def _keep(sources, path, content):
    """Writes a new file into the report's folder and puts its checksum on the list there, which
    several processes do at the same time.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    name = path.relative_to(sources.folder).as_posix()
    data.Owned(sources.folder).write({name: lambda file: file.write(content)}, tidy=False)


def peak_memory() -> int:
    """Largest resident memory of this process so far, in bytes."""
    import resource  # POSIX, as all that is written

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (
        1 if sys.platform == "darwin" else 1024
    )


def circumstances() -> dict[str, Any]:
    """What a measurement depends on besides its options: threads, versions, device."""
    return {
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "miue_fast": __version__,
        "cpu_level": cpu_level(),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
    }


def make_poison(sources: Sources, name: str) -> None:
    """Generates one poison (or goes on where an interrupted run stopped) and measures its noise:
    budget, size, separability.
    """
    key, entry = sources.poison_key(name), sources.config.poisons[name]
    cost = None
    if not entry.keys() & {"path", "of"}:
        folder = sources.poison_folder(name)
        arguments, options = split({**sources.config.generation, **entry})
        # Without a network there is no checkpoint to go on from, and none is needed.
        again = options.chosen.outputs is None
        history = generate(
            sources.clean, folder, progress=False, overwrite=again, **arguments, **options.as_dict()
        ).history
        if history:
            # An epoch without a poison step has no rate.
            rates = sorted(filter(None, (row["image_steps_per_s"] for row in history)))
            cost = {
                "seconds": sum(row["seconds"] for row in history),
                "image_steps_per_s": rates[len(rates) // 2],
                "peak_memory": peak_memory(),
            }
    clean, images = sources.images(name)
    levels = images.to(torch.int16) - clean.images
    noise = {
        "linf": int(levels.abs().amax()),
        "l2": float((levels.float() / LEVEL).flatten(1).norm(dim=1).mean()),
        "separability": linear_separability(levels.float(), clean.labels).to_dict(),
    }
    _finish(
        sources,
        key,
        {
            "kind": "poison",
            "name": name,
            "key": key,
            "cost": cost,
            "noise": noise,
            **circumstances(),
        },
    )


def make_start(sources: Sources, victim: str) -> None:
    """Trains a victim on clean images of the same classes that no poison holds: those after the
    first `per_class` ones, by name.
    """
    config, other = sources.config, sources.other_images(victim)
    options = _recipe(config, victim) | {"epochs": config.victims[victim]["pretrain"]["epochs"]}
    state = pretrain(
        other.images,
        other.labels,
        sources.test.images,
        sources.test.labels,
        len(other.classes),
        seed=1000,
        victim=_model(config, victim),
        **options,
    )
    _keep(sources, sources.start_path(victim), safetensors.torch.save(state))


def _model(config, victim):
    return config.victims[victim].get("model", victim)


def _recipe(config, victim):
    return {name: value for name, value in config.victims[victim].items() if name in RECIPE}


def make_cell(sources: Sources, poison: str, victim: str, defence: str, seed: int) -> None:
    """Trains one victim and, where the configuration asks for it, analyses the features it has
    learnt.
    """
    started = time.perf_counter()
    key, config = sources.cell_key(poison, victim, defence, seed), sources.config
    clean, images = sources.images(poison)
    analysed = "analysis" in key
    init = sources.start(victim) if "pretrain" in config.victims[victim] else None
    run = run_cell(
        images,
        clean.labels,
        sources.test.images,
        sources.test.labels,
        len(clean.classes),
        victim=_model(config, victim),
        defence=defence,
        seed=seed,
        keep_network=analysed,
        init=init,
        **_recipe(config, victim),
    )
    cell = {
        "kind": "cell",
        "poison": poison,
        "victim": victim,
        "defence": defence,
        "seed": seed,
        "key": key,
        "train": run.train,
        "test": run.test,
        "robust": run.robust,
        "seconds": run.seconds,
    }
    if analysed:
        cell["analysis"] = _analysis(run.network, victim, clean, images, config)
    cell["all_seconds"] = time.perf_counter() - started
    _finish(sources, key, {**cell, **circumstances()})


def _analysis(model, victim, clean, images, config):
    """The layers in order, then the feature layer; and two principal components of its features on
    the poisoned images.
    """
    chosen = (
        torch.linspace(0, len(images) - 1, min(config.analysis["points"], len(images)))
        .round()
        .long()
    )
    before, after, labels = clean.images[chosen], images[chosen], clean.labels[chosen]
    feature, estimators, slices = (
        models.NETWORKS[_model(config, victim)].feature,
        config.analysis["estimators"],
        config.analysis["slices"],
    )
    rows = []
    if victim == config.analysis["layers"]:  # the other layers with the first estimator alone
        rows = analyse_layers(
            model, before, after, labels, estimators=estimators[:1], slices=slices
        )
    rows = [row for row in rows if row.layer != feature]
    rows += analyse_layers(
        model, before, after, labels, [feature], estimators=estimators, slices=slices
    )
    few = torch.linspace(0, len(after) - 1, min(POINTS, len(after))).round().long()
    features = layer_features(model, after[few].contiguous(), [feature])[feature].double().cpu()
    features = features - features.mean(0)
    axes = torch.linalg.svd(features, full_matrices=False)[2][:2]
    axes = (
        axes * axes.gather(1, axes.abs().argmax(1, keepdim=True)).sign()
    )  # a component has no sign of its own
    scatter = [[round(value, 4) for value in point] for point in (features @ axes.T).tolist()]
    return {
        "feature": feature,
        "layers": [_short(row.to_dict()) for row in rows],
        "scatter": scatter,
        "scatter_labels": labels[few].tolist(),
    }


def _short(row):
    """Without the rows of single classes."""
    return {
        **row,
        **{
            side: {name: value for name, value in row[side].items() if name != "classes"}
            for side in ("clean", "poisoned")
        },
    }
