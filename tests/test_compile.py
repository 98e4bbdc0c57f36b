"""torch.compile(fullgraph=True) gives what eager gives: every public op, forward and backward, dynamic shapes, and inductor once."""

import pytest
import torch
from _support import cases_of

import miue_fast

MEAN, STD = [0.5, 0.4, 0.3], [0.2, 0.2, 0.3]


def nt_xent(backend, batch):
    return 2 * miue_fast.nt_xent(batch["features"] * 3, batch["labels"], backend=backend)


def intra_class_distance(backend, batch):
    return 2 * miue_fast.intra_class_distance(batch["features"] * 3, batch["labels"], backend=backend)


def mi_ue_value_and_grad(backend, batch):
    return miue_fast.mi_ue_value_and_grad(batch["features"] * 2, batch["labels"], backend=backend)


def projected_step(backend, batch):
    delta = batch["delta"]
    return miue_fast.projected_step(delta, batch["grad"] + 1, torch.full_like(delta, 0.5), 0.01, 0.03, backend=backend)


def projected_step_(backend, batch):
    delta, count = batch["delta"].clone(), torch.zeros(1, dtype=torch.int64, device=batch["delta"].device)
    miue_fast.projected_step_(delta, batch["index"], batch["grad"], batch["images"], batch["flip"], alpha=0.01, eps=0.03,
                              nonfinite=count, backend=backend)  # fmt: skip
    return delta * 1, count


def perturbed_input(backend, batch):
    return miue_fast.perturbed_input(batch["images"], batch["delta"], batch["index"], batch["flip"], MEAN, STD, backend=backend) + 1


CALLS = {f.__name__: f for f in (nt_xent, intra_class_distance, mi_ue_value_and_grad, projected_step, projected_step_, perturbed_input)}


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
            results(compiled, impl.backend, batch), results(call, impl.backend, batch), rtol=0, atol=0, equal_nan=True
        )
        first = len(traced) if k == 0 else first
    assert len(traced) == first > 0  # other sizes trace nothing new


@pytest.mark.parametrize("op, impl, device", cases_of(dtypes=False))
def test_compiled_equals_eager(op, impl, device):
    assert_compiled_equals_eager(op, impl, device, "aot_eager", [8])


@pytest.mark.parametrize("op, impl, device", cases_of("mi_ue_value_and_grad", "projected_step_", "perturbed_input", dtypes=False))
def test_dynamic_shapes(op, impl, device):
    assert_compiled_equals_eager(op, impl, device, "aot_eager", [8, 9, 12], dynamic=True)


@pytest.mark.parametrize("op, impl, device", cases_of("nt_xent", dtypes=False))
def test_inductor(op, impl, device):
    assert_compiled_equals_eager(op, impl, device, "inductor", [8])
