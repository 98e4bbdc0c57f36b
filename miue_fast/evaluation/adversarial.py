"""Projected gradient descent: adversarial training and robust accuracy (Madry et al. 2018)."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from ..ops import perturbed_input

TEST_STEPS = 20  # of the attack on the test images, whatever the training used


@dataclass(frozen=True)
class Attack:
    """L-inf attack: a uniform start in +-eps, `steps` sign steps of size `step`; both on the [0, 1]
    image scale.
    """

    eps: float
    steps: int
    step: float

    def __call__(self, model, images, labels):
        """Images [B, C, H, W] within eps of `images` and within [0, 1], with a larger
        cross-entropy.

        The network is in eval mode meanwhile (running statistics of batch norm, which the attack
        leaves as they are) and then in its former mode. Draws from torch's global generator, within
        `Draws` from the cell's."""
        training = model.training
        model.eval()
        low, high = (images - self.eps).clamp_(0, 1), (images + self.eps).clamp_(0, 1)
        start = images + (2 * torch.rand(images.shape).to(images.device) - 1) * self.eps
        attacked = torch.minimum(torch.maximum(start, low), high)
        for _ in range(self.steps):
            with torch.enable_grad():
                attacked.requires_grad_()
                loss = F.cross_entropy(model(attacked), labels, reduction="sum")
                (slope,) = torch.autograd.grad(loss, attacked)
            attacked = torch.minimum(
                torch.maximum(attacked.detach() + self.step * slope.sign(), low), high
            )
        model.train(training)
        return attacked

    def batch(self, model, images, labels, classes):
        """A defence's batch: the attacked images alone, as Madry et al. train."""
        return self(model, images, labels), labels


def robust_accuracy(model, images, labels, attack, *, batch=500):
    """Top-1 accuracy in eval mode on uint8 `images` [N, C, H, W] under 20 steps of `attack` with
    its eps and step size.
    """
    model.eval()
    attack = Attack(attack.eps, TEST_STEPS, attack.step)
    right = 0
    for rows in torch.arange(len(images)).split(batch):
        part, wanted = images[rows[0] : rows[-1] + 1], labels[rows[0] : rows[-1] + 1]
        attacked = attack(model, perturbed_input(part), wanted)
        with torch.no_grad():
            right += int((model(attacked).argmax(1) == wanted).sum())
    return right / len(images)
