"""What the tests of the contract share: the cases of the registry and the derived tolerance."""

import pytest
import torch

import miue_fast  # registers the ops
from miue_fast.dispatch.registry import OPS
from tests.samples.conv_epilogue import mask_by_numpy

assert miue_fast
DEVICES = ["cpu"] + ["cuda"] * torch.cuda.is_available()
BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def impls_of(op):
    """(impl, device) for every implementation that runs here; a skip with the registry's reason for
    every other one.
    """
    for impl in op.impls:
        if reason := impl.missing():
            yield pytest.param(impl, None, marks=pytest.mark.skip(reason=reason), id=impl.backend)
            continue
        for device in DEVICES:
            if device in impl.devices:
                yield pytest.param(impl, device, id=f"{impl.backend}-{device}")


def cases_of(*names, dtypes=True):
    """pytest parameters (op, impl, device[, dtype]) of the named ops, or of all."""
    cases = []
    for op in [OPS[name] for name in names] or OPS.values():
        for case in impls_of(op):
            impl, device = case.values
            for dtype in sorted(impl.dtypes, key=str) if dtypes and device else [None]:
                values = (op, impl, device) + ((dtype,) if dtypes else ())
                name = f"{op.name}-{case.id}" + (f"-{str(dtype)[6:]}" if dtype else "")
                cases.append(pytest.param(*values, marks=case.marks, id=name))
    return cases


def available(op, device="cpu", dtype=None):
    return [
        i
        for i in op.impls
        if device in i.devices and i.missing() is None and (dtype is None or dtype in i.dtypes)
    ]


def clone(args):
    return tuple(
        a.clone(memory_format=torch.preserve_format) if isinstance(a, torch.Tensor) else a
        for a in args
    )


def in_double(args):
    return tuple(
        a.double() if isinstance(a, torch.Tensor) and a.is_floating_point() else a for a in args
    )


def run(op, fn, args):
    """Every output of a call on copies of the arguments: what it returned, then what it wrote in
    place.
    """
    args = clone(args)
    out = fn(*args)
    returned = () if out is None else out if isinstance(out, tuple) else (out,)
    return [*returned, *(args[i] for i in op.mutates if args[i] is not None)]


def same_bits(a, b):
    """Equal dtype, shape and bits, where any NaN equals any NaN."""
    if (a.dtype, a.shape) != (b.dtype, b.shape):
        return False
    bits = BITS[a.dtype.itemsize]
    nan = a.isnan() if a.is_floating_point() else torch.zeros_like(a, dtype=torch.bool)
    also_nan = b.isnan() if b.is_floating_point() else nan
    equal = a.contiguous().view(bits) == b.contiguous().view(bits)
    return torch.equal(nan, also_nan) and bool((equal | nan).all())


def assert_same_bits(got, plain):
    assert len(got) == len(plain)
    for k, (g, p) in enumerate(zip(got, plain)):
        assert same_bits(g, p), (
            f"output {k}: {g.dtype} {list(g.shape)} differs from "
            f"{p.dtype} {list(p.shape)}: {_first(g, p)}"
        )


def _first(a, b):
    if a.shape != b.shape or a.dtype != b.dtype:
        return "dtype or shape"
    where = torch.nonzero(~((a == b) & (a.signbit() == b.signbit()) | (a != a) & (b != b)))
    at = tuple(where[0])
    return (
        f"{len(where)} values, first {a[at].item()!r} for {b[at].item()!r} at {where[0].tolist()}"
    )


def assert_close(got, plain, truth, moved=0.0, weight=1.0):
    """|got - truth| <= 2 |plain - truth| + 4 roundings of the result (+ `moved`), in the maximum
    norm; NaN and Inf where plain has them. For float64 the truth is rounded as often: 8.

    `weight` multiplies all of them first: with the row norms, small rows count as much as large
        ones.
    """
    assert (got.dtype, got.shape) == (plain.dtype, plain.shape)
    clear = sure(truth, plain.dtype)
    finite = plain.isfinite() & clear
    special = ~plain.isfinite() & clear
    assert same_bits(torch.where(special, got, 0), torch.where(special, plain, 0)), (
        "a number where the reference has NaN or Inf"
    )
    assert got[finite].isfinite().all(), "NaN or Inf where the reference has a number"
    if not finite.any():
        return
    limits = torch.finfo(got.dtype)
    weight = torch.as_tensor(weight, dtype=torch.float64, device=got.device).expand_as(got)[finite]
    roundings = 8 if got.dtype == torch.float64 else 4
    got, plain, truth = (x.double()[finite] * weight for x in (got, plain, truth))
    assert truth.isfinite().all(), "the reference is finite where the float64 oracle is not"
    rounding = limits.eps * truth.abs().max() + limits.eps * limits.smallest_normal * weight.max()
    allowed = 2 * (plain - truth).abs().max() + roundings * rounding + moved
    error = (got - truth).abs().max()
    assert error <= allowed, (
        f"error {error:.3e}, allowed {allowed:.3e}, largest {truth.abs().max():.3e}"
    )


