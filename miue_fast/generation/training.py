"""The model step: epochs of cross-entropy training of the source network on augment(x) + delta."""

import contextlib
import logging
from collections.abc import Callable
from typing import cast

import torch
import torch.nn.functional as F
from torch import nn

from ..dispatch.registry import OPS, BackendError
from ..frozen.training import packed_training
from ..models import attacked
from ..support.calls import Turn, borrowed, ordinary
from ..support.draws import Draws, backward_of
from ..support.written import shown
from . import batches
from .graphs import Captured
from .options import Options
from .seen import network_input

# keeps the gradients of a float16 network out of underflow; a power of two, taken out again before
# the update
_HALF_SCALE = 128.0
log = logging.getLogger("miue_fast")


class Trainer:
    """Trains `network` with SGD on rows of `images` [N, C, H, W] uint8 plus `delta` (None: on the
    images alone); labels: int64 [N].

    On CUDA the training step of whole batches is captured in one CUDA graph and replayed; the
    learning rate is then a number on the device. A network that cannot be captured (it waits for
    the device) trains call by call, and one log line says so; so does every network with an attack.

    draws: `Draws` that a network with random operations takes its numbers from; None: it has none.
    One thread at a time, and no other thread with the same network: the second is refused
    (ValueError).
    """

    def __init__(
        self,
        network: nn.Module,
        images: torch.Tensor,
        labels: torch.Tensor,
        delta: torch.Tensor | None,
        options: Options,
        draws: Draws | None = None,
    ):
        self.turn, self.draws = Turn("Trainer"), draws
        self.network, self.images, self.labels = network, images, labels
        self.delta, self.options = delta, options.resolved(len(images))
        device = images.device
        self.convolutions = packed_training(network, options.backend, device, self.options.dtype)
        self.captures = (
            images.is_cuda and options.fused and not options.attack and self._has_kernel()
        )
        self.graph, self.ran = None, False
        lr = torch.full((), options.lr, device=device) if self.captures else options.lr
        parameters = [p for p in network.parameters() if p.requires_grad]
        self.optimizer = torch.optim.SGD(
            parameters,
            lr,
            options.momentum,
            weight_decay=options.weight_decay,
            fused=True if self.captures else None,
        )

    def _has_kernel(self):
        """Whether `perturbed_input` has a kernel: its reference waits for the device, which a
        capture cannot.
        """
        return (
            OPS["perturbed_input"].choose(self.options.backend, "cuda", torch.float32).backend
            != "reference"
        )

    def epoch(self, number: int, tick: Callable[[int], object]) -> tuple[float, float]:
        """Trains for one epoch. Returns (mean loss, accuracy in percent). Errors: ValueError for a
        loss that is not finite, BackendError out of memory.

        `tick(images done)` is called after each batch. Waits for the device once, at the end.
        """
        with (
            self.turn,
            borrowed("generate", self.network),
            ordinary(),
            torch.enable_grad(),
            self.convolutions,
        ):
            return self._epoch(number, tick)

    def _epoch(self, number, tick):
        o, device, count = self.options, self.images.device, len(self.images)
        order, flips = (
            t.to(device)
            for t in batches.order_and_flips(count, o.flip, o.seed, number, "model step")
        )
        slices = batches.train_slices(count, cast(int, o.train_batch))
        self.noise = batches.generator(o.seed, number, "attack")
        losses, correct = [], torch.zeros((), dtype=torch.int64, device=device)
        self._set_learning_rate(o.learning_rate(number))
        self.network.train()
        try:
            for part in slices:
                index = order[part]
                loss, right = self._batch(index, flips[part])
                losses.append(loss * len(index))
                correct += right
                tick(len(index))
        except torch.OutOfMemoryError as error:
            raise BackendError(
                "generate: out of memory in the model step: "
                f"lower {shown('generate', 'train_batch')} ({o.train_batch}) or the width"
            ) from error
        losses = torch.stack(losses)
        bad = (~losses.isfinite()).nonzero()
        if len(bad):
            raise ValueError(
                f"generate: epoch {number}, batch {int(bad[0]) + 1} of {len(slices)} "
                "of the model step: loss: expected a finite number, got NaN or Inf; "
                f"lower {shown('generate', 'lr')} ({o.lr})"
            )
        return float(losses.sum()) / count, 100 * float(correct) / count

    def _set_learning_rate(self, value):
        for group in self.optimizer.param_groups:
            if isinstance(group["lr"], torch.Tensor):
                group["lr"].fill_(value)
            else:
                group["lr"] = value

    def _batch(self, index, flip):
        """(loss, how many are right) of one batch, after which the weights are new."""
        if not self.captures or len(index) != self.options.train_batch:
            return self._step(index, flip)
        if self.graph is None and not self.ran:
            self.ran = True
            return _apart(self._step, index, flip)
        if self.graph is None:
            # The captured backward pass makes gradients of its own.
            self.optimizer.zero_grad(set_to_none=True)
            try:
                self.graph = Captured(
                    self._step, [index.clone(), flip.clone()], generators=self._generators()
                )
            except torch.OutOfMemoryError:
                raise
            except RuntimeError as error:
                self.captures = False
                log.warning(
                    "the model step runs call by call: it cannot be captured in a CUDA graph (%s)",
                    str(error).splitlines()[0],
                )
                self.optimizer.zero_grad(set_to_none=True)  # what the capture left has no values
                return self._step(index, flip)
        else:
            self.graph.load((index, flip))
        self.graph.replay()
        return tuple(value.clone() for value in self.graph.result)

    def _generators(self):
        """The generators whose numbers differ at every replay."""
        return (
            ()
            if self.draws is None
            else [g for g in self.draws.generators.values() if g.device.type == "cuda"]
        )

    def _step(self, index, flip):
        o, device, labels = self.options, self.images.device, self.labels[index]
        dtype = getattr(torch, o.dtype)
        scale = _HALF_SCALE if dtype is torch.float16 else 1.0

        def load(delta):
            return network_input(
                self.images,
                delta,
                labels,
                index,
                flip,
                eps=o.eps,
                channels_last=o.channels_last,
                backend=o.backend,
                classwise=o.classwise,
            )

        # No cache of cast weights: within a caller's autocast it would outlive their update.
        autocast = torch.autocast(
            device.type, dtype, enabled=dtype != torch.float32, cache_enabled=False
        )
        x = load(self.delta)
        if o.attack:
            with self.draws or contextlib.nullcontext(), autocast:
                x = self._attacked(x, labels, scale)
        if self.draws is not None:
            self.draws.drew = False
        with self.draws or contextlib.nullcontext(), autocast:
            logits = self.network(x)
        loss = F.cross_entropy(logits.float(), labels)
        if o.mixed and self.delta is not None:
            with self.draws or contextlib.nullcontext(), autocast:
                clean = self.network(load(None))
            clean_loss = F.cross_entropy(clean.float(), labels)
            loss = (1 - o.mixed) * loss + o.mixed * clean_loss
        self.optimizer.zero_grad(set_to_none=True)
        with backward_of(self.draws):
            (loss * scale).backward()
        if scale != 1:
            torch._foreach_div_(
                [p.grad for p in self.network.parameters() if p.grad is not None], scale
            )
        self.optimizer.step()
        return loss.detach(), (logits.detach().argmax(1) == labels).sum()

    def _attacked(self, x, labels, scale):
        """x within options.attack of itself, with a larger loss."""
        o = self.options
        noise = 2 * torch.rand(x.shape, generator=self.noise).to(x.device) - 1
        step = 2.5 * o.attack / o.attack_steps
        return attacked(
            self.network,
            x,
            labels,
            noise,
            eps=o.attack,
            step=step,
            steps=o.attack_steps,
            scale=scale,
        )


def _apart(step, *args):
    """step(*args) on a stream of its own, as autograd wants it before a capture: its nodes remember
    the stream they were made on.
    """
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        result = step(*args)
    torch.cuda.current_stream().wait_stream(stream)
    return result
