"""What the poison step lowers. Each objective is one class in one file of this folder; a file that
registers one is found by itself. `OBJECTIVES` has an instance of each, by name.

The bi-level loop, the step size, the budget and the kernels are the same for all of them, which is
not what the papers of em and tap ran: em trains until the training accuracy is 99 %, and tap takes
250 steps on one finished network.
"""

import importlib
import pkgutil

from .base import OBJECTIVES, Objective, register

for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"miue_fast.generation.objectives.{_module.name}")

__all__ = ["OBJECTIVES", "Objective", "register"]
