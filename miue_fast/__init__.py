"""MI-UE unlearnable examples, fast: fused ops in four backends and resumable generation. See README.md."""

from importlib.metadata import PackageNotFoundError, version

from . import _waiting  # noqa: F401  (before torch)

try:
    __version__ = version("miue_fast")
except PackageNotFoundError:
    raise ImportError("miue_fast is imported from a checkout that is not installed: run `pip install -e .` in it") from None

from . import analyse
from ._registry import BackendError
from .evaluate import evaluate
from .frozen import freeze
from .generate import generate, perturb
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
    "analyse",
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
