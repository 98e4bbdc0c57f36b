import torch

from .projected_step import load_delta, load_images, viewed


def perturbed_input(images, delta, index, flip, mean, std, eps, dtype, channels_last, view=None):
    x = load_images(images, index, flip)
    if delta is not None:
        x = x + load_delta(delta, index, eps)
    x = viewed(x, view)
    if mean:
        as_column = [
            torch.tensor(v, dtype=torch.float32, device=x.device)[:, None, None]
            for v in (mean, [1 / s for s in std])
        ]
        x = (x - as_column[0]) * as_column[1]
    layout = torch.channels_last if channels_last else torch.contiguous_format
    return x.to(dtype, memory_format=layout, copy=True)  # never the images themselves
