"""Poisoned images out: a folder of the same tree and names, poison.pt, npz, pickle."""

import os
import pickle
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from .._checks import describe, fail
from .atomic import check_writable, only_writer, sweep, write_file
from .images import UnreadableError, quiet_decoding, read_image, read_look
from .interop import PICKLES
from .poison import CHUNK, ROUNDINGS, apply_poison, budget, check_delta, quantise
from .tree import list_tree, target_names

# Pillow's save options.
LOSSLESS = {
    "png": (".png", {"format": "PNG"}),
    "webp": (".webp", {"format": "WEBP", "lossless": True}),
    "tiff": (".tiff", {"format": "TIFF"}),
    "bmp": (".bmp", {"format": "BMP"}),
}
LOSSY = {"jpeg": (".jpg", {"format": "JPEG", "quality": 100, "subsampling": 0})}
FORMATS = LOSSLESS | LOSSY


def export_folder(dataset, delta, out, *, eps, image_format="png", allow_lossy=False, rounding="nearest", overwrite=False, progress=None):
    """Writes every image of `dataset` plus its perturbation to `out`, same tree and names (suffix replaced).

    Args:
        delta: float [N, C, H, W] at the data set's size, [0, 1] scale; see `apply_poison` for eps and rounding.
        out: a new or empty folder, not inside the clean one (overwrite=True: files of the same names are replaced).
        image_format: "png", "webp" (lossless), "tiff", "bmp"; "jpeg" needs allow_lossy=True because it breaks the budget.
        progress: function of (images done, N), called after each image.

    An image whose original has another size is read again at full size, and delta is enlarged bilinearly (a convex combination, so
    it stays within eps; antialiased where it shrinks). Arrays become out/CLASS/00000017.png. Where two names would meet, both keep
    their old suffix ("a.jpg.png"). Each file appears whole or not at all. Files are 8-bit RGB of one frame, without alpha. Of the
    original's metadata the orientation (png, webp, jpeg) and an RGB colour profile (not bmp) are kept: they say how the pixels look.
    Returns the number of files. Errors: ValueError, OSError (found before the first image is written, except a full disk).
    """
    if image_format not in FORMATS:
        fail("export", "image_format", " or ".join(FORMATS), repr(image_format))
    if image_format in LOSSY and not allow_lossy:
        fail("export", "image_format", "a lossless one, or allow_lossy=True / --allow-lossy (JPEG breaks the budget)", repr(image_format))
    _check(dataset, delta, eps, rounding)
    suffix, options = FORMATS[image_format]
    targets = list(target_paths(dataset, suffix).values())
    out = _prepare(dataset, Path(out), overwrite)

    def write(job):
        row, same_size = job
        if same_size is None:
            same_size = _full_size(dataset, delta, row, eps, rounding)
        pixels = same_size[0] if len(same_size) == 1 else same_size.permute(1, 2, 0)
        image = Image.fromarray(pixels.contiguous().numpy())
        look = {} if dataset.root is None else _original(dataset, row, read_look)
        if image_format == "tiff":
            look.pop("exif", None)  # who reads it with Pillow would get other pixels
        write_file(out / targets[row], lambda file: image.save(file, **options, **look), durable=False)

    def jobs(start):
        rows = range(start, min(start + CHUNK, len(dataset)))
        small = [row for row in rows if dataset.sizes is None or dataset.sizes[row] == _size(dataset)]
        done = dict(zip(small, apply_poison(dataset.images[small], delta[small], eps, rounding=rounding)))
        return [(row, done.get(row)) for row in rows]

    count = 0
    with only_writer(out), quiet_decoding(), ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        for folder in sorted({(out / target).parent for target in targets}):
            folder.mkdir(parents=True, exist_ok=True)
            if not folder.resolve().is_relative_to(out.resolve()):
                fail("export", "out", "folders inside it", f"{folder}, a link out of it")
            sweep(folder)
        try:
            for start in range(0, len(dataset), CHUNK):
                for _ in pool.map(write, jobs(start)):
                    count += 1
                    if progress is not None:
                        progress(count, len(dataset))
        finally:
            pool.shutdown(cancel_futures=True)
    return count


def other_images(dataset, out, image_format):
    """Names of the images in `out` that an export of `dataset` in this format would not write: another export's."""
    mine = set(target_paths(dataset, FORMATS[image_format][0]).values())
    return [name for name in list_tree(out)[1] if name not in mine] if Path(out).is_dir() else []


def remove_others(dataset, out, image_format):
    """Removes `other_images`, and folders that are then empty."""
    for name in other_images(dataset, out, image_format):
        path = Path(out) / name
        path.unlink()
        for folder in path.relative_to(out).parents[:-1]:
            if not any((Path(out) / folder).iterdir()):
                (Path(out) / folder).rmdir()


def export_pt(dataset, delta, path, *, eps=1.0, overwrite=False):
    """Writes `delta` as one bare fp32 tensor [N, C, H, W], [0, 1] scale, order = data-set index: poison.pt for other tools.

    Float on [0, 1], clamped to +-eps, not rounded: whoever applies it rounds (here to nearest).
    """
    _check(dataset, delta, eps, "nearest")
    bare = delta.detach().cpu().float().clone(memory_format=torch.contiguous_format).clamp_(-eps, eps)
    write_file(_new_file(path, (".pt",), overwrite), lambda file: torch.save(bare, file))


