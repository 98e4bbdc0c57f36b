"""The poison step of a contrastive batch: K projected sign steps on the perturbation."""

import torch
from torch import nn

from ..dispatch import checks
from ..dispatch.registry import OPS
from ..frozen import AutogradNet, FrozenNet, frozen_form
from ..ops import conv_input_grad_step_, perturbed_input, projected_step_
from ..support import messages
from ..support.calls import Turn, ordinary
from .graphs import Captured
from .objectives import on_logits, value_and_grad


def network_input(images, delta, labels, index, flip, mean=None, std=None, *, classwise, **rest):
    """`perturbed_input` of rows `index`; with `classwise`, delta has one row per class and `labels`
    [B] choose it.
    """
    if classwise and delta is not None:
        images, delta, index = images[index], delta[labels], None
    return perturbed_input(images, delta, index, flip, mean, std, **rest)


class Descent:
    """Projected sign steps on rows of a poison store, one contrastive batch after the other. Never
    waits for the device.

    net: from `freeze`, up to the outputs that the objective looks at. images: the store [N, C, H,
        W]; delta: like it, or [classes, C, H,
    W] with options.classwise; changed in place. options: of the loss and the step. classes: how
    many, for options.objective "tap". On CUDA a step of a fused network is captured in a CUDA graph
    once per batch size, step size and normalisation, and replayed; a batch's first step then runs
    as it is, on the graph's own inputs. One thread at a time: a second one is refused (ValueError).
    """

    def __init__(self, net, images, delta, options, classes=None):
        self.net, self.images, self.delta, self.options, self.classes = (
            net,
            images,
            delta,
            options,
            classes,
        )
        self.captured = images.is_cuda and net.fused and self._has_kernels()
        self.graphs, self.pool, self.baked = {}, None, None
        self.turn = Turn("Descent")

    def _has_kernels(self):
        """Whether every op of the step has one: the reference waits for the device, which a capture
        cannot.
        """
        used = [("perturbed_input", self.net.dtype), ("projected_step_", self.delta.dtype)]
        used += (
            [] if on_logits(self.options.objective) else [("mi_ue_value_and_grad", self.net.dtype)]
        )
        device = self.images.device.type
        return all(
            OPS[op].choose(self.options.backend, device, dtype).backend != "reference"
            for op, dtype in used
        )

    def __call__(self, labels, index, flip, alpha):
        """options.steps steps on rows `index`. labels, index, flip: [B] in one order.

        Returns: the last step's loss (before its update), and int64 [2]: how often the loss, and
            the gradient, was NaN or Inf.
        """
        with self.turn, self.net.alone():
            self.net.check()
            return self._descend(labels, index, flip, alpha)

    def _descend(self, labels, index, flip, alpha):
        bad = torch.zeros(2, dtype=torch.int64, device=self.images.device)
        steps = self.options.steps
        if not self.captured:
            for _ in range(steps):
                loss = self._step(labels, index, flip, alpha, bad)
            return loss, bad
        given, baked = (labels, index, flip, bad), (alpha, self.net.mean, self.net.std)
        key = len(index), flip is None
        if baked != self.baked:  # another epoch: these numbers are part of the captured launches
            self.graphs, self.pool, self.baked = {}, None, baked
        if key in self.graphs:
            captured = self.graphs[key]
            captured.load(given)
        else:
            inputs = [None if v is None else v.clone() for v in given]
            first = self._step(
                *inputs[:3], alpha, inputs[3]
            )  # compiles and loads what a capture must not, for these very inputs
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
            self.net.forget()
            self.net.chunk.halve(min(self.net.chunk.size, len(inputs[1])))

    def _step(self, labels, index, flip, alpha, bad):
        o, net = self.options, self.net
        channels_last = net.fused or net.layout is torch.channels_last
        mean, std = net.normalisation(self.images.shape[1])

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
                dtype=net.dtype if net.fused else torch.float32,
                channels_last=channels_last,
                backend=o.backend,
                classwise=o.classwise,
            )

        def take(rows, grad):
            if o.classwise:
                sums.add_((members[:, rows] @ grad.flatten(1).float()).view_as(sums))
                return
            rest = {"alpha": alpha, "eps": o.eps, "nonfinite": bad[1:], "backend": o.backend}
            if net.stem is None:
                projected_step_(self.delta, index[rows], grad, self.images, flips(rows), **rest)
            else:  # grad belongs to the first convolution's result
                conv_input_grad_step_(
                    self.delta,
                    index[rows],
                    grad,
                    net.stem.back_weight,
                    self.images,
                    flips(rows),
                    **rest,
                    **net.stem.geometry,
                )

        features = net.run(len(index), load)
        loss, grad = value_and_grad(features, labels, self.classes, o)
        bad[0] += ~loss.isfinite()
        if (
            features.dtype is torch.float16
        ):  # only signs count: a power of two lifts the gradient out of half precision's underflow
            grad = torch.ldexp(grad, -torch.frexp(grad.abs().amax()).exponent)
        if not o.classwise:
            net.back(grad.to(features.dtype), take, stem=net.stem is not None)
            return loss
        sums = torch.zeros_like(self.delta, dtype=torch.float32)
        members = (torch.arange(len(sums), device=labels.device)[:, None] == labels).float()
        net.back(grad.to(features.dtype), take)
        bad[1:] += (~sums.isfinite()).sum()
        self.delta.sub_((alpha * sums.sign_()).to(self.delta.dtype)).clamp_(-o.eps, o.eps)
        return loss


