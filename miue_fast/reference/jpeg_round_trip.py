"""What JPEG leaves of an image, and the transpose of its linear parts.

Every sum is written out in one order, term by term, so that kernels can have the same bits: a
coefficient that lies near a half is rounded alike on every backend.
"""

import math

import torch
import torch.nn.functional as F

# The tables K.1 and K.2 of ITU-T T.81, row by row.
LUMA = (
    (16, 11, 10, 16, 24, 40, 51, 61),
    (12, 12, 14, 19, 26, 58, 60, 55),
    (14, 13, 16, 24, 40, 57, 69, 56),
    (14, 17, 22, 29, 51, 87, 80, 62),
    (18, 22, 37, 56, 68, 109, 103, 77),
    (24, 35, 55, 64, 81, 104, 113, 92),
    (49, 64, 78, 87, 103, 121, 120, 101),
    (72, 92, 95, 98, 112, 100, 103, 99),
)
CHROMA = (
    (17, 18, 24, 47, *[99] * 4),
    (18, 21, 26, 66, *[99] * 4),
    (24, 26, 56, *[99] * 5),
    (47, 66, *[99] * 6),
    *[(99,) * 8] * 4,
)
# COSINES[u][k]: the share of sample k in coefficient u; its transpose is its inverse.
COSINES = [
    [math.cos((2 * k + 1) * u * math.pi / 16) * (0.5 if u else 0.125**0.5) for k in range(8)]
    for u in range(8)
]
# JFIF: Y = R_Y R + G_Y G + B_Y B, Cb = (B - Y) / B_CB, Cr = (R - Y) / R_CR.
R_Y, G_Y, B_Y = 0.299, 0.587, 0.114
R_CR, B_CB = 2 * (1 - R_Y), 2 * (1 - B_Y)
R_CB, G_CB, G_CR, B_CR = R_Y / B_CB, G_Y / B_CB, G_Y / R_CR, B_Y / R_CR
CB_G, CR_G = B_Y * B_CB / G_Y, R_Y * R_CR / G_Y
NARROW = 4  # libjpeg repeats the chroma of images up to this width instead of interpolating it


