"""What a poison does to features: sliced mutual information, class-conditional covariance, linear
separability; per layer and model.
"""

from .correlation import Spearman, spearman
from .covariance import ClassRow, CovarianceSummary, class_covariance_summary
from .layers import LayerRow, analyse_depth, analyse_layers, block_names, layer_features
from .mutual_information import (
    ESTIMATORS,
    MutualInformation,
    gaussian_sliced_mi,
    mutual_information,
)
from .separability import Separability, linear_separability
from .slices import slice_directions

__all__ = [
    "ESTIMATORS",
    "ClassRow",
    "CovarianceSummary",
    "LayerRow",
    "MutualInformation",
    "Separability",
    "Spearman",
    "analyse_depth",
    "analyse_layers",
    "block_names",
    "class_covariance_summary",
    "gaussian_sliced_mi",
    "layer_features",
    "linear_separability",
    "mutual_information",
    "slice_directions",
    "spearman",
]
