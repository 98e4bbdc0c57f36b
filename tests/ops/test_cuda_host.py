"""The CUDA kernels, run on the host through tests/shim: parity with the reference, repeatability,
hostile indices.
"""

import importlib.util
import subprocess
from pathlib import Path

import pytest
import torch
from _support import OPS, assert_same_bits, check, check_losses, rounding_of_weights

from miue_fast.dispatch import native
from miue_fast.dispatch.registry import BackendError
from miue_fast.reference.conv_epilogue import mask_bytes, unpack
from tests import samples as inputs
from tests.ops import test_ranges as ranges
from tests.samples.conv_epilogue import activations
from tests.samples.losses import large_losses

spec = importlib.util.spec_from_file_location(
    "shim_build", Path(__file__).parents[1] / "shim/build.py"
)
build = importlib.util.module_from_spec(spec)
spec.loader.exec_module(build)


@pytest.fixture(scope="module")
def module(tmp_path_factory):
    if reason := build.missing():
        pytest.skip(reason)
    return build.load(tmp_path_factory.mktemp("shim"))


@pytest.fixture(autouse=True)
def on_host(module, monkeypatch):
    """CPU tensors go to the CUDA kernels; fresh memory is full of NaN."""
    monkeypatch.setattr(native, "_cpu", module)
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def cuda_impl(op, backend="cuda"):
    return next(impl for impl in op.impls if impl.backend == backend)


def cases():
    for op in OPS.values():
        for impl in op.impls:
            here = impl.backend in ("cuda", "wgmma") and op.name != "nt_xent"  # that is test_losses
            for dtype in sorted(impl.dtypes, key=str) if here else ():
                yield pytest.param(op, impl, dtype, id=f"{op.name}-{impl.backend}-{str(dtype)[6:]}")


def samples(op, impl, dtype):
    """(number, arguments), without what takes 128 OS threads seconds: half of the half-precision
    losses, two thirds of mi_ue (the same kernels again), all but one wide batch of the distance."""
    half = op.kind == "loss" and dtype != torch.float32
    every = 3 if op.name == "mi_ue_value_and_grad" else 2 if half else 1
    wide = 0
    for k, args in enumerate(inputs.taken(op.name, impl, "cpu", dtype)):
        if op.name in ("intra_class_distance", "mi_ue_value_and_grad") and len(args[1]) > 100:
            wide += 1
            if op.name != "intra_class_distance" or dtype != torch.float32 or wide > 1:
                continue
        if k % every == 0:
            yield k, args


def run(fn, op, args):
    """Everything the call gives: its results, then what it wrote in place."""
    args = [x.clone() if k in op.mutates and x is not None else x for k, x in enumerate(args)]
    out = fn(*args)
    out = [] if out is None else [out] if isinstance(out, torch.Tensor) else list(out)
    return out + [args[k] for k in op.mutates if args[k] is not None]


def same_bits(a, b):
    return (
        a.dtype == b.dtype
        and a.shape == b.shape
        and torch.equal(
            a.contiguous().flatten().view(torch.uint8), b.contiguous().flatten().view(torch.uint8)
        )
    )


def assert_near(op, args, got, plain, what):
    truth = op.truth(
        *[x.double() if isinstance(x, torch.Tensor) and x.is_floating_point() else x for x in args]
    )
    for a, b, t in zip(got, plain, truth, strict=True):
        assert (a.dtype, a.shape) == (b.dtype, t.shape)
        if a.numel():
            allowed = (
                2 * (b.double() - t).abs().max() + 4 * torch.finfo(a.dtype).eps * t.abs().max()
            )
            error = (a.double() - t).abs().max()
            assert error <= allowed, (
                f"{what}: error {error:.2e}, allowed {allowed:.2e}, of {t.abs().max():.2e}"
            )


@pytest.mark.parametrize("op, impl, dtype", list(cases()))
def test_parity(op, impl, dtype):
    fn = impl.fn
    for k, args in samples(op, impl, dtype):
        got, plain = run(fn, op, args), run(op.reference.fn, op, args)
        if k % 8 == 2:
            assert all(same_bits(a, b) for a, b in zip(got, run(fn, op, args), strict=True)), (
                f"sample {k} does not repeat"
            )
        if op.kind in ("convolution", "statistics"):
            check(op, args, [impl])
            continue
        if op.exact:
            assert_same_bits(got, plain)
            assert [a.stride() for a in got] == [b.stride() for b in plain]
            continue
        if op.name == "mi_ue_value_and_grad" and (
            rounding := rounding_of_weights(impl, args[0], build.LARGE_ROWS)
        ):
            check_losses(op, args, [impl], rounding)
        else:
            assert_near(op, args, got, plain, f"sample {k}")


