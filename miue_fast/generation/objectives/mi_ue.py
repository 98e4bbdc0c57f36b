"""The objective of the paper: Zhu et al., ICLR 2026."""

from collections.abc import Mapping
from typing import Any, ClassVar

import torch

from ...dispatch import checks
from ...ops import mi_ue_value_and_grad
from ...support import ranges
from .base import Objective, register


@register
class MiUe(Objective):
    """nt_xent of the features of a batch + zeta * their distance within classes."""

    name = "mi-ue"
    about = "contrastive loss and within-class distance of the features (Zhu et al., 2026)"
    outputs = "features"
    ops = ("mi_ue_value_and_grad",)
    options: ClassVar[Mapping[str, str]] = {
        "zeta": "weight of the within-class distance term",
        "denominator": "pairs in the denominator of nt_xent: all, or negatives (other classes "
        "only)",
        "normalize_dim": "divide the distance term by the feature width",
        "temperature": "temperature of nt_xent",
    }

    def check_options(self, options: Any) -> None:
        ranges.number(
            "option",
            "zeta",
            options.zeta,
            lambda v: 0 <= v <= ranges.LARGEST,
            f"a number from 0 to {ranges.LARGEST:g}",
        )
        ranges.number(
            "option",
            "temperature",
            options.temperature,
            lambda v: 1e-3 <= v <= 10,
            "a number from 1e-3 to 10",
        )
        checks.denominator("option", options.denominator)
        ranges.switch("option", "normalize_dim", options.normalize_dim)

    def value_and_grad(
        self, outputs: torch.Tensor, labels: torch.Tensor, num_classes: int, options: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return mi_ue_value_and_grad(
            outputs,
            labels,
            options.temperature,
            options.zeta,
            denominator=options.denominator,
            normalize_dim=options.normalize_dim,
            backend=options.backend,
        )
