"""Generation of MI-UE perturbations: `generate` for a data set, `perturb` for one batch of your own
loop.
"""

from .api import Result, generate, perturb
from .objectives import OBJECTIVES, Objective, register
from .options import Options
from .presets import PRESETS, Preset
from .robust import TRANSFORMS
from .run import Interrupted

__all__ = [
    "OBJECTIVES",
    "PRESETS",
    "TRANSFORMS",
    "Interrupted",
    "Objective",
    "Options",
    "Preset",
    "Result",
    "generate",
    "perturb",
    "register",
]
