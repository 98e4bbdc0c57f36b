"""torch.compile(fullgraph=True) gives what eager gives: every public op, forward and backward,
dynamic shapes, and inductor once.
"""

import pytest
import torch
from _support import cases_of

from tests import samples


def results(call, backend, batch):
    """What the call returns and, where that is a differentiable loss, its gradient."""
    out = call(backend, batch)
    if isinstance(out, torch.Tensor) and out.requires_grad:
        return out.detach(), torch.autograd.grad(out, batch["features"])[0]
    return out


def assert_compiled_equals_eager(op, impl, device, compiler, counts, **options):
    torch._dynamo.reset()
    call, traced, first = samples.of(op.name).public, [], 0

    def counted(graph, inputs):
        traced.append(graph)
        return torch._dynamo.lookup_backend(compiler)(graph, inputs)

    compiled = torch.compile(call, fullgraph=True, backend=counted, **options)
    for k, count in enumerate(counts):
        batch = samples.batch_of(count, device)
        batch["features"].requires_grad_("want_grad" in op.schema)
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
