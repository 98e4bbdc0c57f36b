from .intra_class_distance import formula as distance_formula
from .intra_class_distance import intra_class_distance
from .nt_xent import formula as nt_xent_formula
from .nt_xent import nt_xent


def formula(features, labels, temperature, zeta, denominator, normalize_dim):
    loss = nt_xent_formula(features, labels, temperature, denominator)
    return loss if zeta == 0 else loss + zeta * distance_formula(features, labels, normalize_dim)


def mi_ue_value_and_grad(features, labels, temperature, zeta, denominator, normalize_dim):
    """nt_xent + zeta * intra_class_distance, and its gradient."""
    loss, grad = nt_xent(features, labels, temperature, denominator, True)
    if zeta != 0:
        distance, distance_grad = intra_class_distance(features, labels, normalize_dim, True)
        loss, grad = loss + zeta * distance, grad + zeta * distance_grad
    return loss, grad
