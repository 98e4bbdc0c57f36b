"""Gradients of the public losses against finite differences in float64; second derivatives are
refused, not wrong.
"""

import pytest
import torch
from _support import cases_of

import miue_fast


def batch(device):
    gen = torch.Generator().manual_seed(5)
    features = torch.randn(7, 4, generator=gen, dtype=torch.float64)
    return features.to(device).requires_grad_(), torch.tensor([0, 1, 1, 0, 2, 2, 2], device=device)


def losses(name, labels, backend):
    if name == "nt_xent":
        for temperature in (0.1, 1.0):
            for denominator in ("all", "negatives"):
                yield lambda x, t=temperature, d=denominator: miue_fast.nt_xent(
                    x, labels, t, denominator=d, backend=backend
                )
    else:
        for normalize in (True, False):
            yield lambda x, n=normalize: miue_fast.intra_class_distance(
                x, labels, normalize_dim=n, backend=backend
            )


@pytest.mark.parametrize(
    "op, impl, device", cases_of("nt_xent", "intra_class_distance", dtypes=False)
)
def test_gradcheck(op, impl, device):
    if torch.float64 not in impl.dtypes:
        pytest.skip(f"{impl.backend} does not take float64")
    features, labels = batch(device)
    for loss in losses(op.name, labels, impl.backend):
        assert torch.autograd.gradcheck(loss, features)
        assert torch.autograd.gradcheck(lambda x, loss=loss: -3 * loss(x).square(), features)


@pytest.mark.parametrize(
    "op, impl, device", cases_of("nt_xent", "intra_class_distance", dtypes=False)
)
def test_second_derivative_is_refused(op, impl, device):
    dtype = torch.float64 if torch.float64 in impl.dtypes else torch.float32
    features, labels = batch(device)
    features = features.detach().to(dtype).requires_grad_()
    for loss in losses(op.name, labels, impl.backend):
        (grad,) = torch.autograd.grad(loss(features), features, create_graph=True)
        with pytest.raises(RuntimeError, match="can be differentiated once only"):
            grad.sum().backward()


@pytest.mark.parametrize(
    "op, impl, device", cases_of("nt_xent", "intra_class_distance", dtypes=False)
)
def test_loss_scaling_lifts_half_gradients_out_of_underflow(op, impl, device):
    """One rounding, after the scale: the values below float16's smallest are there, as they are for
    a float32 gradient.
    """
    gen = torch.Generator().manual_seed(5)
    labels = torch.arange(24, device=device) % 3
    features = (1000 * torch.randn(24, 16, generator=gen)).half().to(device).requires_grad_()
    (scaled,) = torch.autograd.grad(
        next(losses(op.name, labels, impl.backend))(features) * 2.0**16, features
    )
    exact = features.detach().double().requires_grad_()
    (truth,) = torch.autograd.grad(next(losses(op.name, labels, "reference"))(exact), exact)
    assert ((truth != 0) & (truth.abs() < 3e-8)).any(), "nothing would underflow"
    assert scaled.dtype == torch.float16
    torch.testing.assert_close(
        scaled.double(), truth * 2.0**16, rtol=2e-3, atol=1e-6 * truth.abs().max().item() * 2.0**16
    )


@pytest.mark.parametrize("op, impl, device", cases_of("mi_ue_value_and_grad", dtypes=False))
def test_value_and_grad_is_the_sum_of_the_two_losses(op, impl, device):
    features, labels = batch(device)
    features = features.detach().float().requires_grad_()
    together = miue_fast.nt_xent(features, labels, 0.2, backend=impl.backend)
    together = together + 0.3 * miue_fast.intra_class_distance(
        features, labels, backend=impl.backend
    )
    (grad,) = torch.autograd.grad(together, features)
    value, direct = miue_fast.mi_ue_value_and_grad(features, labels, 0.2, 0.3, backend=impl.backend)
    torch.testing.assert_close((value, direct), (together.detach(), grad))
    assert not value.requires_grad and not direct.requires_grad


def test_no_gradient_is_computed_where_none_is_asked(monkeypatch):
    seen = []
    op = miue_fast.dispatch.registry.OPS["nt_xent"]
    chosen = op.choose("auto", "cpu", torch.float32)
    spy = miue_fast.dispatch.registry.Impl(
        "spy",
        lambda *args: seen.append(args[-1]) or chosen.fn(*args),
        chosen.devices,
        chosen.dtypes,
        chosen.missing,
    )
    monkeypatch.setitem(op._chosen, ("auto", "cpu", torch.float32), spy)
    features, labels = torch.randn(4, 3), torch.tensor([0, 0, 1, 1])
    miue_fast.nt_xent(features, labels)
    miue_fast.nt_xent(features.requires_grad_(), labels)
    with torch.no_grad():
        miue_fast.nt_xent(features, labels)
    assert seen == [False, True, False]
