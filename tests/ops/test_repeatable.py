"""The same input gives the same bits: 100 repeats of every implementation (fewer where Python loops
make them slow).
"""

import pytest
import torch
from _support import cases_of, run, same_bits

from tests import samples


@pytest.mark.parametrize("op, impl, device, dtype", cases_of())
def test_repeatable(op, impl, device, dtype):
    args = max(
        samples.taken(op.name, impl, device, dtype),
        key=lambda args: args[0].numel() if args[0].numel() < 20_000 else 0,
    )
    first = run(op, impl.fn, args)
    slow = impl is op.reference and op.kind == "loss"  # some walk rows in Python
    for _ in range(20 if slow else 100):
        assert all(same_bits(a, b) for a, b in zip(run(op, impl.fn, args), first))


@pytest.mark.parametrize(
    "op, impl, device",
    cases_of("nt_xent", "intra_class_distance", "mi_ue_value_and_grad", dtypes=False),
)
def test_repeatable_at_workload_size(op, impl, device):
    if impl is op.reference and op.name != "nt_xent":
        pytest.skip("the reference walks rows in Python: covered at sample size")
    gen = torch.Generator().manual_seed(2)
    features = torch.randn(512, 512, generator=gen).relu().to(device)
    labels = torch.randint(10, (512,), generator=gen).to(device)
    rest = {
        "nt_xent": (0.1, "all", True),
        "intra_class_distance": (True, True),
        "mi_ue_value_and_grad": (0.1, 0.1, "all", True),
    }[op.name]
    first = impl.fn(features, labels, *rest)
    for _ in range(100 if device == "cuda" else 10):
        assert all(same_bits(a, b) for a, b in zip(impl.fn(features, labels, *rest), first))
