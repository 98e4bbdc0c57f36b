"""Every public function and method of the package has annotations, but for those named here."""

import ast
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
LEFT = (
    "reference/",  # formulas, whose types are those of the contract in ops/
    "dispatch/native.py",  # wrappers of native functions, likewise
    "data/inert.py",  # the opcodes of pickles
    "frozen/trace.py",  # overrides of torch.fx
)


def functions(tree):
    for node in tree.body:
        if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
            yield from functions(node)
        elif isinstance(node, ast.FunctionDef) and not node.name.startswith("_"):
            yield node


def test_public_functions_are_annotated():
    seen, bare = 0, []
    for path in sorted((ROOT / "miue_fast").rglob("*.py")):
        name = path.relative_to(ROOT / "miue_fast").as_posix()
        if name.startswith(LEFT):
            continue
        for function in functions(ast.parse(path.read_text())):
            args = [*function.args.posonlyargs, *function.args.args, *function.args.kwonlyargs]
            wanted = [arg for arg in args if arg.arg not in ("self", "cls")]
            seen += 1
            if function.returns is None or any(arg.annotation is None for arg in wanted):
                bare.append(f"{name}: {function.name}")
    assert seen > 400 and not bare
