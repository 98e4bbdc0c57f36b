"""The path a user of published MI-UE code has today, written anew: one PyTorch operator per step,
autograd, nothing fused.
"""

import torch


def _value_and_grad(loss, features, labels, *args):
    leaf = features.detach().requires_grad_()
    with torch.enable_grad():
        value = loss(leaf.float(), labels, *args)
    return value.detach(), torch.autograd.grad(value, leaf)[0]


def _nt_xent_loss(features, labels, temperature, denominator):
    """The cosine matrix comes from a B x B x D broadcast."""
    similarity = torch.nn.functional.cosine_similarity(
        features.unsqueeze(1), features.unsqueeze(0), dim=2, eps=1e-8
    )
    weights = torch.exp(similarity / temperature)
    same = labels.unsqueeze(1) == labels.unsqueeze(0)
    positives = (weights * same).sum(1)
    pool = weights.sum(1) if denominator == "all" else (weights * ~same).sum(1)
    return (-torch.log(positives / pool)).mean()


def _distance_loss(features, labels, normalize_dim):
    """A Python loop over the batch; each row meets the members of its class."""
    losses = []
    for i in range(features.shape[0]):
        members = features[labels == labels[i]]
        total = torch.norm(features[i] - members, p=2, dim=1).sum()
        losses.append(torch.log(1 + (total / features.shape[1] if normalize_dim else total)))
    return torch.stack(losses).mean()


def _mi_ue_loss(features, labels, temperature, zeta, denominator, normalize_dim):
    """The distance term is computed at zeta = 0 too, then multiplied by it."""
    return _nt_xent_loss(features, labels, temperature, denominator) + zeta * _distance_loss(
        features, labels, normalize_dim
    )


def nt_xent(features, labels, temperature, denominator, want_grad):
    return _value_and_grad(_nt_xent_loss, features, labels, temperature, denominator)


def intra_class_distance(features, labels, normalize_dim, want_grad):
    return _value_and_grad(_distance_loss, features, labels, normalize_dim)


def mi_ue_value_and_grad(features, labels, temperature, zeta, denominator, normalize_dim):
    return _value_and_grad(
        _mi_ue_loss, features, labels, temperature, zeta, denominator, normalize_dim
    )


def class_covariance(features, labels, num_classes):
    """torch.cov, class by class."""
    features = features.float()
    width = features.shape[1]
    counts = torch.bincount(labels, minlength=num_classes)
    means, covariances = (
        features.new_zeros(num_classes, width),
        features.new_zeros(num_classes, width, width),
    )
    for label in labels.unique():
        members = features[labels == label]
        means[label] = members.mean(0)
        covariances[label] = torch.cov(members.T, correction=0)
    return counts, means, covariances


def pack(y):
    """The ReLU bits of y in memory order; PyTorch has no operator for it. Whole bytes."""
    flat = (~(y <= 0)).permute(0, 2, 3, 1).reshape(-1, 8)
    return (flat << torch.arange(8, device=y.device)).sum(1).to(torch.uint8)


def unpack(mask, shape):
    b, c, h, w = shape
    return (
        (mask[:, None] >> torch.arange(8, device=mask.device) & 1)
        .bool()
        .view(b, h, w, c)
        .permute(0, 3, 1, 2)
    )


def conv_epilogue_(y, bias, residual, relu, mask):
    y.copy_(torch.relu(y + bias[:, None, None] + residual))
    if mask is not None:
        mask.copy_(pack(y))


def conv_grad_epilogue_(grad, addend, mask):
    grad.copy_(torch.where(unpack(mask, grad.shape), grad + addend, 0))


def conv_forward(x, weight, bias, residual, stride, padding, dilation, groups, relu, want_mask):
    y = torch.relu(torch.nn.functional.conv2d(x, weight, bias, stride, padding, dilation, groups))
    return y, pack(y)


def conv_input_grad(grad, weight, addend, mask, size, stride, padding, dilation, groups):
    image_grad = torch.nn.grad.conv2d_input(size, weight, grad, stride, padding, dilation, groups)
    return image_grad if mask is None else torch.where(unpack(mask, size), image_grad, 0)


def conv_input_grad_step_(
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
    image_grad = conv_input_grad(
        grad, weight, None, None, [len(grad), *images.shape[1:]], stride, padding, dilation, groups
    )
    projected_step_(delta, index, image_grad, images, flip, alpha, eps, nonfinite)


def projected_step(delta, grad, image, alpha, eps):
    delta = delta - alpha * torch.sign(grad.float())
    delta = torch.clamp(delta, -eps, eps)
    return torch.clamp(image + delta, 0, 1) - image


def _gather(images, index, flip):
    x = images[index].float() / 255
    return torch.where(flip[:, None, None, None], torch.flip(x, [3]), x)


def projected_step_(delta, index, grad, images, flip, alpha, eps, nonfinite):
    delta[index] = projected_step(delta[index], grad, _gather(images, index, flip), alpha, eps)


def perturbed_input(images, delta, index, flip, mean, std, eps, dtype, channels_last):
    x = _gather(images, index, flip) + delta[index]
    centre, scale = (torch.tensor(v, device=x.device)[:, None, None] for v in (mean, std))
    x = ((x - centre) / scale).to(dtype)
    return x.to(memory_format=torch.channels_last) if channels_last else x
