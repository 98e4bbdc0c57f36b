"""What the wheel and the sdist hold."""

import tarfile
import zipfile
from pathlib import Path

import tomllib

import miue_fast

ROOT = Path(__file__).resolve().parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def python_files(folder, under):
    return {
        f"{under}/{p.relative_to(ROOT / folder).as_posix()}" for p in (ROOT / folder).rglob("*.py")
    }


def test_wheel_holds_every_module_and_nothing_else(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    wanted = python_files("miue_fast", "miue_fast") | python_files("kernels", "miue_fast/kernels")
    assert "miue_fast/kernels/triton/__init__.py" in wanted
    table = ROOT / "miue_fast" / "dispatch" / "measured.json"  # there once a GPU was measured
    wanted |= {f"miue_fast/dispatch/{table.name}"} if table.exists() else set()
    assert {n for n in names if ".dist-info/" not in n} == wanted | {"miue_fast/py.typed"}
    assert {n.split("/")[0] for n in names} == {
        "miue_fast",
        f"miue_fast-{PROJECT['version']}.dist-info",
    }
    assert wheel.name.endswith("-py3-none-any.whl")


def test_wheel_metadata(wheel):
    archive = zipfile.ZipFile(wheel)
    info = f"miue_fast-{PROJECT['version']}.dist-info"
    metadata = archive.read(f"{info}/METADATA").decode()
    assert (
        f"\nVersion: {PROJECT['version']}\n" in metadata
        and "\nLicense-Expression: Apache-2.0\n" in metadata
    )
    assert "\nRequires-Dist: torch>=2.11\n" in metadata
    assert archive.read(f"{info}/licenses/LICENSE") == (ROOT / "LICENSE").read_bytes()
    assert "miue-fast = miue_fast.cli:main" in archive.read(f"{info}/entry_points.txt").decode()


def test_version_is_the_projects():
    assert miue_fast.__version__ == PROJECT["version"]


def test_sdist_builds_everything(sdist):
    with tarfile.open(sdist) as archive:
        names = {name.split("/", 1)[1] for name in archive.getnames() if "/" in name}
    sources = {p.relative_to(ROOT).as_posix() for p in (ROOT / "csrc").rglob("*.*")}
    assert sources and sources <= names
    assert {"setup.py", "pyproject.toml", "LICENSE", "README.md", "MANIFEST.in"} <= names
    assert python_files("miue_fast", "miue_fast") | python_files("kernels", "kernels") <= names
    assert not [n for n in names if n.endswith((".so", ".pyc"))]


def test_citation_is_of_this_version_and_ci_runs_what_make_runs():
    citation = (ROOT / "CITATION.cff").read_text()
    assert f"\nversion: {PROJECT['version']}\n" in citation
    assert "make lint test" in (ROOT / ".github/workflows/ci.yml").read_text()
    assert "entry: make lint\n" in (ROOT / ".pre-commit-config.yaml").read_text()
