"""Source and victim networks, and the attack on them. `NETWORKS` has an entry for each name; a file
of this folder that adds one is found by itself.
"""

import importlib
import pkgutil

from .attack import attacked
from .base import NETWORKS, Architecture, Network, Recipe, in_format
from .build import build

for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"miue_fast.models.{_module.name}")

__all__ = ["NETWORKS", "Architecture", "Network", "Recipe", "attacked", "build", "in_format"]
