"""torch.func, forward-mode derivatives, autocast and in-place versions: right, or one clear
refusal.
"""

import pytest
import torch
from _support import OPS, assert_same_bits, available, cases_of, run
from torch.autograd import forward_ad

import miue_fast
from miue_fast import ops
from tests import samples

LOSSES = {
    "nt_xent": lambda y, backend: lambda x: miue_fast.nt_xent(x, y, 0.3, backend=backend),
    "intra_class_distance": lambda y, backend: (
        lambda x: miue_fast.intra_class_distance(x, y, backend=backend)
    ),
}
ONCE = "can be differentiated once only"


@pytest.fixture(
    params=[pytest.param(p.values, marks=p.marks, id=p.id) for p in cases_of(*LOSSES, dtypes=False)]
)
def case(request):
    """(loss, features, labels, autograd's gradient)."""
    op, impl, device = request.param
    gen = torch.Generator().manual_seed(3)
    dtype = torch.float64 if torch.float64 in impl.dtypes else torch.float32
    features, labels = (
        torch.randn(8, 5, generator=gen).to(dtype).to(device),
        (torch.arange(8) % 3).to(device),
    )
    loss = LOSSES[op.name](labels, impl.backend)
    leaf = features.clone().requires_grad_()
    return loss, features, labels, torch.autograd.grad(loss(leaf), leaf)[0]


def test_backward_transforms(case):
    loss, x, _, grad = case
    assert torch.equal(torch.func.grad(loss)(x), grad) and torch.equal(
        torch.func.jacrev(loss)(x), grad
    )
    value, pull = torch.func.vjp(loss, x)
    torch.testing.assert_close(value, loss(x), rtol=0, atol=0)
    torch.testing.assert_close(pull(torch.full_like(value, 3.0))[0], 3 * grad)
    torch.testing.assert_close(
        torch.func.grad(lambda x: loss(2 * x) ** 2)(x),
        4 * loss(2 * x) * torch.func.grad(loss)(2 * x),
    )


def test_forward_mode(case):
    loss, x, _, grad = case
    tangent = torch.randn(x.shape, generator=torch.Generator().manual_seed(1)).to(x)
    value, moved = torch.func.jvp(loss, (x,), (tangent,))
    torch.testing.assert_close(value, loss(x), rtol=0, atol=0)
    torch.testing.assert_close(moved, (grad * tangent).sum())
    torch.testing.assert_close(torch.func.jacfwd(loss)(x), grad)
    with forward_ad.dual_level():
        dual = forward_ad.unpack_dual(loss(forward_ad.make_dual(x, tangent)))
        torch.testing.assert_close(dual.tangent, (grad * tangent).sum())
        assert forward_ad.unpack_dual(loss(x)).tangent is None


def test_vmap_is_a_loop(case):
    loss, x, _, _ = case
    batches = torch.stack([x, 2 * x + 1, x.flip(0)])
    each = torch.stack([torch.func.grad(loss)(b) for b in batches])
    assert torch.equal(torch.func.vmap(loss)(batches), torch.stack([loss(b) for b in batches]))
    assert torch.equal(torch.func.vmap(torch.func.grad(loss))(batches), each)
    assert torch.equal(
        torch.func.vmap(torch.func.grad(loss), in_dims=1)(batches.movedim(0, 1)), each
    )


def test_second_derivatives_are_refused(case):
    loss, x, _, _ = case
    for call in (
        lambda: torch.func.hessian(loss)(x),
        lambda: torch.func.jacrev(torch.func.jacrev(loss))(x),
        lambda: torch.func.grad(lambda x: torch.func.grad(loss)(x).sum())(x),
        lambda: torch.func.jvp(torch.func.grad(loss), (x,), (x,)),
        lambda: torch.func.grad(lambda x: torch.func.jvp(loss, (x,), (x.detach(),))[1])(x),
        lambda: torch.func.jvp(lambda x: torch.func.jvp(loss, (x,), (x,))[1], (x,), (x,)),
    ):
        with pytest.raises(RuntimeError, match=ONCE):
            call()


