"""The Triton kernels run, in Triton's interpreter on the CPU: the registry's parity and the paths
its samples do not reach.

The interpreter is switched on when triton is imported, so one test starts pytest again on this
file, test_parity.py, test_class_covariance.py and test_ranges.py. bfloat16 is left to a GPU: the
interpreter truncates it where a GPU rounds."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from _support import (
    OPS,
    assert_same_bits,
    check_convolutions,
    check_losses,
    check_statistics,
    clone,
    mask_by_numpy,
    run,
)

from tests import samples as inputs
from tests.samples.losses import large_losses

pytest.importorskip("triton")
HERE = Path(__file__).parent
HALF_AND_SINGLE = pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float16], ids=["float32", "float16"]
)

if os.environ.get("TRITON_INTERPRET") != "1":

    def test_in_the_interpreter():
        command = [
            sys.executable,
            "-m",
            "pytest",
            "-p",
            "no:cacheprovider",
            "-W",
            "ignore::RuntimeWarning",
            HERE / "test_parity.py",
            HERE / "test_class_covariance.py",
            HERE / "test_ranges.py",
            __file__,
        ]
        command += ["-k", "(triton and not bfloat16) or interpreted", "--durations=5"]
        result = subprocess.run(
            command,
            env={**os.environ, "TRITON_INTERPRET": "1"},
            capture_output=True,
            text=True,
            timeout=900,
        )
        assert result.returncode == 0, result.stdout[-8000:] + result.stderr[-2000:]
        summary = result.stdout.splitlines()[-1]
        assert int(re.match(r"(\d+) passed", summary)[1]) >= 105 and "skipped" not in summary, (
            summary
        )

else:
    import triton
    import triton.language as tl
    from miue_fast.kernels.triton import convolution, intra_class_distance, nt_xent
    from miue_fast.kernels.triton._common import log, log1p

    from miue_fast.ops.geometry import quantised

    @triton.jit
    def both_logarithms(x, plain, plus_one, BLOCK: tl.constexpr):
        i = tl.arange(0, BLOCK)
        tl.store(plain + i, log(tl.load(x + i)))
        tl.store(plus_one + i, log1p(tl.load(x + i)))

    def test_interpreted_logarithms():
        """A loss near 0 is log1p of a small number: its relative error must stay at float32's
        rounding.
        """
        x = torch.cat([torch.logspace(-37, 37, 510), torch.tensor([0.0, 1.0])])
        plain, plus_one = torch.empty(512), torch.empty(512)
        both_logarithms[(1,)](x, plain, plus_one, BLOCK=512)
        limit = 4 * torch.finfo(torch.float32).eps
        assert torch.allclose(plain.double(), x.double().log(), rtol=limit, atol=0)
        assert torch.allclose(plus_one.double(), x.double().log1p(), rtol=limit, atol=0)

    def triton_impl(name):
        return next(impl for impl in OPS[name].impls if impl.backend == "triton")

    SERVED = [name for name, op in OPS.items() if any(i.backend == "triton" for i in op.impls)]

    def make(batch, width, classes, dtype, scale=1.0):
        gen = torch.Generator().manual_seed(batch + width)
        labels = torch.randint(classes, (batch,), generator=gen)
        labels[:2] = torch.tensor([0, 1])
        centres = torch.randn(classes, width, generator=gen)
        return ((centres[labels] + torch.randn(batch, width, generator=gen)).relu() * scale).to(
            dtype
        ), labels

    BOTH = [
        (form, dtype)
        for form in ("stored", "recomputed")
        for dtype in (torch.float16, torch.float32)
    ]

    @pytest.mark.parametrize("form, dtype", [*BOTH, ("resident", torch.float16)], ids=str)
    @pytest.mark.parametrize("programs", [1, 256], ids=["one-split", "many-splits"])
    def test_interpreted_forms_of_nt_xent(form, programs, dtype, monkeypatch):
        """The resident form rounds its weights to fp16, half a unit in the last of 11 bits; the
        others keep 22.
        """
        monkeypatch.setattr(nt_xent, "STORED_ROWS", 2048 if form == "stored" else 0)
        monkeypatch.setattr(
            nt_xent, "capability", lambda tensor: (9, 0) if form == "resident" else (8, 0)
        )
        monkeypatch.setattr(nt_xent, "PROGRAMS", programs)
        monkeypatch.setattr(nt_xent, "RESIDENT_PROGRAMS", programs)
        for width, denominator in ((70, "all"), (130, "negatives")):
            args = *make(150, width, 3, dtype), 0.1, denominator, True
            check_losses(
                OPS["nt_xent"],
                args,
                [triton_impl("nt_xent")],
                2**-11 if form == "resident" else 0.0,
            )

    def test_interpreted_resident_form_of_the_samples(monkeypatch):
        """Zero rows, lone members, tight clusters, low temperatures; weights of columns that are
        not there.
        """
        monkeypatch.setattr(nt_xent, "STORED_ROWS", 0)
        found = list(inputs.make("nt_xent", "cpu", torch.float16))
        for args in found[:-6:3] + found[-6:] + list(large_losses("cpu", torch.float16))[-3:]:
            check_losses(OPS["nt_xent"], args, [triton_impl("nt_xent")], 2**-11)

    @HALF_AND_SINGLE
    def test_interpreted_wide_rows(dtype):
        """Rows wider than one tile of every kernel."""
        args = make(5, 2100, 2, dtype)
        check_losses(
            OPS["mi_ue_value_and_grad"],
            (*args, 0.1, 0.1, "all", True),
            [triton_impl("mi_ue_value_and_grad")],
        )
        check_losses(
            OPS["intra_class_distance"],
            (*make(5, 600, 2, dtype), False, True),
            [triton_impl("intra_class_distance")],
        )

    @HALF_AND_SINGLE
    @pytest.mark.parametrize("scale", [1e-3, 1e3])
    def test_interpreted_row_scales(scale, dtype):
        """Large and small rows in one batch: the power-of-two scaling of each row keeps fp16
        operands in range.
        """
        features, labels = make(20, 24, 3, torch.float32)
        features[::2] *= scale
        check_losses(
            OPS["nt_xent"], (features.to(dtype), labels, 0.2, "all", True), [triton_impl("nt_xent")]
        )

    @pytest.mark.parametrize("name", [name for name, op in OPS.items() if op.kind == "loss"])
    def test_interpreted_degenerate_batches(name):
        op, impl = OPS[name], triton_impl(name)
        args = next(a for a in inputs.make(name, "cpu", torch.float32) if a[-1] is True)[2:]
        for shape in ((0, 4), (3, 0), (0, 0), (1, 1)):
            features, labels = torch.rand(shape), torch.zeros(shape[0], dtype=torch.int64)
            assert_same_bits(
                run(op, impl.fn, (features, labels, *args)),
                run(op, op.reference.fn, (features, labels, *args)),
            )
        features, labels = make(9, 5, 2, torch.float32)
        features[3, 2] = torch.nan
        assert impl.fn(features, labels, *args)[0].isnan()

    @HALF_AND_SINGLE
    def test_interpreted_covariance_tiles(dtype):
        """Three tiles each way, a class of several steps, an empty one; then no class, no column,
        no row.
        """
        impl = triton_impl("class_covariance")
        features, labels = make(90, 150, 2, dtype)
        cases = [
            (features, 2 * labels, 4),
            (features[:0], labels[:0], 0),
            (features[:0], labels[:0], 2),
            (features[:, :0], labels, 2),
        ]
        for args in cases:
            check_statistics(OPS["class_covariance"], args, [impl])

    def test_interpreted_one_class_with_negatives():
        loss, grad = nt_xent.nt_xent(
            torch.rand(6, 5), torch.zeros(6, dtype=torch.int64), 0.1, "negatives", True
        )
        assert loss == -torch.inf and grad.isfinite().all()

    @pytest.mark.parametrize("name", SERVED)
    def test_interpreted_repeats(name):
        op, impl = OPS[name], triton_impl(name)
        args = list(inputs.make(name, "cpu", torch.float32))[:8][-1]
        assert_same_bits(run(op, impl.fn, args), run(op, impl.fn, args))

    def test_interpreted_strides():
        features, labels = make(11, 6, 2, torch.float32)
        for view in (
            features.T.contiguous().T,
            features.repeat(1, 2)[:, ::2],
            features[:1].expand(11, 6),
        ):
            for launcher, rest in (
                (nt_xent.nt_xent, (0.1, "all", True)),
                (intra_class_distance.intra_class_distance, (True, True)),
            ):
                assert_same_bits(
                    launcher(view, labels, *rest), launcher(view.contiguous(), labels, *rest)
                )
        op, impl = OPS["projected_step_"], triton_impl("projected_step_")
        images = torch.randint(256, (4, 3, 6, 7), dtype=torch.uint8)
        for grad in (
            torch.randn(4, 3, 7, 6).transpose(2, 3),
            torch.randn(4, 3, 6, 1).expand(4, 3, 6, 7),
            torch.randn(4, 3, 12, 7)[:, :, ::2],
        ):
            args = torch.zeros(4, 3, 6, 7), None, grad, images, None, 0.01, 0.03, None
            assert_same_bits(run(op, impl.fn, args), run(op, op.reference.fn, args))

    def test_interpreted_rows_outside_the_store():
        """Such rows are never written; as an input they are NaN, not a neighbour's image."""
        images, index = (
            torch.randint(256, (3, 3, 4, 5), dtype=torch.uint8),
            torch.tensor([3, 1, -1, 2**40]),
        )
        store = torch.zeros(5, 3, 4, 5)  # one row of slack on either side
        triton_impl("projected_step_").fn(
            store[1:4], index, torch.ones(4, 3, 4, 5), images, None, 0.01, 0.03, None
        )
        assert store[[0, 1, 3, 4]].eq(0).all() and store[2].ne(0).any()
        for channels_last in (True, False):
            out = triton_impl("perturbed_input").fn(
                images, None, index, None, [], [], 0.0, torch.float32, channels_last
            )
            assert out[[0, 2, 3]].isnan().all() and torch.equal(out[1], images[1] / 255)

    def test_interpreted_halfway_levels():
        """int8 levels halfway between two integers go to the even one; every uint8 / 255 is the
        nearest float.
        """
        op, impl = OPS["projected_step_"], triton_impl("projected_step_")
        eps = 127 / 256  # one level is 1/256, so halves are exact
        for half in range(0, 126):
            args = (
                torch.zeros(1, 1, 1, 2, dtype=torch.int8),
                None,
                torch.tensor([[[[1.0, -1.0]]]]),
                torch.full((1, 1, 1, 2), 0.5),
                None,
            )
            (got,) = run(op, impl.fn, (*args, (half + 0.5) / 256, eps, None))
            nearest_even = half + half % 2
            assert got.flatten().tolist() == [-nearest_even, nearest_even]
        every = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16)
        out = triton_impl("perturbed_input").fn(
            every, None, None, None, [], [], 0.0, torch.float32, False
        )
        assert torch.equal(out.double(), (every.double() / 255).float().double())

    def test_interpreted_inputs_are_left_alone():
        for name in SERVED:
            op = OPS[name]
            args = list(inputs.make(name, "cpu", torch.float32))[:6][-1]
            kept = clone(args)
            triton_impl(name).fn(*args)
            unwritten = [
                i for i, a in enumerate(args) if isinstance(a, torch.Tensor) and i not in op.mutates
            ]
            assert_same_bits([args[i] for i in unwritten], [kept[i] for i in unwritten])

    # batch, in, out, height, width, kernel, stride: what the registry's shapes leave out
    LAYERS = [
        (
            1,
            48,
            80,
            5,
            3,
            3,
            1,
        ),  # channels that no tile divides, several reduction steps, odd sizes
        (2, 64, 144, 4, 10, 3, 2),  # several tiles of output channels
        (17, 16, 32, 4, 4, 3, 1),  # several images in a tile, and a last tile that is not full
        (1, 128, 128, 3, 3, 1, 1),
        (2, 128, 32, 2, 2, 1, 2),
        (1, 16, 16, 2, 70, 3, 1),  # tiles narrower than the image
    ]
    STEMS = [
        (2, 3, 32, 6, 10, 3, 2),
        (1, 1, 16, 2, 130, 3, 1),
        (2, 5, 16, 3, 5, 1, 1),
        (2, 9, 16, 4, 4, 1, 2),
        (1, 15, 16, 2, 2, 3, 1),
    ]
    # several steps and channels that no tile divides; several tiles, stride 2; many images in a
    # tile; 1x1
    E4M3 = [
        (1, 96, 160, 5, 3, 3, 1),
        (2, 64, 160, 4, 10, 3, 2),
        (17, 32, 32, 4, 4, 3, 1),
        (1, 128, 64, 3, 3, 1, 1),
        (2, 256, 32, 2, 2, 1, 2),
    ]
    FORMS = [
        (torch.float16, True),
        (torch.float16, False),
        (torch.float32, False),
    ]  # tiles: float32 has small ones only

    def layer(dtype, b, c, k, h, w, r, stride):
        """make(*size), x, weight, the output's size, and the convolution's arguments."""
        gen = torch.Generator().manual_seed(b + c + k + h + w)

        def make(*size):
            return (
                torch.randn(size, generator=gen)
                .to(dtype)
                .contiguous(memory_format=torch.channels_last)
            )

        return (
            make,
            make(b, c, h, w),
            make(k, c, r, r),
            (b, k, h // stride, w // stride),
            ([stride] * 2, [r // 2] * 2, [1, 1], 1),
        )

    @pytest.mark.parametrize(
        "dtype, large", FORMS, ids=["float16-large", "float16-small", "float32"]
    )
    @pytest.mark.parametrize("shape", LAYERS + STEMS, ids=str)
    def test_interpreted_convolution_shapes(shape, dtype, large, monkeypatch):
        monkeypatch.setattr(convolution, "_large", lambda like: large)
        make, x, weight, out, conv = layer(dtype, *shape)
        bias = torch.linspace(-1, 1, len(weight))
        check_convolutions(
            OPS["conv_forward"],
            (x, weight, bias, make(*out), *conv, True, True),
            [triton_impl("conv_forward")],
        )
        args = make(*out), weight, make(*x.shape), mask_by_numpy(x), list(x.shape), *conv
        check_convolutions(OPS["conv_input_grad"], args, [triton_impl("conv_input_grad")])

    @pytest.mark.parametrize("large", [True, False], ids=["large", "small"])
    @pytest.mark.parametrize("shape", E4M3, ids=str)
    def test_interpreted_e4m3_shapes(shape, large, monkeypatch):
        """The interpreter is right with e4m3 (it widens the operands); it truncates the bfloat16
        results, which is within the tolerance.
        """
        monkeypatch.setattr(convolution, "_large", lambda like: large)
        make, x, weight, out, conv = layer(torch.float32, *shape)
        bias, mask = torch.linspace(-1, 1, len(weight)), mask_by_numpy(x)
        (x8, first), (weight8, second), (grad8, third) = map(quantised, (x, weight, make(*out)))
        args = x8, weight8, bias, make(*out).bfloat16(), *conv, True, True, first * second
        check_convolutions(OPS["conv_forward"], args, [triton_impl("conv_forward")])
        inner = (
            weight8.permute(1, 2, 3, 0).contiguous().permute(3, 0, 1, 2)
        )  # as FrozenNet holds it
        for held in (weight8, inner):
            args = (
                grad8,
                held,
                make(*x.shape).bfloat16(),
                mask,
                list(x.shape),
                *conv,
                third * second,
            )
            check_convolutions(OPS["conv_input_grad"], args, [triton_impl("conv_input_grad")])

    @pytest.mark.parametrize(
        "dtype, large", FORMS, ids=["float16-large", "float16-small", "float32"]
    )
    @pytest.mark.parametrize(
        "shape", [*STEMS, (2, 16, 16, 4, 4, 3, 2), (1, 32, 16, 3, 3, 3, 1)], ids=str
    )
    def test_interpreted_fused_step(shape, dtype, large, monkeypatch):
        """The step inside the kernel is, to the bit, the step with the gradient that the kernel
        would have written.
        """
        monkeypatch.setattr(convolution, "_large", lambda like: large)
        make, x, weight, out, conv = layer(dtype, *shape)
        op, step = OPS["conv_input_grad_step_"], OPS["projected_step_"]
        store = (len(x) + 1, *x.shape[1:])
        images, index, flip = (
            torch.randint(256, store, dtype=torch.uint8),
            torch.arange(len(x)).flip(0) + 1,
            torch.arange(len(x)) % 2 == 0,
        )
        grad = make(*out)
        grad[0, 0, 0, 0] = torch.nan
        image_grad = triton_impl("conv_input_grad").fn(
            grad, weight, None, None, list(x.shape), *conv
        )
        for delta, selection in (
            (torch.zeros(store, dtype=torch.int8), (index, flip)),
            (make(*x.shape).contiguous() / 64, (None, None)),
        ):
            rows = images[: len(delta)]
            rest = (0.3 / 255, 8 / 255, torch.zeros(1, dtype=torch.int64))
            args = (delta, selection[0], grad, weight, rows, selection[1], *conv, *rest)
            two_steps = run(
                step,
                step.reference.fn,
                (delta, selection[0], image_grad, rows, selection[1], *rest),
            )
            assert_same_bits(run(op, triton_impl(op.name).fn, args), two_steps)
            args = (delta, selection[0], make(*out), weight, rows, selection[1], *conv, *rest)
            check_convolutions(op, args, [triton_impl(op.name)])

    def test_interpreted_convolutions_of_unaligned_memory():
        """Descriptors need 16 bytes; what does not start there is copied."""
        make, x, weight, out, conv = layer(torch.float32, 2, 16, 16, 4, 4, 3, 1)
        residual = make(*out)

        def shifted(tensor):
            flat = torch.empty(tensor.numel() + 1)[1:]
            return flat.as_strided(tensor.shape, tensor.stride(), flat.storage_offset()).copy_(
                tensor
            )

        def both(*tensors):
            x, weight, residual = tensors
            y = convolution.conv_forward(x, weight, None, residual, *conv, True, False)[0]
            return y, convolution.conv_input_grad(residual, weight, x, None, list(x.shape), *conv)

        assert_same_bits(
            both(*map(shifted, (x, weight, residual))), both(x, weight.contiguous(), residual)
        )

    def test_interpreted_convolutions_that_have_no_kernel():
        for change in (
            {"stride": 3},
            {"padding": 0},
            {"dilation": 2, "padding": 2},
            {"groups": 2},
            {"channels": 8},
            {"size": 5, "stride": 2},
        ):
            given = {
                "stride": 1,
                "padding": 1,
                "dilation": 1,
                "groups": 1,
                "channels": 16,
                "size": 6,
            } | change
            pairs = [[given[name]] * 2 for name in ("stride", "padding", "dilation")]
            x, weight = (
                torch.zeros(1, 16, given["size"], given["size"]),
                torch.zeros(given["channels"], 16 // given["groups"], 3, 3),
            )
            with pytest.raises(RuntimeError, match="conv_forward: no Triton kernel"):
                triton_impl("conv_forward").fn(
                    x, weight, None, None, *pairs, given["groups"], True, False
                )
        x, weight = (
            torch.zeros(size).to(torch.float8_e4m3fn) for size in ((1, 48, 4, 4), (32, 48, 3, 3))
        )
        with pytest.raises(RuntimeError, match="no Triton kernel for float8_e4m3fn weights"):
            triton_impl("conv_forward").fn(
                x, weight, None, None, [1, 1], [1, 1], [1, 1], 1, True, False, torch.ones(())
            )
