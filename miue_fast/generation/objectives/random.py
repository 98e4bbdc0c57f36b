"""Random noise of the whole budget, as a baseline."""

from typing import Any

import torch

from ...data import Dataset, random_noise
from .base import Objective, register


@register
class Random(Objective):
    """No loss: every value is -eps or +eps, by a generator of the seed, one set of signs per image
    or per class.
    """

    name = "random"
    about = "every value is -eps or +eps, without training"
    outputs = None

    def perturbation(self, dataset: Dataset, options: Any) -> torch.Tensor:
        if not options.classwise:
            return random_noise(dataset, options.eps, options.seed, kind="sign")
        present, row_of = dataset.labels.unique(return_inverse=True)
        first = [int((dataset.labels == label).nonzero()[0]) for label in present]
        rows = random_noise(dataset.select(first), options.eps, options.seed, kind="sign")
        return rows[row_of]
