"""Applies a poison to 8-bit images, and reads and writes its files."""

import hashlib
import json
import math
import platform
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch

from ..support import ranges
from ..support.messages import describe, fail, printable
from . import inert
from .archive import read_arrays
from .atomic import check_writable
from .dataset import Dataset
from .files import ARCHIVE_ERRORS, open_regular, parse_json, read_bytes
from .images import one_line
from .interop import PICKLES, channels_first, read_pickle
from .owned import Owned
from .torchfile import NotDenseError, read_torch

FORMAT = "miue_fast poison 1"
TENSOR_FILE, MANIFEST_FILE = "poison.safetensors", "manifest.json"
STORES = {torch.float32: "float32", torch.float16: "float16", torch.int8: "int8"}
POISON_FILES = (TENSOR_FILE, MANIFEST_FILE)
KINDS = {
    "store": str,
    "shape": list,
    "eps": (int, float),
    "fingerprint": str,
    "classes": list,
    "names_sha256": str,
    "options": dict,
    "versions": dict,
    "files": dict,
}
TEXTS = ("classes", "versions", "files")  # lists and dicts of nothing but text
MAX_MANIFEST = 1 << 24  # bytes
ROUNDINGS = ("nearest", "truncate")
BARE = (".pt", ".pth", ".npz", *PICKLES)
FILES = "a poison folder, .safetensors, .pt, .pth, .npz, .pkl or .pickle file"
CHUNK = 4096  # images at a time: bounds the temporaries
PT_ERRORS = (*ARCHIVE_ERRORS, *inert.ERRORS)
MAX_STORE = 1 << 40  # bytes of a poison that is read without its data set


def budget(eps: float) -> int:
    """Turns eps on the [0, 1] scale into pixel levels of 1/255, rounded down (8/255 gives 8)."""
    ranges.budget("poison", "eps", eps, zero=True)
    return int(eps * 255 + 1e-4)


def check_delta(delta: torch.Tensor) -> None:
    if (
        not isinstance(delta, torch.Tensor)
        or delta.dim() != 4
        or delta.dtype not in (torch.float32, torch.float16, torch.float64)
    ):
        fail("poison", "delta", "a float tensor [N, C, H, W]", describe(delta))
    if len(delta) and not (delta.min() >= -1 and delta.max() <= 1):
        found = f"values from {float(delta.min())} to {float(delta.max())}"
        fail("poison", "delta", "finite values in [-1, 1] ([0, 1] image scale)", found)


def quantise(delta: torch.Tensor, eps: float) -> torch.Tensor:
    """Rounds 255 * delta half to even and clamps it to the budget: int16 pixel levels of 1/255, [N,
    C, H, W], never more than eps.
    """
    check_delta(delta)
    levels = budget(eps)
    result = torch.empty(delta.shape, dtype=torch.int16)
    for start in range(0, len(delta), CHUNK):
        part = delta[start : start + CHUNK].cpu().float()
        result[start : start + CHUNK] = (part * 255).round_().clamp_(-levels, levels)
    return result


def apply_poison(
    images: torch.Tensor, delta: torch.Tensor, eps: float, *, rounding: str = "nearest"
) -> torch.Tensor:
    """Poisoned 8-bit images, uint8 [N, C, H, W], on the CPU.

    "nearest": y = clamp(x + q, 0, 255), q = `quantise(delta, eps)`: |y - x| <= 255 * eps holds
    exactly. "truncate": floor(255 * clamp(x / 255 + delta, 0, 1)) in fp32, as existing scripts do;
    it shifts the mean by half a level and can exceed the budget by one. For comparison only.
    """
    if (
        not isinstance(images, torch.Tensor)
        or images.dtype != torch.uint8
        or images.shape != delta.shape
    ):
        fail("poison", "images", f"a uint8 tensor {list(delta.shape)}", describe(images))
    if rounding not in ROUNDINGS:
        fail("poison", "rounding", " or ".join(map(repr, ROUNDINGS)), repr(rounding))
    check_delta(delta)
    result = torch.empty(images.shape, dtype=torch.uint8)
    for start in range(0, len(images), CHUNK):
        part = slice(start, start + CHUNK)
        x = images[part].cpu()
        if rounding == "nearest":
            result[part] = (x.to(torch.int16) + quantise(delta[part], eps)).clamp_(0, 255)
        else:
            result[part] = (
                (x.float() / 255 + delta[part].cpu().float().clamp(-eps, eps)).clamp_(0, 1) * 255
            ).floor_()
    return result


