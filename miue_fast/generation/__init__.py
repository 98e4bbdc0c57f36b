"""Generation of MI-UE perturbations: `generate` for a data set, `perturb` for one batch of your own
loop.
"""

from .loop import Interrupted, Result, generate
from .options import PRESETS, Options
from .step import perturb

__all__ = ["PRESETS", "Interrupted", "Options", "Result", "generate", "perturb"]
