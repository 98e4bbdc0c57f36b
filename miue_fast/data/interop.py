"""Perturbations in the pickles of other tools."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from ..support.messages import describe, fail
from . import inert
from .files import read_bytes
from .images import one_line

PICKLES = (".pkl", ".pickle")
CHANNELS = (1, 3)


def channels_first(delta: torch.Tensor) -> torch.Tensor:
    """Turns [N, H, W, C] into [N, C, H, W] where that is unambiguous: the last side is 1 or 3 and
    the second one is not. Anything else comes back unchanged.
    """
    last = (
        isinstance(delta, torch.Tensor)
        and delta.dim() == 4
        and delta.shape[3] in CHANNELS
        and delta.shape[1] not in CHANNELS
    )
    return delta.permute(0, 3, 1, 2) if last else delta


def read_pickle(path: str | Path, names: Sequence[str] | None = None) -> torch.Tensor:
    """The perturbations of a .pkl or .pickle file as a float tensor [N, C, H, W] on the [0, 1]
    scale.

    The file holds one numpy array of four sides, or a list, tuple or dict of arrays of three: one
    per image (or class). Keys are 0 to N - 1, or image names, which are put in the order of
    `names`. Integers (int8 to int64, values within int8) are levels of 1/255, exact: level / 255.
    Floats (16 to 64 bits) are on [0, 1] and rounded to nearest at application.
    Nothing in the file is run (see `inert`); sizes are checked before memory is taken: at most 1
    GiB of file, arrays that share bytes are refused. ValueError, one line: what was refused, object
    or unsigned values, levels out of range, unequal or ambiguous shapes."""
    path = Path(path)
    try:
        raw = read_bytes(path, inert.MAX_BYTES)
        values = _stacked(inert.loads(raw), names, len(raw))
    except (OSError, *inert.ERRORS) as error:
        fail("poison", str(path), "a pickle of plain numpy arrays", one_line(error))
    del raw
    delta = torch.from_numpy(values)
    if (delta.shape[1] in CHANNELS) == (delta.shape[3] in CHANNELS):
        fail(
            "poison",
            str(path),
            "[N, C, H, W] or [N, H, W, C], C = 1 or 3, and no doubt which",
            describe(delta),
        )
    delta = channels_first(delta)
    if delta.is_floating_point():
        return delta
    if delta.min() < -128 or delta.max() > 127:
        fail(
            "poison",
            str(path),
            "levels of 1/255 within int8",
            f"values from {int(delta.min())} to {int(delta.max())}",
        )
    return delta.float().div_(255)


def _stacked(content, names, size):
    """One native, writable array of four sides."""
    if isinstance(content, inert.Array):
        arrays = [content]
    else:
        arrays = _in_order(content, names)
    if not arrays or not all(isinstance(array, inert.Array) for array in arrays):
        raise ValueError(
            f"a {type(content).__name__} that is not one array or a list, tuple or dict of arrays"
        )
    arrays = [array.numpy() for array in arrays]
    if sum(array.nbytes for array in arrays) > size:
        raise ValueError("arrays that share their bytes")
    kinds = {(str(array.dtype), array.shape) for array in arrays}
    if len(kinds) != 1:
        raise ValueError(
            "arrays of different types or shapes "
            f"({' and '.join(f'{t} {list(s)}' for t, s in sorted(kinds)[:2])})"
        )
    whole = arrays[0] if isinstance(content, inert.Array) else np.stack(arrays)
    if whole.ndim != 4 or whole.dtype.kind == "u":
        raise ValueError(
            f"{whole.dtype} {list(whole.shape)}, not signed or float [N, C, H, W] or [N, H, W, C]"
        )
    return whole.astype(whole.dtype.newbyteorder("="))


def _in_order(content, names):
    if isinstance(content, (list, tuple)):
        return list(content)
    if not isinstance(content, dict):
        return []
    kinds = {type(key) for key in content}
    wanted = list(range(len(content))) if kinds == {int} else names
    if wanted is None or len(kinds) != 1:
        raise ValueError("a dict whose keys are not 0 to N - 1 (image names need the data set)")
    if set(wanted) != set(content):
        missing = min(map(str, set(wanted) ^ set(content)))
        raise ValueError(
            f"a dict of {len(content)} keys where {len(wanted)} were expected, "
            f"differing in {missing[:80]!r}"
        )
    return [content[key] for key in wanted]
