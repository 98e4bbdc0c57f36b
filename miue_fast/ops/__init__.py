"""The public ops. Importing this package registers them all."""

from .intra_class_distance import intra_class_distance, l2sim
from .mi_ue_value_and_grad import mi_ue_value_and_grad
from .nt_xent import nt_xent
from .perturbed_input import perturbed_input
from .projected_step import projected_step, projected_step_

__all__ = ["intra_class_distance", "l2sim", "mi_ue_value_and_grad", "nt_xent", "perturbed_input", "projected_step", "projected_step_"]