def test_forward_over_backward_is_refused(case):
    """Autograd's backward of a dual number."""
    loss, x, _, _ = case
    with forward_ad.dual_level():
        leaf = x.clone().requires_grad_()
        dual = forward_ad.make_dual(leaf, torch.ones_like(x))
        with pytest.raises(RuntimeError, match=ONCE):
            torch.autograd.grad(loss(dual), leaf, create_graph=True)


def test_functionalize_and_compile(case):
    loss, x, _, grad = case
    assert torch.func.functionalize(loss)(x) == loss(x)
    for transform, wanted in (
        (torch.func.grad(lambda x: 2 * loss(x)), 2 * grad),
        (lambda x: torch.func.jvp(loss, (x,), (x,))[1], (grad * x).sum()),
        (lambda x: torch.func.vmap(torch.func.grad(loss))(x[None])[0], grad),
    ):
        torch._dynamo.reset()
        torch.testing.assert_close(torch.compile(transform, backend="aot_eager")(x), wanted)
        torch._dynamo.reset()
        with pytest.raises(
            torch._dynamo.exc.Unsupported, match=r"under torch\.func runs in eager mode only"
        ):
            torch.compile(transform, fullgraph=True, backend="aot_eager")(x)
    torch._dynamo.reset()
    torch.testing.assert_close(
        torch.compile(loss, fullgraph=True, backend="aot_eager")(x), loss(x), rtol=0, atol=0
    )
    torch.testing.assert_close(torch.func.grad(loss)(x), grad)


def test_value_and_grad_refuses_derivatives_of_transforms():
    x, y = torch.randn(6, 3), torch.arange(6) % 2

    def call(x):
        return miue_fast.mi_ue_value_and_grad(x, y)[0]

    for transform in (torch.func.grad(call), torch.func.jacfwd(call), torch.func.jacrev(call)):
        with pytest.raises(
            ValueError, match="mi_ue_value_and_grad: features: expected no derivative"
        ):
            transform(x)
    assert call(x.clone().requires_grad_()) == call(x)
    assert torch.equal(torch.func.vmap(call)(torch.stack([x, x])), torch.stack([call(x)] * 2))
    torch.func.grad(lambda x: x.sum() * call(x.detach()))(x)


def undifferentiable():
    """(op, argument, a function of one tensor, where it is valid)."""
    images, y = torch.rand(2, 3, 4, 4), torch.tensor([0, 1, 1])
    nhwc = torch.randn(2, 16, 4, 4).contiguous(memory_format=torch.channels_last)
    weight = torch.randn(16, 16, 3, 3)
    steps = {"alpha": 0.01, "eps": 0.03}
    yield (
        "class_covariance",
        "features",
        lambda x: miue_fast.class_covariance(x, y, 2)[2],
        torch.randn(3, 4),
    )
    yield (
        "perturbed_input",
        "images and delta",
        lambda x: miue_fast.perturbed_input(images, x),
        images * 0,
    )
    yield "perturbed_input", "images and delta", lambda x: miue_fast.perturbed_input(x), images
    for k, name in enumerate(("delta", "grad", "image")):
        args = [images * 0, images, images]
        yield (
            "projected_step",
            name,
            lambda x, k=k, args=args: miue_fast.projected_step(
                *args[:k], x, *args[k + 1 :], **steps
            ),
            args[k],
        )
    yield (
        "projected_step_",
        "grad",
        lambda x: miue_fast.projected_step_(images * 0, None, x, images, **steps),
        images,
    )
    yield (
        "projected_step_",
        "images",
        lambda x: miue_fast.projected_step_(images * 0, None, images, x, **steps),
        images,
    )
    yield "conv_forward", "x", lambda x: ops.conv_forward(x, weight, padding=1)[0], nhwc
    yield "conv_forward", "weight", lambda w: ops.conv_forward(nhwc, w, padding=1)[0], weight
    yield (
        "conv_input_grad",
        "grad",
        lambda g: ops.conv_input_grad(g, weight, nhwc.shape, padding=1),
        nhwc,
    )
    yield "conv_epilogue_", "y", lambda x: ops.conv_epilogue_(x), nhwc
    yield (
        "conv_grad_epilogue_",
        "addend",
        lambda x: ops.conv_grad_epilogue_(nhwc.clone(memory_format=torch.preserve_format), x),
        nhwc,
    )