def export_npz(dataset, delta, path, *, eps, rounding="nearest", overwrite=False):
    """Writes poisoned `images` (uint8 [N, C, H, W]), `labels`, `classes` and `names` as a compressed .npz that `load` reads."""
    _check(dataset, delta, eps, rounding)
    content = {
        "images": apply_poison(dataset.images, delta, eps, rounding=rounding).numpy(),
        "labels": dataset.labels.numpy(),
        "classes": np.array(dataset.classes, dtype=np.str_),
        "names": np.array(dataset.names, dtype=np.str_),
    }
    write_file(_new_file(path, (".npz",), overwrite), lambda file: np.savez_compressed(file, **content))


def export_pickle(dataset, delta, path, *, eps, layout="nhwc", overwrite=False):
    """Writes the perturbation as one pickled numpy int8 array, order = data-set index: levels of 1/255, exact.

    The levels are `quantise(delta, eps)`, so delta is rounded to nearest and clamped to eps once, here; `load_poison` and `apply_poison`
    then give the same images as the other exports. eps: at most 127/255. layout: "nhwc" ([N, H, W, C]) or "nchw".
    path: ends in .pkl or .pickle. Protocol 4; the same input gives the same bytes (with the same numpy). Errors: ValueError, OSError.
    """
    _check(dataset, delta, eps, "nearest")
    check_pickle(eps)
    if layout not in ("nhwc", "nchw"):
        fail("export", "layout", "'nhwc' or 'nchw'", repr(layout))
    path = _new_file(path, PICKLES, overwrite)
    levels = quantise(delta, eps).to(torch.int8)
    content = (levels.permute(0, 2, 3, 1) if layout == "nhwc" else levels).numpy()
    write_file(path, lambda file: pickle.dump(content, file, protocol=4))


def check_pickle(eps):
    """ValueError if int8 levels cannot hold this budget."""
    if budget(eps) > 127:
        fail("export", "eps", "at most 127/255, int8 levels (a bare perturbation needs its budget: --eps)", eps)


def _check(dataset, delta, eps, rounding):
    if not isinstance(delta, torch.Tensor) or delta.shape != dataset.images.shape:
        fail("export", "delta", f"a float tensor {list(dataset.images.shape)}", describe(delta))
    check_delta(delta)
    budget(eps)
    if rounding not in ROUNDINGS:
        fail("export", "rounding", " or ".join(map(repr, ROUNDINGS)), repr(rounding))


def _new_file(path, suffixes, overwrite):
    path = Path(path)
    if path.suffix not in suffixes:
        fail("export", "path", f"a file name ending in {' or '.join(suffixes)}", str(path))
    check_writable(path.parent)
    if path.exists() and not overwrite:
        fail("export", "path", "a new file (or overwrite=True)", f"{path}, which exists")
    return path


def _prepare(dataset, out, overwrite):
    if dataset.root is not None:
        real, clean = Path(os.path.realpath(out)), Path(os.path.realpath(dataset.root))
        if real.is_relative_to(clean) or clean.is_relative_to(real):
            fail("export", "out", f"a folder apart from the clean one, {clean}", str(real))
    if out.is_dir() and any(out.iterdir()) and not overwrite:
        fail("export", "out", "a new or empty folder (or overwrite=True)", f"{out}, which is not empty")
    return check_writable(out)


def _size(dataset):
    return dataset.images.shape[3], dataset.images.shape[2]


def _original(dataset, row, read):
    path = dataset.root / dataset.names[row]
    try:
        return read(path)
    except UnreadableError as error:
        raise ValueError(f"export: {path}: expected the image that was loaded, got: {error}") from error


def _full_size(dataset, delta, row, eps, rounding):
    image = _original(dataset, row, read_image)
    if image.size != tuple(dataset.sizes[row]):
        fail("export", str(dataset.root / dataset.names[row]), f"the {dataset.sizes[row]} image that was loaded", image.size)
    clean = torch.from_numpy(np.array(image)).permute(2, 0, 1)
    wide = F.interpolate(delta[row : row + 1].cpu().float(), clean.shape[1:], mode="bilinear", align_corners=False, antialias=True)
    return apply_poison(clean[None], wide.clamp_(-eps, eps), eps, rounding=rounding)[0]


def tree_paths(dataset):
    """Where each image stands in a folder: its name, below its class for arrays. ValueError: a name that would leave the folder."""
    paths = [name if "/" in name else f"{dataset.classes[label]}/{name}" for name, label in zip(dataset.names, dataset.labels.tolist())]
    for path in paths:
        if any(part in ("", ".", "..") or "\0" in part for part in path.split("/")):
            fail("export", "names", "relative paths without empty, '.' and '..' parts", repr(path))
    for label in dataset.classes:
        if dataset.root is None and "/" in label:
            fail("export", "classes", "names without '/'", repr(label))
    if len(set(paths)) != len(paths):
        fail("export", "names", "a different path for each image", "two images with the same")
    return paths


def target_paths(dataset, suffix):
    """{path: path after an export with `suffix`} in the data set's order."""
    return target_names(tree_paths(dataset), [name for name, _ in dataset.unreadable], suffix)
