"""Adversarial training, and the accuracy under the same attack (Madry et al. 2018)."""

from dataclasses import dataclass, replace

import torch
from torch import nn

from ...models import Recipe, attacked
from ...ops import perturbed_input
from ...support.messages import fail
from .base import Defence, Stage, option, register

TEST_STEPS = 20  # of the attack on the test images, whatever the training used


@register
@dataclass(frozen=True)
class Adversarial(Defence):
    """Training on attacked images alone. The attack is projected gradient descent in L-inf: `steps`
    sign steps of size `step` from a uniform start in +-eps; eps and step are of 255.
    """

    name = "adversarial"
    stage = Stage.ATTACK
    eps: float = option(8.0, 0.1, 64, whole=False)
    steps: int = option(10, 1, 200)
    step: float = option(2.0, 0.01, 64, whole=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.steps * self.step < self.eps:
            fail(
                "defence",
                "steps * step of adversarial",
                f"at least eps = {self.eps:g}, or the attack cannot use its budget",
                f"{self.steps * self.step:g}",
            )

    def recipe(self, usual: Recipe) -> Recipe:
        """At most 100 epochs and lr 0.1, weight decay 5e-4 (AdamW: its own), divided by 10 at 40
        and 80 %.
        """
        decay = usual.weight_decay if usual.optimizer == "adamw" else 5e-4
        return replace(
            usual,
            epochs=min(usual.epochs, 100),
            lr=min(usual.lr, 0.1),
            weight_decay=decay,
            schedule="steps",
        )

    def attack(
        self,
        network: nn.Module,
        images: torch.Tensor,
        labels: torch.Tensor,
        steps: int | None = None,
    ) -> torch.Tensor:
        """Images [B, C, H, W] within eps of float `images` and within [0, 1], with a larger
        cross-entropy; steps: None for those of the training.

        The network is in eval mode meanwhile (running statistics of batch norm, which the attack
        leaves as they are) and then in its former mode. Draws from torch's global generator, within
        `Draws` from the cell's.
        """
        noise = 2 * torch.rand(images.shape).to(images.device) - 1
        steps = self.steps if steps is None else steps
        return attacked(
            network, images, labels, noise, eps=self.eps / 255, step=self.step / 255, steps=steps
        )

    def batch(
        self, network: nn.Module, images: torch.Tensor, labels: torch.Tensor, num_classes: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return self.attack(network, images, labels), labels

    def robust(
        self, network: nn.Module, images: torch.Tensor, labels: torch.Tensor, batch: int = 500
    ) -> float:
        """Top-1 accuracy in eval mode under 20 steps of the attack."""
        network.eval()
        right = 0
        for rows in torch.arange(len(images)).split(batch):
            part, wanted = images[rows[0] : rows[-1] + 1], labels[rows[0] : rows[-1] + 1]
            attacked = self.attack(network, perturbed_input(part), wanted, TEST_STEPS)
            with torch.no_grad():
                right += int((network(attacked).argmax(1) == wanted).sum())
        return right / len(images)
