"""The output folder of a run: what is opened, what a run may replace there, and what it removes."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from .. import data as datasets
from ..data import atomic
from ..support import messages
from ..support.written import option
from . import checkpoint
from .options import Options

METRICS = "metrics.csv"


def open_folder(folder: Path, resume: bool, overwrite: bool, options: Options) -> Path:
    """The checkpoint's path in a folder that can be written. Refuses to replace anything unless
    asked, and what others wrote anyway.

    A run goes on from its checkpoint; an objective without a network has none, and makes the same
    poison again. Errors: ValueError, OSError.
    """
    atomic.sweep(folder)
    path = folder / checkpoint.NAME
    if path.is_dir():
        messages.fail("generate", "out", "no folder under the name of the checkpoint", str(path))
    # A checkpoint that a run goes on from proves itself when it is read.
    mine = [checkpoint.NAME] if overwrite else []
    files = datasets.Owned(folder)
    files.check("generate", [*mine, *datasets.POISON_FILES, METRICS])
    for part in [files, datasets.Owned(folder / datasets.IMAGES)] if overwrite else [files]:
        part.check_access("generate")
    if overwrite or (resume and _goes_on(folder, path, options)):
        return path
    for name in (checkpoint.NAME, *datasets.POISON_FILES, METRICS):
        if (folder / name).exists():
            told = (
                f"expected an empty folder or a run to resume, got {folder / name}; "
                f"set {option('overwrite', True)} to replace it"
            )
            raise ValueError(f"generate: out: {told}")
    return path


def _goes_on(folder, path, options):
    """Whether what lies in `folder` is of a run that these options go on with."""
    if options.chosen.outputs is not None:
        return path.exists()
    if path.exists():
        return False
    try:
        manifest = datasets.load_poison(folder)[1]
    except ValueError:  # none, or someone else's
        return False
    return manifest is not None and manifest["options"] == options.as_dict()


def of_another_run(folder: Path, header: dict[str, Any]) -> bool:
    """Whether the manifest in `folder` is that of other options or images than a checkpoint's."""
    if not (folder / datasets.POISON_FILES[1]).exists():
        return False
    try:
        found = datasets.read_manifest(folder / datasets.POISON_FILES[1])
    except ValueError:  # not ours to remove
        return False
    return (found["options"], found["fingerprint"]) != (header["options"], header["fingerprint"])


def remove_run(folder: Path, but: Iterable[str] = ()) -> None:
    """Removes what an earlier run left in `folder` and what it exported there, but for the files of
    the names `but`.

    What other commands wrote into the same folder (reports and their cells, evaluations, exports
    under names of the user's own) stays. The manifest goes last: it tells a run that was killed
    here whose files are left.
    """
    images = folder / datasets.IMAGES
    datasets.Owned(images).remove(datasets.exported_files(images))
    run = (checkpoint.NAME, METRICS, *datasets.EXPORTS.values(), *datasets.POISON_FILES)
    datasets.Owned(folder).remove(name for name in run if name not in but)
