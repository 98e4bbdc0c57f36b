"""Writes a poison or poisoned images as one file: .pt, .npz or pickle."""

import os
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..support.messages import describe, fail
from ..support.written import option
from .atomic import check_writable
from .dataset import Dataset
from .interop import PICKLES
from .owned import check_owned, write_owned
from .poison import ROUNDINGS, apply_poison, budget, check_delta, quantise

EXPORTS = {
    "pt": "poison.pt",
    "npz": "poisoned.npz",
    "pickle": "poison.pkl",
}  # the names in the folder of a run
SUFFIXES = {"pt": (".pt",), "npz": (".npz",), "pickle": PICKLES}


def export_pt(
    dataset: Dataset,
    delta: torch.Tensor,
    path: str | Path,
    *,
    eps: float = 1.0,
    overwrite: bool = False,
) -> None:
    """Writes `delta` as one bare float32 tensor [N, C, H, W] on the [0, 1] scale, in the order of
    the data set: the poison.pt of other tools.

    The values are clamped to +-eps and not rounded; whoever applies them rounds (this package to
    the nearest level).
    """
    check_content(dataset, delta, eps, "nearest")
    bare = (
        delta.detach().cpu().float().clone(memory_format=torch.contiguous_format).clamp_(-eps, eps)
    )
    write_owned(
        {check_file(path, "pt", eps=eps, overwrite=overwrite): lambda file: torch.save(bare, file)}
    )


def export_npz(
    dataset: Dataset,
    delta: torch.Tensor,
    path: str | Path,
    *,
    eps: float,
    rounding: str = "nearest",
    overwrite: bool = False,
) -> None:
    """Writes poisoned `images` (uint8 [N, C, H, W]), `labels`, `classes` and `names` as a
    compressed .npz that `load` reads.
    """
    check_content(dataset, delta, eps, rounding)
    content: dict[str, Any] = {
        "images": apply_poison(dataset.images, delta, eps, rounding=rounding).numpy(),
        "labels": dataset.labels.numpy(),
        "classes": np.array(dataset.classes, dtype=np.str_),
        "names": np.array(dataset.names, dtype=np.str_),
    }
    write_owned(
        {
            check_file(path, "npz", eps=eps, overwrite=overwrite): lambda file: np.savez_compressed(
                file, **content
            )
        }
    )


def export_pickle(
    dataset: Dataset,
    delta: torch.Tensor,
    path: str | Path,
    *,
    eps: float,
    layout: str = "nhwc",
    overwrite: bool = False,
) -> None:
    """Writes the perturbation as one pickled numpy int8 array, order = data-set index: levels of
    1/255, exact.

    The levels are `quantise(delta, eps)`, so delta is rounded to nearest and clamped to eps once,
    here; `load_poison` and `apply_poison` then give the same images as the other exports. eps: at
    most 127/255. layout: "nhwc" ([N, H, W, C]) or "nchw".
    path: ends in .pkl or .pickle. Protocol 4; the same input gives the same bytes (with the same
        numpy). Errors: ValueError, OSError.
    """
    check_content(dataset, delta, eps, "nearest")
    if layout not in ("nhwc", "nchw"):
        fail("export", "layout", "'nhwc' or 'nchw'", repr(layout))
    path = check_file(path, "pickle", eps=eps, overwrite=overwrite)
    levels = quantise(delta, eps).to(torch.int8)
    content = (levels.permute(0, 2, 3, 1) if layout == "nhwc" else levels).numpy()
    write_owned({path: lambda file: pickle.dump(content, file, protocol=4)})


def check_pickle(eps: float) -> None:
    """ValueError if int8 levels cannot hold this budget."""
    if budget(eps) > 127:
        fail(
            "export",
            "eps",
            (
                "at most 127/255, int8 levels (a bare perturbation needs its budget: "
                f"{option('eps', '8/255')})"
            ),
            eps,
        )


def check_content(dataset: Dataset, delta: torch.Tensor, eps: float, rounding: str) -> None:
    if not isinstance(delta, torch.Tensor) or delta.shape != dataset.images.shape:
        fail("export", "delta", f"a float tensor {list(dataset.images.shape)}", describe(delta))
    check_delta(delta)
    budget(eps)
    if rounding not in ROUNDINGS:
        fail("export", "rounding", " or ".join(map(repr, ROUNDINGS)), repr(rounding))


def check_file(path: str | Path, form: str, *, eps: float, overwrite: bool = False) -> Path:
    """Finds everything that would stop an export of `form` ("pt", "npz" or "pickle") to this file,
    before there is a perturbation.

    Returns the path. Errors: ValueError for a wrong suffix or a file that exists and may not be
    replaced; OSError for a folder that cannot be written.
    """
    path = Path(path)
    if path.suffix not in SUFFIXES[form]:
        fail("export", "path", f"a file name ending in {' or '.join(SUFFIXES[form])}", str(path))
    if form == "pickle":
        check_pickle(eps)
    check_writable(path.parent)
    if os.path.lexists(path) and not overwrite:
        fail(
            "export",
            "path",
            f"a new file (or {option('overwrite', True)})",
            f"{path}, which exists",
        )
    check_owned("export", [path])
    return path
