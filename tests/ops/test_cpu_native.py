"""The C++ kernels for the CPU: every instruction set, any thread count, dirty memory, refused
input.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import miue_fast.ops  # noqa: F401  (registers the ops)
from miue_fast.dispatch import native
from miue_fast.dispatch.registry import OPS
from miue_fast.reference.conv_epilogue import mask_bytes
from tests import samples
from tests.samples.conv_epilogue import activations

pytestmark = pytest.mark.skipif(native.cpu_missing() is not None, reason=str(native.cpu_missing()))
LEVELS = ["generic", "avx2", "avx512"]
NAMES = [
    name
    for name, op in OPS.items()
    if op.kind in ("pointwise", "loss") and any(impl.backend == "cpu" for impl in op.impls)
]


@pytest.fixture(autouse=True)
def restore_level():
    before = native.cpu_level()
    yield
    native.set_cpu_level(before)


def here():
    """The levels of this processor."""
    for name in LEVELS:
        try:
            native.set_cpu_level(name)
        except ValueError:
            continue
        yield name


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def compiled(name):
    return next(impl for impl in OPS[name].impls if impl.backend == "cpu")


def copies(op, args):
    return [a.clone() if k in op.mutates and a is not None else a for k, a in enumerate(args)]


def results(op, fn, args):
    """What a call returns, or what it leaves in the arguments it writes to."""
    args = copies(op, args)
    out = fn(*args)
    return (
        [args[k] for k in op.mutates if args[k] is not None]
        if op.mutates
        else [out]
        if torch.is_tensor(out)
        else list(out)
    )


def layout(tensor):
    return [(size, stride) for size, stride in zip(tensor.shape, tensor.stride()) if size > 1]


def same_bits(a, b):
    if (a.dtype, a.shape, layout(a)) != (b.dtype, b.shape, layout(b)):
        return False
    nan = a.isnan()
    a, b, same = a.masked_fill(nan, 0), b.masked_fill(nan, 0), torch.equal(nan, b.isnan())
    return same and torch.equal(a, b) and torch.equal(a.signbit(), b.signbit())


def assert_parity(op, args):
    """At every level of this processor."""
    plain = results(op, op.reference.fn, args)
    truth = (
        plain
        if op.exact
        else op.truth(
            *[a.double() if torch.is_tensor(a) and a.is_floating_point() else a for a in args]
        )
    )
    for level in here():
        got = results(op, compiled(op.name).fn, args)
        assert len(plain) == len(got)
        for t, p, g in zip(truth, plain, got):
            assert (g.dtype, g.shape) == (p.dtype, p.shape)
            if op.exact:
                assert same_bits(p, g), (op.name, level)
            elif g.numel():
                # in float64 the oracle itself carries the rounding of s, amplified by exp(s / t)
                amplified = (
                    1 / args[2] if g.dtype == torch.float64 and isinstance(args[2], float) else 1
                )
                allowed = (
                    2 * (p.double() - t).abs().max()
                    + 4 * torch.finfo(g.dtype).eps * max(1, amplified) * t.abs().max()
                )
                assert (g.double() - t).abs().max() <= allowed, (op.name, level)


@pytest.mark.parametrize("name", NAMES)
def test_samples_at_every_level(name):
    for dtype in compiled(name).dtypes:
        for args in samples.make(name, "cpu", dtype):
            assert_parity(OPS[name], args)


def batch(count, width, classes, dtype=torch.float32, seed=0):
    gen = torch.Generator().manual_seed(seed)
    labels = torch.randint(classes, (count,), generator=gen)
    features = torch.randn(classes, width, generator=gen)[labels] + torch.randn(
        count, width, generator=gen
    )
    return features.relu().to(
        dtype
    ), labels * 2**33  # labels far apart, whose low bits are all alike


# past the sizes computed in double; more than one slice of features, then of rows; S not kept in
# float, then in double
SIZES = [(257, 100, 10), (60, 1100, 3), (1100, 9, 7), (2600, 6, 10), (1900, 5, 3)]


@pytest.mark.parametrize("denominator", ["all", "negatives"])
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_nt_xent_on_larger_batches(size, denominator):
    features, labels = batch(*size)
    for t in (0.1, 0.5):
        assert_parity(OPS["nt_xent"], (features, labels, t, denominator, True))
    features[3] = 0
    features[5] *= 1e-9 / features[5].norm()  # below the clamp: neither zero nor unit length
    assert_parity(
        OPS["nt_xent"],
        (features.double() if size[0] == 1900 else features, labels, 0.1, denominator, True),
    )


@pytest.mark.parametrize("size", [(300, 200, 1), (2100, 3, 1), (513, 65, 10)], ids=str)
def test_distance_kept_and_recomputed(size):
    for dtype in (torch.float32, torch.float16):
        assert_parity(OPS["intra_class_distance"], (*batch(*size, dtype=dtype), True, True))


def test_large_temperature_range_on_a_large_batch():
    features, labels = batch(400, 64, 10)
    for t in (1e-3, 0.02, 10.0):
        for denominator in ("all", "negatives"):
            assert_parity(OPS["nt_xent"], (features, labels, t, denominator, True))


def everything():
    """(op, args) of calls large enough to be shared among threads."""
    features, labels = batch(300, 130, 10)
    many, many_labels = batch(2600, 6, 10)
    gen = torch.Generator().manual_seed(3)
    images = torch.randint(256, (50, 3, 32, 32), generator=gen, dtype=torch.uint8)
    delta, grad = (
        torch.rand(images.shape, generator=gen) / 32,
        torch.randn(40, 3, 32, 32, generator=gen),
    )
    index, flip = torch.randperm(50, generator=gen)[:40], torch.rand(40, generator=gen) < 0.5
    last = grad.contiguous(memory_format=torch.channels_last)
    yield OPS["nt_xent"], (features, labels, 0.1, "all", True)
    yield OPS["nt_xent"], (features, labels, 0.1, "negatives", True)
    yield OPS["nt_xent"], (many, many_labels, 0.1, "all", True)
    yield OPS["mi_ue_value_and_grad"], (features.half(), labels, 0.1, 0.1, "all", True)
    yield OPS["intra_class_distance"], (features, labels, True, True)
    yield (
        OPS["projected_step"],
        (delta, torch.randn(delta.shape, generator=gen), images / 255, 0.003, 0.03),
    )
    yield (
        OPS["projected_step_"],
        (delta, index, last, images, flip, 0.003, 0.03, torch.zeros(1, dtype=torch.int64)),
    )
    yield (
        OPS["perturbed_input"],
        (images, delta, index, flip, [0.5] * 3, [0.2] * 3, 0.03, torch.bfloat16, True),
    )
    y = activations("cpu", torch.float32, 3, 48, 33, 31)
    mask = torch.full((mask_bytes(y.numel()),), 0xA5, dtype=torch.uint8)
    yield OPS["conv_epilogue_"], (y, torch.linspace(-1, 1, 48), y.flip(0), True, mask)
    yield OPS["conv_epilogue_"], (y.bfloat16(), torch.linspace(-1, 1, 48), None, False, mask)
    yield OPS["conv_grad_epilogue_"], (y, y.flip(0), mask)
    yield OPS["jpeg_round_trip"], (grad[:, :, :, 1:], 75, "4:2:0")
    yield OPS["jpeg_round_trip_grad"], (grad[:, :, :, 1:],)


def test_the_result_does_not_depend_on_the_thread_count(threads):
    for op, args in everything():
        threads(1)
        one = results(op, compiled(op.name).fn, args)
        for count in (2, 3, 7):
            threads(count)
            assert all(map(same_bits, one, results(op, compiled(op.name).fn, args))), (
                op.name,
                count,
            )


def test_a_hundred_repeats_give_the_same_bits():
    for op, args in everything():
        first = results(op, compiled(op.name).fn, args)
        for _ in range(100 if args[0].shape[0] < 2000 else 10):
            assert all(map(same_bits, first, results(op, compiled(op.name).fn, args))), op.name


def test_dirty_workspaces_and_outputs_do_not_show(monkeypatch):
    empty = torch.empty
    for op, args in everything():
        clean = results(op, compiled(op.name).fn, args)
        for byte in (0xFF, 0x7F, 0x00):  # NaN and -1; huge; zero
            with monkeypatch.context() as patch:

                def dirty(*shape, byte=byte, **options):
                    memory = empty(*shape, **options)
                    memory.untyped_storage().fill_(byte)
                    return memory

                patch.setattr(torch, "empty", dirty)
                got = results(op, compiled(op.name).fn, args)
            assert all(map(same_bits, clean, got)), (op.name, byte)


def test_every_half_precision_number_and_its_rounding():
    patterns = torch.arange(65536, dtype=torch.int32).to(torch.int16)
    store = patterns.view(torch.float16).reshape(1, 1, 256, 256)
    black = torch.zeros(store.shape, dtype=torch.uint8)
    assert_parity(
        OPS["perturbed_input"], (black, store, None, None, [], [], 0.0, torch.float32, False)
    )
    gen = torch.Generator().manual_seed(5)
    numbers = (
        torch.randint(-(2**31), 2**31, (1, 3, 300, 301), generator=gen)
        .to(torch.int32)
        .view(torch.float32)
    )
    halves = store.float().flatten()[:65535]
    between = torch.nextafter(halves, torch.zeros(()))
    numbers.view(-1)[:131070] = torch.cat([between + (halves - between) / 2, between])
    numbers.view(-1)[-60000:] = torch.randn(60000, generator=gen) * 1e-5  # around the f16 denormals
    for dtype in (torch.float16, torch.bfloat16):
        for channels_last in (False, True):
            assert_parity(
                OPS["perturbed_input"],
                (numbers, None, None, None, [], [], 0.0, dtype, channels_last),
            )
    grads = patterns[:65280].reshape(1, 5, 48, 272)
    images = torch.zeros(grads.shape, dtype=torch.uint8) + 128
    for dtype in (torch.float16, torch.bfloat16):
        count = torch.zeros(1, dtype=torch.int64)
        args = (torch.zeros(grads.shape), None, grads.view(dtype), images, None, 0.01, 0.03, count)
        assert_parity(OPS["projected_step_"], args)


@pytest.mark.parametrize("channels", [1, 2, 3, 4, 5])
def test_gradients_of_any_stride(channels):
    gen = torch.Generator().manual_seed(channels)
    shape = (3, channels, 37, 41)
    whole = torch.randn(3, 2 * channels, 80, 90, generator=gen)
    layouts = [
        whole[:, :channels, :37, :41],  # rows apart
        whole[:, ::2, ::2, ::2][:, :, :37, :41],  # every stride above 1
        whole[:, :channels, :41, :37].transpose(2, 3),
        torch.randn(3, 37, 41, channels + 2, generator=gen)[..., :channels].permute(
            0, 3, 1, 2
        ),  # padded channels-last
        torch.randn(3, 1, 1, 41, generator=gen).expand(shape),
        torch.randn(shape, generator=gen).contiguous(memory_format=torch.channels_last),
    ]
    images = torch.randint(256, shape, generator=gen, dtype=torch.uint8)
    delta = (torch.rand(shape, generator=gen) - 0.5) / 16
    flip = torch.tensor([True, False, True])
    for grad in layouts:
        for dtype in (torch.float32, torch.bfloat16):
            grad_ = grad if dtype == torch.float32 else grad.to(dtype)
            assert_parity(
                OPS["projected_step_"],
                (delta, None, grad_, images, flip, 0.003, 0.03, torch.zeros(1, dtype=torch.int64)),
            )
    for dtype in (torch.float32, torch.float16):
        for last in (False, True):
            mean = [0.4] * channels
            assert_parity(
                OPS["perturbed_input"], (images, delta, None, flip, mean, mean, 0.03, dtype, last)
            )
            assert_parity(
                OPS["perturbed_input"], (images / 255, delta, None, flip, [], [], 0.03, dtype, last)
            )


COUNTS = [
    1,
    63,
    64,
    65,
    1023,
    1024,
    1087,
    16383,
    16384,
    16385,
    3 * 16384 + 77,
]  # around words, buffers and units of work


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("count", COUNTS)
def test_epilogues_of_any_count_and_thread_count(count, dtype, threads):
    for channels in {c for c in (1, 3, 16, 63, 64, 65, 192, count) if count % c == 0}:
        y, other = (
            activations("cpu", dtype, count // channels, channels, seed=seed) for seed in (1, 2)
        )
        bias = torch.linspace(-1, 1, channels, dtype=torch.promote_types(dtype, torch.float32))
        mask = torch.randint(
            256,
            (mask_bytes(count),),
            generator=torch.Generator().manual_seed(count),
            dtype=torch.uint8,
        )
        for number in (1, 2, 5):
            threads(number)
            for options in [
                (bias, other, True, mask),
                (bias, None, True, mask),
                (None, None, False, mask),
                (None, other, False, None),
            ]:
                assert_parity(OPS["conv_epilogue_"], (y, *options))
            for options in [(other, mask), (None, mask), (other, None), (None, None)]:
                assert_parity(OPS["conv_grad_epilogue_"], (y, *options))


def test_epilogues_write_nothing_beyond_their_ends():
    for level in here():
        for dtype in (torch.float32, torch.bfloat16):
            whole, bits = (
                torch.full((100,), -7.0, dtype=dtype),
                torch.full((4 * 8,), 0xA5, dtype=torch.uint8),
            )
            y, mask = whole[3:80].view(7, 11), bits[8:24]
            native.conv_epilogue_(y, torch.ones(11), None, True, mask)
            assert (y == 0).all() and (mask == 0).all(), level
            assert (
                (whole[:3] == -7).all()
                and (whole[80:] == -7).all()
                and (bits[:8] == 0xA5).all()
                and (bits[24:] == 0xA5).all()
            ), level
            native.conv_grad_epilogue_(y, y + 1, mask.fill_(255))
            assert (y == 1).all() and (whole[:3] == -7).all() and (whole[80:] == -7).all(), level


@pytest.mark.parametrize("wrong", [-1, 5, 2**40])
def test_an_index_out_of_range_is_refused_before_anything_is_written(wrong):
    images, grad = torch.zeros(5, 3, 8, 8, dtype=torch.uint8), torch.randn(4, 3, 8, 8)
    delta, index, count = (
        torch.rand(5, 3, 8, 8),
        torch.tensor([0, 1, 2, wrong]),
        torch.zeros(1, dtype=torch.int64),
    )
    before = delta.clone()
    message = rf"index: expected rows in \[0, 5\), got {wrong} at position 3"
    with pytest.raises(ValueError, match=f"projected_step_: {message}"):
        native.projected_step_(delta, index, grad, images, None, 0.1, 0.5, count)
    assert torch.equal(delta, before) and count.item() == 0
    with pytest.raises(ValueError, match=f"perturbed_input: {message}"):
        native.perturbed_input(images, delta, index, None, [], [], 0.5, torch.float32, True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float64])
def test_degenerate_batches(dtype):
    none = torch.zeros(0, dtype=torch.int64)
    for width in (0, 4):
        loss, grad = native.nt_xent(torch.zeros(0, width, dtype=dtype), none, 0.1, "all", True)
        assert loss.isnan() and grad.shape == (0, width)
        loss, grad = native.intra_class_distance(
            torch.zeros(0, width, dtype=dtype), none, True, True
        )
        assert loss.isnan() and grad.shape == (0, width)
    labels = torch.tensor([0, 0, 1, 1, 1])
    assert_parity(OPS["nt_xent"], (torch.zeros(5, 0, dtype=dtype), labels, 0.1, "all", True))
    assert_parity(OPS["nt_xent"], (torch.zeros(5, 3, dtype=dtype), labels, 0.1, "all", True))
    assert native.intra_class_distance(torch.zeros(5, 0, dtype=dtype), labels, True, True)[0] == 0
    features = torch.randn(5, 3, generator=torch.Generator().manual_seed(0)).to(dtype)
    loss, grad = native.nt_xent(features, torch.zeros(5, dtype=torch.int64), 0.1, "negatives", True)
    assert loss == -torch.inf and grad.isfinite().all()
    for bad in (torch.nan, torch.inf):
        features[2, 1] = bad
        for denominator in ("all", "negatives"):
            assert native.nt_xent(features, labels, 0.1, denominator, True)[0].isnan()
        assert not native.intra_class_distance(features, labels, True, True)[0].isfinite()


def test_huge_and_tiny_features_have_the_right_norm():
    features, labels = batch(300, 40, 5)
    expected = native.nt_xent(features, labels, 0.1, "all", True)[0]
    for scale in (2.0**80, 2.0**-20):  # the sum of squares of the first overflows in float
        assert native.nt_xent(features * scale, labels, 0.1, "all", True)[0] == expected


def test_memory_stays_within_the_promise():
    size = native._cpu.nt_xent_workspace
    values = 512 * 512
    assert size(512, 512, 0, True) + 4 * values < 8e6
    assert size(8192, 512, 0, True) + 4 * 8192 * 512 < 200e6
    for count, width, code in [
        (1, 1, 0),
        (2500, 8, 0),
        (1800, 64, 3),
        (50_000, 512, 0),
        (100_000, 16, 1),
    ]:
        padded = (count + 96) * (width + 96)
        assert size(count, width, code, True) <= (32 << 20) + 4 * padded * (
            8 if code == 3 or padded < 2**20 else 4
        )


@pytest.mark.parametrize("level", LEVELS)
def test_a_level_is_used_or_refused_with_the_reason(level):
    try:
        native.set_cpu_level(level)
    except ValueError as error:
        assert "this processor has" in str(error)
        pytest.skip(str(error))
    assert native.cpu_level() == level


def test_levels_are_named_in_the_message():
    before = native.cpu_level()
    with pytest.raises(ValueError, match=r"expected one of generic, avx2, avx512.*got 'sse9'"):
        native.set_cpu_level("sse9")
    assert native.cpu_level() == before


@pytest.mark.parametrize("level", ["generic", "mmx"])
def test_the_environment_chooses_the_level(level):
    code = "from miue_fast.dispatch import native; print(native.cpu_level())"
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "MIUE_CPU_LEVEL": level},
        capture_output=True,
        text=True,
    )
    if level == "generic":
        assert done.stdout.strip() == "generic"
    else:
        assert (
            done.returncode == 1
            and "MIUE_CPU_LEVEL: expected one of generic, avx2, avx512" in done.stderr
        )


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="no /proc/self/maps")
def test_one_openmp_runtime_is_mapped():
    native.set_cpu_level(native.cpu_level())
    lines = Path("/proc/self/maps").read_text().splitlines()
    runtimes = {
        line.split()[-1]
        for line in lines
        if "libgomp" in line or "libomp" in line or "libiomp" in line
    }
    assert len(runtimes) == 1, runtimes
