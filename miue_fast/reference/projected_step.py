import torch

LEVELS = 127  # an int8 poison store holds delta as level * eps / 127


def load_images(images, index, flip):
    """Rows `index` on the [0, 1] scale in fp32, mirrored along W where `flip`."""
    x = images if index is None else images[index]
    if (
        x.dtype == torch.uint8
        # by a tensor on the device: CUDA multiplies with the reciprocal of a number, which rounds
        # otherwise
    ):
        x = x.float() / torch.full((), 255.0, device=x.device)
    return x if flip is None else torch.where(flip.bool()[:, None, None, None], x.flip(3), x)


def load_delta(delta, index, eps):
    """Rows `index` of the poison store in fp32."""
    d = (delta if index is None else delta[index]).float()
    return (
        d * torch.tensor(eps / LEVELS, dtype=torch.float32, device=d.device)
        if delta.dtype == torch.int8
        else d
    )


def projected_step(delta, grad, image, alpha, eps):
    dtype = delta.dtype
    if dtype.itemsize < 4:
        delta, grad, image = delta.float(), grad.float(), image.float()
    sign = torch.where(grad.isnan(), 0, grad).sign()
    step = (delta - alpha * sign).clamp(-eps, eps)
    step = ((image + step).clamp(0, 1) - image).clamp(
        0.0 - eps, eps
    )  # the budget, whatever the image and the sum's rounding
    return step.to(dtype).contiguous()


def projected_step_(delta, index, grad, images, flip, alpha, eps, nonfinite):
    step = projected_step(
        load_delta(delta, index, eps), grad.float(), load_images(images, index, flip), alpha, eps
    )
    if nonfinite is not None:
        nonfinite += (~grad.isfinite()).sum()
    if delta.dtype == torch.int8:
        step = (
            (step * torch.tensor(LEVELS / eps, dtype=torch.float32, device=step.device))
            .round()
            .clamp(-LEVELS, LEVELS)
        )
    if index is None:
        delta.copy_(step)
    else:
        delta[index] = step.to(delta.dtype)
