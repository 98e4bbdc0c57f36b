"""The same two calls through PyTorch's autograd, for networks that have no fused form."""

import contextlib
import threading
from collections.abc import Callable, Generator

import torch
from torch import nn

from ..support.calls import borrowed
from ..support.messages import describe, fail
from .base import NHWC, wide
from .chunks import Chunks
from .form import Frozen


class AutogradNet(Frozen):
    """What `freeze` gives for a network that has no fused form: the same calls and results, with
    PyTorch's speed and memory.

    A batch of one launch keeps its graph. A larger one is computed twice: first without a graph,
    then launch by launch with one. A call runs the model itself, meanwhile in eval mode and with
    frozen weights: two threads need a model each, and the second is refused."""

    fused = False

    def __init__(
        self,
        model: nn.Module,
        feature: str,
        reason: str,
        *,
        dtype: torch.dtype,
        chunk: int | None,
        channels_last: bool,
    ) -> None:
        super().__init__(model)
        self.feature, self.reason, self.dtype = feature, reason, dtype
        self.channels_last = channels_last
        self.chunk = Chunks(chunk or 2**62)
        if any(tensor.is_inference() for tensor in [*model.parameters(), *model.buffers()]):
            fail(
                "freeze",
                "model",
                "ordinary tensors as weights",
                "tensors that were made in torch.inference_mode",
            )

    @property
    def layout(self) -> torch.memory_format:
        """The memory format of the network's input."""
        return NHWC if self.channels_last else torch.contiguous_format

    @contextlib.contextmanager
    def alone(self) -> Generator[None, None, None]:
        with super().alone(), borrowed("FrozenNet", self.model):
            yield

    def check(self) -> None:
        if self.feature not in dict(self.model.named_modules()):
            fail(
                "FrozenNet",
                "model",
                f"a layer {self.feature!r}, as it was frozen",
                "none; call freeze again",
            )

    def refold(self) -> None:
        """Does nothing: it is the model itself that runs."""

    def run(self, count: int, load: Callable[[slice], torch.Tensor]) -> torch.Tensor:
        self.forget()
        features, graphs = [], []
        keep = self.chunk.size >= count

        def work(rows):
            graph = keep and rows.stop - rows.start == count
            x = load(rows)
            f = self._features(x.requires_grad_(graph), graph)
            features.append(f.detach())
            graphs.append((x, f) if graph else None)

        self.chunk.each(slice(0, count), work)
        self.load, self.graph, self.count = load, graphs[0], count
        return features[0] if len(features) == 1 else torch.cat(features)

    def back(
        self, grad: torch.Tensor, take: Callable[[slice, torch.Tensor], None], *, stem: bool = False
    ) -> None:
        rows, load, graph = slice(0, self.count), self.load, self.graph
        self.forget()

        def work(part):
            x = load(part).requires_grad_()
            push(part, x, self._features(x, True))

        def push(part, x, features):
            take(part, torch.autograd.grad(features, x, grad[part].to(features.dtype))[0])

        if graph and self.chunk.attempt(rows, lambda part, graph=graph: push(part, *graph)):
            return
        graph = None  # Its memory is needed: everything is computed again, in smaller launches.
        self.chunk.each(rows, work)

    def _weights(self):
        """The model's floating weights and statistics in the type that computes, by name; those
        that have it already are left out.
        """
        named = {**dict(self.model.named_parameters()), **dict(self.model.named_buffers())}
        kind = wide(self.dtype)
        return {
            name: t.detach().to(kind)
            for name, t in named.items()
            if t.is_floating_point() and t.dtype != kind
        }

    def _features(self, x, graph):
        """Eval mode, frozen parameters, the layer's output through a hook; modes and requires_grad
        are put back.
        """
        seen, me = [], threading.get_ident()

        def see(module, inputs, output):
            if threading.get_ident() == me:
                seen.append((output, getattr(output, "_version", 0)))

        hook = dict(self.model.named_modules())[self.feature].register_forward_hook(see)
        modes = [(module, module.training) for module in self.model.modules()]
        needed = [(parameter, parameter.requires_grad) for parameter in self.model.parameters()]
        halves = self.dtype in (
            torch.float16,
            torch.bfloat16,
        )  # not cached: a caller's autocast would keep what was cast before training
        half = (
            torch.autocast(x.device.type, self.dtype, cache_enabled=False)
            if halves
            else contextlib.nullcontext()
        )
        try:
            self.model.eval()
            self.model.requires_grad_(False)
            with torch.set_grad_enabled(graph), half:
                torch.func.functional_call(self.model, weights, (x,)) if (
                    weights := self._weights()
                ) else self.model(x)
        finally:
            hook.remove()
            for parameter, value in needed:
                parameter.requires_grad_(value)
            for module, mode in modes:
                module.training = mode
        if len(seen) != 1:
            fail(
                "freeze",
                "feature",
                "a layer that runs once per forward pass",
                f"{self.feature!r}, which ran {len(seen)} times",
            )
        output, version = seen.pop()
        if not isinstance(output, torch.Tensor) or output.dim() < 2 or len(output) != len(x):
            fail(
                "freeze",
                "feature",
                f"a layer with one output [{len(x)}, ...]",
                f"{self.feature!r}: {describe(output)}",
            )
        if output._version != version:
            fail(
                "freeze",
                "feature",
                "a layer whose output is not changed in place",
                f"{self.feature!r}; choose the layer after it",
            )
        with torch.set_grad_enabled(graph):  # the caller may have switched gradients off
            return output.flatten(1)

    def features(self, images: torch.Tensor) -> torch.Tensor:
        images = images.to(wide(self.dtype))
        return self.run(len(images), lambda rows: images[rows].clone(memory_format=self.layout))
