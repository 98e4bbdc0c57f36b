"""The packed and the matrix convolutions on any sizes (hypothesis; MIUE_FUZZ cases, or 100):
float64's results, and the same bits with another number of threads.
"""

import os

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from miue_fast.dispatch import native
from tests.frozen import test_matrix, test_packed

pytestmark = pytest.mark.skipif(native.cpu_missing() is not None, reason="needs the C++ kernels")
FUZZ = settings(
    max_examples=int(os.environ.get("MIUE_FUZZ", "100")),
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=list(HealthCheck),
)
CHANNELS = st.one_of(st.integers(1, 80), st.sampled_from([96, 128, 160, 256]))
SIDE = st.integers(1, 19)


@pytest.fixture(autouse=True)
def one_thread_after():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("level", ["generic", "avx2", "avx512"])
def test_packed_fuzz(level):
    before = native.cpu_level()
    try:
        native.set_cpu_level(level)
    except ValueError as error:
        pytest.skip(str(error))

    @FUZZ
    @given(
        st.sampled_from(test_packed.KINDS),
        st.booleans(),
        st.tuples(st.integers(0, 9), CHANNELS, CHANNELS, SIDE, SIDE),
        st.integers(0, 2**31),
        st.integers(2, 5),
    )
    def check(kind, back, size, seed, threads):
        case = test_packed.Case(*kind, back, size, seed)
        torch.set_num_threads(1)
        y, _ = case()
        if y.numel():
            assert (y.double() - case.truth).abs().max() <= case.tolerance()
        torch.set_num_threads(threads)
        assert torch.equal(case()[0], y)

    try:
        check()
    finally:
        native.set_cpu_level(before)


@st.composite
def geometries(draw):
    """Arguments of test_matrix.Case for a convolution that has a result."""
    taps = draw(st.tuples(st.integers(1, 5), st.integers(1, 5)))
    stride, padding, dilation = (draw(st.integers(low, 3)) for low in (1, 0, 1))
    least = [max(1, dilation * (tap - 1) + 1 - 2 * padding) for tap in taps]
    height, width = (draw(st.integers(low, low + 12)) for low in least)
    batch, channels, results = draw(st.integers(0, 40)), draw(CHANNELS), draw(CHANNELS)
    return batch, channels, results, height, width, taps, stride, padding, dilation


@pytest.mark.parametrize("plain", test_matrix.PLAIN, ids=["plain", "tiles"])
def test_matrix_fuzz(plain):
    @FUZZ
    @given(geometries(), st.booleans(), st.booleans(), st.integers(0, 2**31), st.integers(2, 5))
    def check(geometry, back, relu, seed, threads):
        made = test_matrix.Case(*geometry, seed=seed)
        relu, truth = relu and not back, made.truth[back]
        torch.set_num_threads(1)
        y, bits = made(back, plain, relu=relu)
        test_matrix.close(y, truth.relu() if relu else truth)
        if relu:
            assert torch.equal(test_matrix.unpacked(bits, y), y > 0)
        weight_grad = native.matrix_weight_grad(made.x, made.grad, made.taps, made.conv, plain)
        truth = made.weight_grad
        assert (weight_grad - truth).abs().max() <= 1e-5 * truth.abs().max() + 1e-30
        torch.set_num_threads(threads)
        assert torch.equal(made(back, plain, relu=relu)[0], y)
        again = native.matrix_weight_grad(made.x, made.grad, made.taps, made.conv, plain)
        assert torch.equal(again, weight_grad)

    check()
