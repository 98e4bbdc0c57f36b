"""Images without the directions that separate their classes."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from .base import Defence, Stage, option, register, to_bytes

FIT_EPOCHS, FIT_BATCH, FIT_SAMPLE = 20, 128, 512


def separating_directions(
    images: torch.Tensor, labels: torch.Tensor, components: int, seed: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """(mean image [D], orthonormal directions [components, D]) of the pixels of uint8 images by
    which a linear classifier tells the classes apart.

    A softmax classifier is fitted to the centred images on the [0, 1] scale: 20 epochs of SGD from
    zero with momentum 0.9, batch 128, no weight decay, a cosine from 1 / L to 0, where L is the
    loss's largest curvature, estimated on 512 images. Its K weight rows sum to zero, so they span
    at most K - 1 directions; these are the right singular vectors of the weights, the strongest
    first. Deterministic for a seed and a thread count.
    """
    draw = torch.Generator().manual_seed(seed)
    pixels = images.flatten(1)
    mean = (
        torch.stack([part.sum(0, dtype=torch.float64) for part in pixels.split(4096)])
        .sum(0)
        .div(255 * len(pixels))
        .float()
    )

    def centred(rows):
        return pixels[rows].float() / 255 - mean

    some = centred(torch.randperm(len(pixels), generator=draw)[:FIT_SAMPLE])
    curvature = 0.5 * float(torch.linalg.eigvalsh(some @ some.T)[-1]) / len(some)
    num_classes = int(labels.max()) + 1
    weight = torch.zeros(num_classes, pixels.shape[1])
    bias = torch.zeros(num_classes)
    momentum = [torch.zeros_like(weight), torch.zeros_like(bias)]
    for epoch in range(FIT_EPOCHS):
        lr = 0.5 * (1 + math.cos(math.pi * epoch / FIT_EPOCHS)) / max(curvature, 1e-6)
        for rows in torch.randperm(len(pixels), generator=draw).split(FIT_BATCH):
            x = centred(rows)
            grad = (
                torch.addmm(bias, x, weight.T).softmax(1) - F.one_hot(labels[rows], num_classes)
            ) / len(rows)
            for value, speed, own in zip((weight, bias), momentum, (grad.T @ x, grad.sum(0))):
                value.sub_(speed.mul_(0.9).add_(own), alpha=lr)
    return mean, torch.linalg.svd(weight, full_matrices=False).Vh[:components]


@register
@dataclass(frozen=True)
class OrthogonalProjection(Defence):
    """Sandoval-Segura et al. 2023, "What can we learn from unlearnable datasets?": the images
    without the directions in which a linear classifier separates them, rounded to 8 bits.

    As there, the rows of a fitted linear classifier are made orthonormal and projected out.
    Different from there: the singular vectors stand in for the QR factor (the same span, ordered by
    strength, so that fewer can be taken), and the mean image is kept, because without it most
    pixels would leave 0 to 255. components: None for one less than there are classes.
    """

    name = "orthogonal-projection"
    stage = Stage.ONCE
    components: int | None = option(None, 1, 10_000)

    def misfit(self, shape: Sequence[int], num_classes: int) -> tuple[str, object] | None:
        if (self.components or 0) < num_classes:
            return None
        return f"1 to {num_classes - 1} components, for {num_classes} classes", self.components

    def prepare(self, images: torch.Tensor, labels: torch.Tensor, seed: int) -> torch.Tensor:
        present = int(labels.max()) if self.components is None else self.components
        mean, directions = separating_directions(images, labels, present, seed)
        out = torch.empty_like(images)
        for rows in torch.arange(len(images)).split(1000):
            x = images[rows].flatten(1).float() / 255 - mean
            out[rows] = to_bytes((x - (x @ directions.T) @ directions + mean) * 255).view_as(
                images[rows]
            )
        return out
