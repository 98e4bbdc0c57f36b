"""Every random choice of a run, as a function of (seed, epoch): a resumed run makes the same
ones.
"""

import hashlib

import torch


def generator(seed: int, epoch: int, purpose: str) -> torch.Generator:
    """A new generator on the CPU."""
    return torch.Generator().manual_seed(derive(seed, epoch, purpose))


def step_generator(seed: int, epoch: int, batch: int, step: int) -> torch.Generator:
    """A new generator on the CPU, for what is random in one step of one contrastive batch."""
    return generator(seed, epoch, f"robust/{batch}/{step}")


def derive(seed: int, epoch: int, purpose: str) -> int:
    """A seed of 63 bits for one purpose in one epoch."""
    return (
        int.from_bytes(hashlib.sha256(f"{seed}/{epoch}/{purpose}".encode()).digest()[:8], "little")
        >> 1
    )


def order_and_flips(
    count: int, probability: float, seed: int, epoch: int, purpose: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """A permutation of `count` and a bool flip mask in the order of that permutation, on the
    CPU.
    """
    g = generator(seed, epoch, purpose)
    return torch.randperm(count, generator=g), torch.rand(
        count, generator=g, dtype=torch.float32
    ) < probability


def train_slices(count: int, batch: int) -> list[slice]:
    """Batches of the model step. A remainder of one image joins the batch before it (batch norm
    needs two).
    """
    return _slices(count, batch, least=2)


def poison_slices(labels: torch.Tensor, batch: int) -> list[slice]:
    """Contrastive batches over shuffled `labels` (CPU), each of at least two classes.

    A remainder of less than half a batch joins the batch before it, and so does a batch of one
    class: alone it would have no contrast. With two classes in the data this always ends; the first
    batch, which has none before it, takes the one after.
    """
    slices = []
    for part in _slices(len(labels), batch, least=(batch + 1) // 2):
        if slices and (_one_class(labels[part]) or _one_class(labels[slices[-1]])):
            part = slice(slices.pop().start, part.stop)
        slices.append(part)
    return slices


def _slices(count, batch, least):
    starts = list(range(0, count, batch))
    if len(starts) > 1 and count - starts[-1] < least:
        starts.pop()
    return [slice(a, b) for a, b in zip(starts, [*starts[1:], count])]


def _one_class(labels):
    return bool((labels == labels[0]).all())
