"""Samples of perturbed_input."""

import numpy as np
import torch

import miue_fast

from . import FLOATS, Samples, add
from .projected_step import (
    any_view,
    budget,
    delta_by_numpy,
    rows_by_numpy,
    store_case,
    store_samples,
    viewed_by_numpy,
    views,
)

MEAN, STD = [0.485, 0.456, 0.406, 0.5], [0.229, 0.224, 0.225, 0.25]


def make(device, dtype):
    gen = torch.Generator().manual_seed(5)
    for store in (torch.float32, torch.float16, torch.int8):
        for k, (delta, index, shape, images, flip) in enumerate(store_samples(device, store)):
            mean, std = (MEAN[: shape[1]], STD[: shape[1]]) if k % 3 else ([], [])
            args = (
                images,
                delta if k % 5 else None,
                index,
                flip,
                mean,
                std,
                8 / 255,
                dtype,
                k % 4 < 2,
            )
            yield *args, None
            yield *args, views(gen, shape).to(device)


def case(choose):
    eps = budget(choose)
    gen, delta, images, index, flip, shape = store_case(choose, eps)
    mean, std = [], []
    if choose.flag():
        mean = (torch.rand(shape[1], generator=gen, dtype=torch.float64) * 2 - 0.5).tolist()
        std = (torch.rand(shape[1], generator=gen, dtype=torch.float64) + 0.01).tolist()
    delta = delta if choose.integer(0, 3) else None
    dtype, channels_last = choose.one_of(*FLOATS), choose.flag()
    view = any_view(choose, gen, shape)
    return images, delta, index, flip, mean, std, eps, dtype, channels_last, view


def formula(images, delta, index, flip, mean, std, eps, dtype, channels_last, view):
    batch = images.shape[0] if index is None else index.shape[0]
    layout = torch.channels_last if channels_last else torch.contiguous_format
    out = torch.empty((batch, *images.shape[1:]), dtype=dtype, memory_format=layout)
    for b, row, x in rows_by_numpy(images, index, flip):
        if delta is not None:
            x = x + delta_by_numpy(delta, row, eps)
        if view is not None:
            x = viewed_by_numpy(x, view[b].tolist())
        for c in range(len(mean)):
            x = x.copy()
            x[c] = (x[c] - np.float32(mean[c])) * np.float32(1 / std[c])
        out[b] = torch.from_numpy(x.copy()).to(dtype)
    return [out]


def public(backend, batch):
    names = "images", "delta", "index", "flip"
    given = [batch[name] for name in names]
    normal = [0.5, 0.4, 0.3], [0.2, 0.2, 0.3]
    return 1 + miue_fast.perturbed_input(*given, *normal, view=batch["view"], backend=backend)


def no_rows(args):
    none = torch.empty(0, dtype=torch.int64, device=args[0].device)
    return *args[:2], none, None, *args[4:9], None if args[9] is None else args[9][:0]


add("perturbed_input", Samples(make, case, no_rows, public, formula=formula))
