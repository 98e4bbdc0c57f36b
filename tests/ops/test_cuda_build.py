"""The built _cuda module: it loads without a GPU, a call says what the driver says, and its machine
code does not spill.
"""

import re
import shutil
from pathlib import Path

import _machine_code
import pytest
import torch

from miue_fast.dispatch import architectures, native
from miue_fast.dispatch.registry import BackendError

if native._cuda is None:
    pytest.skip(native._cuda_reason, allow_module_level=True)
if native._built != architectures.ARCHITECTURES:
    pytest.skip("built for some architectures only", allow_module_level=True)

ROOT = Path(__file__).parents[2]
NOWHERE = torch.device(
    "meta"
)  # neither cpu nor cuda: `native` hands the call to _cuda on the default stream
CALLS = {
    "nt_xent": (0, 0, 4, 0, 4, 4, 0.1, False, 0, 0, 0),
    "intra_class_distance": (0, 0, 4, 0, 4, 4, True, 1.0, 0, 0, 0, 0, 0),
    "projected_step": (0, 0, 0, 0, 0, 4, 0.1, 0.1),
    "projected_step_inplace": (
        (0, 0),
        0,
        (0, 0),
        (4, 4, 4, 1),
        (0, 4),
        0,
        (1, 1, 4, 4),
        1,
        0.1,
        0.1,
        0,
        0,
        1,
    ),
    "perturbed_input": ((0, 0), False, (0, 4), (0, -1), 0.1, 0, 0, [], [], (1, 1, 4, 4), 1, 0),
    "conv_epilogue": (0, 0, 0, 0, True, 0, 4, 64),
    "conv_grad_epilogue": (0, 0, 0, 1 << 20, 64),
    "conv64": (0, 1, 0, 0, False, False, 0, 0, True, 0, 0, 1, 4, 4),
}


@pytest.mark.parametrize("op", CALLS)
def test_call_without_a_gpu_reports_the_driver(op):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU: null pointers would reach it")
    for _ in range(2):
        with pytest.raises(BackendError, match=rf"^{op}: (\w+: )?.*(driver|device)"):
            native._call(NOWHERE, op, *CALLS[op])


def test_bad_dtype_is_the_callers_error():
    with pytest.raises(ValueError, match=r"^nt_xent: features: expected .*, got code 3$"):
        native._call(NOWHERE, "nt_xent", 0, 3, *CALLS["nt_xent"][2:])
    with pytest.raises(ValueError, match=r"^conv_epilogue_: y: expected .*, got code 3$"):
        native._call(NOWHERE, "conv_epilogue", 0, 3, *CALLS["conv_epilogue"][2:])
    for change, match in [
        ({1: 0}, "x: expected .*, got code 0"),
        ({13: 65}, "size: expected H >= 1 and W in 4..64, got 4 x 65"),
        ({2: 8}, "memory: expected multiples of 16 bytes"),
        ({11: 1 << 31}, "size: expected fewer than"),
    ]:
        with pytest.raises(ValueError, match=f"^conv64: {match}"):
            native._call(
                NOWHERE, "conv64", *(change.get(k, v) for k, v in enumerate(CALLS["conv64"]))
            )
    with pytest.raises(
        ValueError,
        match=r"^perturbed_input: mean and std: expected at most 16 channels on a GPU, got 17$",
    ):
        native._call(
            NOWHERE,
            "perturbed_input",
            *CALLS["perturbed_input"][:7],
            [0.0] * 17,
            [1.0] * 17,
            (1, 17, 4, 4),
            1,
            0,
        )


