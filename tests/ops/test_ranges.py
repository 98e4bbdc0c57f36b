"""Any magnitude of a dtype: what float64 gives is given, and the budget of a step holds for every
image.
"""

import pytest
import torch
from _support import OPS, assert_same_bits, available, cases_of, clone, run

import miue_fast
from miue_fast import ops
from tests import samples

EPS = 8 / 255


def powers(dtype):
    """Exponents k at which features * 2^k have squares that overflow (norms 1e19 and more) or
    underflow (1e-30); half precision: few.
    """
    return {torch.float16: (10,), torch.float64: (-1000, -600, 520, 900)}.get(
        dtype, (-100, -80, 64, 80, 110)
    )


def batch(dtype, device, width=24):
    gen = torch.Generator().manual_seed(5)
    features, labels = torch.randn(15, width, generator=gen).to(dtype), torch.arange(15) % 3
    features[4], features[7] = features[1], features[1]  # equal rows: distance 0
    return features.to(device), labels.to(device)


def distance_at(features, labels, exponent, normalize_dim):
    """Loss and gradient of intra_class_distance of features * 2^exponent, by distances in float64
    at exponent 0.
    """
    f = features.double()
    difference = f[:, None] - f[None, :]
    distance = difference.norm(dim=2)
    same = (labels[:, None] == labels[None, :]).double()
    scale = 1 / f.shape[1] if normalize_dim else 1.0
    sums = scale * (distance * same).sum(1) * 2.0**exponent
    unit = torch.where(distance[..., None] == 0, 0, difference / distance[..., None])
    share = scale / len(f) / (1 + sums)
    return sums.log1p().mean(), ((same * (share[:, None] + share[None, :]))[..., None] * unit).sum(
        1
    )


def assert_relative(got, truth, tolerance, what):
    error = (got.double() - truth).abs().max() / truth.abs().max()
    assert error <= tolerance, f"{what}: relative error {error:.1e}"


@pytest.mark.parametrize("normalize_dim", [True, False])
@pytest.mark.parametrize("op, impl, device, dtype", cases_of("intra_class_distance"))
def test_distances_of_any_magnitude(op, impl, device, dtype, normalize_dim):
    for width in (24, 2100) if impl.backend == "triton" else (24,):
        features, labels = batch(dtype, device, width)
        for k in (
            powers(dtype) if width == 24 else (0, -4, 4) if dtype == torch.float16 else (0, -50, 50)
        ):  # of Triton's wide rows as it says
            loss, grad = impl.fn(features * 2.0**k, labels, normalize_dim, True)
            truth = distance_at(features, labels, k, normalize_dim)
            assert_relative(loss, truth[0], 40 * torch.finfo(loss.dtype).eps, f"loss at 2^{k}")
            assert_relative(grad, truth[1], 40 * torch.finfo(loss.dtype).eps, f"gradient at 2^{k}")


# The range of float16 is too narrow for two magnitudes.
WIDE_RANGE = [case for case in cases_of("intra_class_distance") if not case.id.endswith("-float16")]


@pytest.mark.parametrize("op, impl, device, dtype", WIDE_RANGE)
def test_large_and_small_pairs_in_one_batch(op, impl, device, dtype):
    """A class of each magnitude, and both in one class: nobody's gradient is lost because another
    row is large.
    """
    features, labels = batch(dtype, device)
    low, high = (-1000, 500) if dtype == torch.float64 else (-100, 70)
    for mixed in (labels, torch.zeros_like(labels)):
        f = (
            features
            * torch.tensor([2.0**low, 1.0, 2.0**high], dtype=torch.float64, device=device)[
                labels
            ].to(dtype)[:, None]
        )
        _, grad = impl.fn(f, mixed, True, True)
        for label in range(
            3
        ):  # the directions of a class among itself are what they are at magnitude 1
            rows = labels == label
            inside = mixed[rows]
            if mixed is labels:
                truth = (
                    distance_at(features[rows], inside, (low, 0, high)[label], True)[1]
                    * rows.sum()
                    / len(f)
                )
                assert_relative(
                    grad[rows], truth, 40 * torch.finfo(grad.dtype).eps, f"class {label}"
                )
            else:
                assert grad[rows].isfinite().all() and (grad[rows] != 0).any()


