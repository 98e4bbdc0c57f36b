"""Every Triton kernel, in every form its launcher can choose, compiles for sm_80 and sm_90 without a GPU and without spills.

The launchers themselves are called, with Triton's launch replaced by a recorder that specialises the arguments as Triton would.
"""

import os
import re
import subprocess
from pathlib import Path

import pytest
import torch

triton = pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("the interpreter replaces the compiler", allow_module_level=True)

from miue_fast.kernels.triton import intra_class_distance, mi_ue_value_and_grad, nt_xent, perturbed_input, projected_step  # noqa: E402
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402
from triton.runtime.jit import JITFunction  # noqa: E402

SHARED = {80: 163 * 1024, 90: 227 * 1024}  # bytes one block may have
TENSOR_CORE = {80: r"\bHMMA\.", 90: r"\bHGMMA\."}
BIN = Path(triton.__file__).parent / "backends/nvidia/bin"
POINTER = {
    torch.float32: "*fp32",
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.uint8: "*u8",
    torch.int8: "*i8",
    torch.int64: "*i64",
}
EXACT = (projected_step.__name__, perturbed_input.__name__)
FLOATS = [torch.float32, torch.float16, torch.bfloat16]


def specialise(kernel, args, kwargs):
    """(signature, constexprs, attrs, options) of a launch: None and 1 are constants, multiples of 16 are known to be."""
    given = dict(zip(kernel.arg_names, args)) | {k: v for k, v in kwargs.items() if k in kernel.arg_names}
    signature, constants, attrs = {}, {}, {}
    for position, parameter in enumerate(kernel.params):
        value = given[parameter.name]
        if parameter.is_constexpr or value is None or (type(value) is int and value == 1):
            signature[parameter.name], constants[(position,)] = "constexpr", value
            continue
        if isinstance(value, torch.Tensor):
            kind, aligned = POINTER[value.dtype], value.data_ptr() % 16 == 0
        elif isinstance(value, float):
            kind, aligned = "fp32", False
        else:
            kind, aligned = "i32" if -(2**31) <= value < 2**31 else "i64", value % 16 == 0
        signature[parameter.name] = kind
        if aligned:
            attrs[(position,)] = [["tt.divisibility", 16]]
    return signature, constants, attrs, {k: v for k, v in kwargs.items() if k not in kernel.arg_names}


@pytest.fixture(scope="module")
def launches():
    """{text: (kernel, *specialisation)} of every launch of the calls below."""
    found = {}

    def record(kernel, *args, grid, warmup, **kwargs):
        case = specialise(kernel, args, kwargs)
        found[f"{kernel.fn.__name__} {case}"] = (kernel, *case)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(JITFunction, "run", record)
        losses()
        pointwise()
    return found


def losses():
    for dtype in FLOATS:
        for batch, width in ((512, 512), (nt_xent.STORED_ROWS + 192, 512), (64, 70)):
            features, labels = torch.zeros(batch, width, dtype=dtype), torch.arange(batch) % 10
            nt_xent.nt_xent(features, labels, 0.1, "all", True)
            if dtype != torch.float16:
                nt_xent.nt_xent(features, labels, 0.1, "negatives", True)
        nt_xent.nt_xent(features[:, ::2], labels, 0.1, "all", False)
        for width in (70, 512, 2048, 2304):
            intra_class_distance.intra_class_distance(torch.zeros(48, width, dtype=dtype), torch.arange(48) % 3, True, True)
        mi_ue_value_and_grad.mi_ue_value_and_grad(torch.zeros(512, 512, dtype=dtype), torch.arange(512) % 10, 0.1, 0.1, "all", True)


def pointwise():
    x, index, flip, count = torch.zeros(4, 3, 32, 32), torch.arange(4), torch.zeros(4, dtype=torch.bool), torch.zeros(1, dtype=torch.int64)
    odd = torch.zeros(3, 1, 7, 5)
    for k, store in enumerate((torch.float32, torch.float16, torch.int8)):
        for dtype in FLOATS:
            grad = x.to(dtype, memory_format=torch.channels_last if k % 2 else torch.contiguous_format)
            projected_step.projected_step_(x.to(store), index, grad, x.byte(), flip, 0.1, 0.1, count)
            perturbed_input.perturbed_input(x.byte(), x.to(store), index, flip, [0.5] * 3, [0.5] * 3, 0.1, dtype, dtype != torch.float32)
        projected_step.projected_step_(odd.to(store), None, odd.to(FLOATS[k]), odd, None, 0.1, 0.1, None)
        perturbed_input.perturbed_input(odd, odd.to(store) if k else None, None, None, [], [], 0.1, FLOATS[k], k == 1)
        projected_step.projected_step(x.to(FLOATS[k]), x.to(FLOATS[k]), x.to(FLOATS[k]), 0.1, 0.1)


def tool(name, *arguments):
    return subprocess.run([BIN / name, *arguments], capture_output=True, text=True, check=True).stdout


def problems(capability, name, case, folder):
    kernel, signature, constants, attrs, options = case
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attrs)
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    cubin = folder / f"{abs(hash(name))}.cubin"
    cubin.write_bytes(compiled.asm["cubin"])
    usage = re.search(r"REG:(\d+) STACK:(\d+)", tool("cuobjdump", "-res-usage", cubin))
    if int(usage[2]):
        yield f"{usage[2]} bytes of stack ({usage[1]} registers): spills"
    if compiled.metadata.shared > SHARED[capability]:
        yield f"{compiled.metadata.shared} bytes of shared memory"
    if kernel.fn.__name__ in ("_sums_kernel", "_gradient_kernel") and not re.search(TENSOR_CORE[capability], tool("nvdisasm", "-c", cubin)):
        yield f"no {TENSOR_CORE[capability]} in the machine code"
    if kernel.fn.__module__ in EXACT and (options.get("enable_fp_fusion", True) or re.search(r"\bfma\.", compiled.asm["ptx"])):
        yield "may fuse a multiply-add where the contract rounds twice"


@pytest.mark.parametrize("capability", [80, 90])
def test_compiles_without_spills(launches, capability, tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))

    def check(item):
        return [f"{problem}: {item[0]}" for problem in problems(capability, *item, tmp_path)]

    # one after the other: ast.parse in two threads at once is a SystemError on CPython 3.11
    found = [line for launch in launches.items() for line in check(launch)]
    assert not found, "\n".join(found)


def test_every_configuration_is_compiled(launches):
    """The calls above reach each entry of the tables the launchers choose from."""

    def chosen(kernel, *names):
        for found, _, constants, _, options in launches.values():
            if found.fn.__name__ == kernel:
                named = {found.arg_names[position]: value for (position,), value in constants.items()}
                yield {k: v for k, v in (named | options).items() if k in names}

    tiles = ("BM", "BN", "BK", "BD", "num_warps", "num_stages")
    for kernel, table in (("_sums_kernel", nt_xent.SUMS), ("_gradient_kernel", nt_xent.GRADIENT)):
        assert all(config in list(chosen(kernel, *tiles)) for config in table.values()), kernel
    for grad in (False, True):
        wanted = [{**tile, "GRAD": grad} for tile in intra_class_distance.TILES]
        assert all(config in list(chosen("_pairs_kernel", *wanted[0])) for config in wanted)
    for module in (nt_xent, intra_class_distance, perturbed_input, projected_step):
        kernels = {
            value.fn.__name__ for value in vars(module).values() if isinstance(value, JITFunction) and value.fn.__name__.endswith("_kernel")
        }
        assert kernels and kernels <= {kernel.fn.__name__ for kernel, *_ in launches.values()}
