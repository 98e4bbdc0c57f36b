"""The public ops. Importing this package registers them all."""

from .class_covariance import class_covariance
from .conv_epilogue import conv_epilogue_, conv_grad_epilogue_
from .convolution import conv_forward, conv_input_grad, conv_input_grad_step_
from .intra_class_distance import intra_class_distance, l2sim
from .jpeg_round_trip import jpeg_round_trip, jpeg_round_trip_grad
from .mi_ue_value_and_grad import mi_ue_value_and_grad
from .nt_xent import nt_xent
from .perturbed_input import perturbed_input
from .projected_step import projected_step, projected_step_

__all__ = [
    "class_covariance",
    "conv_epilogue_",
    "conv_forward",
    "conv_grad_epilogue_",
    "conv_input_grad",
    "conv_input_grad_step_",
    "intra_class_distance",
    "jpeg_round_trip",
    "jpeg_round_trip_grad",
    "l2sim",
    "mi_ue_value_and_grad",
    "nt_xent",
    "perturbed_input",
    "projected_step",
    "projected_step_",
]
