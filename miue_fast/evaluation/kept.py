"""Finished victims as files, one each, so that an interrupted evaluation goes on where it stood."""

import hashlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from .. import data
from ..data.kept import digest, pack, read_part
from ..support.messages import fail
from ..support.schema import array, number, one_of, optional, record
from ..support.version import __version__
from .victims import Run

FORMAT = 2
SHARE = number(0, 1)
CURVE = array(SHARE, 1)
RUN = {
    **{
        "seed": number(0, 2**63, whole=True),
        "train_curve": CURVE,
        "test_curve": CURVE,
        "test_classes": array(optional(SHARE)),
        "seconds": number(0, 1e12),
    },
    "dtype": one_of(["float32", "bfloat16"]),
    **{"robust": optional(SHARE), "test_poisoned": optional(SHARE), "test_unseen": optional(SHARE)},
}


class Kept:
    """The folder of the victims that one call of `evaluate` trains; without a folder nothing is
    kept.

    setting: what all of them depend on, as JSON values; tensors become their sha256.
    """

    def __init__(self, folder: str | os.PathLike[str] | None, **setting: Any):
        self.folder = None if folder is None else Path(folder)
        if self.folder is not None:
            data.check_writable(self.folder)
            versions = {
                "miue_fast": __version__,
                "torch": torch.__version__,
                "threads": torch.get_num_threads(),
                "gpu": torch.cuda.is_available(),
            }
            self.setting = _plain({"format": FORMAT, **versions, **setting})

    def run(self, images: torch.Tensor, seed: int, make: Callable[[], Run]) -> Run:
        """The Run of a victim trained on `images` with `seed`: the one that is kept, or that of
        `make()`, which is kept then.

        Errors: ValueError: a file that is not as it was written.
        """
        if self.folder is None:
            return make()
        key = {**self.setting, **_plain({"images": images, "seed": seed})}
        path = self.folder / f"{digest(key)}.json"
        if not path.exists():
            run = make()
            content = pack({"key": key, **{name: getattr(run, name) for name in RUN}})
            data.Owned(self.folder).write({path.name: lambda file: file.write(content)})
            return run
        found = read_part(path, key)
        if found is None:
            fail(
                "evaluate",
                str(path),
                "a finished victim",
                "a damaged file; remove it and run again",
            )
        record(RUN)(f"evaluate: {path}", found)
        return Run(**{name: found[name] for name in RUN})


def _plain(setting):
    return {
        name: hashlib.sha256(value.contiguous().numpy()).hexdigest()
        if isinstance(value, torch.Tensor)
        else value
        for name, value in setting.items()
    }
