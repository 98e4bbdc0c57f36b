"""Images that a network gets wrong: projected gradient ascent in L-inf (Madry et al. 2018)."""

import torch
import torch.nn.functional as F
from torch import nn


def attacked(
    network: nn.Module,
    images: torch.Tensor,
    labels: torch.Tensor,
    noise: torch.Tensor,
    *,
    eps: float,
    step: float,
    steps: int,
    scale: float = 1.0,
) -> torch.Tensor:
    """Images within eps of `images` and within [0, 1], with a larger cross-entropy of `labels`.

    images: [B, C, H, W] float32. noise: like them, in [-1, 1]: where the attack starts, in parts of
    eps. steps: sign steps of size `step`; eps and step are on the [0, 1] scale. scale: a power of
    two that keeps gradients of a float16 network out of underflow.
    The network is in eval mode meanwhile (running statistics of batch norm, which the attack leaves
    as they are) and then in its former mode; gradients of its weights are left alone.
    """
    training = network.training
    network.eval()
    low, high = (images - eps).clamp_(0, 1), (images + eps).clamp_(0, 1)
    found = torch.minimum(torch.maximum(images + noise * eps, low), high)
    for _ in range(steps):
        with torch.enable_grad():
            found.requires_grad_()
            loss = scale * F.cross_entropy(network(found), labels, reduction="sum")
            (grad,) = torch.autograd.grad(loss, found)
        found = torch.minimum(torch.maximum(found.detach() + step * grad.sign(), low), high)
    network.train(training)
    return found
