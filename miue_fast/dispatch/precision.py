"""What the compute type "auto" means on a device."""

import torch

from . import native

CHOICES = ("float32", "bfloat16", "float16", "auto")


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
