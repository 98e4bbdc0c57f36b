"""torch.compile(fullgraph=True) gives what eager gives: every public op, forward and backward,
dynamic shapes, and inductor once.
"""

import pytest
import torch
from _support import cases_of

import miue_fast
from miue_fast import ops
from miue_fast.reference.conv_epilogue import mask_bytes

MEAN, STD = [0.5, 0.4, 0.3], [0.2, 0.2, 0.3]


def nt_xent(backend, batch):
    return 2 * miue_fast.nt_xent(batch["features"] * 3, batch["labels"], backend=backend)


def intra_class_distance(backend, batch):
    return 2 * miue_fast.intra_class_distance(
        batch["features"] * 3, batch["labels"], backend=backend
    )


def class_covariance(backend, batch):
    counts, means, covariances = miue_fast.class_covariance(
        batch["features"] * 2, batch["labels"], 4, backend=backend
    )
    return counts + 1, means, covariances * 2


def mi_ue_value_and_grad(backend, batch):
    return miue_fast.mi_ue_value_and_grad(batch["features"] * 2, batch["labels"], backend=backend)


def projected_step(backend, batch):
    delta = batch["delta"]
    return miue_fast.projected_step(
        delta, batch["grad"] + 1, torch.full_like(delta, 0.5), 0.01, 0.03, backend=backend
    )


def projected_step_(backend, batch):
    delta, count = (
        batch["delta"].clone(),
        torch.zeros(1, dtype=torch.int64, device=batch["delta"].device),
    )
    miue_fast.projected_step_(
        delta,
        batch["index"],
        batch["grad"],
        batch["images"],
        batch["flip"],
        alpha=0.01,
        eps=0.03,
        nonfinite=count,
        backend=backend,
    )
    return delta * 1, count


def perturbed_input(backend, batch):
    return (
        miue_fast.perturbed_input(
            batch["images"],
            batch["delta"],
            batch["index"],
            batch["flip"],
            MEAN,
            STD,
            backend=backend,
        )
        + 1
    )


def bits_of(y):
    return torch.zeros(mask_bytes(y.numel()), dtype=torch.uint8, device=y.device)


def conv_epilogue_(backend, batch):
    y = batch["x"].clone()
    mask = bits_of(y)
    ops.conv_epilogue_(y, batch["bias"], batch["x"], mask=mask, backend=backend)
    return y * 2, mask


def conv_grad_epilogue_(backend, batch):
    grad = batch["x"].clone()
    ops.conv_grad_epilogue_(grad, batch["x"], bits_of(grad) + 0x5A, backend=backend)
    return grad * 2


def conv_forward(backend, batch):
    y, mask = ops.conv_forward(
        batch["x"] + 1, batch["weight"], batch["bias"], batch["x"], padding=1, backend=backend
    )
    return y * 2, mask


def conv_input_grad(backend, batch):
    x = batch["x"]
    return (
        ops.conv_input_grad(
            x, batch["weight"], x.shape, x, bits_of(x) + 0x5A, padding=1, backend=backend
        )
        * 2
    )


def conv_input_grad_step_(backend, batch):
    delta, count = (
        batch["delta"].clone(),
        torch.zeros(1, dtype=torch.int64, device=batch["delta"].device),
    )
    grad = (
        batch["x"][:, :, :, :1].expand(-1, -1, 4, 5).contiguous(memory_format=torch.channels_last)
    )
    ops.conv_input_grad_step_(
        delta,
        batch["index"],
        grad,
        batch["stem"],
        batch["images"],
        batch["flip"],
        alpha=0.01,
        eps=0.03,
        padding=1,
        nonfinite=count,
        backend=backend,
    )
    return delta * 1, count


CALLS = {
    f.__name__: f
    for f in (
        nt_xent,
        intra_class_distance,
        class_covariance,
        mi_ue_value_and_grad,
        projected_step,
        projected_step_,
        perturbed_input,
        conv_epilogue_,
        conv_grad_epilogue_,
        conv_forward,
        conv_input_grad,
        conv_input_grad_step_,
    )
}


def make(count, device):
    gen = torch.Generator().manual_seed(count)
    images = torch.randint(256, (count, 3, 4, 5), generator=gen, dtype=torch.uint8)
    batch = {
        "features": torch.randn(count, 6, generator=gen),
        "labels": torch.randint(3, (count,), generator=gen),
        "images": images,
        "delta": (torch.rand(images.shape, generator=gen) - 0.5) / 20,
        "grad": torch.randn(images.shape, generator=gen),
        "index": torch.randperm(count, generator=gen),
        "flip": torch.rand(count, generator=gen) < 0.5,
        "x": torch.randn(count, 16, 4, 4, generator=gen).contiguous(
            memory_format=torch.channels_last
        ),
        "weight": torch.randn(16, 16, 3, 3, generator=gen) / 12,
        "stem": torch.randn(16, 3, 3, 3, generator=gen),
        "bias": torch.randn(16, generator=gen),
    }
    batch["grad"][0, 0, 0, 0] = torch.nan
    return {name: value.to(device) for name, value in batch.items()}


def results(call, backend, batch):
    """What the call returns and, where that is a differentiable loss, its gradient."""
    out = call(backend, batch)
    if isinstance(out, torch.Tensor) and out.requires_grad:
        return out.detach(), torch.autograd.grad(out, batch["features"])[0]
    return out


def assert_compiled_equals_eager(op, impl, device, compiler, counts, **options):
    torch._dynamo.reset()
    call, traced, first = CALLS[op.name], [], 0

    def counted(graph, inputs):
        traced.append(graph)
        return torch._dynamo.lookup_backend(compiler)(graph, inputs)

    compiled = torch.compile(call, fullgraph=True, backend=counted, **options)
    for k, count in enumerate(counts):
        batch = make(count, device)
        batch["features"].requires_grad_(op.name in ("nt_xent", "intra_class_distance"))
        torch.testing.assert_close(
            results(compiled, impl.backend, batch),
            results(call, impl.backend, batch),
            rtol=0,
            atol=0,
            equal_nan=True,
        )
        first = len(traced) if k == 0 else first
    assert len(traced) == first > 0  # other sizes trace nothing new


@pytest.mark.parametrize("op, impl, device", cases_of(dtypes=False))
def test_compiled_equals_eager(op, impl, device):
    assert_compiled_equals_eager(op, impl, device, "aot_eager", [8])


@pytest.mark.parametrize(
    "op, impl, device",
    cases_of(
        "mi_ue_value_and_grad",
        "class_covariance",
        "projected_step_",
        "perturbed_input",
        dtypes=False,
    ),
)
def test_dynamic_shapes(op, impl, device):
    assert_compiled_equals_eager(op, impl, device, "aot_eager", [8, 9, 12], dynamic=True)


@pytest.mark.parametrize("op, impl, device", cases_of("nt_xent", dtypes=False))
def test_inductor(op, impl, device):
    assert_compiled_equals_eager(op, impl, device, "inductor", [8])
