"""The source network's memory format, and its compute type while it trains."""

import torch
from torch import nn

from ..support import messages


def channels_last(op, model, wanted, device):
    """The memory format to train in: `wanted`, or True where None.

    On the CPU, oneDNN (issue 6035, open) writes past its buffer in the weight gradient of a
    channels-last strided 1x1 convolution
    with fewer than 16 channels: such a network keeps the other format. (The frozen network has no
        weight gradient.)
    """
    layers = (m for m in model.modules() if isinstance(m, nn.Conv2d))
    unsafe = device.type == "cpu" and any(
        m.kernel_size == (1, 1) and m.stride != (1, 1) and m.in_channels // m.groups < 16
        for m in layers
    )
    if wanted and unsafe:
        messages.fail(
            op,
            "channels_last",
            (
                "False for strided 1x1 convolutions with fewer than 16 channels on a CPU "
                "(oneDNN issue 6035)"
            ),
            True,
        )
    return not unsafe if wanted is None else wanted


def autocast(device, dtype):
    """No cache of cast weights: within a caller's autocast it would outlive the update of the
    weights.
    """
    return torch.autocast(device.type, dtype, enabled=dtype != torch.float32, cache_enabled=False)
