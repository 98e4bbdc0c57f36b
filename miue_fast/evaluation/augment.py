"""Defences that change every training batch: images float [B, C, H, W] on the [0, 1] scale, after
crop and flip.

Each is called as f(model, images, labels, classes) and gives (images, targets): labels [B], or
shares of the classes [B, classes]. They draw from torch's global generator, which a cell replaces
by its own (`Draws`)."""

import torch
import torch.nn.functional as F

from ._torchvision import transforms

EDGES = 0.5  # chance of each of UEraser's first three steps


def cutout(model, images, labels, classes, *, size):
    """DeVries and Taylor 2017: a black square with its centre anywhere in the image, cut off at the
    border.

    size: side in pixels; None: half the image's width, 16 at 32 as in the paper.
    """
    size = images.shape[-1] // 2 if size is None else size
    inside = []
    for length in images.shape[-2:]:
        first = torch.randint(length, (len(images), 1)) - size // 2
        place = torch.arange(length)
        inside.append((place >= first) & (place < first + size))
    hole = (inside[0][:, :, None] & inside[1][:, None, :])[:, None]
    return images.masked_fill(hole.to(images.device), 0.0), labels


def gaussian_noise(model, images, labels, classes, *, std):
    """Fresh normal noise of deviation std / 255 in every epoch, clamped to the image range."""
    return (images + torch.randn(images.shape).to(images.device) * (std / 255)).clamp_(0, 1), labels


def cutmix(model, images, labels, classes, *, alpha):
    """Yun et al. 2019: a rectangle of the batch's previous image; the targets are the shares of the
    pixels.
    """
    return transforms().CutMix(alpha=alpha, num_classes=classes)(images, labels)


def mixup(model, images, labels, classes, *, alpha):
    """Zhang et al. 2018: lam * image + (1 - lam) * the batch's previous image, lam from Beta(alpha,
    alpha), once per batch.
    """
    return transforms().MixUp(alpha=alpha, num_classes=classes)(images, labels)


def plasma(count, height, width):
    """Random clouds [count, 1, height, width] from 0 to 1: octaves of uniform noise on grids of 2,
    3, 5, 9... points, each octave weaker by a roughness from 0.1 to 0.7."""
    rough = torch.rand(count, 1, 1, 1) * 0.6 + 0.1
    side, weight, cloud = 2, torch.ones_like(rough), torch.zeros(count, 1, height, width)
    while side // 2 < max(height, width):
        cloud += weight * F.interpolate(
            torch.rand(count, 1, side, side), (height, width), mode="bilinear", align_corners=True
        )
        side, weight = 2 * side - 1, weight * rough
    low, high = cloud.amin((2, 3), keepdim=True), cloud.amax((2, 3), keepdim=True)
    return (cloud - low) / (high - low)


def strong(images):
    """One draw of UEraser's chain: plasma brightness, plasma contrast and channel shuffle, each for
    every second image, then one operation of TrivialAugment (Müller and Hutter 2021) per image.
    8-bit values on the [0, 1] scale."""
    count, channels, height, width = images.shape
    device = images.device

    def chosen():
        return (torch.rand(count, 1, 1, 1) < EDGES).to(device)

    strength = torch.rand(count, 1, 1, 1).to(device)
    brighter = (images + (2 * plasma(count, height, width).to(device) - 1) * strength).clamp(0, 1)
    images = torch.where(chosen(), brighter, images)
    contrast = ((images - 0.5) * (4 * plasma(count, height, width).to(device)) + 0.5).clamp(0, 1)
    images = torch.where(chosen(), contrast, images)
    order = torch.rand(count, channels).argsort(1).to(device)
    shuffled = images.gather(1, order[:, :, None, None].expand_as(images))
    images = torch.where(chosen(), shuffled, images)
    trivial = transforms().TrivialAugmentWide()
    return (
        torch.stack([trivial(image) for image in (images * 255).round().to(torch.uint8)]).float()
        / 255
    )


def ueraser(model, images, labels, classes, *, draws):
    """In the style of UEraser (Qin et al. 2023, "Learning the Unlearnable"): `strong`; with draws >
    1 the draw of the largest loss.

    Not the authors' program: the clouds are sums of octaves instead of their library's fractal, and
    the loss that picks a draw is computed in eval mode, which leaves the running statistics alone.
    draws=5 is the paper's error-maximising form."""
    if draws == 1:
        return strong(images), labels
    offers = [strong(images) for _ in range(draws)]
    training = model.training
    model.eval()
    with torch.no_grad():
        losses = torch.stack(
            [F.cross_entropy(model(offer), labels, reduction="none") for offer in offers]
        )
    model.train(training)
    return torch.stack(offers)[
        losses.argmax(0), torch.arange(len(labels), device=labels.device)
    ], labels
