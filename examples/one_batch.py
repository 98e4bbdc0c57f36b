"""One batch in a loop of your own: train the source network, then move the perturbations.

python examples/one_batch.py [EPOCHS]
"""

import sys

import torch

import miue_fast

EPS = 8 / 255


def main(epochs: int = 3, count: int = 64) -> torch.Tensor:
    """Returns the perturbations: float32 [count, 3, 32, 32] on the [0, 1] scale, |delta| <= EPS."""
    drawn = miue_fast.data.shapes(count, seed=1, classes=4)  # stands for your images
    images, labels = drawn.images.float() / 255, drawn.labels
    torch.manual_seed(7)
    model = miue_fast.models.build("small_resnet", num_classes=4)  # or any nn.Module
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    delta = torch.zeros_like(images)
    for epoch in range(epochs):
        model.train()
        optimizer.zero_grad()
        loss = torch.nn.functional.cross_entropy(model(images + delta), labels)
        loss.backward()
        optimizer.step()
        delta = miue_fast.perturb(
            model.eval(), images, labels, delta, steps=10, alpha=0.4 / 255, eps=EPS
        )
        largest = 255 * delta.abs().max().item()
        print(f"epoch {epoch + 1}: loss {loss.item():.3f}, largest change {largest:.2f}/255")
    return delta


if __name__ == "__main__":
    main(*map(int, sys.argv[1:2]))
