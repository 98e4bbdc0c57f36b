"""nt_xent + zeta * intra_class_distance: the distance is added to nt_xent's result in place."""

from .intra_class_distance import weighted
from .nt_xent import nt_xent


def mi_ue_value_and_grad(features, labels, temperature, zeta, denominator, normalize_dim):
    similarity = nt_xent(features, labels, temperature, denominator, True)
    return (
        similarity
        if zeta == 0
        else weighted(features, labels, normalize_dim, True, zeta, similarity)
    )
