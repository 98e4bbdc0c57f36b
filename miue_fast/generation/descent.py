"""The poison step of a contrastive batch: K projected sign steps on the perturbation."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F

from ..dispatch.registry import OPS
from ..frozen import AutogradNet, FrozenNet
from ..ops import conv_input_grad_step_, projected_step_
from ..support.calls import Turn
from ..support.messages import fail
from .graphs import Captured
from .options import Options
from .robust import Drawn
from .seen import Seen
from .store import levels


class Descent:
    """Projected sign steps on rows of a poison store, one contrastive batch after the other. It
    never waits for the device.

    network: from `freeze`, up to the outputs that the objective looks at. images: the store [N, C,
        H, W], uint8 or float32 on [0, 1]. delta: like it, or [num_classes, C, H, W] with
        options.classwise; changed in place. options: of the loss and the step. num_classes: what
        the objective is told of the data set; 0 where it does not ask.
    Errors: ValueError where options.robust does not fit the images.
    On CUDA a step of a fused network is captured in a CUDA graph once per batch size, step size and
    normalisation, and replayed, the view of each step being one of its inputs; a batch's first step
    then runs as it is, on the graph's own inputs. Where options.robust computes new pixels, or a
    gradient is the mean of several draws, nothing is captured.
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
        self.robust = options.transforms
        self.robust.check(images.shape)
        self.captured = (
            images.is_cuda
            and network.fused
            and not self.robust.changes
            and options.eot == 1
            and self._has_kernels()
        )
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
        self,
        labels: torch.Tensor,
        index: torch.Tensor,
        flip: torch.Tensor | None,
        alpha: float,
        draws: Callable[[int], torch.Generator] | None = None,
        eps: float | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Takes options.steps steps on the rows `index`. labels, index (int64), flip (bool or
        None): [B] in one order; a crop of options.robust mirrors in place of flip. alpha: step size
        on the [0, 1] scale. draws: step number -> the generator, on the CPU, of what is random in
        that step; needed where options.robust draws anything. eps: the budget of these steps, at
        most options.eps, which None stands for.

        Returns: the last step's loss (before its update), and int64 [2]: how often the loss, and
            the gradient, was NaN or Inf.
        """
        with self.turn, self.network.alone():
            self.network.check()
            sizes = {"alpha": alpha, "eps": self.options.eps if eps is None else eps}
            return self._descend(labels, index, flip, sizes, self._drawn(len(index), draws))

    def _drawn(self, batch, draws):
        """What is random in each of the steps, options.eot times."""
        steps, o = range(self.options.steps), self.options
        if not self.robust.draws:
            return [[Drawn()]] * len(steps)
        if draws is None:
            fail("Descent", "draws", "a generator for each step of options.robust", None)
        drawn = []
        for generator in map(draws, steps):
            each = [
                self.robust.draw(batch, self.images.shape, o.flip, generator) for _ in range(o.eot)
            ]
            drawn.append(each)
        views = [one.view for each in drawn for one in each if one.view is not None]
        if views:
            views = torch.stack(views)
            views = iter(views.to(self.images.device, non_blocking=True))
            drawn = [[one._replace(view=next(views)) for one in each] for each in drawn]
        return drawn

    def _descend(self, labels, index, flip, sizes, drawn):
        bad = torch.zeros(2, dtype=torch.int64, device=self.images.device)
        if self.robust.moves:
            flip = None
        if not self.captured:
            for step in drawn:
                loss = self._step(labels, index, flip, sizes, bad, step)
            return loss, bad
        views = [step[0].view for step in drawn]
        given = labels, index, flip, bad, views[0]
        baked = sizes, self.network.mean, self.network.std
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
            first = self._step(*inputs[:3], sizes, inputs[3], [Drawn(inputs[4])])
            captured = self.graphs[key] = self._capture(inputs, sizes)
            views = views[1:]
        for view in views:
            captured.load((None, None, None, None, view))
            captured.replay()
        return captured.result.clone() if views else first, captured.inputs[3].clone()

    def _capture(self, inputs, sizes):
        """One step on static inputs, whose result is the loss."""
        while True:
            try:
                captured = Captured(
                    lambda labels, index, flip, bad, view: self._step(
                        labels, index, flip, sizes, bad, [Drawn(view)]
                    ),
                    inputs,
                    self.pool,
                )
                self.pool = captured.pool
                return captured
            except torch.OutOfMemoryError:
                pass  # handled below, where the exception no longer holds the memory
            self.network.forget()
            self.network.chunk.halve(min(self.network.chunk.size, len(inputs[1])))

    def _step(self, labels, index, flip, sizes, bad, draws):
        """One step along the mean gradient of the draws, of the alpha and within the eps of
        `sizes`. Returns the mean of their losses.
        """
        if self.delta.dtype is not torch.int8 or sizes["eps"] == self.options.eps:
            return self._project(labels, index, flip, sizes, bad, draws)
        # The levels of the store are those of the whole budget. Both ranges of the projection hold
        # 0, so that the narrower one may come last.
        whole = {**sizes, "eps": self.options.eps}
        loss = self._project(labels, index, flip, whole, bad, draws)
        most = levels(sizes["eps"], self.options)
        self.delta[index] = self.delta[index].clamp_(-most, most)
        return loss

    def _project(self, labels, index, flip, sizes, bad, draws):
        o, network, grid = self.options, self.network, self.robust.grid
        seen = [
            Seen(network, self.images, self.delta, o, labels, index, flip, drawn) for drawn in draws
        ]
        if o.classwise:
            return self._class_step(seen, labels, sizes, bad)
        rest: dict[str, Any] = {**sizes, "nonfinite": bad[1:], "backend": o.backend}
        if len(seen) > 1:
            sums = torch.zeros((len(index), *self.delta.shape[1:]), device=self.delta.device)

            def add(each, rows, grad):
                sums[rows] += each.back(rows, grad)

            losses = [self._gradient(each, bad, partial(add, each)) for each in seen]
            projected_step_(self.delta, index, sums, self.images, flip, grid=grid, **rest)
            return torch.stack(losses).mean()
        (one,) = seen
        view, changes = one.drawn
        # The gradient of the images comes first where it is moved, or summed over cells.
        stem = None if changes or view is not None or grid > 1 else network.step_stem

        def take(rows, grad):
            where, mirrored = (self.delta, index[rows]), None if flip is None else flip[rows]
            if stem is not None:  # grad belongs to the first convolution's result
                conv_input_grad_step_(
                    *where, grad, stem.back_weight, self.images, mirrored, **rest, **stem.geometry
                )
            elif changes:
                grad = one.back(rows, grad)
                projected_step_(*where, grad, self.images, mirrored, grid=grid, **rest)
            else:
                moved = None if view is None else view[rows]
                projected_step_(*where, grad, self.images, mirrored, view=moved, grid=grid, **rest)

        return self._gradient(one, bad, take, stem=stem is not None)

    def _class_step(self, seen, labels, sizes, bad):
        """The step of one perturbation per class, along the sums of its images' gradients."""
        grid, alpha, eps = self.robust.grid, sizes["alpha"], sizes["eps"]
        sums = torch.zeros_like(self.delta, dtype=torch.float32)
        members = (torch.arange(len(sums), device=labels.device)[:, None] == labels).float()

        def take(each, rows, grad):
            grad = each.back(rows, grad).flatten(1).float()
            sums.add_((members[:, rows] @ grad).view_as(sums))

        losses = [self._gradient(each, bad, partial(take, each)) for each in seen]
        bad[1:] += (~sums.isfinite()).sum()
        if grid > 1:
            sums = _cell_means(sums, grid)
        self.delta.sub_((alpha * sums.sign_()).to(self.delta.dtype)).clamp_(-eps, eps)
        return torch.stack(losses).mean()

    def _gradient(self, seen, bad, take, stem=False):
        """Calls take(rows, gradient of the network's input there) for all rows, and returns the
        loss. stem: the gradient of the first convolution's result instead.
        """
        outputs = self.network.run(len(seen.index), seen.load)
        loss, grad = self.options.chosen.value_and_grad(
            outputs, seen.labels, self.num_classes, self.options
        )
        bad[0] += ~loss.isfinite()
        if outputs.dtype is torch.float16:
            # A power of two lifts the gradient out of half precision's underflow. Of one draw only
            # signs count; among several each has to come back with its own size.
            exponent = torch.frexp(grad.abs().amax()).exponent
            grad = torch.ldexp(grad, -exponent)
            if self.options.eot > 1:
                self.network.back(
                    grad.half(), lambda rows, grad: take(rows, torch.ldexp(grad.float(), exponent))
                )
                return loss
        self.network.back(grad.to(outputs.dtype), take, stem=stem)
        return loss


def _cell_means(grad, size):
    """Every value replaced by the mean over its cell, which has the sign of the sum."""
    height, width = grad.shape[2:]
    cells = F.avg_pool2d(grad, min(size, max(height, width)), ceil_mode=True)
    for axis, length in ((2, height), (3, width)):
        cells = cells.repeat_interleave(size, axis).narrow(axis, 0, length)
    return cells


def check_finite(where: str, bad: torch.Tensor, hint: str) -> None:
    """Judges the counts of a `Descent`; this is where the host waits for the device. Errors:
    ValueError, which begins with `where` and ends with `hint`.
    """
    for name, times in zip(("loss (NaN or Inf features)", "input gradient"), bad.tolist()):
        if times:
            raise ValueError(
                f"{where}: {name}: expected finite numbers, got NaN or Inf ({times} times); {hint}"
            )
