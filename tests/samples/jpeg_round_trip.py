"""Samples of jpeg_round_trip and its gradient."""

import torch

import miue_fast

from . import Samples, add, shuffled, special

# Whole and cut blocks and units of the code, one pixel, chroma too narrow to be interpolated.
SIZES = [(32, 32), (33, 47), (8, 8), (1, 1), (17, 4), (4, 17), (5, 5), (18, 34), (16, 31)]
SUBSAMPLINGS = "4:2:0", "4:4:4"


def pictures(gen, batch, height, width):
    """Noise of all sizes; black and white only; one colour, whose coefficients are ties."""
    x = torch.rand(batch, 3, height, width, generator=gen) * 1.2 - 0.1
    x[1::3] = (x[1::3] > 0.5).float()
    x[2::3] = 0.5
    return x


def make(device, dtype):
    gen = torch.Generator().manual_seed(7)
    for k, size in enumerate(SIZES):
        x = pictures(gen, 4, *size).to(dtype).to(device)
        yield x, (75, 1, 100, 49, 50)[k % 5], SUBSAMPLINGS[k % 2]
        yield x.to(memory_format=torch.channels_last), 90 - k, SUBSAMPLINGS[1 - k % 2]


def make_grads(device, dtype):
    gen = torch.Generator().manual_seed(7)
    for size in SIZES:
        x = torch.randn(3, 3, *size, generator=gen).to(dtype).to(device)
        yield (x,)
        yield (x.mT,)


def batch_of_any_size(choose):
    gen, dtype = choose.generator(), choose.one_of(torch.float32, torch.float64)
    x = pictures(gen, choose.integer(0, 4), choose.integer(1, 40), choose.integer(1, 40))
    if choose.flag():
        x = special(x, gen, torch.nan, torch.inf, -0.0)
    return shuffled(x.to(dtype), choose.order(4))


def case(choose):
    return batch_of_any_size(choose), choose.integer(1, 100), choose.one_of(*SUBSAMPLINGS)


def case_of_grads(choose):
    return (batch_of_any_size(choose) * 10.0 ** choose.integer(-30, 30),)


def no_rows(args):
    return args[0][:0], *args[1:]


def public(backend, batch):
    return miue_fast.jpeg_round_trip(batch["images"] / 255, 60, backend=backend) + 1


def public_grad(backend, batch):
    return miue_fast.ops.jpeg_round_trip_grad(batch["grad"] * 2, backend=backend) + 1


add("jpeg_round_trip", Samples(make, case, no_rows, public, strided=(0,)))
add("jpeg_round_trip_grad", Samples(make_grads, case_of_grads, no_rows, public_grad, strided=(0,)))
