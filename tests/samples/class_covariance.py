"""Samples of class_covariance."""

import torch

import miue_fast

from . import Samples, add
from .losses import fuzzed, no_rows

# Powers of ten of the features: their squares are numbers of the dtype.
MAGNITUDES = {
    torch.float32: (-5, 17),
    torch.bfloat16: (-5, 17),
    torch.float16: (-2, 3),
    torch.float64: (-5, 140),
}


def make(device, dtype):
    """One row to several tiles, a class longer than a chain of sums; empty, lone, equal and
    collapsed classes far from zero; strides.
    """
    gen = torch.Generator().manual_seed(7)

    def rows(batch, width, classes, *, spread=1.0, shift=0.0, num_classes=None):
        labels = torch.randint(classes, (batch,), generator=gen)
        centres = torch.randn(classes, width, generator=gen) + shift
        features = centres[labels] + spread * torch.randn(batch, width, generator=gen)
        return features.to(dtype).to(device), labels.to(device), num_classes or classes

    yield rows(2, 1, 2)
    yield rows(1, 5, 1)
    yield rows(7, 3, 2, num_classes=5)
    yield rows(33, 17, 4)
    yield rows(40, 36, 3, spread=0.02, shift=100)  # collapsed: the one-pass form has no digit left
    yield rows(
        20, 6, 2, spread=2e-5, shift=100
    )  # ... and in float32 the rounding of the mean is as large as the spread
    features, labels, classes = rows(24, 16, 3)
    features[labels == 1] = features[0].clone()  # no variance at all
    yield features, labels, classes
    yield features, torch.where(labels == 2, 7, labels), 8
    wide, labels, classes = rows(20, 32, 3)
    yield wide[:, ::2], labels, classes
    yield wide[::2, :9], labels[::2].contiguous(), classes
    yield rows(600, 5, 2)
    yield rows(130, 70, 7)


def case(choose):
    features, labels = fuzzed(choose, MAGNITUDES, clamped=False)
    classes, labels = labels.unique(return_inverse=True)
    return features, labels, len(classes) + choose.integer(0, 3)


def public(backend, batch):
    counts, means, covariances = miue_fast.class_covariance(
        batch["features"] * 2, batch["labels"], 4, backend=backend
    )
    return counts + 1, means, covariances * 2


add("class_covariance", Samples(make, case, no_rows, public, (0,)))
