"""The source network as the poison step sees it: frozen, with one named layer whose output is the features."""

import contextlib
import logging

import torch
from torch import nn

from .. import _checks
from .._registry import BackendError

log = logging.getLogger("miue_fast")


def find_layer(op, model, name):
    layers = dict(model.named_modules())
    if not name or name not in layers:
        _checks.fail(op, "feature", f"a layer of the model ({', '.join(n for n in layers if n)})", repr(name))
    return layers[name]


@contextlib.contextmanager
def frozen(op, model, feature):
    """Yields images -> features [B, D] in eval mode with frozen parameters; puts modes and requires_grad back at the end.

    A model with a method `folded` (those of `miue_fast.models`) is replaced by the copy that it gives: the same function, faster.
    """
    find_layer(op, model, feature)
    if hasattr(model, "folded"):
        model = model.folded()
    layer = find_layer(op, model, feature)
    modes = [(module, module.training) for module in model.modules()]
    needed = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    seen = []
    hook = layer.register_forward_hook(lambda module, inputs, output: seen.append((output, getattr(output, "_version", 0))))

    def features(x):
        seen.clear()
        model(x)
        if len(seen) != 1:
            _checks.fail(op, "feature", "a layer that runs once per forward pass", f"{feature!r}, which ran {len(seen)} times")
        output, version = seen.pop()
        if not isinstance(output, torch.Tensor) or output.dim() < 2 or len(output) != len(x):
            _checks.fail(op, "feature", f"a layer with one output [{len(x)}, ...]", f"{feature!r}: {_checks.describe(output)}")
        if output._version != version:
            _checks.fail(op, "feature", "a layer whose output is not changed in place", f"{feature!r}; choose the layer after it")
        return output.flatten(1)

    try:
        model.eval()
        model.requires_grad_(False)
        yield features
    finally:
        hook.remove()
        for parameter, value in needed:
            parameter.requires_grad_(value)
        for module, mode in modes:
            module.training = mode


def channels_last(op, model, wanted, device):
    """The memory format to use: `wanted`, or True where None.

    On the CPU, oneDNN (issue 6035, open) writes past its buffer in the weight gradient of a channels-last strided 1x1 convolution
    with fewer than 16 channels: such a network keeps the other format.
    """
    layers = (m for m in model.modules() if isinstance(m, nn.Conv2d))
    unsafe = device.type == "cpu" and any(m.kernel_size == (1, 1) and m.stride != (1, 1) and m.in_channels // m.groups < 16 for m in layers)
    if wanted and unsafe:
        _checks.fail(
            op, "channels_last", "False for strided 1x1 convolutions with fewer than 16 channels on a CPU (oneDNN issue 6035)", True
        )
    return not unsafe if wanted is None else wanted


def autocast(device, dtype):
    return torch.autocast(device.type, dtype, enabled=dtype != torch.float32)


class Chunk:
    """How many images enter the network at once. Running out of memory halves this and never the contrastive batch.

    Never one image alone: PyTorch gives its convolutions to another algorithm on the CPU, which rounds differently. With two or
    more per launch the result is bitwise that of the whole batch there.
    """

    def __init__(self, size):
        self.size = size

    def halve(self, count):
        if count < 4:
            raise BackendError(f"out of memory with {count} images per network launch: use a smaller model, or delta_dtype float16 or int8")
        self.size = (count + 1) // 2
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        log.warning("out of memory: network_chunk is now %d (the contrastive batch and the objective do not change)", self.size)

    def whole(self, count, work):
        """work(all rows) in one launch; False if that does not fit."""
        if self.size < count:
            return False
        try:
            work(slice(0, count))
            return True
        except torch.OutOfMemoryError:
            pass  # handled below, where the exception no longer holds the graph's memory
        self.halve(count)
        return False

    def pieces(self, count, work):
        """work(rows) over 0..count, in order, each row once. A last single image joins the launch before it."""
        start = 0
        while start < count:
            stop = start + self.size
            rows = slice(start, count if stop + 1 >= count else stop)
            try:
                work(rows)
                start = rows.stop
                continue
            except torch.OutOfMemoryError:
                pass
            self.halve(rows.stop - rows.start)
