"""Which backend is the faster one on this GPU: a table that ships with the package once somebody
has measured a GPU.

`python -m benchmarks.pages.readme FILE --write-table` writes it from a record of
benchmarks/device.py. Without the file nothing is known to be faster.
"""

import functools
import json
from collections.abc import Sequence
from pathlib import Path

import torch

# {device name: {key: "triton", "cuda" or "wgmma"}}
TABLE = Path(__file__).with_name("measured.json")
NEAR = 4  # a loss was measured for batches within this factor
WIDTH = 512  # and for rows of at most so many features


def key(op: str, weight: torch.Tensor, size: Sequence[int], stride: Sequence[int]) -> str:
    """The table's name for a convolution of an input of `size` [B, C, H, W] with `weight`
    [K, C, R, S].
    """
    (k, c, r, _), (_, _, h, w) = weight.shape, size
    return f"{op} {c}->{k} {r}x{r}/{stride[0]} @{h}x{w} {str(weight.dtype)[6:]}"


def loss_key(op: str, batch: int, dtype: torch.dtype) -> str:
    """The table's name for a loss of a batch of so many rows."""
    return f"{op} {batch} {str(dtype)[6:]}"


@functools.cache
def _name(device):
    return torch.cuda.get_device_name(device)


@functools.cache
def _table():
    return json.loads(TABLE.read_text()) if TABLE.exists() else {}


@functools.cache
def _batches(name, op, dtype):
    """[(batch, backend)] of the measurements of a loss on the GPU `name`."""
    parts = [
        (*where.split(" "), backend)
        for where, backend in _table().get(name, {}).items()
        if where.count(" ") == 2
    ]
    return [
        (int(batch), backend)
        for this, batch, kind, backend in parts
        if (this, kind) == (op, str(dtype)[6:])
    ]


def forget() -> None:
    """Makes the next look-up read the file again, because it has changed."""
    for cached in (_table, _batches):
        cached.cache_clear()


def faster(op: str, weight: torch.Tensor, size: Sequence[int], stride: Sequence[int]) -> str:
    """The faster backend for a convolution on the GPU that holds `weight`: "triton", "cuda" (cuDNN
    and an epilogue kernel) or "wgmma"; "cuda" where the table does not have the layer.
    """
    return _table().get(_name(weight.device), {}).get(key(op, weight, size, stride), "cuda")


def faster_loss(op: str, features: torch.Tensor) -> str:
    """The faster backend for a loss of `features` [B, D] on their GPU: "triton" or "cuda", as
    measured for the nearest batch if one is near; else "triton".
    """
    rows, width = features.shape
    measured = _batches(_name(features.device), op, features.dtype)
    found = [(max(rows, batch) / max(1, min(rows, batch)), backend) for batch, backend in measured]
    distance, backend = min(found, default=(NEAR + 1, "triton"))
    return backend if distance <= NEAR and width <= WIDTH else "triton"