def check_finite(where, bad, hint):
    """ValueError if the counts of a `Descent` are not zero; this is where the host waits for the
    device.
    """
    for name, times in zip(("loss (NaN or Inf features)", "input gradient"), bad.tolist()):
        if times:
            raise ValueError(
                f"{where}: {name}: expected finite numbers, got NaN or Inf ({times} times); {hint}"
            )


@ordinary()  # whatever the loop around it runs in
def perturb(
    model,
    images,
    labels,
    delta,
    *,
    steps=10,
    alpha,
    eps=8 / 255,
    temperature=0.1,
    zeta=0.1,
    denominator="all",
    normalize_dim=True,
    feature="avgpool",
    flip=None,
    network_chunk=None,
    dtype=None,
    channels_last=False,
    fused=True,
    fp8=False,
    backend="auto",
):
    """The poison step of one batch, for people with their own loop: `steps` projected sign steps on
    `delta`.

    Args:
        model: any nn.Module that takes [B, C, H, W] on the [0, 1] scale and normalises its input
            itself. It is frozen (`freeze`) as it is in eval mode, and only read; where it has no
            fused form it runs itself, its mode and requires_grad are put back, and a second thread
            with the same model is refused. Or what `freeze` returned, for many batches of one
            model: then feature, network_chunk, dtype, fp8 and channels_last are its own.
        images: [B, C, H, W] uint8 or float32 in [0, 1], on the model's device.
        labels: [B], any integer dtype, at least two classes.
        delta: [B, C, H, W] float32, float16 or int8 levels of eps / 127 (0 to begin with). Not
            changed.
        alpha: step size, eps: L-inf budget, both on the [0, 1] scale.
        temperature, zeta, denominator, normalize_dim: of the loss, see `mi_ue_value_and_grad`.
        feature: name of the layer whose (flattened) output is the features.
        flip: bool [B] or None: images that are mirrored along W; delta is not.
        network_chunk: images per network launch, >= 2; the objective is that of the whole batch all
            the same.
        dtype: compute type of the network: torch.float32 (None), bfloat16 or float16. fp8: with
            bfloat16 (None), see `freeze`.
        channels_last: memory format of the network's input where it runs in autograd; fused=False:
            let it (see `freeze`).

    Returns: the new delta, same shape and dtype, within +-eps (float16: eps rounded to it) and
        images + delta within [0, 1] (before the
    flip: the flipped image). Deterministic as far as the model is. Errors: ValueError (also for NaN
        or Inf), BackendError.
    """
    from .options import Options

    op = "perturb"
    options = Options(
        steps=steps,
        eps=eps,
        temperature=temperature,
        zeta=zeta,
        denominator=denominator,
        normalize_dim=normalize_dim,
        network_chunk=network_chunk,
        dtype=dtype or ("bfloat16" if fp8 else "float32"),
        channels_last=channels_last,
        fused=fused,
        fp8=fp8,
        backend=backend,
    )
    checks.step_sizes(op, alpha, eps)
    checks.images(op, images)
    checks.same_store(op, delta, images)
    batch = len(images)
    labels = check_labels(op, labels, batch, images.device)
    flip = checks.selection(op, None, flip, batch, images.device)
    if images.is_floating_point() and not ((images >= 0) & (images <= 1)).all():
        messages.fail(op, "images", "numbers from 0 to 1", "others, or NaN")
    if delta.is_floating_point() and not delta.isfinite().all():
        messages.fail(op, "delta", "finite numbers", "NaN or Inf")
    if not isinstance(model, (nn.Module, FrozenNet, AutogradNet)):
        messages.fail(op, "model", "an nn.Module, or what `freeze` returned", type(model).__name__)
    device = (
        next(model.parameters(), images).device if isinstance(model, nn.Module) else model.device
    )
    if device != images.device:
        messages.fail(op, "images", f"the model's device {device}", images.device)
    delta = delta.detach().clone()
    net = model
    if isinstance(model, nn.Module):
        net = frozen_form(
            model,
            feature,
            dtype=getattr(torch, options.dtype),
            chunk=network_chunk,
            fused=fused,
            fp8=fp8,
            channels_last=channels_last,
            backend=backend,
            channels=images.shape[1],
        )
    _, bad = Descent(net, images, delta, options)(
        labels, torch.arange(batch, device=images.device), flip, alpha
    )
    check_finite(op, bad, "check the model's weights")
    return delta


def check_labels(op, labels, count, device):
    """Labels [count] of at least two classes, as int64 on `device`: one image or one class has a
    gradient of exactly zero.
    """
    if (
        not isinstance(labels, torch.Tensor)
        or labels.dtype not in checks.INTEGERS
        or labels.shape != (count,)
    ):
        messages.fail(op, "labels", f"an integer tensor [{count}]", messages.describe(labels))
    if labels.device != device:
        messages.fail(op, "labels", f"device {device}", labels.device)
    if count < 2:
        messages.fail(op, "images", "two or more (a single one has a zero gradient)", count)
    if (labels == labels[0]).all():
        messages.fail(
            op, "labels", "two or more classes (one class has a zero gradient)", "one class"
        )
    return labels.to(torch.int64).contiguous()
