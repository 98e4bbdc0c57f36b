"""Targeted adversarial poisoning: Fowl et al., NeurIPS 2021."""

from collections.abc import Mapping
from typing import Any, ClassVar

import torch

from ...support import ranges
from ...support.messages import fail
from .base import Objective, register
from .cross_entropy import cross_entropy


@register
class Tap(Objective):
    """Cross-entropy of the class (y + target_shift) mod classes, of a network that is trained on
    clean images.
    """

    name = "tap"
    about = "cross-entropy of another class: targeted adversarial (Fowl et al., 2021)"
    outputs = "logits"
    trains_on_delta = False
    options: ClassVar[Mapping[str, str]] = {
        "target_shift": "images of class y are pushed towards class y + N"
    }

    def check_options(self, options: Any) -> None:
        ranges.whole("option", "target_shift", options.target_shift)

    def check(self, op: str, options: Any, num_classes: int) -> None:
        if options.target_shift % num_classes == 0:
            fail(
                op,
                "target_shift",
                f"no multiple of the {num_classes} classes",
                options.target_shift,
            )

    def value_and_grad(
        self, outputs: torch.Tensor, labels: torch.Tensor, num_classes: int, options: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return cross_entropy(outputs, (labels + options.target_shift) % num_classes)
