"""Defences that change the whole training set once, before training: uint8 images [N, C, H, W] in,
the same shape out.

Image shortcut squeezing (ISS: Liu, Zhao and Larson 2023, "Image Shortcut Squeezing") is grayscale,
bit depth and JPEG."""

import io
import math

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from ._torchvision import transforms

SUBSAMPLING = (
    2  # of jpeg: 4:2:0, half the colour resolution in both directions, Pillow's own default
)
FIT_EPOCHS, FIT_BATCH, FIT_SAMPLE = 20, 128, 512


def _to_bytes(images):
    return images.round().clamp(0, 255).to(torch.uint8)


def grayscale(images, labels, seed):
    """Luma of ITU-R BT.601 (0.299 R + 0.587 G + 0.114 B), rounded, in all three channels."""
    weights = torch.tensor([0.299, 0.587, 0.114])[:, None, None]
    return (
        torch.cat([_to_bytes((part * weights).sum(1, keepdim=True)) for part in images.split(1000)])
        .expand_as(images)
        .contiguous()
    )


def bit_depth(images, labels, seed, *, bits):
    """2**bits evenly spaced levels from 0 to 255, each value to the nearest."""
    top = 2**bits - 1
    levels = ((torch.arange(256) * top / 255).round() * 255 / top).round().to(torch.uint8)
    return levels[images.long()]


def jpeg(images, labels, seed, *, quality):
    """A round trip through Pillow's JPEG with 4:2:0 subsampling (one channel: grey JPEG)."""
    out = np.empty_like(images.numpy())
    for target, image in zip(out, images.numpy()):
        buffer = io.BytesIO()
        picture = (
            Image.fromarray(image[0])
            if len(image) == 1
            else Image.fromarray(np.ascontiguousarray(image.transpose(1, 2, 0)))
        )
        picture.save(buffer, "JPEG", quality=quality, subsampling=SUBSAMPLING)
        with Image.open(buffer) as decoded:
            pixels = np.asarray(decoded)
        target[:] = pixels if len(image) == 1 else pixels.transpose(2, 0, 1)
    return torch.from_numpy(out)


def blur_width(sigma):
    """Of the Gaussian kernel in pixels: three deviations on each side."""
    return 2 * math.ceil(3 * sigma) + 1


def gaussian_blur(images, labels, seed, *, sigma):
    """A Gaussian of deviation `sigma` pixels, with reflected borders (torchvision)."""
    blur = transforms().functional.gaussian_blur
    return torch.cat(
        [blur(part, [blur_width(sigma)] * 2, [sigma] * 2) for part in images.split(1000)]
    )


def separating_directions(images, labels, components, seed):
    """(mean image [D], orthonormal directions [components, D]) of the pixels by which a linear
    classifier tells the classes apart.

    A softmax classifier is fitted to the centred images on the [0, 1] scale: 20 epochs of SGD from
    zero with momentum 0.9, batch 128, no weight decay, a cosine from 1 / L to 0, where L is the
    loss's largest curvature, estimated on 512 images. Its K weight rows sum to zero, so they span
    at most K - 1 directions; these are the right singular vectors of the weights, the strongest
    first. Deterministic for a seed and a thread count."""
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
    classes = int(labels.max()) + 1
    weight = torch.zeros(classes, pixels.shape[1])
    bias = torch.zeros(classes)
    momentum = [torch.zeros_like(weight), torch.zeros_like(bias)]
    for epoch in range(FIT_EPOCHS):
        lr = 0.5 * (1 + math.cos(math.pi * epoch / FIT_EPOCHS)) / max(curvature, 1e-6)
        for rows in torch.randperm(len(pixels), generator=draw).split(FIT_BATCH):
            x = centred(rows)
            slope = (
                torch.addmm(bias, x, weight.T).softmax(1) - F.one_hot(labels[rows], classes)
            ) / len(rows)
            for value, speed, gradient in zip(
                (weight, bias), momentum, (slope.T @ x, slope.sum(0))
            ):
                value.sub_(speed.mul_(0.9).add_(gradient), alpha=lr)
    return mean, torch.linalg.svd(weight, full_matrices=False).Vh[:components]


def orthogonal_projection(images, labels, seed, *, components):
    """Sandoval-Segura et al. 2023, "What can we learn from unlearnable datasets?": the images
    without the directions in which a linear classifier separates them, rounded to 8 bits.

    As there, the rows of a fitted linear classifier are made orthonormal and projected out.
    Different from there: the singular vectors stand in for the QR factor (the same span, ordered by
        strength, so that fewer can be taken), and the mean image is kept, because
    without it most pixels would leave 0 to 255. components: None for classes - 1.
    """
    present = int(labels.max()) if components is None else components
    mean, directions = separating_directions(images, labels, present, seed)
    out = torch.empty_like(images)
    for rows in torch.arange(len(images)).split(1000):
        x = images[rows].flatten(1).float() / 255 - mean
        out[rows] = _to_bytes((x - (x @ directions.T) @ directions + mean) * 255).view_as(
            images[rows]
        )
    return out
