"""Who may import whom: the table of docs/architecture.md, read from the sources with ast, and from
#include lines.
"""

import ast
import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
STDLIB = sys.stdlib_module_names
PAGE = (ROOT / "docs" / "architecture.md").read_text()
# {room: the rooms and packages that it may import, besides itself and the standard library}
ALLOWED = {
    room: re.findall(r"`([\w.]+)`", allowed)
    for room, allowed in re.findall(r"^\| `miue_fast/(\w+)/?` \|[^|]*\| ([^|]*) \|$", PAGE, re.M)
}
DEVICE_CODE = ("_cpu", "_cuda", "kernels")


def sources(folder):
    return sorted(p for p in (ROOT / folder).rglob("*.py") if "__pycache__" not in p.parts)


def name_of(path):
    parts = path.relative_to(ROOT).with_suffix("").parts
    parts = ("miue_fast", *parts) if parts[0] == "kernels" else parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {
    name_of(p): p for folder in ("miue_fast", "kernels", "benchmarks") for p in sources(folder)
}


def imports(path):
    """Absolute names of what a file imports, lazily or not: a module where the name is one, else
    what stands before it.
    """
    package = name_of(path) if path.name == "__init__.py" else name_of(path).rpartition(".")[0]
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) - node.level + 1]
            base = ".".join(
                [*(above if node.level else []), *([node.module] if node.module else [])]
            )
            names = {f"{base}.{alias.name}" for alias in node.names}
            found |= {name if name in MODULES else base for name in names}
        elif isinstance(node, ast.Call):
            called = getattr(node.func, "attr", getattr(node.func, "id", ""))
            if called in ("import_module", "__import__"):
                target = (
                    node.args[0].values[0]
                    if isinstance(node.args[0], ast.JoinedStr)
                    else node.args[0]
                )
                found.add(
                    target.value.rstrip(".") if isinstance(target, ast.Constant) else "computed"
                )
    return found


def room(name):
    """`miue_fast.data.poison` is in `data`, torch in `torch`."""
    parts = name.split(".")
    return parts[1] if parts[0] == "miue_fast" and len(parts) > 1 else parts[0]


def test_every_module_has_a_room_with_rules():
    rooms = {room(name) for name in MODULES if name.startswith("miue_fast.")}
    assert rooms - {"__main__", "_waiting", "kernels"} == set(ALLOWED)


@pytest.mark.parametrize("here", ALLOWED)
def test_a_room_imports_what_the_table_says(here):
    used = set()
    for path in sources(f"miue_fast/{here}"):
        for name in imports(path):
            if room(name) == here or name.split(".")[0] in STDLIB:
                continue
            if here == "dispatch" and name in ("computed", "miue_fast"):
                continue  # versions of any package, and the device code below
            used.add(room(name))
            assert room(name) in ALLOWED[here], f"{path.relative_to(ROOT)} imports {name}"
    unused = set(ALLOWED[here]) - used
    assert not unused, f"docs/architecture.md: {here} no longer imports {', '.join(sorted(unused))}"


def test_the_table_has_no_circle():
    left = {here: {r for r in allowed if r in ALLOWED} for here, allowed in ALLOWED.items()}
    while left:
        free = {here for here, needs in left.items() if not needs & set(left)}
        assert free, f"rooms that need each other: {left}"
        left = {here: needs for here, needs in left.items() if here not in free}


def test_modules_import_each_other_in_one_direction():
    """No circle of modules, in the package or in the benchmarks, not even a lazy one."""
    needs = {}
    for name, path in MODULES.items():
        inside = {found for found in imports(path) if found in MODULES and found != name}
        # `from .. import data` in a module is no need of the package itself
        needs[name] = {found for found in inside if not name.startswith(found + ".")}
    while needs:
        free = {name for name, wanted in needs.items() if not wanted & set(needs)}
        assert free, f"modules that need each other, or those that do: {sorted(needs)}"
        needs = {name: wanted for name, wanted in needs.items() if name not in free}


def test_kernels_know_no_policy():
    for path in sources("kernels"):
        for name in imports(path):
            assert room(name) in ("torch", "triton", "kernels", *STDLIB), (
                f"{path.name} imports {name}"
            )


def test_benchmarks_use_the_public_api_and_the_registry():
    for path in sources("benchmarks"):
        for name in imports(path):
            assert room(name) not in DEVICE_CODE, f"{path.relative_to(ROOT)} imports {name}"


@pytest.mark.parametrize(
    "what, importer", [("_cpu", "native"), ("_cuda", "native"), ("kernels", "triton")]
)
def test_one_importer_of_device_code(what, importer):
    seen = set()
    for path in sources("miue_fast"):
        # `import_module(f"miue_fast.{name}")` counts where the name is written in the file.
        named = re.search(rf"\b{what}\b", path.read_text())
        if any(room(name) == what or (name == "miue_fast" and named) for name in imports(path)):
            seen.add(path.stem)
    assert seen - {"version"} == {importer}


def test_native_code_knows_neither_torch_nor_python_nor_the_other_device():
    for device, other in (("cpu", "cuda"), ("cuda", "cpu")):
        suffixes = (".cpp", ".cu", ".h", ".cuh", ".inc")
        files = [p for p in (ROOT / "csrc" / device).rglob("*") if p.suffix in suffixes]
        assert files, device
        own = {p.name for p in files}
        for path in files:
            includes = re.findall(
                r'^\s*#\s*include\s*(?:<([^>]+)>|"([^"]+)")', path.read_text(), re.M
            )
            for system, quoted in includes:
                name, where = system or quoted, path.relative_to(ROOT)
                outside = re.match(r"(torch|ATen|c10|pybind11|Python)", name)
                assert not outside and other not in Path(name).parts, f"{where} includes {name}"
                if quoted:
                    assert Path(name).name in own | {"ops.h", "check.h"}, f"{where} includes {name}"


def test_the_bindings_are_the_only_files_that_know_python():
    python = r"#\s*include\s*[<\"](pybind11|Python)"
    knowing = {p.name for p in (ROOT / "csrc").rglob("*.*") if re.search(python, p.read_text())}
    assert knowing == {"bindings.h"}
