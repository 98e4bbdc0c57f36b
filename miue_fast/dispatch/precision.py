"""What the compute type "auto" means on a device."""

import torch

from ..support.messages import fail, short
from . import native

CHOICES = ("float32", "bfloat16", "float16", "auto")
UNSCALED = ("float32", "bfloat16", "auto")  # a loss in these needs no scale against underflow


def compute_dtype(name: str, device: torch.device) -> str:
    """`name`, or for "auto" the type that was measured fastest there: bfloat16 on a CPU with matrix
    tiles (docs/performance-notes.md) and on a GPU with bfloat16 tensor cores, else float32.
    """
    if name != "auto":
        return name
    if device.type == "cuda":
        half = torch.cuda.get_device_capability(device) >= (8, 0)
    else:
        half = device.type == "cpu" and native.matrix_missing() is None
    return "bfloat16" if half else "float32"


def check_unscaled(op: str, dtype: str) -> None:
    """Raises ValueError unless `dtype` is one of `UNSCALED`."""
    if not isinstance(dtype, str) or dtype not in UNSCALED:
        fail(op, "dtype", f"one of {', '.join(UNSCALED)}", short(dtype))
