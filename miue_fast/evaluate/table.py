"""The result of `evaluate`: three rows of numbers, one per training set, as text and as JSON."""

import platform
import statistics
from dataclasses import dataclass

import torch

from .. import __version__
from .._environment import cpu_level
from .victims import Run

WIDTH = 31  # of "100.0 +- 10.0 (100.0 to 100.0)" and a space


def _summary(values):
    """Mean, sample standard deviation (0 for one seed), smallest and largest."""
    spread = statistics.stdev(values) if len(values) > 1 else 0.0
    return {"mean": statistics.fmean(values), "std": spread, "min": min(values), "max": max(values)}


@dataclass
class Table:
    """Accuracies (0 to 1) of the victims trained on clean, poisoned and random-noise images, one Run per seed."""

    rows: dict[str, list[Run]]  # "clean", "poisoned", "random noise"
    options: dict

    def test(self, row):
        """Mean clean-test accuracy of a row over the seeds."""
        return _summary([run.test for run in self.rows[row]])["mean"]

    def train(self, row):
        """Mean accuracy of a row on its own training images over the seeds."""
        return _summary([run.train for run in self.rows[row]])["mean"]

    def __str__(self):
        seeds, crop = len(self.options["seeds"]), self.options["crop"]
        lines = [
            f"victim {self.options['victim']}, {self.options['epochs']} epochs, {seeds} seed{'s' if seeds > 1 else ''}, "
            f"augmentation: {f'crop({crop}) and ' if crop else ''}flip",
            f"{self.options['train_images']} training and {self.options['test_images']} clean test images; "
            f"random noise: {self.options['noise']}, +-{self.options['eps'] * 255:.3g}/255",
            "",
            f"{'trained on':<14}{'train accuracy':>{WIDTH}}{'clean test accuracy':>{WIDTH}}",
        ]
        for name, runs in self.rows.items():
            lines.append(f"{name:<14}{_cell([run.train for run in runs]):>{WIDTH}}{_cell([run.test for run in runs]):>{WIDTH}}")
        if seeds > 1:
            lines += ["", "percent, mean +- standard deviation over the seeds (smallest to largest)"]
        return "\n".join(lines)

    def to_dict(self):
        """Plain numbers for JSON: options, environment, and per row the summaries, the single seeds and their curves."""
        return {
            "options": self.options,
            "environment": environment(),
            "rows": {
                name: {
                    "train": _summary([run.train for run in runs]),
                    "test": _summary([run.test for run in runs]),
                    "runs": [
                        {"seed": run.seed, "seconds": round(run.seconds, 2), "train_curve": run.train_curve, "test_curve": run.test_curve}
                        for run in runs
                    ],
                }
                for name, runs in self.rows.items()
            },
        }


def _cell(values):
    got = {name: 100 * value for name, value in _summary(values).items()}
    if len(values) == 1:
        return f"{got['mean']:.1f} %"
    return f"{got['mean']:.1f} +- {got['std']:.1f} ({got['min']:.1f} to {got['max']:.1f})"


def environment():
    """Versions and machine of a measurement, without paths or names of people and hosts."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"{platform.machine()} CPU ({cpu_level() or 'no _cpu module'})"
    return {
        "miue_fast": __version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "system": platform.system(),
        "device": device,
        "threads": torch.get_num_threads(),
    }
