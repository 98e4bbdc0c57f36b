"""The rooms of docs/architecture.md: who may import whom. Read from the source with ast, and from #include lines."""

import ast
import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
STDLIB = sys.stdlib_module_names
# From the program down to the ops; a room imports only what stands after it.
LAYERS = ["miue_fast.demo", "miue_fast.cli", "miue_fast._arguments", "miue_fast.report", "miue_fast.evaluate", "miue_fast.analyse",
          "miue_fast.generate", "miue_fast.frozen", "miue_fast.models", "miue_fast.data"]  # fmt: skip
PROGRAM = ("miue_fast.demo", "miue_fast.cli")  # one layer
INSIDE = ("miue_fast.kernels", "miue_fast.reference", "miue_fast._native", "miue_fast._triton", "miue_fast._cpu", "miue_fast._cuda")


def module_name(path):
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(("miue_fast", *parts) if parts[0] == "kernels" else parts)


def imports(path):
    """Absolute names of what a file imports: `import a.b`, `from .x import y` (x and x.y), import_module("a.b")."""
    name = module_name(path)
    package = name.removesuffix(".__init__") if path.name == "__init__.py" else name.rpartition(".")[0]
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                base = ".".join(package.split(".")[: len(package.split(".")) - node.level + 1] + ([node.module] if node.module else []))
            found |= {f"{base}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Call) and getattr(node.func, "attr", getattr(node.func, "id", "")) in ("import_module", "__import__"):
            target = node.args[0]
            if isinstance(target, ast.JoinedStr):
                target = target.values[0]
            found.add(target.value if isinstance(target, ast.Constant) else "computed")
    return found


def within(name, roots):
    return any(name == root or name.startswith(root + ".") for root in roots)


def sources(folder):
    paths = sorted((ROOT / folder).rglob("*.py"))
    return [p for p in paths if "__pycache__" not in p.parts]


def check(folder, allowed, forbidden=()):
    paths = sources(folder)
    assert paths, folder
    for path in paths:
        for name in imports(path):
            assert within(name, allowed) and not within(name, forbidden), f"{path.relative_to(ROOT)} imports {name}"


def test_reference_imports_torch_only():
    check("miue_fast/reference", ["torch", "miue_fast.reference"])


def test_ops_import_torch_and_miue_fast_but_no_device_code():
    check("miue_fast/ops", ["torch", "miue_fast"], ["miue_fast.kernels", "miue_fast._cpu", "miue_fast._cuda", *LAYERS])


def test_kernels_know_no_policy():
    check("kernels", ["torch", "triton", "miue_fast.kernels", *STDLIB])


@pytest.mark.parametrize("layer", LAYERS)
def test_rooms_import_downwards_only(layer):
    folder = layer.replace(".", "/")
    files = sources(folder) or [ROOT / f"{folder}.py"] * (ROOT / f"{folder}.py").exists()
    above = LAYERS[: LAYERS.index(layer)] if layer not in PROGRAM else []
    for path in files:
        for name in imports(path):
            assert not within(name, [*INSIDE, *above]), f"{path.relative_to(ROOT)} imports {name}"


def test_benchmarks_use_the_public_api_and_the_registry():
    for path in sources("benchmarks"):
        for name in imports(path):
            assert not within(name, ["miue_fast.kernels", "miue_fast._cpu", "miue_fast._cuda"]), f"{path.relative_to(ROOT)} imports {name}"


@pytest.mark.parametrize("what, importer", [("_cpu", "_native"), ("_cuda", "_native"), ("kernels", "_triton")])
def test_one_importer_of_device_code(what, importer):
    seen = set()
    for path in sources("miue_fast"):
        # `import_module(f"miue_fast.{name}")` counts where the name is written anywhere in the file.
        named = re.search(rf"\b{what}\b", path.read_text())
        if any(within(name, [f"miue_fast.{what}"]) or (name == "miue_fast." and named) for name in imports(path)):
            seen.add(path.stem)
    assert seen == {importer}


def test_native_code_knows_neither_torch_nor_python_nor_the_other_device():
    for device, other in (("cpu", "cuda"), ("cuda", "cpu")):
        files = [p for p in (ROOT / "csrc" / device).rglob("*") if p.suffix in (".cpp", ".cu", ".h", ".cuh", ".inc")]
        assert files, device
        own = {p.name for p in files}
        for path in files:
            for system, quoted in re.findall(r'^\s*#\s*include\s*(?:<([^>]+)>|"([^"]+)")', path.read_text(), re.M):
                name, where = system or quoted, path.relative_to(ROOT)
                assert not re.match(r"(torch|ATen|c10|pybind11|Python)", name), f"{where} includes {name}"
                assert other not in Path(name).parts, f"{where} includes {name}"
                if quoted:
                    assert Path(name).name in own | {"ops.h", "check.h"}, f"{where} includes {name}"


def test_the_bindings_are_the_only_files_that_know_python():
    knowing = {p.name for p in (ROOT / "csrc").rglob("*.*") if re.search(r"#\s*include\s*[<\"](pybind11|Python)", p.read_text())}
    assert knowing == {"bindings.h"}