def loss_cases(dtype):
    """The op's samples, rows of several tiles of features and, in half precision, what reaches
    every width of a tile in csrc/cuda/hopper.
    """
    found = list(inputs.make("nt_xent", "cpu", dtype))
    gen = torch.Generator().manual_seed(3)
    for batch, width in [(10, 300), (5, 500)] if dtype == torch.float32 else [(9, 1000), (70, 520)]:
        features = torch.rand(batch, width, generator=gen).to(dtype)
        found.append((features, torch.arange(batch) % 3, 0.1, "all", True))
    return found if dtype == torch.float32 else [*found[1::2], *large_losses("cpu", dtype)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_losses(dtype):
    op, impl = OPS["nt_xent"], cuda_impl(OPS["nt_xent"])
    for k, args in enumerate(loss_cases(dtype)):
        if rounding := rounding_of_weights(impl, args[0], build.LARGE_ROWS):
            check_losses(op, args, [impl], rounding)
        else:
            assert_near(
                op, args, run(impl.fn, op, args), run(op.reference.fn, op, args), f"case {k}"
            )
        if k % 3 == 0:
            assert all(
                same_bits(a, b)
                for a, b in zip(run(impl.fn, op, args), run(impl.fn, op, args), strict=True)
            ), f"case {k} does not repeat"


def test_a_large_batch_takes_its_own_kernels():
    """Its weights are rounded to float16 where its rows are of at most 512 features."""
    gen = torch.Generator().manual_seed(0)
    large = build.LARGE_ROWS + 1
    for batch, width, rounded in [(large, 8, True), (large - 1, 8, False), (large, 513, False)]:
        features, labels = torch.rand(batch, width, generator=gen).half(), torch.arange(batch) % 2
        half, single = (
            native.nt_xent(x, labels, 0.1, "all", True)[1] for x in (features, features.float())
        )
        error = ((half - single).abs().max() / single.abs().max()).item()
        assert error > 2**-16 if rounded else error < 2**-20


def test_float64_is_refused():
    with pytest.raises(ValueError, match=r"^nt_xent: features: expected .*, got code 3$"):
        native.nt_xent(torch.rand(4, 3, dtype=torch.float64), torch.arange(4) % 2, 0.1, "all", True)


def test_unknown_rows_are_left_alone():
    delta, images = torch.zeros(3, 2, 4, 8), torch.full((3, 2, 4, 8), 0.5)
    grad, index = torch.ones(4, 2, 4, 8), torch.tensor([-1, 1, 3, 2**40])
    native.projected_step_(delta, index, grad, images, None, 0.01, 0.1, None)
    assert (delta[1] != 0).all() and (delta[::2] == 0).all()
    out = native.perturbed_input(images, delta, index, None, [], [], 0.0, torch.float32, False)
    assert out[1].isfinite().all() and out[[0, 2, 3]].isnan().all()


def test_misaligned_and_offset_stores():
    op = OPS["projected_step"]
    whole = torch.rand(3, 101, generator=torch.Generator().manual_seed(0)).half()
    delta, grad, image = (row[1:] for row in whole)
    assert torch.equal(
        cuda_impl(op).fn(delta, grad, image, 0.01, 0.03),
        op.reference.fn(delta, grad, image, 0.01, 0.03),
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_epilogues_aligned_or_not(dtype):
    """Past one round of the grid's stride, channels that eight divides and others, and memory that
    16-byte accesses cannot take.
    """
    for rows, channels in [(80, 16), (300, 7), (100, 12), (41, 130)]:
        whole, other = (
            activations("cpu", dtype, rows * channels + 1, 1, seed=seed).view(-1) for seed in (1, 2)
        )
        bias = torch.linspace(-1, 1, channels + 1)
        for start in (0, 1):
            y, residual = (
                x[start:][: rows * channels].view(rows, channels) for x in (whole, other)
            )
            mask = torch.full((mask_bytes(y.numel()),), 0xA5, dtype=torch.uint8)
            for name, args in [
                ("conv_epilogue_", (y, bias[start:][:channels], residual, True, mask)),
                ("conv_epilogue_", (y, bias[start:][:channels], None, False, mask)),
                ("conv_grad_epilogue_", (y, residual, mask)),
            ]:
                op = OPS[name]
                assert_same_bits(run(cuda_impl(op).fn, op, args), run(op.reference.fn, op, args))


WIDE = [1, 1], [1, 1], [1, 1], 1


def wide(b, h, w, dtype=torch.bfloat16, seed=0):
    """[b, 64, h, w] channels-last."""
    gen = torch.Generator().manual_seed(seed)
    return torch.randn(b, h, w, 64, generator=gen).to(dtype).permute(0, 3, 1, 2)


def test_weights_of_the_gradient_in_both_orders_of_memory():
    """As a checkpoint has them, and with the summed channels innermost, as a frozen network keeps
    them: the same bits.
    """
    grad, weight = wide(1, 4, 6), wide(64, 3, 3, seed=1) / 24
    inner = weight.permute(1, 2, 3, 0).contiguous().permute(3, 0, 1, 2)
    op, impl = OPS["conv_input_grad"], cuda_impl(OPS["conv_input_grad"], "wgmma")
    for fitting in (weight, inner, weight.contiguous()):
        args = grad, fitting, None, None, list(grad.shape), *WIDE
        check(op, args, [impl])
        assert_same_bits(run(impl.fn, op, args), run(impl.fn, op, (grad, weight, *args[2:])))


def test_one_pixel_reaches_its_neighbours_and_no_other():
    """In the corners and next to the seams of a tile, of lines and of images, for each of the three
    tile sizes.
    """
    impl, weight = (
        cuda_impl(OPS["conv_forward"], "wgmma"),
        torch.arange(1.0, 10).view(1, 1, 3, 3) * torch.eye(64)[:, :, None, None],
    )
    weight = weight.half().contiguous(memory_format=torch.channels_last)
    for b, h, w in ((3, 2, 5), (1, 5, 64), (2, 13, 12)):
        x = torch.zeros(b, 64, h, w).half().contiguous(memory_format=torch.channels_last)
        for at, (image, row, column) in enumerate(
            [(0, 0, 0), (b - 1, h - 1, w - 1), (0, h - 1, w - 1), (b - 1, 0, 0), (0, h // 2, w - 1)]
        ):
            x[image, 7 * at, row, column] = 1
        got, _ = impl.fn(x, weight, None, None, *WIDE, False, False)
        assert torch.equal(
            got, torch.nn.functional.conv2d(x.float(), weight.float(), padding=1).half()
        )


def test_widths():
    """The tile is chosen by the width, and must fit into the shared memory of a block (the shim
    looks).
    """
    weight = wide(64, 3, 3, seed=1) / 24
    op, impl = OPS["conv_forward"], cuda_impl(OPS["conv_forward"], "wgmma")
    for width in range(4, 65, 6):
        check(op, (wide(1, 2, width), weight, None, None, *WIDE, True, True), [impl])


def test_memory_that_no_16_byte_access_takes():
    op, impl = OPS["conv_forward"], cuda_impl(OPS["conv_forward"], "wgmma")
    whole = [
        torch.randn(2 * 15 * 64 + 1).bfloat16()[1:].view(2, 3, 5, 64).permute(0, 3, 1, 2)
        for _ in range(2)
    ]
    odd = torch.randn(64 * 9 * 64 + 1).bfloat16()[1:].view(64, 3, 3, 64).permute(0, 3, 1, 2) / 24
    args = whole[0], odd, None, whole[1], *WIDE, True, True
    check(op, args, [impl])


def test_what_is_not_finite_stays_with_its_neighbours():
    x, weight = wide(1, 6, 7, torch.float16), wide(64, 3, 3, torch.float16, seed=1) / 24
    x[0, 3, 2, 6], x[0, 5, 5, 0] = torch.nan, torch.inf
    y, mask = cuda_impl(OPS["conv_forward"], "wgmma").fn(x, weight, None, None, *WIDE, True, True)
    touched = torch.zeros(6, 7, dtype=torch.bool)
    touched[1:4, 5:] = touched[4:, :2] = True
    assert y.isfinite()[0, :, ~touched].all() and not y.isfinite()[0].all(0)[touched].any()
    nan = y.isnan().permute(0, 2, 3, 1).flatten()
    assert unpack(mask, y).permute(0, 2, 3, 1).flatten()[nan].all(), "NaN has its bit"


def test_an_empty_batch_and_what_is_refused():
    op, impl = OPS["conv_forward"], cuda_impl(OPS["conv_forward"], "wgmma")
    weight = wide(64, 3, 3)
    y, mask = impl.fn(wide(0, 4, 4), weight, None, None, *WIDE, True, True)
    assert y.shape == (0, 64, 4, 4) and not mask.numel()
    x = wide(1, 4, 4)
    for args, part in [
        ((x, weight[:32], None, None, *WIDE), r"a weight \[32, 64, 3, 3\], groups 1"),
        ((x.float(), weight.float(), None, None, *WIDE), "float32"),
        ((x, weight, None, None, [2, 2], *WIDE[1:]), r"stride \[2, 2\]"),
        ((wide(1, 4, 65), weight, None, None, *WIDE), r"images \[1, 64, 4, 65\]"),
        ((wide(1, 4, 3), weight, None, None, *WIDE), r".*4 to 64 columns"),
    ]:
        assert op.why_not(impl, "cuda", args[1].dtype) or impl.refuses(*args, False, False)
        with pytest.raises(BackendError, match=f"^conv_forward: wgmma does not take {part}"):
            impl.fn(*args, False, False)


# in the kernels for every GPU, and in those for large batches of a Hopper
BATCHES = pytest.mark.parametrize("batch, dtype", [(5, torch.float32), (15, torch.float16)])


@BATCHES
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_nonfinite_features_are_not_hidden(value, batch, dtype):
    features = torch.rand(batch, 4, generator=torch.Generator().manual_seed(0)).to(dtype)
    features[2, 1] = value
    labels = torch.tensor([0, 1, 0, 1, 1]).repeat(batch // 5)
    distance = cuda_impl(OPS["intra_class_distance"]).fn
    for fn, rest in (
        (native.nt_xent, (0.1, "all", True)),
        (native.nt_xent, (0.1, "negatives", True)),
        (distance, (True, True)),
    ):
        loss, grad = fn(features, labels, *rest)
        assert loss.isnan() and grad[2].isnan().any()


@BATCHES
def test_empty_batch_and_one_class(batch, dtype):
    for fn, rest in (
        (native.nt_xent, (0.1, "all", True)),
        (cuda_impl(OPS["intra_class_distance"]).fn, (True, True)),
    ):
        loss, grad = fn(torch.empty(0, 4, dtype=dtype), torch.empty(0, dtype=torch.int64), *rest)
        assert loss.isnan() and grad.shape == (0, 4)
    features = torch.rand(batch, 4, generator=torch.Generator().manual_seed(0)).to(dtype)
    labels = torch.zeros(batch, dtype=torch.int64)
    assert native.nt_xent(features, labels, 0.1, "negatives", True)[0] == -torch.inf
    loss, grad = native.nt_xent(features, labels, 0.1, "all", True)
    assert loss == 0 and (grad == 0).all()


def test_the_program_of_make_asan_compiles():
    """It calls the kernels by their argument structs, and nothing else in CI does."""
    flags = [
        *build.FLAGS.split(),
        f"-I{build.ROOT / 'tests/shim'}",
        f"-I{build.ROOT / 'csrc'}",
        "-include",
        "shim.h",
    ]
    source = build.ROOT / "tests/shim/sanitize.cpp"
    done = subprocess.run(
        [build.compiler(), *flags, "-x", "c++", "-fsyntax-only", source],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_any_magnitude(dtype):
    """The tests of test_ranges.py on these kernels: no square overflows or underflows, and no image
    costs the budget.
    """
    distance, step, store = (
        OPS[n] for n in ("intra_class_distance", "projected_step", "projected_step_")
    )
    for normalize_dim in (True, False):
        ranges.test_distances_of_any_magnitude(
            distance, cuda_impl(distance), "cpu", dtype, normalize_dim
        )
    ranges.test_large_and_small_pairs_in_one_batch(distance, cuda_impl(distance), "cpu", dtype)
    ranges.test_the_budget_holds_for_any_image(step, cuda_impl(step), "cpu", dtype)
    ranges.test_the_budget_holds_in_the_store(
        store, cuda_impl(store), "cpu", torch.float32 if dtype == torch.float32 else torch.int8
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_similarities_of_any_magnitude(dtype):
    op, impl = OPS["nt_xent"], cuda_impl(OPS["nt_xent"])
    ranges.test_similarities_do_not_depend_on_the_magnitude(op, impl, "cpu", dtype)
    ranges.test_a_norm_beyond_float32_is_right_or_nan(op, impl, "cpu", dtype)
