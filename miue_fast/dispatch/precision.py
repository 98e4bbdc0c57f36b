"""The compute type of a network that trains: float32, or bfloat16 under autocast."""

import torch

from ..support.messages import fail, short
from . import native

DTYPES = ("float32", "bfloat16", "auto")


def auto_dtype(device: torch.device) -> str:
    """The name of the type that "auto" stands for: "bfloat16" on a CPU whose matrix tiles this
    library's convolutions run on, else "float32".
    """
    return "bfloat16" if device.type == "cpu" and native.matrix_missing() is None else "float32"


def check_dtype(op: str, dtype: str) -> None:
    """Raises ValueError unless `dtype` is one of `DTYPES`."""
    if not isinstance(dtype, str) or dtype not in DTYPES:
        fail(op, "dtype", f"one of {', '.join(DTYPES)}", short(dtype))


def chosen_dtype(op: str, dtype: str, device: torch.device) -> str:
    """ "float32" or "bfloat16", as `dtype` says for a network on `device`. Errors: ValueError."""
    check_dtype(op, dtype)
    return auto_dtype(device) if dtype == "auto" else dtype
