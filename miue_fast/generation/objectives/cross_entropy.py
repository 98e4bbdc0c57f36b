"""What the objectives on logits share."""

import torch


def cross_entropy(logits: torch.Tensor, wanted: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(mean cross-entropy of the classes `wanted` [B], its gradient in the logits [B, K]), both
    float32.
    """
    logs = logits.float().log_softmax(1)
    hit = torch.arange(logits.shape[1], device=logits.device) == wanted[:, None]
    return -(logs * hit).sum(1).mean(), (logs.exp() - hit.float()) / len(logits)
