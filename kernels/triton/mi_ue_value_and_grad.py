"""nt_xent + zeta * intra_class_distance: the distance is added to nt_xent's fp32 gradient, which is rounded once."""

import torch
from miue_fast.kernels.triton.intra_class_distance import weighted
from miue_fast.kernels.triton.nt_xent import nt_xent, value_and_grad


def mi_ue_value_and_grad(features, labels, temperature, zeta, denominator, normalize_dim):
    if zeta == 0:
        return nt_xent(features, labels, temperature, denominator, True)
    loss, grad = value_and_grad(features, labels, temperature, denominator, True, torch.float32)
    return weighted(features, labels, normalize_dim, True, zeta, loss, grad)
