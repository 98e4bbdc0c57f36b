"""The fastest forms known that take PyTorch alone: matmul-form losses, hand-written gradients,
in-place updates, each also under torch.compile. The tables count this library's reference among
them, because it is PyTorch too.

PATHS[op][name] has the arguments of the op's `Impl.fn`. Only what the workloads use is covered:
denominator "all"."""

import functools

import torch
from torch.nn import functional

from benchmarks.baselines.eager import pack, unpack

CHUNK = 512  # rows per block where the whole B x B would not fit


def _same(labels):
    return labels[:, None] == labels[None, :]


def _nt_xent_loss(features, labels, temperature):
    z = functional.normalize(features.float(), dim=1, eps=1e-8)
    weights = ((z @ z.T - 1) / temperature).exp()
    same = _same(labels)
    return torch.log1p(
        weights.masked_fill(same, 0).sum(1) / weights.masked_fill(~same, 0).sum(1)
    ).mean()


def _nt_xent_backward_form(features, labels, temperature):
    """Value and gradient written out (docs/method.md), the B x B weights kept from the first
    pass.
    """
    f = features.float()
    norm = torch.linalg.vector_norm(f, dim=1, keepdim=True).clamp_min(1e-8)
    z = f / norm
    weights = ((z @ z.T - 1) / temperature).exp()
    same = _same(labels)
    total_same = weights.masked_fill(~same, 0).sum(1)
    total_other = weights.masked_fill(same, 0).sum(1)
    total = total_same + total_other
    pull, push = -total_other / (total_same * total), 1 / total
    weights = weights * torch.where(
        same, pull[:, None] + pull[None, :], push[:, None] + push[None, :]
    )
    g = weights @ z / (len(f) * temperature)
    grad = (g - (g * z).sum(1, keepdim=True) * z) / norm
    return torch.log1p(total_other / total_same).mean(), grad.to(features.dtype)


def _nt_xent_in_place(features, labels, temperature):
    """The same with in-place operators and class sums by a B x B x classes product."""
    f = features.float()
    norm = torch.linalg.vector_norm(f, dim=1, keepdim=True).clamp_min(1e-8)
    z = f / norm
    classes, code = labels.unique(return_inverse=True)
    member = functional.one_hot(code, len(classes)).to(f.dtype)
    scaled = z / temperature
    weights = torch.addmm(z.new_tensor(-1 / temperature), scaled, z.T).exp_()
    sums = weights @ member
    total_same = sums.gather(1, code[:, None])
    total_other = (sums * (1 - member)).sum(1, keepdim=True)
    total = total_same + total_other
    pull, push = -total_other / (total_same * total), 1 / total
    left = torch.cat([pull * member, member, push * member, member], 1)
    right = torch.cat([member, pull * member, 1 - member, push * (1 - member)], 1)
    weights.mul_(left @ right.T)
    g = (weights @ scaled).div_(len(f))
    grad = torch.addcmul(g, (g * z).sum(1, keepdim=True), z, value=-1).div_(norm)
    return torch.log1p(total_other / total_same).mean(), grad.to(features.dtype)


def _nt_xent_chunked(features, labels, temperature):
    """Row chunks for batches whose B x B does not fit: weights are computed twice."""
    f = features.float()
    norm = torch.linalg.vector_norm(f, dim=1, keepdim=True).clamp_min(1e-8)
    z = f / norm
    classes, code = labels.unique(return_inverse=True)
    member = functional.one_hot(code, len(classes)).to(f.dtype)
    scaled, shift = z / temperature, z.new_tensor(-1 / temperature)
    blocks = range(0, len(f), CHUNK)
    sums = torch.cat(
        [torch.addmm(shift, scaled[i : i + CHUNK], z.T).exp_() @ member for i in blocks]
    )
    total_same = sums.gather(1, code[:, None])
    total_other = (sums * (1 - member)).sum(1, keepdim=True)
    total = total_same + total_other
    pull, push = -total_other / (total_same * total), 1 / total
    left = torch.cat([pull * member, member, push * member, member], 1)
    right = torch.cat([member, pull * member, 1 - member, push * (1 - member)], 1).T.contiguous()
    grad = torch.empty_like(f)
    for i in blocks:
        row = slice(i, i + CHUNK)
        weights = torch.addmm(shift, scaled[row], z.T).exp_().mul_(left[row] @ right)
        g = (weights @ scaled).div_(len(f))
        grad[row] = torch.addcmul(g, (g * z[row]).sum(1, keepdim=True), z[row], value=-1).div_(
            norm[row]
        )
    return torch.log1p(total_other / total_same).mean(), grad.to(features.dtype)


def _distance_loss(features, labels, normalize_dim):
    distance = torch.cdist(
        features.float(), features.float(), compute_mode="donot_use_mm_for_euclid_dist"
    )
    scale = 1 / features.shape[1] if normalize_dim else 1.0
    return torch.log1p(scale * distance.masked_fill(~_same(labels), 0).sum(1)).mean()


