"""A frozen network as fused layers: features of a batch, and the input gradient of those features,
in chunks of images.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from ..dispatch.registry import OPS
from ..ops import perturbed_input
from ..support.messages import fail
from .base import NHWC, Gradients, Tape, consumers, keep, scale_and_shift, wide
from .chunks import CPU_CHUNK, Chunks
from .convolution import Conv
from .form import Frozen
from .plan import Plan
from .trace import changed_calls, hooks_of_all_modules


class FrozenNet(Frozen):
    """`forward(images) -> features` and `input_grad(grad) -> image_grad` of a frozen eval-mode
    network. It is made by `freeze`.

    Attributes:
        plan: the fused layers.
        mean, std: the input normalisation that was found at the network's start (lists of C
            numbers), or None.
        dtype: the compute type. chunk: images per launch. fused: True. reason: None.
        fp8: whether the convolutions multiply in e4m3.

    The implementations that the layers call are chosen at `freeze` and `refold`, and then called
    without the dispatcher in between; a call switches autocast off once. Between the two calls only
    ReLU bits, pool positions and shapes are kept. The result is deterministic on one machine and
    thread count. The chunk size changes roundings at most (see `Chunks`), and with fp8, whose
    scales belong to a launch, the values. A second thread is refused while one is at work.
    `copy.deepcopy` and pickle take the model along. A model whose layers were replaced or given
    hooks since is refused."""

    fused, reason = True, None

    def __init__(
        self,
        model: nn.Module,
        plan: Plan,
        *,
        dtype: torch.dtype,
        chunk: int | None,
        backend: str,
        fp8: bool = False,
    ) -> None:
        super().__init__(model)
        self.plan, self.dtype, self.backend, self.fp8 = plan, dtype, backend, fp8
        cpu = self.device.type == "cpu"
        self.chunk = Chunks(
            chunk or (CPU_CHUNK if cpu else 2**62), 4 * torch.get_num_threads() if cpu else 2
        )
        self.parts = consumers(plan.layers, plan.out)
        self.last_use = {value: k for k, layer in enumerate(plan.layers) for value in layer.inputs}
        readers = [layer for layer in plan.layers if 0 in layer.inputs]
        self.stem = (
            readers[0]
            if len(readers) == 1 and isinstance(readers[0], Conv) and readers[0].inputs == [0]
            else None
        )
        self.channels = self.stem.module.in_channels if self.stem and self.stem.pick == 1 else None
        for layer in plan.layers:
            # Pixels, and the step on them, keep their precision.
            if fp8 and isinstance(layer, Conv) and layer.inputs[0] != 0:
                layer.fp8 = True
        self.scale: torch.Tensor | None = None
        self.refold()

    def __getstate__(self) -> dict[str, Any]:
        return {k: v for k, v in super().__getstate__().items() if k != "epilogue"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.resolve()

    def check(self) -> None:
        for parent, name, module, ran in self.plan.places:
            if parent is not None and parent._modules.get(name) is not module:
                fail(
                    "FrozenNet",
                    "model",
                    "the layers that were frozen",
                    f"another {name}; call freeze again",
                )
            if ran and (reason := changed_calls(module)):
                fail(
                    "FrozenNet",
                    "model",
                    "the layers as they were frozen",
                    f"{name or 'a model'} with {reason}; call freeze again",
                )
        if hooks_of_all_modules():
            fail(
                "FrozenNet",
                "model",
                "no hooks of all modules (torch.nn.modules.module)",
                "some; freeze it with fused=False",
            )

    def refold(self) -> None:
        """Takes over the model's present weights and running statistics, in place and without
        tracing again. Errors: ValueError, BackendError.
        """
        with self.alone():
            self.check()
            self._refold()

    @torch.no_grad()
    def _refold(self):
        if self.plan.norms:
            scale, shift = scale_and_shift(self.plan.norms, self.channels or 1, self.device)
            if not (scale != 0).all() or not scale.isfinite().all():
                fail(
                    "freeze",
                    "model",
                    "an input normalisation with finite scales other than 0",
                    scale.tolist(),
                )
            self.mean, self.std = (-shift / scale).tolist(), (1 / scale).tolist()
            keep(self, "scale", scale)
        for layer in self.plan.layers:
            layer.refold(self.dtype, self.device, self.scale if layer is self.stem else None)
        self.resolve()
        self.forget()

    def resolve(self) -> None:
        """Chooses the implementations that the layers call. Errors: BackendError."""
        for layer in self.plan.layers:
            layer.resolve(self.backend, self.device, self.dtype)
        grad_epilogue = OPS["conv_grad_epilogue_"]
        self.epilogue = grad_epilogue.resolve(self.backend, self.device.type, self.dtype)

    @property
    def packed_bytes(self) -> int:
        """The memory of the packed weights, which are made at the first images of a size."""
        convolutions = [layer for layer in self.plan.layers if isinstance(layer, Conv)]
        packed = [each for layer in convolutions for each in layer.packed.values()]
        return sum(each.weights.nbytes for each in packed)

    @property
    def step_stem(self) -> Conv | None:
        """The first layer, if its input gradient and the projected step are one call after `run`;
        None where the gradient comes first, from packed weights.
        """
        return None if self.stem is None or self.stem.packed.get(True) else self.stem

    @torch.no_grad()
    def run(self, count: int, load: Callable[[slice], torch.Tensor]) -> torch.Tensor:
        """Features [count, D]. `load(rows)` gives normalised images of those rows: [b, C, H, W],
        channels-last, self.dtype.
        """
        self.forget()
        tapes: list[tuple[slice, Tape]] = []
        features: list[torch.Tensor] = []

        def work(rows):
            tape = Tape()
            features.append(self._forward(load(rows), tape))
            tapes.append((rows, tape))

        self.chunk.each(slice(0, count), work)
        self.tapes, self.load, self.count = tapes, load, count
        return features[0] if len(features) == 1 else torch.cat(features)

    @torch.no_grad()
    def back(
        self, grad: torch.Tensor, take: Callable[[slice, torch.Tensor], None], *, stem: bool = False
    ) -> None:
        """Calls take(rows, gradient) for each chunk of the last `run`: the gradient of the images,
        or with `stem` that of the first convolution's result.

        A chunk that runs out of memory is computed anew from its images, in smaller launches.
        """
        tapes, load = self.tapes, self.load
        self.forget()

        def anew(part):
            tape = Tape()
            self._forward(load(part), tape)
            take(part, self._backward(grad[part], tape, stem))

        for rows, tape in tapes:
            if not self.chunk.attempt(
                rows, lambda part, tape=tape: take(part, self._backward(grad[part], tape, stem))
            ):
                self.chunk.each(rows, anew)

    def _forward(self, x: torch.Tensor, tape: Tape) -> torch.Tensor:
        values = {0: x}
        for k, layer in enumerate(self.plan.layers):
            values[layer.out] = layer.forward(tape, *map(values.__getitem__, layer.inputs))
            for v in layer.inputs:
                if self.last_use[v] == k:
                    values.pop(v, None)
        return values[self.plan.out]

    def _backward(self, grad: torch.Tensor, tape: Tape, stem: bool) -> torch.Tensor:
        gradients = Gradients(tape, self.parts, self.epilogue)
        gradients.add(self.plan.out, grad.to(self.dtype).contiguous(), False)
        for layer in reversed(self.plan.layers):
            grad, owned = gradients.sums.pop(layer.out)
            if stem and layer is self.stem:
                return grad
            layer.backward(tape, grad, owned, gradients)
        grad, _ = gradients.sums.pop(0)
        if self.scale is not None and self.stem is None:
            grad = (grad * self.scale[:, None, None].to(wide(self.dtype))).to(self.dtype)
        return grad

    @torch.no_grad()
    def features(self, images: torch.Tensor) -> torch.Tensor:
        factor = self.scale
        if self.mean is None or factor is None:
            return self.run(
                len(images), lambda rows: images[rows].to(self.dtype, memory_format=NHWC)
            )
        if self.dtype != torch.float64:
            images = images.to(torch.float32).contiguous()
            mean, std = self.normalisation(images.shape[1])
            return self.run(
                len(images),
                lambda rows: perturbed_input(images[rows], mean=mean, std=std, dtype=self.dtype),
            )
        mean, scale = (
            v[:, None, None] for v in (torch.tensor(self.mean, dtype=torch.float64), factor)
        )
        return self.run(
            len(images),
            lambda rows: ((images[rows].double() - mean) * scale).contiguous(memory_format=NHWC),
        )
