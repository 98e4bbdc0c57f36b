"""Does a poison work? The standard victim, trained on clean, poisoned and random-noise images with
the same seeds.
"""

from .api import NOISES, check_options, check_pair, evaluate
from .cell import pretrain, run_cell
from .defences import DEFENCES, Defence, Stage, defence, option, register
from .poisoned import poisoned_images
from .table import Table
from .victims import Run

__all__ = [
    "DEFENCES",
    "NOISES",
    "Defence",
    "Run",
    "Stage",
    "Table",
    "check_options",
    "check_pair",
    "defence",
    "evaluate",
    "option",
    "poisoned_images",
    "pretrain",
    "register",
    "run_cell",
]
