"""The whole published loop in eager PyTorch, as a user of published MI-UE code has it today: model
step, then poison step, in contiguous float32, one operator after the other.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn

from benchmarks.baselines import eager
from benchmarks.harness.pgd_step import features_of
from miue_fast.data import Dataset
from miue_fast.generation import Options, batches


class EagerLoop:
    """One source network (a ResNet of `models`, trained in place) and one perturbation, float32
    [N, C, H, W]. `epoch(1)`, `epoch(2)`, ... draw the batches and flips that `generate` draws.
    """

    def __init__(self, network: nn.Module, dataset: Dataset, options: Options) -> None:
        self.network, self.options = network, options
        self.images, self.labels = dataset.images, dataset.labels
        self.delta = torch.zeros(self.images.shape)
        self.optimizer = torch.optim.SGD(
            network.parameters(), options.lr, options.momentum, weight_decay=options.weight_decay
        )

    def epoch(self, number: int, tick: Callable[[int], object]) -> None:
        """One model step and one poison step. `tick` is not called."""
        self._train(number)
        self._poison(number)

    def _inputs(self, index, flip):
        return eager._gather(self.images, index, flip) + self.delta[index]

    def _train(self, number):
        o, count = self.options, len(self.images)
        order, flips = batches.order_and_flips(count, o.flip, o.seed, number, "model step")
        self.optimizer.param_groups[0]["lr"] = o.learning_rate(number)
        self.network.train()
        for part in batches.train_slices(count, o.train_batch):
            index = order[part]
            logits = self.network(self._inputs(index, flips[part]))
            self.optimizer.zero_grad()
            F.cross_entropy(logits, self.labels[index]).backward()
            self.optimizer.step()

    def _poison(self, number):
        o, count = self.options, len(self.images)
        order, flips = batches.order_and_flips(count, o.flip, o.seed, number, "poison step")
        self.network.eval()
        for part in batches.poison_slices(self.labels[order], o.batch):
            index, flip = order[part], flips[part]
            for _ in range(o.steps):
                x = self._inputs(index, flip).requires_grad_()
                features = features_of(self.network, x)
                loss = eager._mi_ue_loss(
                    features,
                    self.labels[index],
                    o.temperature,
                    o.zeta,
                    o.denominator,
                    o.normalize_dim,
                )
                (grad,) = torch.autograd.grad(loss, x)
                eager.projected_step_(
                    self.delta, index, grad, self.images, flip, o.alpha(number), o.eps, None
                )