@pytest.mark.parametrize("op, impl, device, dtype", cases_of("nt_xent"))
def test_similarities_do_not_depend_on_the_magnitude(op, impl, device, dtype):
    features, labels = batch(dtype, device)
    tolerance = 2**-9 if dtype.itemsize == 2 else 200 * torch.finfo(dtype).eps
    for denominator in ("all", "negatives"):
        plain = impl.fn(features, labels, 0.2, denominator, True)
        for k in {torch.float16: (10,), torch.float64: (520, 900)}.get(dtype, (-10, 64, 90, 110)):
            loss, grad = impl.fn(features * 2.0**k, labels, 0.2, denominator, True)
            assert_relative(loss, plain[0].double(), tolerance, f"loss at 2^{k}")
            assert_relative(
                grad * 2.0 ** (k // 2) * 2.0 ** (k - k // 2),
                plain[1].double(),
                tolerance,
                f"gradient at 2^{k}",
            )


@pytest.mark.parametrize("op, impl, device", cases_of("nt_xent", dtypes=False))
def test_a_norm_beyond_float32_is_right_or_nan(op, impl, device, dtype=torch.float32):
    features, labels = batch(dtype, device)
    features = features / features.abs().max()
    plain = impl.fn(features, labels, 0.2, "all", False)[0]
    loss = impl.fn(features * torch.tensor(2.0**127, dtype=dtype), labels, 0.2, "all", False)[0]
    assert loss.isnan() or (loss - plain).abs() <= 1e-5 * plain.abs(), impl.backend
    assert impl.backend == "cuda" or not loss.isnan()


# On a GPU a second sum would cost the kernel registers: the docstring names the range there.
COVARIANCES = [
    case for case in cases_of("class_covariance") if case.id.split("-")[1] not in ("triton", "cuda")
]


@pytest.mark.parametrize("op, impl, device, dtype", COVARIANCES)
def test_a_covariance_that_fits_is_given(op, impl, device, dtype):
    if dtype == torch.float16:
        pytest.skip("its squares fit into float32")
    exponent = 510 if dtype == torch.float64 else 62
    gen = torch.Generator().manual_seed(5)
    features = torch.randint(-3, 4, (400, 5), generator=gen).to(dtype).to(device)
    labels = torch.zeros(400, dtype=torch.int64, device=device)
    _, _, plain = impl.fn(features, labels, 1)
    _, _, large = impl.fn(features * 2.0**exponent, labels, 1)
    assert large.isfinite().all()
    assert_relative(
        large * 2.0**-exponent * 2.0**-exponent,
        plain.double(),
        40 * torch.finfo(plain.dtype).eps,
        "covariances",
    )


def outside(shape, gen):
    """Images as people normalise them, and worse."""
    image = torch.rand(shape, generator=gen) * 5 - 2
    for k, value in enumerate((torch.inf, -torch.inf, 1e30, -1e30, 255.0, 0.0, 1.0, torch.nan)):
        image.view(-1)[k::17] = value
    return image


@pytest.mark.parametrize("op, impl, device, dtype", cases_of("projected_step"))
def test_the_budget_holds_for_any_image(op, impl, device, dtype):
    gen = torch.Generator().manual_seed(2)
    image = outside((4, 3, 9, 11), gen).to(dtype).to(device)
    grad, delta = (
        torch.randn(image.shape, generator=gen).to(image),
        (4 * torch.rand(image.shape, generator=gen) - 2).to(image),
    )
    for eps in (EPS, 0.0, 1.0, 0.1):
        args = delta, grad, image, 0.01, eps
        step = impl.fn(*args)
        assert torch.equal(step.isnan(), image.isnan())
        assert step[~step.isnan()].abs().max() <= torch.tensor(
            eps, dtype=torch.promote_types(dtype, torch.float32)
        ).to(dtype)
        assert_same_bits([step], run(op, op.reference.fn, args))


@pytest.mark.parametrize("op, impl, device, dtype", cases_of("projected_step_"))
def test_the_budget_holds_in_the_store(op, impl, device, dtype):
    gen = torch.Generator().manual_seed(2)
    images = outside((6, 3, 5, 8), gen).to(device)
    grad = torch.randn(images.shape, generator=gen).to(device)
    delta = torch.randint(-127, 128, images.shape, generator=gen).to(device)
    delta = delta.to(dtype) if dtype == torch.int8 else (delta / 60).to(dtype)
    args = delta, None, grad, images, None, 0.01, EPS, None
    (step,) = run(op, impl.fn, args)
    bound = 127 if dtype == torch.int8 else torch.tensor(EPS).to(dtype)
    assert step[~images.isnan()].abs().max() <= bound
    assert (
        (step[images.isnan()] == 0).all()
        if dtype == torch.int8
        else step[images.isnan()].isnan().all()
    )
    assert_same_bits([step], run(op, op.reference.fn, args))


@pytest.mark.parametrize("op, impl, device", cases_of("conv_input_grad_step_", dtypes=False))
def test_the_budget_holds_in_the_fused_step(op, impl, device):
    args = next(
        a
        for a in samples.taken(op.name, impl, device, torch.float32)
        if a[0].dtype == torch.float32
    )
    names = [
        a.split()[-1]
        for a in op.schema.split("(", 1)[1]
        .split(" -> ")[0]
        .replace("(a!)", "")
        .replace("(b!)", "")
        .split(",")
    ]
    images = (
        outside(args[4].shape, torch.Generator().manual_seed(1))
        .nan_to_num(0.5, 1e30, -1e30)
        .to(device)
    )
    assert names[4] == "images"
    args = clone((*args[:4], images, *args[5:]))
    eps = args[11]
    args[0].fill_(9.0)
    impl.fn(*args)
    touched = args[0][args[1]]
    assert touched.abs().max() <= torch.tensor(eps, dtype=torch.float32)


def test_a_valid_image_loses_a_rounding_at_most():
    """The second clamp changes a valid step only where the rounding of image + step had left the
    budget.
    """
    gen, changed = torch.Generator().manual_seed(0), 0
    for eps in (EPS, 0.1, 0.03):
        image, delta = (
            torch.rand(10_000, generator=gen),
            (torch.rand(10_000, generator=gen) * 2 - 1) * eps,
        )
        grad = torch.randn(10_000, generator=gen)
        for impl in available(OPS["projected_step"]):
            got = miue_fast.projected_step(delta, grad, image, 0.01, eps, backend=impl.backend)
            moved = (delta - 0.01 * grad.sign()).clamp(-eps, eps)
            once = (image + moved).clamp(0, 1) - image
            other = got != once
            changed += int(other.sum())
            assert (
                torch.equal(other, once.abs() > torch.tensor(eps))
                and (got - once).abs().max() < 2**-23
            )
    assert changed


def test_images_of_any_range_pass_through_perturbed_input():
    images, delta = torch.full((2, 3, 4, 4), 3.0), torch.full((2, 3, 4, 4), 0.25)
    for impl in available(OPS["perturbed_input"]):
        assert (ops.perturbed_input(images, delta, backend=impl.backend) == 3.25).all()