def _distance_per_class(features, labels, normalize_dim):
    """Distances by direct differences inside each class, gradient written out as one small product
    per class.
    """
    f = features.float()
    scale = 1 / features.shape[1] if normalize_dim else 1.0
    grad, total = torch.empty_like(f), f.new_zeros(())
    for label in labels.unique():
        rows = (labels == label).nonzero()[:, 0]
        members = f[rows]
        distance = torch.cdist(members, members, compute_mode="donot_use_mm_for_euclid_dist")
        sums = scale * distance.sum(1)
        total += torch.log1p(sums).sum()
        share = scale / (len(f) * (1 + sums))
        weight = (share[:, None] + share).div_(distance).masked_fill_(distance == 0, 0)
        grad[rows] = weight.sum(1, keepdim=True) * members - weight @ members
    return total / len(f), grad.to(features.dtype)


def _padded_core(f, rows, valid, scale):
    members = f[rows]
    distance = (members[:, :, None] - members[:, None]).square().sum(3).sqrt() * (
        valid[:, :, None] & valid[:, None]
    )
    sums = scale * distance.sum(2)
    share = scale / (len(f) * (1 + sums))
    weight = torch.where(distance == 0, 0, (share[:, :, None] + share[:, None]) / distance)
    return (torch.log1p(sums) * valid).sum() / len(f), weight.sum(
        2, keepdim=True
    ) * members - weight @ members


def _distance_padded(features, labels, normalize_dim):
    """All classes at once, padded to the largest one; the compiler fuses the differences into their
    sums.
    """
    f = features.float()
    classes, code, counts = labels.unique(return_inverse=True, return_counts=True)
    order = code.argsort(stable=True)
    place = torch.arange(len(f), device=f.device) - (counts.cumsum(0) - counts)[code[order]]
    rows = order.new_zeros(len(classes), int(counts.max()))
    valid = torch.zeros_like(rows, dtype=torch.bool)
    rows[code[order], place], valid[code[order], place] = order, True
    loss, padded = _compiled(_padded_core)(f, rows, valid, 1 / f.shape[1] if normalize_dim else 1.0)
    grad = torch.empty_like(f)
    grad[rows[valid]] = padded[valid]
    return loss, grad.to(features.dtype)


def _covariance_per_class(features, labels, num_classes):
    """One product per class of sorted rows, straight into its place."""
    f = features.float()[labels.argsort(stable=True)]
    counts = labels.bincount(minlength=num_classes)
    means, covariances = (
        f.new_zeros(num_classes, f.shape[1]),
        f.new_zeros(num_classes, f.shape[1], f.shape[1]),
    )
    for rows, mean, covariance in zip(f.split(counts.tolist()), means, covariances):
        if len(rows):
            centred = rows - torch.mean(rows, 0, out=mean)
            torch.addmm(covariance, centred.T, centred, beta=0, alpha=1 / len(rows), out=covariance)
    return counts, means, covariances


def _covariance_core(f, rows, valid, counts):
    members = f[rows] * valid[:, :, None]
    means = members.sum(1) / counts[:, None]
    centred = (members - means[:, None]) * valid[:, :, None]
    return means, centred.mT @ centred / counts[:, None, None]


def _covariance_padded(core, features, labels, num_classes):
    """All classes at once, padded to the largest one."""
    f, counts = features.float(), labels.bincount(minlength=num_classes)
    order = labels.argsort(stable=True)
    place = torch.arange(len(f), device=f.device) - (counts.cumsum(0) - counts)[labels[order]]
    rows = order.new_zeros(num_classes, int(counts.max()))
    valid = torch.zeros_like(rows, dtype=torch.bool)
    rows[labels[order], place], valid[labels[order], place] = order, True
    return counts, *core(f, rows, valid, counts.clamp_min(1))


def _autograd(loss, features, labels, *args):
    leaf = features.detach().requires_grad_()
    with torch.enable_grad():
        value = loss(leaf, labels, *args)
    return value.detach(), torch.autograd.grad(value, leaf)[0]


def _nt_xent(path):
    return lambda features, labels, temperature, denominator, want_grad: path(
        features, labels, temperature
    )


def _distance(path):
    return lambda features, labels, normalize_dim, want_grad: path(features, labels, normalize_dim)


def _mi_ue(similarity, distance):
    def call(features, labels, temperature, zeta, denominator, normalize_dim):
        loss, grad = similarity(features, labels, temperature)
        if zeta == 0:
            return loss, grad
        value, distance_grad = distance(features, labels, normalize_dim)
        return loss + zeta * value, grad.add_(distance_grad, alpha=zeta)

    return call


def _step(delta, grad, image, alpha, eps):
    return (
        torch.add(delta, grad.sign(), alpha=-alpha)
        .clamp_(-eps, eps)
        .add_(image)
        .clamp_(0, 1)
        .sub_(image)
    )


def _gather(images, index, flip):
    x = images[index]
    return torch.where(flip[:, None, None, None], x.flip(3), x).to(torch.float32).div_(255)


def _step_in_store(delta, index, grad, images, flip, alpha, eps, nonfinite):
    delta.index_copy_(0, index, _step(delta[index], grad, _gather(images, index, flip), alpha, eps))


