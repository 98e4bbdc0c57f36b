"""`miue-fast` as a function, for the tests of what it does."""

from miue_fast.cli import commands

TINY = [
    *("--model", "small_resnet", "--width", "4", "--epochs", "1"),
    *("--steps", "2", "--batch", "30", "--quiet"),
]


def run(*words):
    return commands.main([str(word) for word in words])


def complaint(capsys):
    """The one line on stderr."""
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and lines[0].startswith("miue-fast: ") and "Traceback" not in lines[0], (
        lines
    )
    return lines[0]


def files(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
