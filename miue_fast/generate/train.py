"""The model step: one epoch of cross-entropy training of the source network on augment(x) + delta."""

import torch
import torch.nn.functional as F

from .._registry import BackendError
from . import batches
from .network import autocast
from .step import network_input

_HALF_SCALE = 128.0  # keeps the gradients of a float16 network out of underflow; a power of two, taken out again before the update


def optimizer(model, options):
    parameters = [p for p in model.parameters() if p.requires_grad]
    return torch.optim.SGD(parameters, options.lr, options.momentum, weight_decay=options.weight_decay)


def train_epoch(model, optimizer, images, labels, delta, *, epoch, options, tick):
    """One epoch on images + delta (delta None: on the images). Returns (mean loss, accuracy in percent).

    `tick(images done)` is called after each batch. Waits for the device once, at the end.
    """
    o, device, count = options, images.device, len(images)
    dtype = getattr(torch, o.dtype)
    scale = _HALF_SCALE if dtype is torch.float16 else 1.0
    order, flips = (t.to(device) for t in batches.order_and_flips(count, o.flip, o.seed, epoch, "model step"))
    slices = batches.train_slices(count, o.train_batch)
    losses, correct = [], torch.zeros((), dtype=torch.int64, device=device)
    for group in optimizer.param_groups:
        group["lr"] = o.learning_rate(epoch)
    model.train()
    try:
        for part in slices:
            index = order[part]
            x = network_input(images, delta, labels[index], index, flips[part], eps=o.eps, channels_last=o.channels_last,
                              backend=o.backend, classwise=o.classwise)  # fmt: skip
            with autocast(device, dtype):
                logits = model(x)
            loss = F.cross_entropy(logits.float(), labels[index])
            optimizer.zero_grad(set_to_none=True)
            (loss * scale).backward()
            if scale != 1:
                torch._foreach_div_([p.grad for p in model.parameters() if p.grad is not None], scale)
            optimizer.step()
            losses.append(loss.detach() * len(index))
            correct += (logits.detach().argmax(1) == labels[index]).sum()
            tick(len(index))
    except torch.OutOfMemoryError as error:
        raise BackendError(f"generate: out of memory in the model step: lower train_batch ({o.train_batch}) or the width") from error
    losses = torch.stack(losses)
    bad = (~losses.isfinite()).nonzero()
    if len(bad):
        raise ValueError(f"generate: epoch {epoch}, batch {int(bad[0]) + 1} of {len(slices)} of the model step: loss: expected a finite "
                         f"number, got NaN or Inf; lower lr ({o.lr})")  # fmt: skip
    return float(losses.sum()) / count, 100 * float(correct) / count
