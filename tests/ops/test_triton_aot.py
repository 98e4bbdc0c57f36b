"""Every Triton kernel, in every form its launcher can choose, compiles for sm_80 and sm_90 without
a GPU and without spills.
"""

import os
import re

import pytest

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("the interpreter replaces the compiler", allow_module_level=True)

import _aot
from _aot import (
    JITFunction,
    class_covariance,
    conv_epilogue,
    convolution,
    convolutions_in_fp8,
    intra_class_distance,
    nt_xent,
    perturbed_input,
    projected_step,
)

from benchmarks.pages import aot

SHARED = {80: 163 * 1024, 90: 227 * 1024}  # bytes one block may have
TENSOR_CORE = {80: "HMMA", 90: "HGMMA", "fp8": "QGMMA"}
EXACT = (projected_step.__name__, perturbed_input.__name__, conv_epilogue.__name__)
PRODUCTS = (
    "_sums_kernel",
    "_gradient_kernel",
    "_resident_gradient_kernel",
    "_convolution_kernel",
    "_stem_kernel",
    "_input_grad_kernel",
    "_stem_grad_kernel",
)


@pytest.fixture(scope="module")
def launches():
    return _aot.launches()


def problems(capability, name, case, folder):
    kernel, signature, _, _, options = case
    made = _aot.compiled(capability, name, case, folder)
    if made.stack:
        yield f"{made.stack} bytes of stack ({made.registers} registers): spills"
    if made.shared > SHARED[capability]:
        yield f"{made.shared} bytes of shared memory"
    rows = _aot.named_constants(case).get("BM", 64)
    fp8 = any("fp8" in kind for kind in _aot.kinds(signature))
    core = TENSOR_CORE["fp8" if fp8 else 80 if rows < 64 else capability]  # wgmma has 64 rows
    if kernel.fn.__name__ in PRODUCTS and core not in made.mix:
        yield f"no {core} in the machine code"
    # sm_80 adds two bf16 values as fma.rn.bf16 with 1: one rounding, as the contract says
    exact = kernel.fn.__module__ in EXACT or kernel is convolution._stem_grad_kernel
    if exact and (
        options.get("enable_fp_fusion", True) or re.search(r"\bfma\.[a-z.]*f32", made.ptx)
    ):
        yield "may fuse a multiply-add where the contract rounds twice"
    if exact and re.search(r"\b(add|sub|mul|div|fma)\.[a-z.]*ftz", made.ptx):
        yield "flushes denormal numbers, which the contract keeps"


@pytest.mark.parametrize("capability", [80, 90])
def test_compiles_without_spills(launches, capability, tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))

    def check(item):
        return [f"{problem}: {item[0]}" for problem in problems(capability, *item, tmp_path)]

    # one after the other: ast.parse in two threads at once is a SystemError on CPython 3.11
    found = [line for launch in launches[capability].items() for line in check(launch)]
    assert not found, "\n".join(found)


def test_e4m3_is_refused_before_it_exists(monkeypatch):
    monkeypatch.setattr(convolution, "capability", lambda tensor: (8, 0))
    with pytest.raises(
        RuntimeError,
        match=(
            r"^conv_forward: e4m3 products need compute capability 8\.9 or later, "
            r"this GPU has 8\.0$"
        ),
    ):
        convolutions_in_fp8()


def test_every_configuration_is_compiled(launches):
    """The calls above reach each entry of the tables the launchers choose from."""

    def chosen(kernel, *names):
        for case in every:
            if case[0].fn.__name__ == kernel:
                named = _aot.named_constants(case) | case[-1]
                yield {k: v for k, v in named.items() if k in names}

    every = [launch for of_one in launches.values() for launch in of_one.values()]
    tiles = ("BM", "BN", "BK", "BD", "WIDTH", "num_warps", "num_stages")
    tables = {"_sums_kernel": nt_xent.SUMS, "_gradient_kernel": nt_xent.GRADIENT}
    resident = [
        ("_sums_kernel", nt_xent.RESIDENT_SUMS),
        ("_resident_gradient_kernel", nt_xent.RESIDENT_GRADIENT),
    ]
    for kernel, table in [*tables.items(), *resident]:
        assert all(config in list(chosen(kernel, *tiles)) for config in table.values()), kernel
    for grad in (False, True):
        wanted = [{**tile, "GRAD": grad} for tile in intra_class_distance.TILES]
        assert all(config in list(chosen("_pairs_kernel", *wanted[0])) for config in wanted)
    blocks = [*convolution.LARGE.items(), (64, convolution.SMALL), (16, convolution.SMALL)]
    blocks = [(bm, *tile.values()) for bm, tile in blocks]
    for kernel, wanted in (("_convolution_kernel", blocks[:-1]), ("_input_grad_kernel", blocks)):
        found = {
            (c["BM"], c["NB"] * c["HB"] * c["WB"], c["BK"], c["num_warps"], c["num_stages"])
            for c in chosen(kernel, "BM", "NB", "HB", "WB", "BK", "num_warps", "num_stages")
        }
        assert found >= set(wanted), kernel
    for module in (
        nt_xent,
        intra_class_distance,
        class_covariance,
        perturbed_input,
        projected_step,
        conv_epilogue,
        convolution,
    ):
        kernels = {
            value.fn.__name__
            for value in vars(module).values()
            if isinstance(value, JITFunction)
            and value.fn.__name__.endswith("_kernel")
            and value.fn.__module__ == module.__name__
        }
        assert kernels and kernels <= {kernel.fn.__name__ for kernel, *_ in every}


def test_blocks_stay_within_their_channels(launches):
    """A box that reached past its tap's or parity's channels would read or write the next one's: on
    a GPU, a race.
    """
    found = 0
    for case in (launch for of_one in launches.values() for launch in of_one.values()):
        kernel, size = case[0], _aot.named_constants(case)
        if kernel in (
            convolution._convolution_kernel,
            convolution._input_grad_kernel,
            convolution._stem_grad_kernel,
        ):
            found += 1
            assert size["C" if kernel is convolution._convolution_kernel else "K"] % size["BK"] == 0
            assert (
                kernel is not convolution._input_grad_kernel
                or size["STRIDE"] == 1
                or size["C"] % size["BM"] == 0
            )
    assert found


def test_the_page_lists_every_configuration(launches):
    """docs/triton-aot.md holds what the compiler made of these; its numbers are of the Triton
    version and sources it names.
    """
    page = aot.PAGE.read_text()
    missing = [
        line
        for capability, found in launches.items()
        for line in aot.labels(capability, found)
        if line not in page
    ]
    assert not missing, "run `python -m benchmarks.pages.aot`: " + missing[0]
