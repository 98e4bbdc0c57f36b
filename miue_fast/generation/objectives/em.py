"""Error-minimising noise: Huang et al., ICLR 2021."""

from typing import Any

import torch

from .base import Objective, register
from .cross_entropy import cross_entropy


@register
class Em(Objective):
    """Cross-entropy of the true label."""

    name = "em"
    about = "cross-entropy of the true label: error-minimising noise (Huang et al., 2021)"
    outputs = "logits"

    def value_and_grad(
        self, outputs: torch.Tensor, labels: torch.Tensor, num_classes: int, options: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return cross_entropy(outputs, labels)
