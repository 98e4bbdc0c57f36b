"""MI-UE unlearnable examples, fast: fused ops in four backends and resumable generation. See
README.md.
"""

from . import _waiting  # noqa: F401, I001  (before torch)
from . import analysis
from .dispatch.registry import BackendError
from .evaluation import evaluate
from .frozen import freeze
from .generation import generate, perturb
from .support.version import __version__
from .ops import (
    class_covariance,
    intra_class_distance,
    l2sim,
    mi_ue_value_and_grad,
    nt_xent,
    perturbed_input,
    projected_step,
    projected_step_,
)

__all__ = [
    "BackendError",
    "__version__",
    "analysis",
    "class_covariance",
    "evaluate",
    "freeze",
    "generate",
    "intra_class_distance",
    "l2sim",
    "mi_ue_value_and_grad",
    "nt_xent",
    "perturb",
    "perturbed_input",
    "projected_step",
    "projected_step_",
]
