"""A loss of your own on the frozen network: only its gradient in the features is needed.

The example pulls the features of each class to one corner of a simplex, and adds MI-UE's loss. Any
function of features and labels that autograd can differentiate would do.

python examples/own_objective.py [STEPS]
"""

import sys

import torch

import miue_fast

EPS, ALPHA = 8 / 255, 0.8 / 255


def own_loss(features: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Mean squared distance to a corner per class. features: float [B, D]; labels: int64 [B]."""
    corners = torch.eye(features.shape[1], device=features.device)[labels]
    return (features - corners).square().sum(1).mean()


def gradient(features: torch.Tensor, labels: torch.Tensor) -> tuple[float, torch.Tensor]:
    """The loss and its gradient in the features, [B, D]: autograd for one part, a kernel for the
    other.
    """
    leaf = features.detach().requires_grad_()
    own = own_loss(leaf, labels)
    (grad,) = torch.autograd.grad(own, leaf)
    mi_ue, mi_ue_grad = miue_fast.mi_ue_value_and_grad(features, labels, 0.1, 0.1)
    return (own + 0.1 * mi_ue).item(), grad + 0.1 * mi_ue_grad


def main(steps: int = 10, count: int = 64) -> list[float]:
    """Returns the loss before each step."""
    drawn = miue_fast.data.shapes(count, seed=1, classes=4)
    labels = drawn.labels
    torch.manual_seed(7)
    model = miue_fast.models.build("small_resnet", num_classes=4).eval()
    net = miue_fast.freeze(model, feature="avgpool")
    images = drawn.images.float() / 255
    delta = torch.zeros_like(images)
    losses = []
    for step in range(steps):
        features = net.forward(images + delta)
        loss, grad = gradient(features, labels)
        losses.append(loss)
        image_grad = net.input_grad(grad)
        miue_fast.projected_step_(delta, None, image_grad, drawn.images, alpha=ALPHA, eps=EPS)
        print(f"step {step + 1}: loss before it {loss:.4f}")
    return losses


if __name__ == "__main__":
    main(*map(int, sys.argv[1:2]))