def _input(images, delta, index, flip, mean, std, eps, dtype, channels_last):
    x = _gather(images, index, flip).add_(delta[index])
    centre, inverse = (
        torch.tensor(v, device=x.device)[:, None, None] for v in (mean, [1 / s for s in std])
    )
    x = x.sub_(centre).mul_(inverse).to(dtype)
    return x.contiguous(
        memory_format=torch.channels_last if channels_last else torch.contiguous_format
    )


def _epilogue(y, bias, residual, relu, mask):
    y.add_(bias[:, None, None]).add_(residual).relu_()
    if mask is not None:
        mask.copy_(pack(y))


def _grad_epilogue(grad, addend, mask):
    grad.add_(addend).masked_fill_(~unpack(mask, grad.shape), 0)


def _forward(x, weight, bias, residual, stride, padding, dilation, groups, relu, want_mask):
    y = functional.conv2d(x, weight, bias, stride, padding, dilation, groups).relu_()
    return y, pack(y)


def _input_grad(grad, weight, addend, mask, size, stride, padding, dilation, groups):
    x = torch.empty(size, dtype=grad.dtype, device=grad.device, memory_format=torch.channels_last)
    back = torch.ops.aten.convolution_backward
    image_grad = back(
        grad,
        x,
        weight,
        None,
        stride,
        padding,
        dilation,
        False,
        [0, 0],
        groups,
        [True, False, False],
    )[0]
    return image_grad if mask is None else image_grad.masked_fill_(~unpack(mask, size), 0)


def _input_grad_step(
    delta,
    index,
    grad,
    weight,
    images,
    flip,
    stride,
    padding,
    dilation,
    groups,
    alpha,
    eps,
    nonfinite,
):
    image_grad = _input_grad(
        grad, weight, None, None, [len(grad), *images.shape[1:]], stride, padding, dilation, groups
    )
    _step_in_store(delta, index, image_grad, images, flip, alpha, eps, nonfinite)


@functools.cache
def _compiled(path):
    return torch.compile(path, dynamic=False)


def _lazy(path):
    """torch.compile of `path` at its first call."""
    return lambda *args: _compiled(path)(*args)


_loss_autograd = functools.partial(_autograd, _nt_xent_loss)
_loss_compiled = functools.partial(_autograd, _lazy(_nt_xent_loss))
_distance_autograd = functools.partial(_autograd, _distance_loss)
# what reads nothing back to the host: timed as a CUDA graph on a GPU, as such a user would run it
CAPTURABLE = {
    "nt_xent": ("matmul, autograd", "matmul, autograd, compiled", "closed form, compiled"),
    "intra_class_distance": ("cdist, autograd",),
    "mi_ue_value_and_grad": ("autograd", "closed form and cdist"),
    "projected_step": ("in place", "compiled"),
    "projected_step_": ("in place", "compiled"),
}
# the form of a similarity loss that anybody would write, in the tables beside the fastest one
PLAIN = {"nt_xent": "matmul, autograd", "mi_ue_value_and_grad": "autograd"}
COMPILED = "compiled"  # in the name of every path that needs torch.compile
PATHS = {
    "nt_xent": {
        "matmul, autograd": _nt_xent(_loss_autograd),
        "matmul, autograd, compiled": _nt_xent(_loss_compiled),
        "closed form": _nt_xent(_nt_xent_in_place),
        "closed form, compiled": _nt_xent(_lazy(_nt_xent_backward_form)),
        "closed form, chunked": _nt_xent(_nt_xent_chunked),
    },
    "intra_class_distance": {
        "cdist, autograd": _distance(_distance_autograd),
        "cdist per class": _distance(_distance_per_class),
        "padded classes, compiled": _distance(_distance_padded),
    },
    "mi_ue_value_and_grad": {
        "autograd": _mi_ue(_loss_autograd, _distance_autograd),
        "closed form": _mi_ue(_nt_xent_in_place, _distance_per_class),
        "closed form and cdist": _mi_ue(_nt_xent_backward_form, _distance_autograd),
        "closed form, compiled": _mi_ue(_lazy(_nt_xent_backward_form), _distance_padded),
    },
    "class_covariance": {
        "product per class": _covariance_per_class,
        "padded classes": functools.partial(_covariance_padded, _covariance_core),
        "padded classes, compiled": functools.partial(_covariance_padded, _lazy(_covariance_core)),
    },
    "projected_step": {"in place": _step, "compiled": _lazy(_step)},
    "projected_step_": {"in place": _step_in_store, "compiled": _lazy(_step_in_store)},
    "perturbed_input": {"in place": _input, "compiled": _lazy(_input)},
    "conv_epilogue_": {"in place": _epilogue, "compiled": _lazy(_epilogue)},
    "conv_grad_epilogue_": {"in place": _grad_epilogue, "compiled": _lazy(_grad_epilogue)},
    "conv_forward": {"in place": _forward},
    "conv_input_grad": {"in place": _input_grad},
    "conv_input_grad_step_": {"in place": _input_grad_step},
}
