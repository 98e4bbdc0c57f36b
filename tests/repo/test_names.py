"""Every dotted name and every file name that a page, a docstring or a comment mentions exists."""

import functools
import importlib
import io
import re
import subprocess
import sys
import tokenize
from pathlib import Path

import pytest

import miue_fast

ROOT = Path(__file__).resolve().parents[2]
# The changelog tells of names that are gone; compiler pages hold the names of their symbols.
PAGES = sorted(
    page
    for page in [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("benchmarks/**/*.md")]
    if page.name not in ("CHANGELOG.md", "cuda-aot.md", "triton-aot.md")
)
SOURCES = sorted(
    path
    for folder in ("miue_fast", "kernels", "benchmarks", "tests", "examples", "csrc")
    for path in (ROOT / folder).rglob("*")
    if path.suffix in (".py", ".h", ".cpp", ".cu", ".cuh", ".sh")
)
SOURCES.append(ROOT / "setup.py")
CODE = "py|h|cpp|cuh|cu|sh"
FILE = re.compile(
    rf"(?<![\w./<*-])((?:[\w-]+/)*[\w-]+\.(?:{CODE}|md)|(?:docs|tests|benchmarks|miue_fast)/"
    r"[\w/-]+\.(?:json|png))\b(?![\w*/])"
)
# What programs make: not there before they have run.
MADE = re.compile(r"benchmarks/results/.*|(?:docs/)?gpu-sanitizer\.md|OUT/.*")
MODULE = re.compile(r"(?<![\w./])((?:miue_fast|benchmarks)(?:\.\w+)+)")
PUBLIC = re.compile(r"`((?:data|models|analysis)\.\w+)`")


@functools.cache
def files():
    """Relative names of all files, and of their ends: `csrc/cpu/gemm.h` is also `cpu/gemm.h`."""
    names = set()
    for path in [*ROOT.rglob("*.*")]:
        parts = path.relative_to(ROOT).parts
        if not {".venv", ".git", "__pycache__", "build"} & set(parts):
            names |= {"/".join(parts[start:]) for start in range(len(parts))}
    return names


@functools.cache
def exists(name):
    """Whether a dotted name is a module, or something that its longest module has."""
    parts = name.split(".")
    for end in range(len(parts), 0, -1):
        path = "/".join(parts[:end]).replace("miue_fast/kernels", "kernels")
        if f"{path}.py" in files() or f"{path}/__init__.py" in files():
            break
    else:
        return False
    if end == len(parts):
        return True
    found = importlib.import_module(".".join(parts[:end]))
    for part in parts[end:]:
        if not hasattr(found, part):
            return False
        found = getattr(found, part)
    return True


def texts(path):
    """The prose of a file: comments of a script, comments and strings of Python (of a test its
    docstrings only, because its other strings are made up), and all of anything else.
    """
    content = path.read_text()
    if path.suffix == ".sh":
        return "\n".join(line for line in content.splitlines() if line.lstrip().startswith("#"))
    if path.suffix != ".py":
        return content
    tokens = list(tokenize.generate_tokens(io.StringIO(content).readline))
    in_test = path.is_relative_to(ROOT / "tests")
    return "\n".join(
        token.string
        for token in tokens
        if token.type == tokenize.COMMENT
        or (token.type == tokenize.STRING and (token.string.startswith('"""') or not in_test))
    )


def wrong(text):
    """The names in a text that stand for nothing."""
    named = {name.replace("miue_fast/kernels/", "kernels/") for name in FILE.findall(text)}
    found = {name for name in named if name not in files() and not MADE.fullmatch(name)}
    dotted = {name.rstrip(".") for name in MODULE.findall(text)}
    dotted |= {f"miue_fast.{name}" for name in PUBLIC.findall(text)}
    dotted = {name for name in dotted if not name.endswith((".py", ".so", ".json", ".md", "._"))}
    return sorted(found | {name for name in dotted if not exists(name)})


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_the_names_in_a_page(page):
    assert not wrong(page.read_text())


def test_the_names_in_docstrings_and_comments():
    found = {path.relative_to(ROOT).as_posix(): wrong(texts(path)) for path in SOURCES}
    assert not {path: names for path, names in found.items() if names}


def test_a_stale_name_is_found():
    stale = (
        "see `graphs.pie`, `nowhere.py`, tests/nowhere.py, nowhere.md, "
        "`miue_fast.evaluate.run_cell`, `data.lead`"
    )
    assert wrong(stale) == [
        "miue_fast.data.lead",
        "miue_fast.evaluate.run_cell",
        "nowhere.md",
        "nowhere.py",
        "tests/nowhere.py",
    ]
    assert not wrong(
        "`miue_fast.data.load`, `data.load`, cpu/gemm.h, `net.py`, tests/repo/test_names.py"
    )


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_the_links_of_a_page(page):
    links = re.findall(r"\]\(([^)\s]+)\)", page.read_text())
    targets = [link.partition("#")[0] for link in links if not link.startswith("http")]
    assert not [target for target in targets if target and not (page.parent / target).exists()]


def test_the_public_names():
    """They are listed, they are there, and importing them loads nothing that is only drawn with."""
    assert len(set(miue_fast.__all__)) == len(miue_fast.__all__)
    assert not [name for name in miue_fast.__all__ if not hasattr(miue_fast, name)]
    rooms = {"data", "models", "analysis", "evaluation", "generation"}
    assert rooms | {"Options", "generate", "evaluate"} <= set(miue_fast.__all__)
    heavy = "{'matplotlib', 'torchvision', 'sympy', 'tensorboard', 'triton'}"
    loaded = [
        subprocess.run(
            [
                sys.executable,
                "-c",
                f"import sys, {name}; print(*sorted({heavy} & {{*sys.modules}}))",
            ],
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for name in ("torch", "miue_fast")
    ]
    assert loaded[0] == loaded[1]