@pytest.mark.parametrize(
    "op, argument, call, x", list(undifferentiable()), ids=lambda v: v if isinstance(v, str) else ""
)
def test_no_derivative_is_lost_without_a_word(op, argument, call, x):
    with pytest.raises(ValueError, match=rf"^{op}: {argument}: expected "):
        call(x.detach().requires_grad_())
    with pytest.raises(ValueError, match=rf"^{op}: {argument}: expected "), forward_ad.dual_level():
        call(forward_ad.make_dual(x, torch.ones_like(x)))
    with pytest.raises(ValueError, match=rf"^{op}: {argument}: expected "):
        torch.func.grad(lambda x: call(x).sum())(x)
    call(x)


@pytest.mark.parametrize(
    "value", [torch.nn.Parameter(torch.tensor(0.1)), torch.tensor(0.1)], ids=["parameter", "tensor"]
)
def test_a_tensor_is_no_temperature(value):
    x, y = torch.randn(4, 3), torch.tensor([0, 0, 1, 1])
    for call in (miue_fast.nt_xent, miue_fast.mi_ue_value_and_grad):
        with pytest.raises(
            ValueError,
            match=(
                r"temperature: expected a number from 1e-3 to 10, "
                r"got a tensor, float32 .*item\(\)"
            ),
        ):
            call(x, y, value)
    with pytest.raises(ValueError, match="zeta: expected a finite number, got a tensor"):
        miue_fast.mi_ue_value_and_grad(x, y, 0.1, value)


def test_two_names_for_the_temperature():
    x, y = torch.randn(4, 3), torch.tensor([0, 0, 1, 1])
    for both in ({"temperature": 0.1, "t": 0.1}, {"temperature": 0.1, "t": 0.5}):
        with pytest.raises(
            ValueError, match=r"nt_xent: temperature and t: expected one of the two .*, got both"
        ):
            miue_fast.nt_xent(x, y, **both)
    assert miue_fast.nt_xent(x, y) == miue_fast.nt_xent(x, y, 0.1) == miue_fast.nt_xent(x, y, t=0.1)


@pytest.mark.parametrize("op, impl, device", cases_of(dtypes=False))
def test_autocast_changes_nothing(op, impl, device):
    dtype = torch.float32 if torch.float32 in impl.dtypes else next(iter(impl.dtypes))
    call = getattr(torch.ops.miue_fast, op.name)
    for args in list(samples.taken(op.name, impl, device, dtype))[-4:]:
        plain = run(op, lambda *a: call(*a, impl.backend), args)
        with torch.autocast(device, torch.bfloat16):
            assert_same_bits(run(op, lambda *a: call(*a, impl.backend), args), plain)
            assert torch.is_autocast_enabled(device)


def test_autocast_does_not_reach_the_backward():
    x, y = torch.randn(9, 6), torch.arange(9) % 3
    for name, loss in LOSSES.items():
        for impl in available(OPS[name]):
            one, other = x.clone().requires_grad_(), x.clone().requires_grad_()
            loss(y, impl.backend)(one).backward()
            with torch.autocast("cpu", torch.bfloat16):
                loss(y, impl.backend)(other).backward()
            assert torch.equal(one.grad, other.grad)


def test_a_step_in_place_is_seen_by_autograd():
    """What autograd has saved of the store is not used after the step has changed it."""
    images, factor = torch.full((2, 3, 4, 4), 0.5), torch.ones(2, 3, 4, 4, requires_grad=True)
    for impl in available(OPS["projected_step_"]):
        delta, count = torch.zeros(2, 3, 4, 4), torch.zeros(1, dtype=torch.int64)
        loss, version = (delta * factor).sum(), count._version
        miue_fast.projected_step_(
            delta,
            None,
            torch.ones_like(delta),
            images,
            alpha=0.1,
            eps=0.1,
            nonfinite=count,
            backend=impl.backend,
        )
        assert count._version > version
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()
        with torch.inference_mode():
            store = torch.zeros(2, 3, 4, 4)
            miue_fast.projected_step_(
                store,
                None,
                torch.ones_like(store),
                images,
                alpha=0.1,
                eps=0.1,
                backend=impl.backend,
            )
        assert torch.equal(store, delta)