def test_workspace_is_bounded():
    for count, width in [(512, 512), (8192, 512), (50_000, 512), (300_000, 64)]:
        padded = (count + 64) * (-(-width // 64) * 64)
        assert (
            native._cuda.nt_xent_workspace(count, width, 0, True)
            <= (32 << 20) + 8 * padded + 128 * count
        )
        for wide in {width, 300, 1000}:
            columns = 1 << (max(wide, 128) - 1).bit_length()
            assert (
                native._cuda.nt_xent_workspace(count, wide, 1, True)
                <= (32 << 20) + 6 * (count + 128) * columns + 192 * count
            )
        assert (
            native._cuda.intra_class_distance_workspace(count, width, 0, True)
            <= 4 * count * width + 4 * count + 64
        )


@pytest.fixture(scope="module")
def kernels():
    for name in ("cuobjdump", "nvdisasm"):
        if _machine_code.tool(name) is None:
            pytest.skip(f"no {name} on PATH or in triton")
    return _machine_code.kernels(native._cuda.__file__)


def test_machine_code_of_every_kernel(kernels):
    """Code of every architecture of the table, Hopper's own kernels for sm_90a only, and PTX;
    registers within the block's share, nothing spilled, tensor cores where a product is meant.
    """
    names = {arch: {name for found, name in kernels if found == arch} for arch, _ in kernels}
    assert len(names["sm_80"]) >= 23
    of_hopper = re.findall(
        r"__global__ (?:void )?(?:__launch_bounds__\(.*?\) )?(\w+)\(",
        "".join(path.read_text() for path in (ROOT / architectures.HOPPER).glob("*.cu")),
    )
    assert len(of_hopper) == 7
    extra = names["sm_90a"] - names["sm_80"]
    assert names["sm_80"] < names["sm_90a"] and len(names) == 2
    assert {next(kernel for kernel in of_hopper if kernel in name) for name in extra} == set(
        of_hopper
    )
    for key, used in kernels.items():
        assert used.stack == 0, f"{key} spills: {used}"
        assert used.registers <= 255 and used.shared <= 48 << 10, f"{key}: {used}"
    assert ".ptx" in _machine_code.output("cuobjdump", "-lptx", native._cuda.__file__)
    hopper = {name: used.mix for (arch, name), used in kernels.items() if arch == "sm_90a"}
    products = [name for name, mix in hopper.items() if "HMMA" in mix]
    products = {re.search(r"row_sums|weights|gradient", name)[0] for name in products}
    assert products == {"row_sums", "weights", "gradient"}
    # The convolution of 64 channels: 36 products in a row (nine taps of four) and one wait for all
    # of them; three tiles, two dtypes.
    wide = {name: mix for name, mix in hopper.items() if "conv64" in name}
    assert {
        name: (mix["HGMMA"], mix["WARPGROUP.DEPBAR"]) for name, mix in wide.items()
    } == dict.fromkeys(wide, (36, 1))
    assert sorted(re.search(r"DTypeE(\d)ELi(\d+)", name).groups() for name in wide) == [
        (t, n) for t in "12" for n in ("136", "176", "72")
    ]
    assert all("UTMALDG" not in mix and "LDGSTS" in mix for mix in wide.values())
    # The large loss: of two tiles all products before a wait, and one wait for each; of the
    # gradient one for the weights, and two of G (the last tile is outside the loop). More waits
    # would be ptxas's own, which lets products overlap no longer.
    for kind, products, waits in (("tile_sums", 2, 2), ("tile_gradient", 1, 3)):
        tiles = {name: mix for name, mix in hopper.items() if kind in name}
        assert {int(re.search(r"Li(\d+)", name)[1]) for name in tiles} == {128, 256, 512}
        for name, mix in tiles.items():
            steps = int(re.search(r"Li(\d+)", name)[1]) // 16
            assert (mix["HGMMA"], mix["WARPGROUP.DEPBAR"]) == (
                products * steps + 8 * (kind == "tile_gradient"),
                waits,
            ), name


def test_the_page_lists_every_kernel(kernels):
    """docs/cuda-aot.md: its numbers are of the nvcc and sources it names."""
    if not shutil.which("c++filt"):
        pytest.skip("no c++filt")
    page = (ROOT / "docs/cuda-aot.md").read_text()
    missing = [
        name
        for name in _machine_code.readable({name for _, name in kernels})
        if f"| {name} |" not in page
    ]
    assert not missing, f"run `python -m benchmarks.pages.aot --cuda`: {missing[0]}"
