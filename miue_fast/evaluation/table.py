"""The result of `evaluate`: three rows of numbers, one per training set, as text and as JSON."""

import platform
import statistics
from dataclasses import dataclass
from typing import Any

import torch

from ..dispatch.environment import cpu_level
from ..support.messages import printable
from ..support.version import __version__
from .defences.none import NoDefence
from .victims import Run

COLUMNS = {
    "train": "train accuracy",
    "test": "clean test accuracy",
    "robust": "robust test accuracy",
    "test_poisoned": "test, poisoned classes",
    "test_unseen": "test, unseen classes",
}
WIDTH = 31  # of "100.0 +- 10.0 (100.0 to 100.0)" and a space


def _summary(values):
    """Mean, sample standard deviation (0 for one seed), smallest and largest."""
    spread = statistics.stdev(values) if len(values) > 1 else 0.0
    return {"mean": statistics.fmean(values), "std": spread, "min": min(values), "max": max(values)}


@dataclass
class Table:
    """Accuracies (0 to 1) of the victims trained on clean, poisoned and random-noise images, one
    Run per seed.
    """

    rows: dict[str, list[Run]]  # "clean", "poisoned", "random noise"
    options: dict[str, Any]

    def test(self, row: str) -> float:
        """Mean clean-test accuracy of a row over the seeds."""
        return _summary([run.test for run in self.rows[row]])["mean"]

    def train(self, row: str) -> float:
        """Mean accuracy of a row on its own training images over the seeds."""
        return _summary([run.train for run in self.rows[row]])["mean"]

    def __str__(self) -> str:
        seeds, crop = len(self.options["seeds"]), self.options["crop"]
        shown = self._measured()
        lines = [
            (
                f"victim {self.options['victim']}, {self.options['epochs']} epochs, "
                f"{seeds} seed{'s' if seeds > 1 else ''}, augmentation: "
                f"{f'crop({crop}) and ' if crop else ''}flip"
            ),
            (
                f"{self.options['train_images']} training and {self.options['test_images']} "
                f"clean test images; random noise: {self.options['noise']}, "
                f"+-{self.options['eps'] * 255:.3g}/255"
            ),
            *self._setting(),
            "",
            f"{'trained on':<14}" + "".join(f"{COLUMNS[key]:>{WIDTH}}" for key in shown),
        ]
        for name, runs in self.rows.items():
            cells = [_cell([getattr(run, key) for run in runs]) for key in shown]
            lines.append(f"{name:<14}" + "".join(f"{cell:>{WIDTH}}" for cell in cells))
        if seeds > 1:
            lines += [
                "",
                "percent, mean +- standard deviation over the seeds (smallest to largest)",
            ]
        return "\n".join(lines)

    def _measured(self):
        """The columns that every run has."""
        return [
            key
            for key in COLUMNS
            if all(getattr(run, key) is not None for runs in self.rows.values() for run in runs)
        ]

    def _setting(self):
        """One line about what is not the standard setting, or none."""
        given = self.options
        parts = []
        if given.get("defence", NoDefence.name) != NoDefence.name:
            parts.append(
                "defence: "
                f"{given['defence']}{' (test images too)' if given['defended_test'] else ''}"
            )
        if given.get("poison_ratio", 1) != 1:
            parts.append(f"poisoned share: {100 * given['poison_ratio']:g} %")
        if given.get("unseen"):
            parts.append(f"classes without poison: {', '.join(map(printable, given['unseen']))}")
        if given.get("pretrained"):
            parts.append("fine-tuned from given weights")
        if given.get("dtype", "float32") != "float32":
            parts.append(f"victims computed in {given['dtype']}")
        return ["; ".join(parts)] if parts else []

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers for JSON: options, environment, and per row the summaries, the single seeds
        and their curves.
        """
        return {
            "options": self.options,
            "environment": environment(),
            "rows": {
                name: {
                    **{
                        key: _summary([getattr(run, key) for run in runs])
                        for key in self._measured()
                    },
                    "runs": [_plain(run) for run in runs],
                }
                for name, runs in self.rows.items()
            },
        }


def _plain(run):
    """A Run for JSON, without its network and what was not measured."""
    optional = {
        key: getattr(run, key)
        for key in ("robust", "test_poisoned", "test_unseen")
        if getattr(run, key) is not None
    }
    curves = {name: getattr(run, name) for name in ("train_curve", "test_curve", "test_classes")}
    return {"seed": run.seed, "seconds": round(run.seconds, 2), **curves, **optional}


def _cell(values):
    got = {name: 100 * value for name, value in _summary(values).items()}
    if len(values) == 1:
        return f"{got['mean']:.1f} %"
    return f"{got['mean']:.1f} +- {got['std']:.1f} ({got['min']:.1f} to {got['max']:.1f})"


def environment() -> dict[str, Any]:
    """Versions and machine of a measurement, without paths or names of people and hosts."""
    device = (
        torch.cuda.get_device_name()
        if torch.cuda.is_available()
        else f"{platform.machine()} CPU ({cpu_level() or 'no _cpu module'})"
    )
    return {
        "miue_fast": __version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "system": platform.system(),
        "device": device,
        "threads": torch.get_num_threads(),
    }
