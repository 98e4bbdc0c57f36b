"""Which backend is the faster one for a convolution on this GPU: a table that ships with the package, filled by benchmarks/device.py."""

import functools
import json
from pathlib import Path

import torch

TABLE = Path(__file__).with_name("measured_convolutions.json")  # {device name: {key: "triton", "cuda" or "wgmma"}}


def key(op, weight, size, stride):
    (k, c, r, _), (_, _, h, w) = weight.shape, size
    return f"{op} {c}->{k} {r}x{r}/{stride[0]} @{h}x{w} {str(weight.dtype)[6:]}"


@functools.cache
def _name(device):
    return torch.cuda.get_device_name(device)


@functools.cache
def _table():
    return json.loads(TABLE.read_text())


def faster(op, weight, size, stride):
    """ "triton", "cuda" (cuDNN and an epilogue kernel) or "wgmma" where this GPU's table has the layer, else "cuda"."""
    return _table().get(_name(weight.device), {}).get(key(op, weight, size, stride), "cuda")