def quantisation(quality):
    """The 8 x 8 steps of luma and of chroma, as libjpeg scales the standard tables."""
    percent = 5000 // quality if quality < 50 else 200 - 2 * quality
    return [
        [[min(max((step * percent + 50) // 100, 1), 255) for step in row] for row in table]
        for table in (LUMA, CHROMA)
    ]


def product(matrix, x, dim):
    """sum_k matrix[:, k] x[k] along the dimension `dim`, counted from the end, of length 8."""
    matrix = torch.tensor(matrix, dtype=x.dtype, device=x.device)
    shape = [-1, *[1] * (-dim - 1)]
    total = matrix[:, 0].view(shape) * x.narrow(dim, 0, 1)
    for k in range(1, 8):
        total = total + matrix[:, k].view(shape) * x.narrow(dim, k, 1)
    return total


def padded(x, down, right):
    """[..., H, W] with its last row and its last column repeated so many times."""
    x = torch.cat([x, x[..., -1:, :].expand(*x.shape[:-2], down, -1)], -2)
    return torch.cat([x, x[..., -1:].expand(*x.shape[:-1], right)], -1)


def coded(plane, steps):
    """Each 8 x 8 block of [..., H, W], whose edges are padded, after its coefficients were rounded
    to multiples of the steps.
    """
    height, width = plane.shape[-2:]
    plane = padded(plane, -height % 8, -width % 8)
    blocks = plane.unflatten(-1, (-1, 8)).unflatten(-3, (-1, 8)).transpose(-2, -3)
    steps = torch.tensor(steps, dtype=plane.dtype, device=plane.device)
    inverse = list(zip(*COSINES))
    rounded = (product(COSINES, product(COSINES, blocks, -2), -1) / steps).round() * steps
    blocks = product(inverse, product(inverse, rounded, -2), -1)
    plane = blocks.transpose(-2, -3).flatten(-4, -3).flatten(-2)
    return plane[..., :height, :width].clamp(-128, 127)


def halved(x):
    """The mean of each 2 x 2 values; an odd side has its last ones twice."""
    x = padded(x, x.shape[-2] % 2, x.shape[-1] % 2)
    rows = x[..., ::2, :] + x[..., 1::2, :]
    return (rows[..., ::2] + rows[..., 1::2]) * 0.25


def halved_transposed(x, height, width):
    """The transpose of `halved`, to [..., height, width]."""
    x = (x * 0.25).repeat_interleave(2, -2).repeat_interleave(2, -1)[..., :height, :width]
    x[..., height - height % 2 :, :] *= 2
    x[..., width - width % 2 :] *= 2
    return x


def doubled(x, dim, narrow):
    """Two values for each one along `dim`, counted from the end: 3/4 of it and 1/4 of its neighbour
    on that side, or of itself at an edge. narrow: the same value twice.
    """
    if narrow:
        return x.repeat_interleave(2, dim)
    last = x.shape[dim] - 1
    before = torch.cat([x.narrow(dim, 0, 1), x.narrow(dim, 0, last)], dim)
    after = torch.cat([x.narrow(dim, 1, last), x.narrow(dim, last, 1)], dim)
    pairs = torch.stack([0.75 * x + 0.25 * before, 0.75 * x + 0.25 * after], dim)
    return pairs.flatten(dim - 1, dim)


def doubled_transposed(x, dim, narrow):
    """The transpose of `doubled`."""
    even, odd = x.unflatten(dim, (-1, 2)).unbind(dim)
    if narrow:
        return even + odd
    last = even.shape[dim] - 1
    before = torch.cat([even.narrow(dim, 0, 1), odd.narrow(dim, 0, last)], dim)
    after = torch.cat([even.narrow(dim, 1, last), odd.narrow(dim, last, 1)], dim)
    return 0.75 * (even + odd) + 0.25 * (before + after)


def jpeg_round_trip(images, quality, chroma):
    luma, colour = quantisation(quality)
    height, width = images.shape[2:]
    red, green, blue = (images.clamp(0, 1) * 255).unbind(1)
    y = ((R_Y * red + G_Y * green) + B_Y * blue) - 128
    cb = (0.5 * blue - R_CB * red) - G_CB * green
    cr = (0.5 * red - G_CR * green) - B_CR * blue
    both = torch.stack([cb, cr])
    if chroma == "4:2:0":
        narrow = width <= NARROW
        # libjpeg repeats columns of pixels, but rows of means.
        both = halved(padded(both, 0, -width % 16))
        both = coded(both, colour)[..., : (width + 1) // 2]
        both = doubled(doubled(both, -2, narrow), -1, narrow)[..., :height, :width]
    else:
        both = coded(both, colour)
    y, (cb, cr) = coded(y, luma) + 128, both
    out = torch.stack([y + R_CR * cr, (y - CB_G * cb) - CR_G * cr, y + B_CB * cb], 1)
    return (out * (1 / 255)).clamp(0, 1)


def jpeg_round_trip_grad(grad):
    height, width = grad.shape[2:]
    narrow = width <= NARROW
    red, green, blue = grad.unbind(1)
    y = (red + green) + blue
    both = torch.stack([B_CB * blue - CB_G * green, R_CR * red - CR_G * green])
    both = F.pad(both, (0, width % 2, 0, height % 2))
    both = doubled_transposed(doubled_transposed(both, -1, narrow), -2, narrow)
    cb, cr = halved_transposed(both, height, width)
    red = (R_Y * y - R_CB * cb) + 0.5 * cr
    green = (G_Y * y - G_CB * cb) - G_CR * cr
    blue = (B_Y * y + 0.5 * cb) - B_CR * cr
    return torch.stack([red, green, blue], 1)
