"""The Triton kernels run, in Triton's interpreter on the CPU: the registry's parity and the paths its samples do not reach.

The interpreter is switched on when triton is imported, so one test starts pytest again on this file and on test_parity.py.
bfloat16 is left to a GPU: the interpreter truncates it where a GPU rounds.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from _support import LOSSES, OPS, assert_same_bits, check_losses, clone, run

pytest.importorskip("triton")
HERE = Path(__file__).parent
HALF_AND_SINGLE = pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["float32", "float16"])

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
            __file__,
        ]
        command += ["-k", "(triton and not bfloat16) or interpreted", "--durations=5"]
        result = subprocess.run(command, env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True, timeout=900)
        assert result.returncode == 0, result.stdout[-8000:] + result.stderr[-2000:]
        summary = result.stdout.splitlines()[-1]
        assert int(re.match(r"(\d+) passed", summary)[1]) >= 35 and "skipped" not in summary, summary

else:
    import triton
    import triton.language as tl
    from miue_fast.kernels.triton import intra_class_distance, nt_xent
    from miue_fast.kernels.triton._common import log, log1p

    @triton.jit
    def both_logarithms(x, plain, plus_one, BLOCK: tl.constexpr):
        i = tl.arange(0, BLOCK)
        tl.store(plain + i, log(tl.load(x + i)))
        tl.store(plus_one + i, log1p(tl.load(x + i)))

    def test_interpreted_logarithms():
        """A loss near 0 is log1p of a small number: its relative error must stay at float32's rounding."""
        x = torch.cat([torch.logspace(-37, 37, 510), torch.tensor([0.0, 1.0])])
        plain, plus_one = torch.empty(512), torch.empty(512)
        both_logarithms[(1,)](x, plain, plus_one, BLOCK=512)
        limit = 4 * torch.finfo(torch.float32).eps
        assert torch.allclose(plain.double(), x.double().log(), rtol=limit, atol=0)
        assert torch.allclose(plus_one.double(), x.double().log1p(), rtol=limit, atol=0)

    def triton_impl(name):
        return next(impl for impl in OPS[name].impls if impl.backend == "triton")

    def make(batch, width, classes, dtype, scale=1.0):
        gen = torch.Generator().manual_seed(batch + width)
        labels = torch.randint(classes, (batch,), generator=gen)
        labels[:2] = torch.tensor([0, 1])
        centres = torch.randn(classes, width, generator=gen)
        return ((centres[labels] + torch.randn(batch, width, generator=gen)).relu() * scale).to(dtype), labels

    @HALF_AND_SINGLE
    @pytest.mark.parametrize("programs", [1, 256], ids=["one-split", "many-splits"])
    @pytest.mark.parametrize("rows", [0, 2048], ids=["recomputed", "stored"])
    def test_interpreted_forms_of_nt_xent(rows, programs, dtype, monkeypatch):
        monkeypatch.setattr(nt_xent, "STORED_ROWS", rows)
        monkeypatch.setattr(nt_xent, "PROGRAMS", programs)
        for width, denominator in ((70, "all"), (130, "negatives")):
            check_losses(OPS["nt_xent"], (*make(150, width, 3, dtype), 0.1, denominator, True), [triton_impl("nt_xent")])

    @HALF_AND_SINGLE
    def test_interpreted_wide_rows(dtype):
        """Rows wider than one tile of every kernel."""
        args = make(5, 2100, 2, dtype)
        check_losses(OPS["mi_ue_value_and_grad"], (*args, 0.1, 0.1, "all", True), [triton_impl("mi_ue_value_and_grad")])
        check_losses(OPS["intra_class_distance"], (*make(5, 600, 2, dtype), False, True), [triton_impl("intra_class_distance")])

    @HALF_AND_SINGLE
    @pytest.mark.parametrize("scale", [1e-3, 1e3])
    def test_interpreted_row_scales(scale, dtype):
        """Large and small rows in one batch: the power-of-two scaling of each row keeps fp16 operands in range."""
        features, labels = make(20, 24, 3, torch.float32)
        features[::2] *= scale
        check_losses(OPS["nt_xent"], (features.to(dtype), labels, 0.2, "all", True), [triton_impl("nt_xent")])

    @pytest.mark.parametrize("name", LOSSES)
    def test_interpreted_degenerate_batches(name):
        op, impl = OPS[name], triton_impl(name)
        args = next(a for a in op.samples("cpu", torch.float32) if a[-1] is True)[2:]
        for shape in ((0, 4), (3, 0), (0, 0), (1, 1)):
            features, labels = torch.rand(shape), torch.zeros(shape[0], dtype=torch.int64)
            assert_same_bits(run(op, impl.fn, (features, labels, *args)), run(op, op.reference.fn, (features, labels, *args)))
        features, labels = make(9, 5, 2, torch.float32)
        features[3, 2] = torch.nan
        assert impl.fn(features, labels, *args)[0].isnan()

    def test_interpreted_one_class_with_negatives():
        loss, grad = nt_xent.nt_xent(torch.rand(6, 5), torch.zeros(6, dtype=torch.int64), 0.1, "negatives", True)
        assert loss == -torch.inf and grad.isfinite().all()

    @pytest.mark.parametrize("name", OPS)
    def test_interpreted_repeats(name):
        op, impl = OPS[name], triton_impl(name)
        args = list(op.samples("cpu", torch.float32))[7]
        assert_same_bits(run(op, impl.fn, args), run(op, impl.fn, args))

    def test_interpreted_strides():
        features, labels = make(11, 6, 2, torch.float32)
        for view in (features.T.contiguous().T, features.repeat(1, 2)[:, ::2], features[:1].expand(11, 6)):
            for launcher, rest in ((nt_xent.nt_xent, (0.1, "all", True)), (intra_class_distance.intra_class_distance, (True, True))):
                assert_same_bits(launcher(view, labels, *rest), launcher(view.contiguous(), labels, *rest))
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
        images, index = torch.randint(256, (3, 3, 4, 5), dtype=torch.uint8), torch.tensor([3, 1, -1, 2**40])
        store = torch.zeros(5, 3, 4, 5)  # one row of slack on either side
        triton_impl("projected_step_").fn(store[1:4], index, torch.ones(4, 3, 4, 5), images, None, 0.01, 0.03, None)
        assert store[[0, 1, 3, 4]].eq(0).all() and store[2].ne(0).any()
        for channels_last in (True, False):
            out = triton_impl("perturbed_input").fn(images, None, index, None, [], [], 0.0, torch.float32, channels_last)
            assert out[[0, 2, 3]].isnan().all() and torch.equal(out[1], images[1] / 255)

    def test_interpreted_halfway_levels():
        """int8 levels halfway between two integers go to the even one; every uint8 / 255 is the nearest float."""
        op, impl = OPS["projected_step_"], triton_impl("projected_step_")
        eps = 127 / 256  # one level is 1/256, so halves are exact
        for half in range(0, 126):
            args = torch.zeros(1, 1, 1, 2, dtype=torch.int8), None, torch.tensor([[[[1.0, -1.0]]]]), torch.full((1, 1, 1, 2), 0.5), None
            (got,) = run(op, impl.fn, (*args, (half + 0.5) / 256, eps, None))
            nearest_even = half + half % 2
            assert got.flatten().tolist() == [-nearest_even, nearest_even]
        every = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16)
        out = triton_impl("perturbed_input").fn(every, None, None, None, [], [], 0.0, torch.float32, False)
        assert torch.equal(out.double(), (every.double() / 255).float().double())

    def test_interpreted_inputs_are_left_alone():
        for name, op in OPS.items():
            args = list(op.samples("cpu", torch.float32))[5]
            kept = clone(args)
            triton_impl(name).fn(*args)
            unwritten = [i for i, a in enumerate(args) if isinstance(a, torch.Tensor) and i not in op.mutates]
            assert_same_bits([args[i] for i in unwritten], [kept[i] for i in unwritten])
