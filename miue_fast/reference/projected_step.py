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


def viewed(x, view):
    """[B, C, H, W], each row mirrored along W where the third number of its view is not 0, then
    moved down and to the right by the first two; zeros come in.
    """
    if view is None:
        return x
    h, w = x.shape[2:]
    down, right, mirrored = view.long().unbind(1)
    row = torch.arange(h, device=x.device) - down[:, None]
    column = torch.arange(w, device=x.device) - right[:, None]
    inside = ((row >= 0) & (row < h))[:, :, None] & ((column >= 0) & (column < w))[:, None]
    column = torch.where(mirrored[:, None] != 0, w - 1 - column, column)
    batch = torch.arange(len(x), device=x.device)[:, None, None]
    seen = x[batch, :, row.clamp(0, h - 1)[:, :, None], column.clamp(0, w - 1)[:, None]]
    return torch.where(inside[..., None], seen, 0).permute(0, 3, 1, 2)


def transposed(view):
    """The view that is the transpose of a view, and its inverse where nothing is cut off."""
    if view is None:
        return None
    down, right, mirrored = view.long().unbind(1)
    return torch.stack([-down, torch.where(mirrored != 0, right, -right), mirrored], 1)


def cell_sums(grad, size):
    """Every value replaced by the sum over its cell of size x size pixels: down each column of the
    cell, then over the columns from left to right, in fp32.
    """
    h, w = grad.shape[2:]
    whole = torch.nn.functional.pad(grad, (0, -w % size, 0, -h % size))
    columns = torch.zeros_like(whole[:, :, ::size])
    for k in range(size):
        columns += whole[:, :, k::size]
    cells = torch.zeros_like(columns[..., ::size])
    for k in range(size):
        cells += columns[..., k::size]
    return cells.repeat_interleave(size, 2)[:, :, :h].repeat_interleave(size, 3)[..., :w]


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


def projected_step_(delta, index, grad, images, flip, alpha, eps, nonfinite, view=None, grid=1):
    grad = viewed(grad.float(), transposed(view))
    if nonfinite is not None:
        nonfinite += (~grad.isfinite()).sum()
    if grid > 1 and grad.numel():
        grad = cell_sums(grad, min(grid, max(grad.shape[2:])))
    step = projected_step(
        load_delta(delta, index, eps), grad, load_images(images, index, flip), alpha, eps
    )
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
