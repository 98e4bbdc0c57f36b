"""MI-UE unlearnable examples: fused ops in four backends, and generation that can be resumed.

`generate` poisons a data set, `perturb` one batch in a loop of your own, `evaluate` trains victims;
docs/usage.md has the rest.
"""

from . import _waiting  # noqa: F401, I001  (before torch)
from .support.version import __version__  # isort: skip  (says what is not installed)
from . import analysis, data, evaluation, generation, models
from .dispatch.registry import BackendError
from .evaluation import evaluate
from .frozen import freeze
from .generation import Options, generate, perturb
from .ops import (
    class_covariance,
    intra_class_distance,
    jpeg_round_trip,
    l2sim,
    mi_ue_value_and_grad,
    nt_xent,
    perturbed_input,
    projected_step,
    projected_step_,
)

__all__ = [
    "BackendError",
    "Options",
    "__version__",
    "analysis",
    "class_covariance",
    "data",
    "evaluate",
    "evaluation",
    "freeze",
    "generate",
    "generation",
    "intra_class_distance",
    "jpeg_round_trip",
    "l2sim",
    "mi_ue_value_and_grad",
    "models",
    "nt_xent",
    "perturb",
    "perturbed_input",
    "projected_step",
    "projected_step_",
]
