"""Samples of the projected step, functional and in place on a store."""

import numpy as np
import torch

import miue_fast

from . import DOUBLES, FLOATS, Samples, add, shuffled, special, values


def step_samples(device, dtype):
    gen = torch.Generator().manual_seed(7)

    def tensors(*shape):
        image = torch.rand(shape, generator=gen)
        image.view(-1)[::5] = 0
        image.view(-1)[1::5] = 1
        grad = torch.randn(shape, generator=gen)
        grad.view(-1)[::7] = 0
        grad.view(-1)[3::11] = torch.nan
        delta = (torch.rand(shape, generator=gen) - 0.5) / 8
        return tuple(x.to(dtype).to(device) for x in (delta, grad, image))

    for shape in [(0,), (1,), (7,), (3, 5, 1), (2, 3, 32, 32), (5, 3, 17, 13)]:
        yield *tensors(*shape), 0.8 / 255, 8 / 255
    yield *tensors(33), 0.0, 8 / 255
    yield *tensors(33), 0.1, 0.0
    delta, grad, image = tensors(4, 3, 8, 8)
    yield delta, grad.to(memory_format=torch.channels_last), image, 0.002, 0.03


def store_samples(device, dtype, eps=8 / 255):
    """(delta store, index, batch shape, images, flip): dtype is the store's; images uint8 and
    float, with and without index and flip.
    """
    gen = torch.Generator().manual_seed(7)
    for count, batch, c, h, w in [
        (1, 1, 1, 1, 1),
        (5, 3, 3, 5, 7),
        (6, 6, 3, 32, 32),
        (4, 2, 1, 3, 18),
        (9, 4, 4, 8, 64),
        (3, 0, 3, 4, 4),
    ]:
        images = torch.randint(256, (count, c, h, w), generator=gen, dtype=torch.uint8)
        images[0] = 0
        images[-1, :, 0] = 255
        delta = (torch.rand(images.shape, generator=gen) * 2 - 1) * eps
        delta = (delta * (127 / eps)).round().to(dtype) if dtype == torch.int8 else delta.to(dtype)
        order = torch.randperm(count, generator=gen)[:batch]
        flip = torch.rand(batch, generator=gen) < 0.5
        yield (
            delta.to(device),
            order.to(device),
            (batch, c, h, w),
            images.to(device),
            flip.to(device),
        )
        whole = torch.rand(images.shape, generator=gen)
        mirror = torch.arange(count) % 2 == 0 if batch % 2 else None
        yield (
            delta.clone().to(device),
            None,
            (count, c, h, w),
            whole.to(device),
            mirror if mirror is None else mirror.to(device),
        )