def random_noise(dataset: Dataset, eps: float, seed: int, kind: str = "uniform") -> torch.Tensor:
    """Noise of the same budget that does not depend on the class, float32 in the shape of the
    images: "uniform" in [-eps, eps], or "sign", which is -eps or +eps for each value.
    """
    budget(eps)
    generator = torch.Generator().manual_seed(seed)
    if kind == "uniform":
        return (
            torch.rand(dataset.images.shape, generator=generator, dtype=torch.float32)
            .mul_(2 * eps)
            .sub_(eps)
            .clamp_(-eps, eps)
        )
    if kind == "sign":
        return (
            torch.randint(0, 2, dataset.images.shape, generator=generator)
            .float()
            .mul_(2)
            .sub_(1)
            .mul_(eps)
        )
    fail("random_noise", "kind", "'uniform' or 'sign'", repr(kind))


# the store on disk


def save_poison(
    folder: str | Path, delta: torch.Tensor, dataset: Dataset, options: Mapping[str, Any]
) -> None:
    """Writes poison.safetensors (the tensor `delta`) and manifest.json into `folder` as one step:
    after any failure the old pair is still there.

    Args:
        delta: [N, C, H, W] in float32, float16, or int8 levels of eps / 127.
        options: JSON values by name, `eps` among them.

    Files of these names that this package did not write, or that were changed since, are refused
    (`Owned`). The same input gives the same bytes. Errors: ValueError, OSError (one line).
    """
    if (
        not isinstance(delta, torch.Tensor)
        or delta.dtype not in STORES
        or delta.shape != dataset.images.shape
    ):
        fail(
            "poison",
            "delta",
            f"float32, float16 or int8 levels {list(dataset.images.shape)}",
            describe(delta),
        )
    ranges.budget("poison", "eps", options.get("eps"), zero=True)
    folder = check_writable(Path(folder))
    delta = delta.detach().cpu().contiguous()
    check_delta(_values(delta, options["eps"]))
    content = safetensors.torch.save({"delta": delta})
    manifest = {
        "format": FORMAT,
        "store": STORES[delta.dtype],
        "shape": list(delta.shape),
        "eps": options["eps"],
        "fingerprint": dataset.fingerprint,
        "classes": dataset.classes,
        "names_sha256": hashlib.sha256("\0".join(dataset.names).encode()).hexdigest(),
        "options": options,
        "versions": {
            "miue_fast": _version(),
            "torch": torch.__version__,
            "python": platform.python_version(),
        },
        "files": {TENSOR_FILE: hashlib.sha256(content).hexdigest()},
    }
    text = _manifest_text(manifest)
    Owned(folder).write(
        {
            TENSOR_FILE: lambda file: file.write(content),
            MANIFEST_FILE: lambda file: file.write(text),
        }
    )


def _version():
    from ..support.version import __version__

    return __version__


def _manifest_text(manifest):
    """The manifest as JSON whose last key is the sha256 of the rest. Reading demands exactly these
    bytes, so any changed bit is found.
    """
    body = {key: value for key, value in manifest.items() if key != "manifest_sha256"}
    digest = hashlib.sha256(json.dumps(body, default=str, allow_nan=False).encode()).hexdigest()
    return (
        json.dumps({**body, "manifest_sha256": digest}, indent=1, default=str, allow_nan=False)
        + "\n"
    ).encode()


def read_manifest(path: str | Path) -> dict[str, Any]:
    """The content of a manifest.json as it was written. ValueError of one line if it is not."""
    try:
        text = read_bytes(path, MAX_MANIFEST)
        manifest = parse_json(text)
        if not isinstance(manifest, dict) or _manifest_text(manifest) != text:
            raise ValueError("its checksum does not fit")
        if manifest.get("format") != FORMAT:
            raise ValueError(f"format {manifest.get('format')!r}")
        for key, kind in KINDS.items():
            value = manifest.get(key)
            if not isinstance(value, kind) or isinstance(value, bool):
                raise ValueError(f"{key} is {printable(repr(value), most=60)}")
        for key in TEXTS:
            if not all(
                isinstance(value, str)
                for value in (manifest[key].values() if key != "classes" else manifest[key])
            ):
                raise ValueError(f"{key} is no list of texts")
        if len(manifest["shape"]) != 4 or not all(
            type(side) is int and side >= 0 for side in manifest["shape"]
        ):
            raise ValueError("shape is no list of four sizes")
        budget(manifest["eps"])
        return manifest
    except (OSError, ValueError, RecursionError) as error:
        fail("poison", str(path), f"an undamaged {FORMAT!r} manifest", one_line(error))


ROOM = 1 << 24  # bytes of a file beside its values
SAFETENSORS_ERRORS = (
    safetensors.SafetensorError,
    LookupError,
    ValueError,
    TypeError,
    AssertionError,
    RuntimeError,
)


def room_for(dataset: Dataset) -> int:
    """The largest number of bytes that a poison of these images can take: float64, and what is
    written around it.
    """
    return ROOM + 8 * dataset.images.numel()


