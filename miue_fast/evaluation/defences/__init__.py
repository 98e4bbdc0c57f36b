"""What a victim's owner may do against a poison, from a short text: `defence("jpeg:10")`,
`defence("adversarial:4:steps=3")`. Each defence is one class in one file of this folder; a file
that registers one is found by itself. `DEFENCES` has the class of each, by name.
"""

import importlib
import pkgutil

from .base import DEFENCES, Defence, Stage, defence, option, register

for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"miue_fast.evaluation.defences.{_module.name}")

__all__ = ["DEFENCES", "Defence", "Stage", "defence", "option", "register"]