def views(gen, shape):
    """int32 [B, 3]: random views of a batch of this shape, some of which leave nothing."""
    batch, _, h, w = shape
    moves = [torch.randint(-n - 1, n + 2, (batch,), generator=gen) for n in (h, w)]
    near = torch.rand(batch, generator=gen) < 0.7
    moves = [torch.where(near, move // 4, move) for move in moves]
    mirrored = torch.randint(2, (batch,), generator=gen)
    return torch.stack([*moves, mirrored], 1).to(torch.int32)


def inplace_samples(device, dtype):
    gen = torch.Generator().manual_seed(11)
    grads = [torch.float32, torch.float16, torch.bfloat16]
    for k, (delta, index, shape, images, flip) in enumerate(store_samples(device, dtype)):
        grad = torch.randn(shape, generator=gen)
        grad.view(-1)[::7] = 0
        grad.view(-1)[2::13] = torch.nan
        grad.view(-1)[5::17] = torch.inf
        grad = grad.to(grads[k % 3]).to(device)
        if k % 2:
            grad = grad.contiguous(memory_format=torch.channels_last)
        count = torch.zeros(1, dtype=torch.int64, device=device) if k % 4 < 2 else None
        args = delta, index, grad, images, flip, 0.8 / 255, 8 / 255, count
        yield *args, None, 1
        view = views(gen, shape).to(device)
        yield *args, view, 1
        yield *args, view if k % 2 else None, 2 + k % 4
    yield (
        delta,
        index,
        grad[:, :, ::1, ::1].transpose(2, 3),
        images.transpose(2, 3).contiguous(),
        flip,
        0.001,
        0.03,
        None,
        view,
        3,
    )


def any_range(choose, image, gen):
    """On the [0, 1] scale, or normalised, or anything."""
    kind = choose.one_of("right", "right", "normalised", "anything")
    if kind == "anything":
        image = image * 10.0 ** choose.number(-30, 30)
        return special(image, gen, torch.inf, -torch.inf, torch.nan, -1e-40, 255, -0.0)
    return image if kind == "right" else image * 5 - 2


def shape_of(choose):
    return tuple(choose.integer(low, high) for low, high in ((0, 6), (1, 4), (0, 9), (0, 40)))


def budget(choose):
    return choose.one_of(8 / 255, 1.0, 10 ** choose.number(-9, 0))


def step_size(choose):
    return choose.one_of(0.0, 0.8 / 255, 10 ** choose.number(-9, 2))


def gradient(gen, shape):
    grad = torch.randn(shape, generator=gen)
    return special(grad, gen, 0, -0.0, torch.nan, torch.inf, -torch.inf, 1e-40)


def step_case(choose):
    gen, shape, dtype = choose.generator(), shape_of(choose), choose.one_of(*DOUBLES)
    eps = choose.one_of(budget(choose), 0.0)
    delta = (torch.rand(shape, generator=gen) * 4 - 2) * eps
    image = any_range(choose, special(torch.rand(shape, generator=gen), gen, 0, 1), gen)
    tensors = [shuffled(x.to(dtype), choose.order(4)) for x in (delta, gradient(gen, shape), image)]
    return *tensors, step_size(choose), eps


def store_case(choose, eps):
    """(gen, delta store, images, index, flip, the shape of the batch)."""
    gen, shape = choose.generator(), shape_of(choose)
    dtype = choose.one_of(torch.float32, torch.float16, torch.int8)
    if choose.flag():
        images = special(torch.randint(256, shape, generator=gen, dtype=torch.uint8), gen, 0, 255)
    else:
        images = any_range(choose, special(torch.rand(shape, generator=gen), gen, 0, 1), gen)
    delta = (torch.rand(shape, generator=gen) * 4 - 2) * eps
    if dtype == torch.int8:
        delta = torch.randint(-128, 128, shape, generator=gen)
    kind, index, batch = choose.one_of("whole", "permuted", "some", "none"), None, shape[0]
    if kind != "whole":
        some = int(torch.randint(shape[0] + 1, (), generator=gen))
        batch = {"permuted": shape[0], "some": some, "none": 0}[kind]
        index = torch.randperm(shape[0], generator=gen)[:batch].contiguous()
    flip = choose.one_of(None, torch.bool, torch.uint8)
    if flip is not None:
        flip = (torch.rand(batch, generator=gen) < 0.5).to(flip)
    return gen, delta.to(dtype), images, index, flip, (batch, *shape[1:])


def inplace_case(choose):
    eps = budget(choose)
    gen, delta, images, index, flip, shape = store_case(choose, eps)
    eps = 0.0 if delta.dtype != torch.int8 and choose.integer(0, 9) == 0 else eps
    grad = gradient(gen, shape).to(choose.one_of(*FLOATS))
    layout = choose.one_of("shuffled", "every other", "expanded")
    if layout == "shuffled":
        grad = shuffled(grad, choose.order(4))
    elif layout == "every other":
        grad = torch.stack([grad, torch.full_like(grad, torch.nan)], 4).flatten(3)[..., ::2]
    elif shape[0]:
        grad = grad[:1].expand(shape)
    nonfinite = torch.tensor([choose.one_of(0, 2**40)]) if choose.flag() else None
    view = any_view(choose, gen, shape)
    grid = choose.one_of(1, 1, 2, 3, 4, choose.integer(1, 50), 2**31 - 1)
    return delta, index, grad, images, flip, step_size(choose), eps, nonfinite, view, grid


def any_view(choose, gen, shape):
    kind = choose.one_of("none", "none", "usual", "anything")
    if kind == "none":
        return None
    if kind == "usual":
        return views(gen, shape)
    lowest = torch.iinfo(torch.int32).min
    view = torch.randint(lowest, -lowest, (shape[0], 3), generator=gen)
    return special(view, gen, 0, 1, lowest, -lowest - 1).to(torch.int32)


def step_by_numpy(delta, grad, image, alpha, eps):
    """The projected step written a second time, from its definition instead of the reference."""
    alpha, eps = (delta.dtype.type(v) for v in (alpha, eps))
    sign = (grad > 0).astype(delta.dtype) - (grad < 0).astype(delta.dtype)
    moved = np.minimum(np.maximum(delta - alpha * sign, -eps), eps)
    step = np.minimum(np.maximum(image + moved, 0), 1) - image
    return np.where(step < 0 - eps, 0 - eps, np.where(step > eps, eps, step)).astype(delta.dtype)


def rows_by_numpy(images, index, flip):
    """(place in the batch, row of the store, its image as the network sees it) of every row."""
    rows = range(len(images)) if index is None else index.tolist()
    for b, row in enumerate(rows):
        x = values(images[row]) / np.float32(255 if images.dtype == torch.uint8 else 1)
        yield b, row, x[..., ::-1] if flip is not None and flip[b] else x


def delta_by_numpy(delta, row, eps):
    return values(delta[row]) * np.float32(eps / 127 if delta.dtype == torch.int8 else 1)


def viewed_by_numpy(x, view):
    """One row [C, H, W] as it is seen, pixel by pixel."""
    down, right, mirrored = view
    out, (_, h, w) = np.zeros_like(x), x.shape
    for i in range(h):
        for j in range(w):
            row, column = i - down, j - right
            if 0 <= row < h and 0 <= column < w:
                out[:, i, j] = x[:, row, w - 1 - column if mirrored else column]
    return out


def back_by_numpy(grad, view):
    """The transpose: every pixel of the view gives its gradient to the pixel that it shows."""
    down, right, mirrored = view
    out, (_, h, w) = np.zeros_like(grad), grad.shape
    for i in range(h):
        for j in range(w):
            row, column = i - down, j - right
            if 0 <= row < h and 0 <= column < w:
                out[:, row, w - 1 - column if mirrored else column] = grad[:, i, j]
    return out


def cells_by_numpy(grad, size):
    out, (_, h, w) = np.empty_like(grad), grad.shape
    for top in range(0, h, size):
        for left in range(0, w, size):
            cell = grad[:, top : top + size, left : left + size]
            down, total = np.zeros_like(cell[:, 0]), np.zeros_like(cell[:, 0, 0])
            for line in cell.swapaxes(0, 1):
                down = down + line
            for column in down.T:
                total = total + column
            out[:, top : top + size, left : left + size] = total[:, None, None]
    return out


def step_formula(delta, grad, image, alpha, eps):
    step = step_by_numpy(values(delta), values(grad), values(image), alpha, eps)
    return [torch.from_numpy(np.ascontiguousarray(step)).to(delta.dtype)]


def inplace_formula(delta, index, grad, images, flip, alpha, eps, nonfinite, view, grid):
    out, count = delta.cpu().clone(), 0
    for b, row, x in rows_by_numpy(images, index, flip):
        g = values(grad[b])
        if view is not None:
            g = back_by_numpy(g, view[b].tolist())
        count += int((~np.isfinite(g)).sum())
        if grid > 1:
            with np.errstate(invalid="ignore", over="ignore"):
                g = cells_by_numpy(g, grid)
        step = step_by_numpy(delta_by_numpy(delta, row, eps), g, x, alpha, eps)
        if delta.dtype == torch.int8:
            step = np.clip(np.rint(step * np.float32(127 / eps)), -127, 127)
        out[row] = torch.from_numpy(step).to(delta.dtype)
    return [out] if nonfinite is None else [out, nonfinite.cpu() + count]


def step_public(backend, batch):
    delta = batch["delta"]
    return miue_fast.projected_step(
        delta, batch["grad"] + 1, torch.full_like(delta, 0.5), 0.01, 0.03, backend=backend
    )


def inplace_public(backend, batch):
    delta = batch["delta"].clone()
    count = torch.zeros(1, dtype=torch.int64, device=delta.device)
    miue_fast.projected_step_(
        delta,
        batch["index"],
        batch["grad"],
        batch["images"],
        batch["flip"],
        alpha=0.01,
        eps=0.03,
        nonfinite=count,
        view=batch["view"],
        grid=2,
        backend=backend,
    )
    return delta * 1, count


def no_values(args):
    return *(a[:0] for a in args[:3]), *args[3:]


def no_rows(args):
    none = torch.empty(0, dtype=torch.int64, device=args[0].device)
    view = None if args[8] is None else args[8][:0]
    return args[0], none, args[2][:0], args[3], None, *args[5:8], view, args[9]


add(
    "projected_step",
    Samples(step_samples, step_case, no_values, step_public, (0, 1, 2), step_formula),
)
add(
    "projected_step_",
    Samples(inplace_samples, inplace_case, no_rows, inplace_public, (2,), inplace_formula),
)
