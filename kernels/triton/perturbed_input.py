"""The network input of a batch: images and poison gathered, mirrored, added, normalised and laid
out in one pass.
"""

from functools import cache

import torch
import triton
import triton.language as tl

from ._common import on_device_of
from ._store import load_image, seen_pixel, split_program, store_row, to_scale

WARPS = 4
BLOCK = 4 * 32 * WARPS
OPTIONS = {
    "num_warps": WARPS,
    "enable_fp_fusion": False,
}  # a fused multiply-add rounds once where the contract rounds twice


@triton.jit
def _kernel(
    out,
    images,
    delta,
    index,
    flip,
    view,
    affine,
    level,
    count,
    plane,
    C: tl.constexpr,
    W: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program: BLOCK neighbours of the output's memory order, so that stores are whole vectors
    and gathers hit the cache.
    """
    if CHANNELS_LAST:
        row, _, o = split_program(plane * C, 1, BLOCK)
        live = o < plane * C
        channel = o % C
        p = o // C
    else:
        row, channel, p = split_program(plane, C, BLOCK)
        live = p < plane
        o = channel * plane + p
    source, exists = store_row(index, row, count)
    base = source * C * plane
    p, inside = seen_pixel(view, row, p, plane // W, W, False)
    offsets = channel * plane + p
    readable = live & exists & inside
    x = load_image(images + base, flip, row, offsets, p % W, W, readable)
    if delta is not None:
        x += to_scale(tl.load(delta + base + offsets, mask=readable, other=0), level)
    if view is not None:
        x = tl.where(inside, x, 0.0)
    if affine is not None:
        x = (x - tl.load(affine + channel)) * tl.load(affine + C + channel)
    x = tl.where(
        exists, x, float("nan")
    )  # a wrong index shows in the loss instead of passing as an image
    tl.store(out + row * C * plane + o, x.to(out.dtype.element_ty), mask=live)


@cache  # never dropped: captured graphs point to it
def _affine(mean, std, device):
    """[means, 1 / std] on the device; made once, so that a captured CUDA graph only sees the
    warm-up's copy.
    """
    return torch.tensor([mean, [1 / s for s in std]], dtype=torch.float32, device=device)


def perturbed_input(images, delta, index, flip, mean, std, eps, dtype, channels_last, view=None):
    n, c, h, w = images.shape
    b = n if index is None else index.shape[0]
    layout = torch.channels_last if channels_last else torch.contiguous_format
    out = torch.empty((b, c, h, w), dtype=dtype, device=images.device, memory_format=layout)
    if out.numel():
        blocks = triton.cdiv(c * h * w, BLOCK) if channels_last else c * triton.cdiv(h * w, BLOCK)
        with on_device_of(images):
            _kernel[(b * blocks,)](
                out,
                images,
                delta,
                index,
                None if flip is None else flip.view(torch.uint8),
                view,
                _affine(tuple(mean), tuple(std), images.device) if mean else None,
                eps / 127,
                n,
                h * w,
                C=c,
                W=w,
                CHANNELS_LAST=channels_last,
                BLOCK=BLOCK,
                **OPTIONS,
            )
    return out
