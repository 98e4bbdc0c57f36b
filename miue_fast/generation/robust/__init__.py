"""What a perturbation is made to survive: random changes of image + delta in each poison step, from
a short text, as in `read("crop,grid:4,gray:0.4")`. Each transform is one class in one file of this
folder; a file that registers one is found by itself. `TRANSFORMS` has the class of each, by name.
"""

import importlib
import pkgutil

from .base import TRANSFORMS, Change, Drawn, Robust, Transform, option, read, register

for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"miue_fast.generation.robust.{_module.name}")

__all__ = ["TRANSFORMS", "Change", "Drawn", "Robust", "Transform", "option", "read", "register"]
