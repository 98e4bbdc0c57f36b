"""Windows is not supported, and that is all it takes: what writes nothing works there, what writes
says one clear line.
"""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
BLOCK = (
    "import sys; sys.modules.update(fcntl=None, resource=None); import torch, miue_fast; "
    "from miue_fast import data\n"
)
SHAPES = "shapes = data.shapes(20, seed=0, size=16, classes=2, difficulty=0)\n"
TINY = "model='small_resnet', width=4, epochs=1, steps=1, batch=10, progress=False"


def python(code, *words):
    return subprocess.run(
        [sys.executable, "-c", BLOCK + code, *map(str, words)],
        capture_output=True,
        text=True,
        timeout=300,
    )


def test_what_writes_nothing_works_without_fcntl():
    code = f"""{SHAPES}
from miue_fast import cli, report
assert miue_fast.nt_xent(torch.randn(8, 4), torch.arange(8) % 2).isfinite()
result = miue_fast.generate(shapes, {TINY})
assert result.delta.any()
table = miue_fast.evaluate(shapes, result.delta, data.shapes(10, seed=1, size=16, classes=2), \
epochs=1, progress=False)
assert len(table.rows) == 3
assert cli.main(["info"]) == 0 and report.Config
"""
    done = python(code)
    assert done.returncode == 0, done.stderr


WRITING = f"""{SHAPES}
from pathlib import Path
folder = Path(sys.argv[1])
for call in (
    lambda: miue_fast.generate(shapes, out=folder / "new", {TINY}),
    lambda: data.export_pt(shapes, shapes.images * 0.0, folder / "new.pt"),
    lambda: data.export_folder(shapes, shapes.images * 0.0, folder / "new", eps=0),
    lambda: data.only_writer(folder).__enter__(),
):
    try:
        call()
    except miue_fast.BackendError as error:
        print(error)
from miue_fast import cli
out, config = folder / "new", folder / "config.json"
for words in (
    ["generate", "--data", "/no", "--out", out],
    ["export", "/no", "--data", "/no", "--to", out],
    ["report", sys.argv[2], "--out", out],
    ["demo", "--out", out],
    ["evaluate", "--data", "/no", "--poisoned", "/no", "--test", "/no", "--json", out / "a.json"],
):
    assert cli.main([str(word) for word in words]) == 2
"""


def test_what_writes_says_one_line_before_it_reads_or_writes(tmp_path):
    config = tmp_path / "config.json"
    config.write_text(
        '{"name": "a", "data": "/no", "test": "/no", '
        '"poisons": {}, "victims": {"linear": {}}, "runs": [{}]}'
    )
    (tmp_path / "out").mkdir()
    done = python(WRITING, tmp_path / "out", config)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines() + [
        line.removeprefix("miue-fast: ") for line in done.stderr.splitlines()
    ]
    assert len(lines) == 9 and all(
        "needs Linux or macOS" in line and "WSL" in line for line in lines
    ), lines
    assert not list((tmp_path / "out").iterdir())


def test_the_project_and_the_readme_name_the_systems():
    project = (ROOT / "pyproject.toml").read_text()
    assert "Operating System :: POSIX :: Linux" in project and "Windows ::" not in project
    limits = (ROOT / "README.md").read_text().partition("## Limits")[2]
    assert "Windows is not supported" in limits
