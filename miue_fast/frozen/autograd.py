"""The same two calls through PyTorch's autograd, for networks that have no fused form."""

import contextlib

import torch

from .._checks import describe, fail
from .layers import device_of
from .net import NHWC, Chunks, Frozen, check_images


class AutogradNet(Frozen):
    """What `freeze` gives for a network that is not lowered: same calls, same results, PyTorch's speed and memory.

    A batch of one launch keeps its graph; a larger one is computed twice, without a graph and then launch by launch with one.
    """

    fused = False

    def __init__(self, model, feature, reason, *, dtype, chunk, channels_last):
        self.model, self.feature, self.reason, self.dtype = model, feature, reason, dtype
        self.layout = NHWC if channels_last else torch.contiguous_format
        self.layer = dict(model.named_modules())[feature]
        self.device = device_of(model)
        self.chunk = Chunks(chunk or 2**62)
        self.pending = None

    def refold(self):
        """Nothing to do: the model itself is run."""

    def run(self, count, load):
        features, graphs = [], []
        keep = self.chunk.size >= count

        def work(rows):
            graph = keep and rows.stop - rows.start == count
            x = load(rows)
            f = self._features(x.requires_grad_(graph), graph)
            features.append(f.detach())
            graphs.append((x, f) if graph else None)

        self.chunk.each(slice(0, count), work)
        self.pending, self.count = (load, graphs[0]), count
        return features[0] if len(features) == 1 else torch.cat(features)

    def back(self, d_features, take, *, stem=False):
        rows, (load, graph) = slice(0, self.count), self.pending
        self.pending = self.count = None

        def work(part):
            x = load(part).requires_grad_()
            push(part, x, self._features(x, True))

        def push(part, x, features):
            take(part, torch.autograd.grad(features, x, d_features[part].to(features.dtype))[0])

        if graph and self.chunk.attempt(rows, lambda part: push(part, *graph)):
            return
        graph = None  # its memory is needed: everything is computed anew, in smaller launches
        self.chunk.each(rows, work)

    def _features(self, x, graph):
        """Eval mode, frozen parameters, the layer's output through a hook; modes and requires_grad are put back."""
        seen = []
        hook = self.layer.register_forward_hook(lambda module, inputs, output: seen.append((output, getattr(output, "_version", 0))))
        modes = [(module, module.training) for module in self.model.modules()]
        needed = [(parameter, parameter.requires_grad) for parameter in self.model.parameters()]
        half = torch.autocast(x.device.type, self.dtype) if self.dtype in (torch.float16, torch.bfloat16) else contextlib.nullcontext()
        try:
            self.model.eval()
            self.model.requires_grad_(False)
            with torch.set_grad_enabled(graph), half:
                self.model(x)
        finally:
            hook.remove()
            for parameter, value in needed:
                parameter.requires_grad_(value)
            for module, mode in modes:
                module.training = mode
        if len(seen) != 1:
            fail("freeze", "feature", "a layer that runs once per forward pass", f"{self.feature!r}, which ran {len(seen)} times")
        output, version = seen.pop()
        if not isinstance(output, torch.Tensor) or output.dim() < 2 or len(output) != len(x):
            fail("freeze", "feature", f"a layer with one output [{len(x)}, ...]", f"{self.feature!r}: {describe(output)}")
        if output._version != version:
            fail("freeze", "feature", "a layer whose output is not changed in place", f"{self.feature!r}; choose the layer after it")
        with torch.set_grad_enabled(graph):  # the caller may have switched gradients off
            return output.flatten(1)

    def forward(self, images):
        images = check_images(images, self.device, None)
        wide = images.to(torch.float64 if self.dtype == torch.float64 else torch.float32)
        return self.run(len(images), lambda rows: wide[rows].detach().clone(memory_format=self.layout))
