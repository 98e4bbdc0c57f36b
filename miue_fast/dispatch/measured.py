"""Which backend is the faster one on this GPU: a table that ships with the package, filled by
benchmarks/device.py.
"""

import functools
import json
from collections.abc import Sequence
from pathlib import Path

import torch

TABLE = Path(__file__).with_name(
    "measured.json"
)  # {device name: {key: "triton", "cuda" or "wgmma"}}
NEAR = 4  # a loss was measured for batches within this factor
WIDTH = 512  # and for rows of at most so many features


def key(op: str, weight: torch.Tensor, size: Sequence[int], stride: Sequence[int]) -> str:
    """The table's name for a convolution of images of `size` [B, C, H, W]."""
    (k, c, r, _), (_, _, h, w) = weight.shape, size
    return f"{op} {c}->{k} {r}x{r}/{stride[0]} @{h}x{w} {str(weight.dtype)[6:]}"


def loss_key(op: str, batch: int, dtype: torch.dtype) -> str:
    """The table's name for a loss of this many rows."""
    return f"{op} {batch} {str(dtype)[6:]}"


@functools.cache
def _name(device):
    return torch.cuda.get_device_name(device)


@functools.cache
def _table():
    return json.loads(TABLE.read_text())


@functools.cache
def _batches(name, op, dtype):
    """The entries of a loss on this GPU: [(batch, backend)]."""
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
    """Reads the table again at the next question, for whoever has changed its file."""
    for cached in (_table, _batches):
        cached.cache_clear()


def faster(op: str, weight: torch.Tensor, size: Sequence[int], stride: Sequence[int]) -> str:
    """The backend that was measured to be fastest for this layer on this GPU: "triton", "cuda"
    (cuDNN and an epilogue kernel) or "wgmma"; "cuda" where the table does not have the layer.
    """
    return _table().get(_name(weight.device), {}).get(key(op, weight, size, stride), "cuda")


def faster_loss(op: str, features: torch.Tensor) -> str:
    """The backend, "triton" or "cuda", that was measured to be faster for the nearest batch;
    "triton" where the table has no batch that is near.
    """
    rows, width = features.shape
    measured = _batches(_name(features.device), op, features.dtype)
    found = [(max(rows, batch) / max(1, min(rows, batch)), backend) for batch, backend in measured]
    distance, backend = min(found, default=(NEAR + 1, "triton"))
    return backend if distance <= NEAR and width <= WIDTH else "triton"