def row_norms(features):
    return torch.linalg.vector_norm(features.double(), dim=1, keepdim=True).clamp_min(1e-8)


def oracle(op, args):
    """Loss and gradient in float64. Where the definition has no gradient (one class, "negatives")
    the closed form stands in.
    """
    exact = in_double(args)
    loss, grad = op.truth(*exact)
    return (loss, grad) if loss.isfinite() else op.reference.fn(*exact)


def conditioning(args, weights=0.0):
    """What four roundings of every cosine do to nt_xent and its gradient: (loss, grad, grad
    weighted by the row norms).

    To first order: with A = d loss / d logits, the loss moves by sum |A| / t, and row i of the
        gradient with respect to the unit
    rows, a sum over A_ij + A_ji, by (1 + 1/t) of its absolute terms. The distance term takes direct
    differences: no allowance.
    weights: a relative rounding of each A_ij + A_ji, where an implementation stores them. Such a
        one also takes a cosine as one sum of
    tensor cores, which truncate it after every eight products or later.
    """
    features, labels, temperature = args[:3]
    denominator, norms = next(a for a in args if isinstance(a, str)), row_norms(features)
    rounding = (
        4 * torch.finfo(torch.float64 if features.dtype == torch.float64 else torch.float32).eps
    )
    rounding += -(-features.shape[1] // 8) * 2**-24 if weights else 0
    z = features.double() / norms
    logits, same = (z @ z.T / temperature).requires_grad_(), labels[:, None] == labels[None, :]
    pool = logits if denominator == "all" else logits.masked_fill(same, -torch.inf)
    terms = [-logits.masked_fill(~same, -torch.inf).logsumexp(1)] + [pool.logsumexp(1)] * bool(
        pool.isfinite().any()
    )
    a = torch.autograd.grad(sum(terms).mean(), logits)[0].abs()
    # "negatives" subtracts two logarithms; "all" is log1p(N / P), which does not cancel.
    size = max(term.abs().max() for term in terms) if denominator == "negatives" else 0.0
    change = (
        (rounding * (1 + 1 / temperature) + weights) / temperature * (a.sum(1) + a.sum(0))[:, None]
    )
    return rounding * (size + a.sum() / temperature), (change / norms).max(), change.max()


def sure(truth, dtype):
    """Where it is clear whether the true value fits into dtype: further than four roundings from
    its limit.
    """
    limits = torch.finfo(dtype)
    return ~((truth.abs().double() / limits.max - 1).abs() <= 4 * limits.eps)


def check_losses(op, args, impls, weights=0.0):
    """Every implementation against the float64 oracle; returns (plain, truth). weights: see
    `conditioning`.
    """
    truth, plain = oracle(op, args), op.reference.fn(*args)
    for p, t in zip(plain, truth):
        fits = t.abs() <= torch.finfo(p.dtype).max
        assert torch.equal(p.isfinite() | ~sure(t, p.dtype), fits | ~sure(t, p.dtype)), (
            "the reference has NaN or Inf where the oracle has a number"
        )
    moved = (
        conditioning(args, weights)
        if impls and op.name != "intra_class_distance" and len(args[0])
        else (0.0, 0.0, 0.0)
    )
    for impl in impls:
        got = run(op, impl.fn, args)
        assert_close(got[0], plain[0], truth[0], moved[0])
        assert_close(got[1], plain[1], truth[1], moved[1])
        if got[1].numel():
            assert_close(got[1], plain[1], truth[1], moved[2], row_norms(args[0]))
    return plain, truth


# Batches of more rows have their weights rounded to float16 on a Hopper.
LARGE_ROWS = {"triton": 2048, "cuda": 512}


def rounding_of_weights(impl, features, large_rows=None):
    """The relative rounding of the pairs' weights in a loss gradient, for `check_losses`: 2^-11
    for a large batch in half precision, else 0.
    """
    rows, width = features.shape
    large = rows > (large_rows or LARGE_ROWS.get(impl.backend, rows))
    return 2**-11 if large and width <= 512 and features.dtype.itemsize == 2 else 0.0


def check_convolutions(op, args, impls):
    """Every implementation against the reference in float64; the mask must be that of the call's
    own values.
    """
    if op.name == "conv_input_grad_step_":
        return check_convolution_step(op, args, impls)
    truth, plain = run(op, op.truth, in_double(args)), run(op, op.reference.fn, args)
    for impl in impls:
        got = run(op, impl.fn, args)
        assert got[0].is_contiguous(memory_format=torch.channels_last)
        assert_close(got[0], plain[0], truth[0])
        if op.name == "conv_forward":
            relu, want_mask = args[8:10]
            assert not (relu and (got[0] < 0).any())
            mask = mask_by_numpy(got[0]) if want_mask else torch.empty(0, dtype=torch.uint8)
            assert_same_bits([got[1].cpu()], [mask])


def check_convolution_step(op, args, impls):
    """Where the gradient exceeds its tolerance the step must go its way; elsewhere it may go any of
    the three.
    """
    delta, index, grad, weight, images, flip, *conv, alpha, eps, nonfinite = args
    gradient, size = OPS["conv_input_grad"], [len(grad), *images.shape[1:]]
    true, plain = (
        gradient.reference.fn(g, w, None, None, size, *conv).double()
        for g, w in (in_double((grad, weight)), (grad, weight))
    )
    allowed = (
        2 * (plain - true).abs().max() + 4 * torch.finfo(grad.dtype).eps * true.abs().max()
        if true.numel()
        else 0.0
    )
    sure = true.abs() > allowed
    step = OPS["projected_step_"]

    def moved(image_grad):
        return run(
            step,
            step.reference.fn,
            (delta, index, image_grad.float(), images, flip, alpha, eps, nonfinite),
        )

    wanted, ways = (
        moved(torch.where(sure, true.sign(), torch.nan))[0],
        [moved(torch.full_like(true, sign))[0] for sign in (-1, 0, 1)],
    )
    decided = torch.ones_like(delta, dtype=torch.bool)
    decided[slice(None) if index is None else index] = sure
    for impl in impls:
        got = run(op, impl.fn, args)
        assert_same_bits([torch.where(decided, got[0], 0)], [torch.where(decided, wanted, 0)])
        assert torch.stack([got[0] == way for way in ways]).any(0).all(), (
            "a value that no step leads to"
        )
        assert_same_bits(
            got[1:], [] if nonfinite is None else [nonfinite + (~plain.isfinite()).sum()]
        )


def check_statistics(op, args, impls):
    """Counts and symmetry to the bit; means and covariances against the reference in float64.

    A sum of n terms in float64, the oracle's too, is off by n roundings: of the means that error,
    of the covariances its square."""
    truth, plain = op.truth(*in_double(args)), op.reference.fn(*args)
    rounding = len(args[0]) * torch.finfo(torch.float64).eps
    moved = [
        rounding * x.double().abs().nan_to_num(0, 0, 0).max() if x.numel() else 0.0
        for x in (args[0], truth[2])
    ]
    for impl in impls:
        got = run(op, impl.fn, args)
        assert_same_bits([got[0], got[2]], [plain[0], got[2].mT])
        assert_close(got[1], plain[1], truth[1], moved[0])
        assert_close(got[2], plain[2], truth[2], moved[1] + moved[0] ** 2)


def check_bits(op, args, impls):
    """Every implementation gives the reference's bits."""
    plain = run(op, op.reference.fn, args)
    for impl in impls:
        assert_same_bits(run(op, impl.fn, args), plain)


CHECKS = {
    "pointwise": check_bits,
    "loss": check_losses,
    "convolution": check_convolutions,
    "statistics": check_statistics,
}


def check(op, args, impls):
    """Every implementation gives what an op of this kind has to give for these arguments."""
    return CHECKS[op.kind](op, args, impls)


def check_shrinks(op, args, plain, truth):
    """The reference is the formula: in float64 its error is the oracle's own rounding, not a share
    of its float32 error.
    """
    got = op.reference.fn(*in_double(args))
    ratio = (torch.finfo(torch.float64).eps / torch.finfo(torch.float32).eps) ** 0.5
    features, temperature = args[0], args[2] if isinstance(args[2], float) else 1.0
    for k, (g, p, t) in enumerate(zip(got, plain, truth)):
        weight = row_norms(features) if k and g.numel() else 1.0
        g, p, t = (torch.where(p.isfinite(), x.double(), 0) * weight for x in (g, p, t))
        if not g.numel():
            continue
        size = (
            t.abs().max() + temperature**-2
        )  # the oracle's logits are of size 1/t, its gradient's terms of size 1/t^2
        allowed = ratio * (p - t).abs().max() + 16 * torch.finfo(torch.float64).eps * size * max(
            1, features.shape[0]
        )
        assert (g - t).abs().max() <= allowed, (
            f"output {k}: {(g - t).abs().max():.3e}, allowed {allowed:.3e}: "
            "the reference is not the formula"
        )