def load_poison(
    path: str | Path, dataset: Dataset | None = None
) -> tuple[torch.Tensor, dict[str, Any] | None]:
    """Reads perturbations.

    Args:
        path: the folder of `save_poison` or its poison.safetensors; poison.pt or perturbation.pt
            (one bare float tensor, read as plain data, see `torchfile`) or an .npz file with
            `delta`, whose floats on the [0, 1] scale are rounded to the nearest level when they are
            applied; or a .pkl or .pickle file as `read_pickle` takes it, whose integers are levels
            of 1/255 and exact. Channels may come last where that is unambiguous (the last side is 1
            or 3, the second one is not).
        dataset: the images that the poison is for. Bare files may then hold [classes, C, H, W],
            which is expanded by label.

    The sha256 of both files of a store (of .pt and .npz the zip checksums), format, shape and range
    are checked, and with `dataset` also the fingerprint (which bare files do not carry) and the
    size: no more is read than a poison of these images can take. The result is a copy, which
    nothing that happens to the file later can change.

    Returns (delta, manifest): float32 [N, C, H, W], and None where there is no manifest.
    ValueError: one line that says which check failed.
    """
    path = Path(path)
    if path.is_dir():
        path = path / TENSOR_FILE
    if not path.exists():
        fail("poison", "path", FILES, f"{path} (no such file)")
    suffix = path.suffix.lower()
    if suffix == ".safetensors":
        return _load_store(path, dataset)
    if suffix in BARE:
        names = None if dataset is None else dataset.names
        delta = (
            read_pickle(path, names)
            if suffix in PICKLES
            else channels_first(_load_bare(path, dataset))
        )
        check_delta(delta)
        delta = delta.detach().float().contiguous()
        return (delta if dataset is None else _expand(delta, dataset)), None
    fail("poison", "path", FILES, str(path))


def is_poison(path: str | Path) -> bool:
    """Whether a file or folder holds perturbations, as `load_poison` reads them, and not images. A
    damaged archive does not count.
    """
    path = Path(path)
    suffix = path.suffix.lower()
    if suffix == ".npz":
        try:
            with open_regular(path) as file, zipfile.ZipFile(file) as archive:
                return "delta.npy" in archive.namelist()
        except ARCHIVE_ERRORS:
            return False
    return suffix in (".safetensors", *BARE) or (path / TENSOR_FILE).is_file()


def _load_store(path, dataset):
    manifest = read_manifest(path.with_name(MANIFEST_FILE))
    most = ROOM + 4 * math.prod(manifest["shape"]) if dataset is None else room_for(dataset)
    try:
        content = read_bytes(path, most)
    except OSError as error:
        fail("poison", str(path), f"a safetensors file of {manifest['shape']}", one_line(error))
    if hashlib.sha256(content).hexdigest() != manifest["files"].get(path.name):
        fail(
            "poison",
            str(path),
            "the file its manifest describes (sha256)",
            "a damaged file, or one of another run",
        )
    if dataset is not None and manifest["fingerprint"] != dataset.fingerprint:
        fail(
            "poison",
            str(path),
            "a poison made for this data set (fingerprint)",
            "one made for other images, labels or size",
        )
    try:
        delta = safetensors.torch.load(content)["delta"]
    except SAFETENSORS_ERRORS as error:
        fail("poison", str(path), "a safetensors file with 'delta'", one_line(error))
    del content
    if list(delta.shape) != manifest["shape"] or STORES.get(delta.dtype) != manifest["store"]:
        fail("poison", str(path), f"{manifest['store']} {manifest['shape']}", describe(delta))
    delta = _values(delta, manifest["eps"])
    check_delta(delta)
    return delta, manifest


def _values(delta, eps):
    """A stored delta as float32; int8 values are levels of eps / 127."""
    return delta.float() * (eps / 127) if delta.dtype == torch.int8 else delta.float()


def _load_bare(path, dataset=None):
    most = None if dataset is None else room_for(dataset)
    try:
        if path.suffix.lower() == ".npz":
            return torch.from_numpy(read_arrays(path, ("delta",), most)["delta"])
        return read_torch(path, MAX_STORE if most is None else most)
    except NotDenseError as error:
        fail(
            "poison", str(path), "a dense tensor with memory of its own for every value", str(error)
        )
    except PT_ERRORS as error:
        fail(
            "poison", str(path), "one bare tensor", f"a damaged or foreign file ({one_line(error)})"
        )


def _expand(delta, dataset):
    if delta.shape == dataset.images.shape:
        return delta
    if delta.shape == (len(dataset.classes), *dataset.images.shape[1:]):
        return delta[dataset.labels]
    wanted = (
        f"{list(dataset.images.shape)} or class-wise "
        f"{[len(dataset.classes), *dataset.images.shape[1:]]}"
    )
    fail("poison", "delta", wanted, describe(delta))
