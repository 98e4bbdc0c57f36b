"""The poison step of a contrastive batch: K projected sign steps on the perturbation."""

from collections.abc import Sequence
from typing import Any

import torch

from ..dispatch.registry import OPS
from ..frozen import AutogradNet, FrozenNet
from ..ops import conv_input_grad_step_, perturbed_input, projected_step_
from ..support.calls import Turn
from .graphs import Captured
from .options import Options


def network_input(
    images: torch.Tensor,
    delta: torch.Tensor | None,
    labels: torch.Tensor,
    index: torch.Tensor | None,
    flip: torch.Tensor | None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    *,
    classwise: bool,
    **rest: Any,
) -> torch.Tensor:
    """`perturbed_input` of the rows `index` [B]; with `classwise`, delta has one row per class and
    `labels` [B] choose it. `rest` are more arguments of `perturbed_input`.
    """
    if classwise and delta is not None:
        images, delta, index = images[index], delta[labels], None
    return perturbed_input(images, delta, index, flip, mean, std, **rest)


class Descent:
    """Projected sign steps on rows of a poison store, one contrastive batch after the other. It
    never waits for the device.

    network: from `freeze`, up to the outputs that the objective looks at. images: the store [N, C,
        H, W], uint8 or float32 on [0, 1]. delta: like it, or [num_classes, C, H, W] with
        options.classwise; changed in place. options: of the loss and the step. num_classes: what
        the objective is told of the data set; 0 where it does not ask.
    On CUDA a step of a fused network is captured in a CUDA graph once per batch size, step size and
    normalisation, and replayed; a batch's first step then runs as it is, on the graph's own inputs.
    One thread at a time: a second one is refused (ValueError).
    """

    def __init__(
        self,
        network: FrozenNet | AutogradNet,
        images: torch.Tensor,
        delta: torch.Tensor,
        options: Options,
        num_classes: int = 0,
    ):
        self.network, self.images, self.delta, self.options = network, images, delta, options
        self.num_classes = num_classes
        self.captured = images.is_cuda and network.fused and self._has_kernels()
        self.graphs, self.pool, self.baked = {}, None, None
        self.turn = Turn("Descent")

    def _has_kernels(self) -> bool:
        """Whether every op of the step has a kernel: the reference waits for the device, which a
        capture cannot.
        """
        used = [("perturbed_input", self.network.dtype), ("projected_step_", self.delta.dtype)]
        used += [(op, self.network.dtype) for op in self.options.chosen.ops]
        device = self.images.device.type
        return all(
            OPS[op].choose(self.options.backend, device, dtype).backend != "reference"
            for op, dtype in used
        )

    def __call__(
        self, labels: torch.Tensor, index: torch.Tensor, flip: torch.Tensor | None, alpha: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Takes options.steps steps on the rows `index`. labels, index (int64), flip (bool or
        None): [B] in one order. alpha: step size on the [0, 1] scale.

        Returns: the last step's loss (before its update), and int64 [2]: how often the loss, and
            the gradient, was NaN or Inf.
        """
        with self.turn, self.network.alone():
            self.network.check()
            return self._descend(labels, index, flip, alpha)

    def _descend(self, labels, index, flip, alpha):
        bad = torch.zeros(2, dtype=torch.int64, device=self.images.device)
        steps = self.options.steps
        if not self.captured:
            for _ in range(steps):
                loss = self._step(labels, index, flip, alpha, bad)
            return loss, bad
        given, baked = (labels, index, flip, bad), (alpha, self.network.mean, self.network.std)
        key = len(index), flip is None
        if baked != self.baked:  # another epoch: these numbers are part of the captured launches
            self.graphs, self.pool, self.baked = {}, None, baked
        if key in self.graphs:
            captured = self.graphs[key]
            captured.load(given)
        else:
            inputs = [None if v is None else v.clone() for v in given]
            # Kernels are compiled and loaded in this step, because that is not allowed during a
            # capture; it runs on the inputs of the graph and counts as the first of the batch.
            first = self._step(*inputs[:3], alpha, inputs[3])
            captured = self.graphs[key] = self._capture(inputs, alpha)
            steps -= 1
        for _ in range(steps):
            captured.replay()
        return captured.result.clone() if steps else first, captured.inputs[3].clone()

    def _capture(self, inputs, alpha):
        """One step on static inputs, whose result is the loss."""
        while True:
            try:
                captured = Captured(
                    lambda labels, index, flip, bad: self._step(labels, index, flip, alpha, bad),
                    inputs,
                    self.pool,
                )
                self.pool = captured.pool
                return captured
            except torch.OutOfMemoryError:
                pass  # handled below, where the exception no longer holds the memory
            self.network.forget()
            self.network.chunk.halve(min(self.network.chunk.size, len(inputs[1])))

    def _step(self, labels, index, flip, alpha, bad):
        o, network = self.options, self.network
        channels_last = isinstance(network, FrozenNet) or network.layout is torch.channels_last
        mean, std = network.normalisation(self.images.shape[1])

        def flips(rows):
            return None if flip is None else flip[rows]

        def load(rows):
            return network_input(
                self.images,
                self.delta,
                labels[rows],
                index[rows],
                flips(rows),
                mean,
                std,
                eps=o.eps,
                dtype=network.dtype if network.fused else torch.float32,
                channels_last=channels_last,
                backend=o.backend,
                classwise=o.classwise,
            )

        def take(rows, grad):
            if o.classwise:
                sums.add_((members[:, rows] @ grad.flatten(1).float()).view_as(sums))
                return
            rest: dict[str, Any] = {
                "alpha": alpha,
                "eps": o.eps,
                "nonfinite": bad[1:],
                "backend": o.backend,
            }
            if stem is None:
                projected_step_(self.delta, index[rows], grad, self.images, flips(rows), **rest)
            else:  # grad belongs to the first convolution's result
                conv_input_grad_step_(
                    self.delta,
                    index[rows],
                    grad,
                    stem.back_weight,
                    self.images,
                    flips(rows),
                    **rest,
                    **stem.geometry,
                )

        outputs = network.run(len(index), load)
        stem = network.step_stem
        loss, grad = o.chosen.value_and_grad(outputs, labels, self.num_classes, o)
        bad[0] += ~loss.isfinite()
        if outputs.dtype is torch.float16:
            # Only signs count: a power of two lifts the gradient out of half precision's underflow.
            grad = torch.ldexp(grad, -torch.frexp(grad.abs().amax()).exponent)
        if not o.classwise:
            network.back(grad.to(outputs.dtype), take, stem=stem is not None)
            return loss
        sums = torch.zeros_like(self.delta, dtype=torch.float32)
        members = (torch.arange(len(sums), device=labels.device)[:, None] == labels).float()
        network.back(grad.to(outputs.dtype), take)
        bad[1:] += (~sums.isfinite()).sum()
        self.delta.sub_((alpha * sums.sign_()).to(self.delta.dtype)).clamp_(-o.eps, o.eps)
        return loss


def check_finite(where: str, bad: torch.Tensor, hint: str) -> None:
    """Judges the counts of a `Descent`; this is where the host waits for the device. Errors:
    ValueError, which begins with `where` and ends with `hint`.
    """
    for name, times in zip(("loss (NaN or Inf features)", "input gradient"), bad.tolist()):
        if times:
            raise ValueError(
                f"{where}: {name}: expected finite numbers, got NaN or Inf ({times} times); {hint}"
            )
