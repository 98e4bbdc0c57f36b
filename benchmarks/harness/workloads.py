"""What is timed: per op one data set of a real run's size. `make(batch, device, seed)` gives the
arguments of `Impl.fn`.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial

import torch

import miue_fast
from benchmarks.baselines import other
from miue_fast import ops
from miue_fast.dispatch import measured
from miue_fast.dispatch.registry import OPS
from miue_fast.reference.conv_epilogue import mask_bytes

MEAN, STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
EPS, ALPHA = 8 / 255, 0.3 / 255
CLASSES = 10


@dataclass(frozen=True)
class Workload:
    name: str
    op: str
    batch: int
    make: Callable
    flops: int = 0  # two B x B x D products: the least that a dense method computes
    moved: int = 0  # bytes that must be read and written once
    memory: bool = False  # measure the extra memory of one call
    skip: dict = field(default_factory=dict)  # implementation -> why it does not take part


def random(device, seed):
    return torch.Generator(device).manual_seed(seed)


def features(batch, device, seed, *, width=512, dtype=torch.float32):
    """Positive features in CLASSES overlapping clusters, and labels."""
    gen = random(device, seed)
    labels = torch.randint(CLASSES, (batch,), generator=gen, device=device)
    centres = torch.randn(CLASSES, width, generator=gen, device=device)
    values = torch.nn.functional.softplus(
        centres[labels] + torch.randn(batch, width, generator=gen, device=device)
    )
    return values.to(dtype), labels


def nt_xent(batch, device, seed, **kind):
    return *features(batch, device, seed, **kind), 0.1, "all", True


def intra_class_distance(batch, device, seed, **kind):
    return *features(batch, device, seed, **kind), True, True


def mi_ue(batch, device, seed, *, zeta, **kind):
    return *features(batch, device, seed, **kind), 0.1, zeta, "all", True


def class_covariance(batch, device, seed, **kind):
    return *features(batch, device, seed, **kind), CLASSES


def projected_step(batch, device, seed, *, side=32):
    gen = random(device, seed)
    image, grad, delta = (
        torch.rand(batch, 3, side, side, generator=gen, device=device) for _ in range(3)
    )
    return (delta * 2 - 1) * EPS, grad - 0.5, image, ALPHA, EPS


def store(batch, device, seed, *, side=32):
    """(images, delta, index, flip): a store of four batches, of which a random quarter is used; a
    large batch is the whole store.
    """
    gen = random(device, seed)
    images = torch.randint(
        256,
        ((4 if batch <= 8192 else 1) * batch, 3, side, side),
        generator=gen,
        dtype=torch.uint8,
        device=device,
    )
    delta = (torch.rand(images.shape, generator=gen, device=device) * 2 - 1) * EPS
    index = torch.randperm(len(images), generator=gen, device=device)[:batch]
    flip = torch.rand(batch, generator=gen, device=device) < 0.5
    return images, delta, index, flip


def projected_step_(batch, device, seed, *, dtype=torch.float32, side=32):
    images, delta, index, flip = store(batch, device, seed, side=side)
    grad = torch.randn(batch, *images.shape[1:], generator=random(device, seed + 1), device=device)
    grad = grad.to(dtype).contiguous(memory_format=torch.channels_last)
    return delta, index, grad, images, flip, ALPHA, EPS, None


def perturbed_input(batch, device, seed, *, dtype=torch.float32, channels_last=True, side=32):
    images, delta, index, flip = store(batch, device, seed, side=side)
    return images, delta, index, flip, MEAN, STD, 0.0, dtype, channels_last


def values(gen, device, *shape):
    x = torch.randn(shape, generator=gen, device=device)
    return x.contiguous(memory_format=torch.channels_last) if x.dim() == 4 else x


def bits(gen, device, count):
    return torch.randint(256, (mask_bytes(count),), generator=gen, dtype=torch.uint8, device=device)


def conv_epilogue_(batch, device, seed, *, channels=64, side=32, masked=True):
    gen = random(device, seed)
    shape = batch, channels, side, side
    mask = (
        torch.zeros(mask_bytes(math.prod(shape)), dtype=torch.uint8, device=device)
        if masked
        else None
    )
    return (
        values(gen, device, *shape),
        values(gen, device, channels),
        values(gen, device, *shape),
        True,
        mask,
    )


def conv_grad_epilogue_(batch, device, seed, *, channels=64, side=32):
    gen = random(device, seed)
    shape = batch, channels, side, side
    return (
        values(gen, device, *shape),
        values(gen, device, *shape),
        bits(gen, device, math.prod(shape)),
    )


CONVOLUTION = [1, 1], [1, 1], [1, 1], 1  # 3x3: stride, padding, dilation, groups


def conv_forward(batch, device, seed, *, channels=64, side=32):
    gen = random(device, seed)
    weight = values(gen, device, channels, channels, 3, 3) / (9 * channels) ** 0.5
    return (
        values(gen, device, batch, channels, side, side),
        weight,
        values(gen, device, channels),
        None,
        *CONVOLUTION,
        True,
        True,
    )


def conv_input_grad(batch, device, seed, *, channels=64, side=32):
    gen = random(device, seed)
    shape = batch, channels, side, side
    grad, weight = (
        values(gen, device, *shape),
        values(gen, device, channels, channels, 3, 3) / (9 * channels) ** 0.5,
    )
    return grad, weight, None, bits(gen, device, math.prod(shape)), list(shape), *CONVOLUTION


def conv_input_grad_step_(batch, device, seed, *, channels=64, side=32):
    images, delta, index, flip = store(batch, device, seed, side=side)
    gen = random(device, seed + 1)
    grad, weight = (
        values(gen, device, batch, channels, side, side),
        values(gen, device, channels, 3, 3, 3),
    )
    return delta, index, grad, weight, images, flip, *CONVOLUTION, ALPHA, EPS, None


def _convolution_workloads(batch, channels, side):
    values = batch * channels * side * side
    shape, product = f"{batch}x{channels}x{side}x{side}", 2 * 9 * values
    for masked in (True, False):
        yield Workload(
            f"conv_epilogue_ {shape}{' with bits' if masked else ''}",
            "conv_epilogue_",
            batch,
            partial(conv_epilogue_, channels=channels, side=side, masked=masked),
            moved=values * 12 + values // 8 * masked,
        )
    for make, flops, moved in [
        (conv_grad_epilogue_, 0, values * 12 + values // 8),
        (conv_forward, product * channels, 0),
        (conv_input_grad, product * channels, 0),
        (conv_input_grad_step_, product * 3, 0),
    ]:
        name = make.__name__
        yield Workload(
            f"{name} {shape}",
            name,
            batch,
            partial(make, channels=channels, side=side),
            flops=flops,
            moved=moved,
        )


def _loss_skips(batch, dense):
    """Dense B x B paths stop where their temporaries would take gigabytes, the B x B x D one long
    before.
    """
    skip = {}
    if batch > 512:
        skip["eager"] = (
            "one of its B x B x D temporaries would take "
            f"{batch * batch * 512 * 4 / 2**30:,.0f} GiB"
        )
    if batch > dense:
        paths = (
            "matmul, autograd",
            "matmul, autograd, compiled",
            "closed form",
            "closed form, compiled",
            other.SUPCON,
        )
        skip |= {
            name: f"keeps several B x B matrices of {batch * batch * 4 / 2**30:,.2f} GiB"
            for name in paths
        }
    return skip


def _nt_xent_workload(batch, *, dtype=torch.float32, width=512, memory=True, dense=2048):
    suffix = "" if dtype == torch.float32 else f" {str(dtype)[6:]}"
    return Workload(
        f"nt_xent B={batch} D={width}{suffix}",
        "nt_xent",
        batch,
        partial(nt_xent, dtype=dtype, width=width),
        flops=4 * batch * batch * width,
        memory=memory,
        skip=_loss_skips(batch, dense),
    )


def _pixel_workloads(batch, dtype, side=32):
    pixels, size, shape = batch * 3 * side * side, dtype.itemsize, f"{batch}x3x{side}x{side}"
    suffix = "" if dtype == torch.float32 else f" {str(dtype)[6:]}"
    yield Workload(
        f"projected_step_ {shape} store{suffix}",
        "projected_step_",
        batch,
        partial(projected_step_, dtype=dtype, side=side),
        moved=pixels * (1 + 4 + 4 + size),
    )
    for channels_last in (True, False):
        layout = "channels-last" if channels_last else "contiguous"
        yield Workload(
            f"perturbed_input {shape} {layout}{suffix}",
            "perturbed_input",
            batch,
            partial(perturbed_input, dtype=dtype, channels_last=channels_last, side=side),
            moved=pixels * (1 + 4 + size),
        )


def cpu(quick=False):
    batch, width, side = (48, 32, 8) if quick else (512, 512, 32)
    yield _nt_xent_workload(batch, width=width)
    if not quick:
        yield _nt_xent_workload(2048, memory=False)
        yield _nt_xent_workload(8192)
    yield Workload(
        f"intra_class_distance B={batch} D={width}",
        "intra_class_distance",
        batch,
        partial(intra_class_distance, width=width),
    )
    for zeta in (0.1, 0.0):
        yield Workload(
            f"mi_ue_value_and_grad B={batch} D={width} zeta={zeta:g}",
            "mi_ue_value_and_grad",
            batch,
            partial(mi_ue, zeta=zeta, width=width),
            flops=4 * batch * batch * width,
        )
    rows = 48 if quick else 8192
    yield Workload(
        f"class_covariance B={rows} D={width} K={CLASSES}",
        "class_covariance",
        rows,
        partial(class_covariance, width=width),
        flops=2 * rows * width * width,
        memory=True,
    )
    yield Workload(
        f"projected_step {batch}x3x{side}x{side}",
        "projected_step",
        batch,
        partial(projected_step, side=side),
        moved=batch * 3 * side * side * 16,
    )
    yield from _pixel_workloads(batch, torch.float32, side)
    yield from _convolution_workloads(min(batch, 64), min(width, 64), side)


def gpu_loss(quick=False):
    """What matters most comes first: a run that is out of time leaves out the rest."""
    half = torch.bfloat16
    for zeta in (0.1, 0.0):
        yield Workload(
            f"mi_ue_value_and_grad B=512 D=512 zeta={zeta:g} bfloat16",
            "mi_ue_value_and_grad",
            512,
            partial(mi_ue, zeta=zeta, dtype=half),
            memory=True,
        )
    for batch in (512,) if quick else (512, 8192, 50_000, 2048):
        for dtype in (half, torch.float32):
            yield _nt_xent_workload(batch, dtype=dtype, dense=8192)
    yield Workload(
        "intra_class_distance B=512 D=512", "intra_class_distance", 512, intra_class_distance
    )


def loss_table(rows):
    """{key of dispatch/measured.py: "triton" or "cuda"} of the loss ops that `auto` chooses for:
    who needs less time.
    """
    found = {}
    for workload in gpu_loss(False):
        times = {
            row["implementation"]: row["median_s"]
            for row in rows
            if row["workload"] == workload.name and row["role"] == "ours"
        }
        if OPS[workload.op].route and times.get("triton") and times.get("cuda"):
            features = workload.make(8, "cpu", 1)[0]
            sums = found.setdefault(
                measured.loss_key(workload.op, workload.batch, features.dtype), {}
            )
            for name in ("triton", "cuda"):
                sums[name] = sums.get(name, 0.0) + times[name]
    return {key: min(sums, key=sums.get) for key, sums in found.items()}


def gpu_pixels(quick=False):
    for batch in (512,) if quick else (50_000, 512):
        for dtype in (torch.bfloat16, torch.float32):
            for workload in _pixel_workloads(batch, dtype):
                yield (
                    workload
                    if batch == 512
                    else replace(workload, skip={"compiled": "compiled at B=512 only"})
                )


def _conv_forward(x, weight, bias, residual, stride, padding, dilation, groups, relu, want_mask):
    return ops.conv_forward(
        x,
        weight,
        bias,
        residual,
        stride=stride,
        padding=padding,
        dilation=dilation,
        groups=groups,
        relu=relu,
        want_mask=want_mask,
    )


def _conv_input_grad_step_(
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
    return ops.conv_input_grad_step_(
        delta,
        index,
        grad,
        weight,
        images,
        flip,
        alpha=alpha,
        eps=eps,
        stride=stride,
        padding=padding,
        dilation=dilation,
        groups=groups,
        nonfinite=nonfinite,
    )


PUBLIC = {  # the public call with the arguments of `Impl.fn`
    "nt_xent": lambda f, y, t, denominator, want_grad: miue_fast.nt_xent(
        f, y, t, denominator=denominator
    ),
    "intra_class_distance": lambda f, y, normalize, want_grad: miue_fast.intra_class_distance(
        f, y, normalize_dim=normalize
    ),
    "class_covariance": lambda f, y, classes: miue_fast.class_covariance(f, y, classes),
    "mi_ue_value_and_grad": lambda f, y, t, zeta, denominator, normalize: (
        miue_fast.mi_ue_value_and_grad(
            f, y, t, zeta, denominator=denominator, normalize_dim=normalize
        )
    ),
    "projected_step": lambda delta, grad, image, alpha, eps: miue_fast.projected_step(
        delta, grad, image, alpha, eps
    ),
    "projected_step_": lambda delta, index, grad, images, flip, alpha, eps, nonfinite: (
        miue_fast.projected_step_(
            delta, index, grad, images, flip, alpha=alpha, eps=eps, nonfinite=nonfinite
        )
    ),
    "perturbed_input": lambda images, delta, index, flip, mean, std, eps, dtype, channels_last: (
        miue_fast.perturbed_input(
            images, delta, index, flip, mean, std, eps=eps, dtype=dtype, channels_last=channels_last
        )
    ),
    "conv_epilogue_": lambda y, bias, residual, relu, mask: ops.conv_epilogue_(
        y, bias, residual, relu=relu, mask=mask
    ),
    "conv_grad_epilogue_": lambda grad, addend, mask: ops.conv_grad_epilogue_(grad, addend, mask),
    "conv_forward": _conv_forward,
    "conv_input_grad": lambda grad, weight, addend, mask, size, stride, padding, dilation, groups: (
        ops.conv_input_grad(
            grad,
            weight,
            size,
            addend,
            mask,
            stride=stride,
            padding=padding,
            dilation=dilation,
            groups=groups,
        )
    ),
    "conv_input_grad_step_": _conv_input_grad_step_,
}


def tiny(op):
    """Inputs so small that a call costs its overhead; the losses without their gradient, as the
    public call computes them.
    """
    size = {
        "nt_xent": partial(nt_xent, width=4),
        "intra_class_distance": partial(intra_class_distance, width=4),
        "class_covariance": partial(class_covariance, width=4),
        "mi_ue_value_and_grad": partial(mi_ue, zeta=0.1, width=4),
        "projected_step": partial(projected_step, side=2),
        "projected_step_": partial(projected_step_, side=2),
        "perturbed_input": partial(perturbed_input, side=2),
    }
    size |= {
        f.__name__: partial(f, channels=16, side=2)
        for f in (
            conv_epilogue_,
            conv_grad_epilogue_,
            conv_forward,
            conv_input_grad,
            conv_input_grad_step_,
        )
    }
    args = size[op](2, "cpu", 1)
    return (*args[:-1], False) if op in ("nt_xent", "intra_class_distance") else args
