"""What all networks share: the table of their names, how victims are trained, the normalisation of
their input, and the initialisation of convolutions.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from ..support.named import Named

MEAN, STD = (
    (0.485, 0.456, 0.406),
    (0.229, 0.224, 0.225),
)  # ImageNet; one grey channel takes their means


@dataclass(frozen=True)
class Recipe:
    """How a victim is trained: epochs, step size, batch and optimiser.

    crop: pixels of zero padding on each side before the random crop; None: an eighth of the width,
        4 at 32. optimizer: "sgd" or "adamw". schedule: "cosine", "steps" or "one-cycle"; the last
        one, for few epochs, changes the rate at every step instead of every epoch.
    """

    epochs: int
    lr: float
    batch: int
    crop: int | None = None
    momentum: float = 0.9
    weight_decay: float = 1e-4
    optimizer: str = "sgd"
    schedule: str = "cosine"

    def learning_rate(self, epoch: float) -> float:
        """The rate of epoch 0, 1, ... (of "one-cycle" also of a part of an epoch): a cosine from
        `lr` to 1e-6; `lr`, divided by 10 after 40 % and again after 80 % of the epochs; or a line
        from lr / 10 to `lr` over the first quarter of the epochs and a cosine to 1e-6.
        """
        if self.schedule == "one-cycle":
            rise = self.epochs / 4
            if epoch < rise:
                return self.lr * (0.1 + 0.9 * epoch / rise)
            fallen = (epoch - rise) / (self.epochs - rise)
            return 1e-6 + (self.lr - 1e-6) * 0.5 * (1 + math.cos(math.pi * fallen))
        if self.schedule == "steps":
            return self.lr * 0.1 ** sum(5 * epoch >= share * self.epochs for share in (2, 4))
        return 1e-6 + (self.lr - 1e-6) * 0.5 * (1 + math.cos(math.pi * epoch / self.epochs))

    def new_optimizer(self, network: nn.Module) -> torch.optim.Optimizer:
        """The optimiser of a fresh network."""
        if self.optimizer == "adamw":
            return torch.optim.AdamW(network.parameters(), self.lr, weight_decay=self.weight_decay)
        return torch.optim.SGD(
            network.parameters(), self.lr, self.momentum, weight_decay=self.weight_decay
        )


@dataclass(frozen=True)
class Architecture:
    """A network that can be chosen by name, as source or as victim.

    name: what it is called. about: what it is, in a few words, for help texts. recipe: how a victim
        of it is trained unless something else is asked for.
    make: (width, num_classes, normalize, size, channels) -> `Network`.
    width: filters of the first stage, or what else sets its width; None: it has no width.
    feature: the layer whose flattened output is the features: what the classifier `fc` reads.
    square: whether it is built for images of exactly size x size; the others take any size.
    least: the smallest side of the images. width_unit and size_unit: the width and the side must be
        multiples of them.
    """

    name: str
    about: str
    recipe: Recipe
    make: Callable[[int, int, bool, int, int], "Network"]
    width: int | None = None
    feature: str = "avgpool"
    square: bool = False
    least: int = 8
    width_unit: int = 1
    size_unit: int = 1


NETWORKS: Named[Architecture] = Named()


def in_format(network: nn.Module, memory_format: torch.memory_format) -> nn.Module:
    """The network itself, with its convolutions in a memory format."""
    # PyTorch documents this argument of `Module.to` but leaves it out of the overloads.
    return network.to(memory_format=memory_format)  # ty: ignore[no-matching-overload]


class Network(nn.Module):
    """Images [B, channels, H, W] on the [0, 1] scale -> logits [B, num_classes], by a classifier
    called `fc`.
    """

    mean: torch.Tensor
    inv_std: torch.Tensor

    def __init__(self, normalize: bool, channels: int):
        super().__init__()
        self.normalize = normalize
        mean, std = torch.tensor(MEAN)[:, None, None], torch.tensor(STD)[:, None, None]
        self.register_buffer(
            "mean", mean if channels == 3 else mean.mean(0, keepdim=True), persistent=False
        )
        self.register_buffer(
            "inv_std", 1 / (std if channels == 3 else std.mean(0, keepdim=True)), persistent=False
        )

    def normalized(self, x: torch.Tensor) -> torch.Tensor:
        """The images without the ImageNet mean, divided by its deviation, where the network
        normalises.
        """
        return (x - self.mean) * self.inv_std if self.normalize else x

    def kaiming(self) -> None:
        """Initialises every convolution: Kaiming normal, fan-out (He et al. 2015)."""
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
