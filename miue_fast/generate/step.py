"""The poison step of one contrastive batch: K projected sign steps on the perturbation."""

import torch

from .. import _checks
from ..ops import mi_ue_value_and_grad, perturbed_input, projected_step_
from .network import Chunk, autocast, frozen


def descend(features, images, labels, delta, index, flip, *, alpha, options, chunk, dtype):
    """options.steps steps on rows `index` of the store `delta`, in place. Never waits for the device.

    features: images [b, C, H, W] -> [b, D], from `frozen`. images, delta: the stores [N, C, H, W]. labels, index, flip: [B].
    A network launch takes at most chunk.size images. If the batch does not fit, the features of all its parts come first, then
    the loss gradient with respect to all of them at once, then each part again with a graph (algorithm.md 2.2).

    Returns: the last step's loss (before its update), and int64 [2]: how often the loss, and the gradient, was NaN or Inf.
    """
    count, device = len(index), images.device
    bad = torch.zeros(2, dtype=torch.int64, device=device)
    o = options

    def forward(rows):
        x = perturbed_input(images, delta, index[rows], None if flip is None else flip[rows], eps=o.eps,
                            channels_last=o.channels_last, backend=o.backend)  # fmt: skip
        x.requires_grad_(torch.is_grad_enabled())
        with autocast(device, dtype):
            return x, features(x)

    def loss_of(f):
        wide = f.detach().float() if dtype is torch.float16 else f.detach()
        loss, grad = mi_ue_value_and_grad(wide, labels, o.temperature, o.zeta, denominator=o.denominator,
                                          normalize_dim=o.normalize_dim, backend=o.backend)  # fmt: skip
        bad[0] += ~loss.isfinite()
        if dtype is torch.float16:  # only signs count: a power of two lifts the gradient out of half precision's underflow
            grad = torch.ldexp(grad, -torch.frexp(grad.abs().amax()).exponent)
        return loss, grad.to(f.dtype)

    def update(rows, x, f, grad):
        (slope,) = torch.autograd.grad(f, x, grad)
        projected_step_(delta, index[rows], slope, images, None if flip is None else flip[rows], alpha=alpha, eps=o.eps,
                        nonfinite=bad[1:], backend=o.backend)  # fmt: skip

    def in_one(rows):
        nonlocal loss
        x, f = forward(rows)
        loss, grad = loss_of(f)
        update(rows, x, f, grad)

    def collect(rows):
        with torch.no_grad():
            parts.append(forward(rows)[1])

    loss = None
    for _ in range(o.steps):
        if chunk.whole(count, in_one):
            continue
        parts = []
        chunk.pieces(count, collect)
        loss, grad = loss_of(torch.cat(parts))
        chunk.pieces(count, lambda rows: update(rows, *forward(rows), grad[rows]))  # noqa: B023 - called at once
    return loss, bad


def check_finite(where, bad, hint):
    """ValueError if the counts of `descend` are not zero; this is where the host waits for the device."""
    for name, times in zip(("loss (NaN or Inf features)", "input gradient"), bad.tolist()):
        if times:
            raise ValueError(f"{where}: {name}: expected finite numbers, got NaN or Inf ({times} times); {hint}")


def perturb(model, images, labels, delta, *, steps=10, alpha, eps=8 / 255, temperature=0.1, zeta=0.1, denominator="all",
            normalize_dim=True, feature="avgpool", flip=None, network_chunk=None, dtype=None, channels_last=False,
            backend="auto"):  # fmt: skip
    """The poison step of one batch, for people with their own loop: `steps` projected sign steps on `delta`.

    Args:
        model: any nn.Module that takes [B, C, H, W] on the [0, 1] scale; it is run in eval mode with frozen parameters, and its
            mode and requires_grad are put back. It normalises its input itself.
        images: [B, C, H, W] uint8 or float32 in [0, 1], on the model's device.
        labels: [B], any integer dtype, at least two classes.
        delta: [B, C, H, W] float32, float16 or int8 levels of eps / 127 (0 to begin with). Not changed.
        alpha: step size, eps: L-inf budget, both on the [0, 1] scale.
        temperature, zeta, denominator, normalize_dim: of the loss, see `mi_ue_value_and_grad`.
        feature: name of the layer whose (flattened) output is the features.
        flip: bool [B] or None: images that are mirrored along W; delta is not.
        network_chunk: images per network launch, >= 2; the objective is that of the whole batch all the same.
        dtype: compute type of the network (autocast): torch.float32 (None), bfloat16 or float16.
        channels_last: memory format of the network's input.

    Returns: the new delta, same shape and dtype, within +-eps and images + delta within [0, 1] (before the flip: the flipped image).
    Deterministic as far as the model is. Errors: ValueError (also for NaN or Inf), BackendError.
    """
    from .options import Options

    op = "perturb"
    options = Options(steps=steps, eps=eps, temperature=temperature, zeta=zeta, denominator=denominator, normalize_dim=normalize_dim,
                      network_chunk=network_chunk, dtype=dtype or "float32", channels_last=channels_last, backend=backend)  # fmt: skip
    _checks.step_sizes(op, alpha, eps)
    _checks.images(op, images)
    _checks.same_store(op, delta, images)
    batch = len(images)
    labels = check_labels(op, labels, batch, images.device)
    flip = _checks.selection(op, None, flip, batch, images.device)
    if images.is_floating_point() and not ((images >= 0) & (images <= 1)).all():
        _checks.fail(op, "images", "numbers from 0 to 1", "others, or NaN")
    if delta.is_floating_point() and not delta.isfinite().all():
        _checks.fail(op, "delta", "finite numbers", "NaN or Inf")
    parameter = next(model.parameters(), images)
    if parameter.device != images.device:
        _checks.fail(op, "images", f"the model's device {parameter.device}", images.device)
    delta = delta.detach().clone()
    with frozen(op, model, feature) as features, torch.enable_grad():
        _, bad = descend(features, images, labels, delta, torch.arange(batch, device=images.device), flip, alpha=alpha, options=options,
                         chunk=Chunk(network_chunk or batch), dtype=getattr(torch, options.dtype))  # fmt: skip
    check_finite(op, bad, "check the model's weights")
    return delta


def check_labels(op, labels, count, device):
    """Labels [count] of at least two classes, as int64 on `device`: one image or one class has a gradient of exactly zero."""
    if not isinstance(labels, torch.Tensor) or labels.dtype not in _checks.INTEGERS or labels.shape != (count,):
        _checks.fail(op, "labels", f"an integer tensor [{count}]", _checks.describe(labels))
    if labels.device != device:
        _checks.fail(op, "labels", f"device {device}", labels.device)
    if count < 2:
        _checks.fail(op, "images", "two or more (a single one has a zero gradient)", count)
    if (labels == labels[0]).all():
        _checks.fail(op, "labels", "two or more classes (one class has a zero gradient)", "one class")
    return labels.to(torch.int64).contiguous()
