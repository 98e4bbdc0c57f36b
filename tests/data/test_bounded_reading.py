"""Files of at most 1 MB that would take seconds or gigabytes, and things that are no files: each is
one line, soon, in little memory.
"""

import hashlib
import io
import json
import os
import pickle
import socket
import struct
import subprocess
import sys
import threading
import zipfile
import zlib

import numpy as np
import pytest
import torch
from PIL import Image

from miue_fast import data
from miue_fast.data import files, inert
from miue_fast.data.torchfile import read_torch
from miue_fast.evaluation.start import read_state
from miue_fast.generation import checkpoint

SECONDS, MEGABYTES = (
    2,
    200,
)  # of the processor, and above what the process had; the files have at most one megabyte
HASH = 2**61 - 1  # integers that differ by multiples of it hash alike


def zeros(count, level=9):
    """zlib's form of so many zeros."""
    machine = zlib.compressobj(level)
    return (
        b"".join(
            machine.compress(bytes(min(1 << 22, count - done))) for done in range(0, count, 1 << 22)
        )
        + machine.flush()
    )


# pickles


def colliding(count=20_000):
    return [((k + 1) * HASH).to_bytes(12, "little") for k in range(count)]


def hostile_pickles():
    """name -> pickle that is nothing when it is read, or takes the machine."""
    keys = b"".join(b"\x8a\x0c" + key + b"N" for key in colliding())
    yield "keys that collide", b"\x80\x02}(" + keys + b"u."
    yield (
        "keys that collide one by one",
        b"\x80\x02}" + b"".join(b"\x8a\x0c" + key + b"Ns" for key in colliding()) + b".",
    )
    yield "keys that collide in DICT", b"\x80\x02(" + keys + b"d."
    yield (
        "memo indices that collide",
        b"I1\n" + b"".join(b"p%d\n" % ((k + 1) * HASH) for k in range(30_000)) + b".",
    )
    yield (
        "negative memo indices that collide",
        b"I1\n" + b"".join(b"p-%d\n" % ((k + 1) * HASH) for k in range(30_000)) + b".",
    )
    for name, code in {
        "lists": b"]",
        "dicts": b"}",
        "marks": b"(",
        "nested tuples": b"\x85",
        "nothing": b"N0",
    }.items():
        yield f"a million opcodes, {name}", b")" + code * ((1 << 20) // len(code) - 9) + b"."
    yield "an integer of 900,000 digits", b"I" + b"9" * 900_000 + b"\n."
    yield (
        "one list a thousand times in each of a thousand",
        b"]q\x00" + (b"(" + b"h\x00" * 900 + b"l") * 500 + b".",
    )


def torch_zip(pickled, storages=(), compression=zipfile.ZIP_STORED):
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", compression) as archive:
        archive.writestr("a/data.pkl", pickled)
        archive.writestr("a/version", "3\n")
        archive.writestr("a/byteorder", "little")
        for key, content in storages:
            archive.writestr(f"a/data/{key}", content)
    return stream.getvalue()


def tensor(count, shape, stride, kind="Float", key="0"):
    """The pickle of a tensor, as torch.save writes it; its storage claims `count` values."""
    sides = [
        b"(" + b"".join(b"J" + struct.pack("<i", n) for n in numbers) + b"t"
        for numbers in (shape, stride)
    ]
    identity = (
        b"(X\x07\0\0\0storagectorch\n"
        + kind.encode()
        + b"Storage\nX\x01\0\0\0"
        + key.encode()
        + b"X\x03\0\0\0cpu"
    )
    return (
        b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n(("
        + identity[1:]
        + b"\x8a\x08"
        + struct.pack("<q", count)
        + b"tQK\0"
        + sides[0]
        + sides[1]
        + b"\x89ccollections\nOrderedDict\n)RtR."
    )


def old_header(content):
    """A file of torch.save before PyTorch 1.6, up to its content."""
    return (
        b"".join(
            pickle.dumps(value, 2)
            for value in (0x1950A86A20F9469CFC6C, 1001, {"little_endian": True})
        )
        + content
    )


def hostile_pt():
    for name, content in hostile_pickles():
        yield f"zip: {name}", torch_zip(content)
        yield f"old: {name}", old_header(content)
    bomb = b"\x80\x02c__builtin__\nbytearray\n\x8a\x05" + (10**10).to_bytes(5, "little") + b"\x85R."
    yield "zip: a bytearray of ten gigabytes", torch_zip(bomb)
    yield "old: a bytearray of ten gigabytes", old_header(bomb)
    claims = tensor(10**9, [1000, 3, 500, 500], [750_000, 250_000, 500, 1])
    yield "zip: a storage of four gigabytes that is not there", torch_zip(claims, [("0", b"1234")])
    yield "old: a storage of four gigabytes that is not there", old_header(claims)
    packed = tensor(10**7, [10, 1, 1000, 1000], [10**6, 10**6, 1000, 1])
    yield (
        "zip: compressed zeros",
        torch_zip(packed, [("0", bytes(4 * 10**7))], zipfile.ZIP_DEFLATED),
    )
    yield "zip: expanded", torch_zip(tensor(1, [9000, 3, 300, 300], [0, 0, 0, 0]), [("0", b"1234")])


# archives


def npy(dtype, shape):
    header = f"{{'descr': '{dtype}', 'fortran_order': False, 'shape': {shape}, }}".ljust(117) + "\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header.encode()


def packed(members, method=zipfile.ZIP_DEFLATED):
    """An archive of {name: (dtype, shape)}, all zeros."""
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", method) as archive:
        for name, (dtype, shape) in members.items():
            with archive.open(f"{name}.npy", "w", force_zip64=True) as file:
                file.write(npy(dtype, shape))
                left = int(np.prod(shape)) * np.dtype(dtype).itemsize
                while left > 0:
                    file.write(bytes(min(left, 1 << 22)))
                    left -= 1 << 22
    return stream.getvalue()


def hostile_npz():
    """Mostly zeros, a thousand times the file."""
    yield "images", packed({"images": ("|u1", (100_000, 3, 16, 16)), "labels": ("<i8", (100_000,))})
    yield "floats", packed({"images": ("<f8", (2_000, 3, 32, 32)), "labels": ("<i8", (2_000,))})
    yield (
        "just too large",
        packed({"images": ("|u1", (14_000, 3, 32, 32)), "labels": ("<i8", (14_000,))}),
    )
    yield (
        "many tiny images",
        packed({"images": ("|u1", (3_000_000, 1, 1, 1)), "labels": ("<i8", (3_000_000,))}),
    )
    yield (
        "long names",
        packed(
            {"images": ("|u1", (4, 3, 4, 4)), "labels": ("<i8", (4,)), "names": ("<U5000000", (4,))}
        ),
    )
    yield (
        "many names",
        packed(
            {
                "images": ("|u1", (4, 3, 4, 4)),
                "labels": ("<i8", (4,)),
                "names": ("<U1", (20_000_000,)),
            }
        ),
    )
    yield (
        "many classes",
        packed(
            {
                "images": ("|u1", (4, 3, 4, 4)),
                "labels": ("<i8", (4,)),
                "classes": ("<U1", (6_000_000,)),
            }
        ),
    )
    yield (
        "bzip2",
        packed(
            {"images": ("|u1", (1_000, 3, 64, 64)), "labels": ("<i8", (1_000,))}, zipfile.ZIP_BZIP2
        ),
    )
    yield (
        "lzma",
        packed(
            {"images": ("|u1", (1_000, 3, 64, 64)), "labels": ("<i8", (1_000,))}, zipfile.ZIP_LZMA
        ),
    )
    yield "a nested header", wrapped(b"\x93NUMPY\x01\x00" + struct.pack("<H", 9000) + b"(" * 9000)
    yield (
        "a header of megabytes",
        wrapped(b"\x93NUMPY\x02\x00" + struct.pack("<I", 900_000) + b"[" * 900_000),
    )
    yield "nothing, a thousand million million times", wrapped(npy("<U0", (10**15,)))
    yield "twenty thousand members", many_members()


def wrapped(content):
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", zipfile.ZIP_DEFLATED) as archive:
        for name in ("images", "labels", "delta"):
            archive.writestr(f"{name}.npy", content)
    return stream.getvalue()


def many_members():
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        for k in range(9_000):
            archive.writestr(f"{k}.npy", b"")
    return stream.getvalue()


# images


def chunk(kind, content):
    return (
        struct.pack(">I", len(content))
        + kind
        + content
        + struct.pack(">I", zlib.crc32(kind + content))
    )


def bmp(width, height, compression, bits, content):
    palette = bytes(4 << bits)
    start = 54 + len(palette)
    head = b"BM" + struct.pack("<IHHI", start + len(content), 0, 0, start)
    return (
        head
        + struct.pack(
            "<IiiHHIIiiII",
            40,
            width,
            height,
            1,
            bits,
            compression,
            len(content),
            0,
            0,
            1 << bits,
            0,
        )
        + palette
        + content
    )


def blank(form, side=9_459, mode="RGB", **options):
    stream = io.BytesIO()
    Image.new(mode, (side, side)).save(stream, form, **options)
    return stream.getvalue()


def hostile_images():
    side = 9_459  # squared: just below Pillow's limit
    ihdr = chunk(b"IHDR", struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0))
    yield (
        "blank.png",
        b"\x89PNG\r\n\x1a\n"
        + ihdr
        + chunk(b"IDAT", zeros((3 * side + 1) * side))
        + chunk(b"IEND", b""),
    )
    yield "blank.webp", blank("WEBP", lossless=True)
    yield "blank.gif", blank("GIF", mode="P")
    yield "blank.tif", blank("TIFF", compression="tiff_deflate")
    yield "fax.tif", blank("TIFF", mode="1", compression="group4")
    yield "one_line.bmp", bmp(side * side - 10, 1, 1, 8, b"\0\2\1\0" + b"\0\0\0\1")
    yield "runs.bmp", bmp(5000, 5000, 2, 4, (b"\xff\x11" * 19 + b"\x9b\x11\0\0") * 5000)
    yield "small_runs.bmp", bmp(3000, 3000, 2, 4, (b"\xff\x11" * 11 + b"\xc3\x11\0\0") * 3000)
    whole = blank("JPEG", 3000, "L", progressive=True)
    scan = whole[whole.rindex(b"\xff\xda") : -2]
    yield "scans.jpg", whole[:-2] + scan * 10_000 + b"\xff\xd9"
    parts = blank("JPEG", 3000, "L", progressive=True)[:-2] + scan * 10_000 + b"\xff\xd9"
    yield "scans.tif", jpeg_tiff(parts, 3000)


def jpeg_tiff(content, side):
    """A gray TIFF of one strip in JPEG."""
    tags = {
        256: side,
        257: side,
        258: 8,
        259: 7,
        262: 1,
        273: 8,
        277: 1,
        278: side,
        279: len(content),
    }
    start = 8 + len(content) + len(content) % 2
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags.items())
    head = b"II*\0" + struct.pack("<I", start)
    return (
        head + content + bytes(len(content) % 2) + struct.pack("<H", len(tags)) + entries + bytes(4)
    )


# stores, checkpoints


def safetensors_header(text):
    return struct.pack("<Q", len(text)) + text


def hostile_safetensors():
    many = ",".join(
        f'"{k}":{{"dtype":"F32","shape":[0],"data_offsets":[0,0]}}' for k in range(15_000)
    )
    yield "many empty tensors", safetensors_header(f"{{{many}}}".encode())
    yield "nested", safetensors_header(b'{"a":' + b"[" * 900_000 + b"]" * 90_000 + b"}")
    yield "a long header that is not there", struct.pack("<Q", 2**63) + b"{}"
    yield (
        "overflowing sides",
        safetensors_header(
            b'{"delta":{"dtype":"F32","shape":[0,1000000000000000000],"data_offsets":[0,0]}}'
        ),
    )
    yield (
        "a type without a name",
        safetensors_header(b'{"delta":{"dtype":"F99","shape":[1],"data_offsets":[0,4]}}1234'),
    )


def manifest(**changes):
    body = {
        "format": "miue_fast poison 1",
        "store": "float32",
        "shape": [4, 3, 4, 4],
        "eps": 8 / 255,
        "fingerprint": "0" * 64,
        "classes": ["a", "b"],
        "names_sha256": "0" * 64,
        "options": {"eps": 8 / 255},
        "versions": {"torch": "2"},
        "files": {"poison.safetensors": "0" * 64},
        **changes,
    }
    return sealed(body)


def sealed(body):
    """A manifest that carries its right checksum, whatever it says."""
    digest = hashlib.sha256(json.dumps(body).encode()).hexdigest()
    return (json.dumps({**body, "manifest_sha256": digest}, indent=1) + "\n").encode()


CHILD = """
import json, resource, sys, time
from pathlib import Path
from miue_fast import data
from miue_fast.data import files
from miue_fast.evaluation.start import read_state
from miue_fast.generation import checkpoint
READ = {"poison": data.load_poison, "data": data.load, "small": lambda p: data.load(p, size=8),
        "cifar": lambda p: data.load(p, split="test"),
        "init": read_state, "checkpoint": checkpoint.load, "epoch": checkpoint.saved_epoch, \
"kind": data.is_poison}
def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
jobs = json.loads(Path(sys.argv[1]).read_text())
for how, path in jobs[: int(sys.argv[2])]:
    READ[how](Path(path))  # what is imported late is imported now
told, base = [], peak()
for how, path in jobs[int(sys.argv[2]) :]:
    start = time.process_time()
    try:
        found = READ[how](Path(path))
        text = json.dumps(getattr(found, "unreadable", None) or [])
    except Exception as error:
        text = f"{type(error).__name__}: {error}"
    told.append([time.process_time() - start, peak() - base, text])
print(json.dumps(told))
"""


def measured(folder, jobs, fine=()):
    """[(how, path)] read in one process of their own, after `fine`: [(seconds, megabytes above the
    start, what was raised)].
    """
    (folder / "jobs.json").write_text(
        json.dumps([[how, str(path)] for how, path in [*fine, *jobs]])
    )
    command = [sys.executable, "-c", CHILD, str(folder / "jobs.json"), str(len(fine))]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MALLOC_ARENA_MAX": "2"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout)


def check_cheap(folder, jobs, names, fine=()):
    told = measured(folder, jobs, fine)
    assert len(told) == len(jobs) == len(names) > 0
    for name, (seconds, megabytes, text) in zip(names, told):
        assert seconds < SECONDS and megabytes < MEGABYTES, (name, seconds, megabytes, text)
        assert text.isprintable() and len(text) < 700, (name, text)
    return dict(zip(names, (text for *_, text in told)))


def written(folder, contents, suffix):
    """[(name, path)] of files of at most a megabyte."""
    folder.mkdir()
    found = []
    for k, (name, content) in enumerate(contents):
        assert len(content) <= 1.05e6, (name, len(content))
        path = folder / f"{k}{suffix}"
        path.write_bytes(content)
        found.append((name, path))
    return found


@pytest.fixture
def store(tmp_path):
    """(clean data set, folder of its poison)"""
    clean = data.shapes(20, seed=1, size=8, classes=2)
    data.save_poison(
        tmp_path / "store", data.random_noise(clean, 8 / 255, 0), clean, {"eps": 8 / 255}
    )
    return clean, tmp_path / "store"


def test_the_keys_collide():
    """What the attack rests on: in a dict of this interpreter these keys are slow."""
    assert len({hash((k + 1) * HASH) for k in range(100)}) == 1


def test_pickles(tmp_path, store):
    clean, _ = store
    data.export_pickle(clean, torch.zeros(clean.images.shape), tmp_path / "fine.pkl", eps=0)
    hostile = written(tmp_path / "hostile", hostile_pickles(), ".pkl")
    told = check_cheap(
        tmp_path,
        [("poison", path) for _, path in hostile],
        [name for name, _ in hostile],
        [("poison", tmp_path / "fine.pkl")],
    )
    assert all(text.startswith("ValueError: poison: ") for text in told.values())
    assert "whose keys are not integers from 0 to 4294967295" in told["keys that collide"]
    assert (
        "memo index" in told["memo indices that collide"]
        and "opcodes" in told["a million opcodes, lists"]
    )


def test_cifar_pickles(tmp_path):
    jobs, names = [], []
    for k, (name, content) in enumerate(hostile_pickles()):
        folder = tmp_path / f"{k}" / "cifar-10-batches-py"
        folder.mkdir(parents=True)
        (folder / "batches.meta").write_bytes(
            pickle.dumps({"label_names": ["a", "b"]}, 2) if k % 2 else content
        )
        (folder / "test_batch").write_bytes(content)
        jobs.append(("cifar", folder))
        names.append(name)
    fine = tmp_path / "fine"
    fine.mkdir()
    (fine / "batches.meta").write_bytes(pickle.dumps({"label_names": ["a", "b"]}, 2))
    (fine / "test_batch").write_bytes(
        pickle.dumps({"data": np.zeros((4, 3072), dtype=np.uint8), "labels": [0, 1, 0, 1]}, 2)
    )
    told = check_cheap(tmp_path, jobs, names, [("cifar", fine)])
    assert all(text.startswith("ValueError: data: ") for text in told.values())


def test_torch_files(tmp_path):
    torch.save({"a.weight": torch.ones(3), "b": torch.ones(2)}, tmp_path / "state.pt")
    torch.save(torch.zeros(4, 3, 4, 4), tmp_path / "poison.pt")
    hostile = written(tmp_path / "hostile", hostile_pt(), ".pt")
    jobs = [("poison" if k % 2 else "init", path) for k, (_, path) in enumerate(hostile)]
    jobs += [("init" if how == "poison" else "poison", path) for how, path in jobs[-6:]]
    names = [
        f"{how}: {name}"
        for (how, _), name in zip(jobs, [name for name, _ in [*hostile, *hostile[-6:]]])
    ]
    told = check_cheap(
        tmp_path, jobs, names, [("poison", tmp_path / "poison.pt"), ("init", tmp_path / "state.pt")]
    )
    assert all(
        text.startswith(("ValueError: poison: ", "ValueError: evaluate: init: "))
        for text in told.values()
    )
    assert "refused __builtin__.bytearray" in told["init: zip: a bytearray of ten gigabytes"]
    assert (
        "compressed members" in told["poison: zip: compressed zeros"]
        and "share theirs" in told["poison: zip: expanded"]
    )
    assert (
        "are the most that is read"
        in told["poison: old: a storage of four gigabytes that is not there"]
    )


def test_npz_archives(tmp_path):
    images = np.zeros((4, 3, 4, 4), dtype=np.uint8)
    np.savez_compressed(tmp_path / "fine.npz", images=images, labels=np.arange(4))
    np.savez_compressed(tmp_path / "poison.npz", delta=images.astype(np.float32))
    hostile = written(tmp_path / "hostile", hostile_npz(), ".npz")
    names, jobs = [name for name, _ in hostile], [("data", path) for _, path in hostile]
    told = check_cheap(
        tmp_path, jobs, names, [("data", tmp_path / "fine.npz"), ("data", tmp_path / "fine.npz")]
    )
    assert all(text.startswith("ValueError: data: ") for text in told.values())
    assert "are the most that is read" in told["images"] and "stored nor deflated" in told["bzip2"]
    assert "items in images.npy" in told["many tiny images"]
    many, few = {"delta": ("<f4", (5_000, 3, 32, 32))}, {"delta": ("<f4", (1_000, 3, 32, 32))}
    deltas = [("zeros", packed(many)), ("bzip2", packed(few, zipfile.ZIP_BZIP2))]
    hostile = written(tmp_path / "deltas", deltas, ".npz")
    told = check_cheap(
        tmp_path,
        [("poison", path) for _, path in hostile],
        ["zeros", "bzip2"],
        [("poison", tmp_path / "poison.npz")],
    )
    assert "are the most that is read" in told["zeros"] and "stored nor deflated" in told["bzip2"]


def test_an_archive_that_compresses_well_is_read(tmp_path):
    """20 times, more than images of this library's `shapes` do, and above what any archive may
    hold.
    """
    images = np.zeros((12_000, 3, 32, 32), dtype=np.uint8)
    images[:, :, ::8] = np.random.default_rng(0).integers(0, 2, (12_000, 3, 4, 32), dtype=np.uint8)
    np.savez_compressed(tmp_path / "a.npz", images=images, labels=np.arange(12_000) % 2)
    assert images.nbytes > max(files.ROOM, 20 * (tmp_path / "a.npz").stat().st_size)
    assert torch.equal(data.load(tmp_path / "a.npz").images, torch.from_numpy(images))


def test_images(tmp_path):
    root, fine = tmp_path / "tree", tmp_path / "fine"
    for folder in (root, fine):
        for label in ("a", "b"):
            (folder / label).mkdir(parents=True)
            for suffix, form in {
                ".png": "PNG",
                ".jpg": "JPEG",
                ".webp": "WEBP",
                ".gif": "GIF",
                ".tif": "TIFF",
                ".bmp": "BMP",
            }.items():
                Image.fromarray(np.zeros((16, 16, 3), dtype=np.uint8)).save(
                    folder / label / f"fine{suffix}", form
                )
    names = []
    for name, content in hostile_images():
        assert len(content) <= 1.05e6, (name, len(content))
        (root / "a" / name).write_bytes(content)
        names.append(f"a/{name}")
    ((seconds, megabytes, text),) = measured(tmp_path, [("small", root)], [("small", fine)])
    assert seconds < SECONDS and megabytes < MEGABYTES, (seconds, megabytes, text)
    assert [name for name, _ in json.loads(text)] == sorted(names)
    assert all("decompression bomb" in reason for _, reason in json.loads(text)), text


def test_large_images_of_photographs_are_read(tmp_path):
    """15 million pixels of a smooth gradient with grain, as strongly compressed as people do, and a
    progressive one.
    """
    y, x = np.mgrid[:3000, :5000].astype(np.float32)
    grain = np.random.default_rng(0).normal(0, 4, (3000, 5000))
    pixels = np.stack([y / 20, x / 25, (x + y) / 40], 2) + grain[..., None]
    for label, options in {"a": {"quality": 30}, "b": {"quality": 75, "progressive": True}}.items():
        (tmp_path / label).mkdir()
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(
            tmp_path / label / "photo.jpg", **options
        )
    found = data.load(tmp_path, size=8)
    assert len(found) == 2 and found.unreadable == [] and found.sizes == [(5000, 3000)] * 2


def test_stores_and_checkpoints(tmp_path, store):
    _, folder = store
    hostile = written(tmp_path / "hostile", hostile_safetensors(), ".safetensors")
    jobs, names = [], []
    for name, path in hostile:
        content = path.read_bytes()
        made = tmp_path / f"store{len(jobs)}"
        made.mkdir()
        (made / "poison.safetensors").write_bytes(content)
        (made / "manifest.json").write_bytes(
            manifest(files={"poison.safetensors": hashlib.sha256(content).hexdigest()})
        )
        jobs += [("poison", made), ("init", path), ("checkpoint", path), ("epoch", path)]
        names += [f"{how}: {name}" for how in ("poison", "init", "checkpoint", "epoch")]
    for name, content in {
        "nested": b"[" * 1_000_000,
        "nested objects": b'{"a":' * 180_000,
        "digits": b"9" * 1_000_000,
        "lists": b"[" + b"[],[]," * 160_000 + b"[]]",
    }.items():
        made = tmp_path / f"manifest {name}"
        made.mkdir()
        (made / "poison.safetensors").write_bytes((folder / "poison.safetensors").read_bytes())
        (made / "manifest.json").write_bytes(content)
        jobs.append(("poison", made))
        names.append(f"manifest: {name}")
    checkpoint.save(tmp_path / "fine.safetensors", {"delta": torch.zeros(3)}, {"epoch": 1})
    fine = [
        ("poison", folder),
        *((how, tmp_path / "fine.safetensors") for how in ("init", "checkpoint", "epoch")),
    ]
    told = check_cheap(tmp_path, jobs, names, fine)
    passed = {"init: many empty tensors", "init: overflowing sides"}  # odd, and whole
    assert {name for name, text in told.items() if not text.startswith("ValueError: ")} <= passed


def test_a_large_sparse_file_is_not_read(tmp_path, store):
    """Longer than what is in the manifest, or than any manifest is."""
    _, folder = store
    with pytest.raises(OSError, match="100000000000 bytes, where 1000 are the most"):
        (tmp_path / "sparse").touch()
        os.truncate(tmp_path / "sparse", 100_000_000_000)
        files.read_bytes(tmp_path / "sparse", 1000)
    os.truncate(folder / "poison.safetensors", 100_000_000_000)
    with pytest.raises(
        ValueError,
        match=(
            r"poison.safetensors: expected a safetensors file of .*, "
            r"got a file of 100000000000 bytes"
        ),
    ):
        data.load_poison(folder)
    os.truncate(folder / "manifest.json", 100_000_000_000)
    with pytest.raises(
        ValueError,
        match=r"manifest.json: expected an undamaged .* manifest, got a file of 100000000000 bytes",
    ):
        data.load_poison(folder)


# what is no file


SPECIAL = ("pipe", "socket", "device", "folder", "loop")


def special(path, kind):
    """Puts something else where a file is read."""
    path.unlink(missing_ok=True)
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "socket":
        here = os.getcwd()
        os.chdir(path.parent)  # the name of a socket is limited to about 100 bytes
        with socket.socket(socket.AF_UNIX) as server:
            server.bind(path.name)
        os.chdir(here)
    elif kind == "device":
        path.symlink_to("/dev/zero")
    elif kind == "folder":
        path.mkdir()
    else:
        path.symlink_to(path.name)


READERS = {
    "poison.pkl": data.load_poison,
    "poison.pt": data.load_poison,
    "poison.npz": data.load_poison,
    "store": data.load_poison,
    "manifest": data.load_poison,
    "images.npz": data.load,
    "state.pt": read_state,
    "state.safetensors": read_state,
    "checkpoint": checkpoint.load,
    "epoch": checkpoint.saved_epoch,
    "cifar": lambda path: data.load(path, split="test"),
}


@pytest.mark.parametrize("kind", SPECIAL)
@pytest.mark.parametrize("which", READERS)
def test_no_regular_file(tmp_path, store, which, kind):
    _, folder = store
    read, path = READERS[which], tmp_path / which
    if which in ("store", "manifest"):
        special(folder / {"store": "poison.safetensors", "manifest": "manifest.json"}[which], kind)
        path = folder
    elif which == "cifar":
        path.mkdir()
        (path / "batches.meta").write_bytes(pickle.dumps({"label_names": ["a", "b"]}, 2))
        (path / "test_batch").write_bytes(b"")
        (path / "batches.meta").unlink() if kind == "folder" else None
        special(path / ("batches.meta" if kind == "folder" else "test_batch"), kind)
    else:
        special(path, kind)
    outcome = []

    def attempt():
        try:
            outcome.append(read(path))
        except (ValueError, OSError) as error:
            outcome.append(error)

    thread = threading.Thread(target=attempt, daemon=True)
    thread.start()
    thread.join(30)
    assert outcome, "it hangs"
    if which == "epoch" and kind == "loop":
        assert outcome == [0]  # as without a file
    else:
        assert isinstance(outcome[0], ValueError) and str(outcome[0]).isprintable(), outcome


@pytest.mark.parametrize("kind", SPECIAL)
def test_special_files_are_no_poison_and_no_data_set(tmp_path, kind):
    for name in ("a.npz", "b"):
        special(tmp_path / name, kind)
        assert not data.is_poison(tmp_path / name)
        with pytest.raises(ValueError, match=r"^data: "):
            data.load(tmp_path / name)


def test_an_image_that_becomes_a_pipe_after_it_was_listed(tmp_path, monkeypatch):
    from miue_fast.data import sources

    for label in ("a", "b"):
        (tmp_path / label).mkdir()
        Image.fromarray(np.zeros((4, 4, 3), dtype=np.uint8)).save(tmp_path / label / "0.png")
        Image.fromarray(np.zeros((4, 4, 3), dtype=np.uint8)).save(tmp_path / label / "1.png")

    def listed(root):
        found = real(root)
        special(tmp_path / "a/1.png", "pipe")
        return found

    real = sources.list_tree
    monkeypatch.setattr(sources, "list_tree", listed)
    found = data.load(tmp_path)
    assert found.unreadable == [("a/1.png", "a pipe, not a regular file")] and len(found) == 3


def test_a_file_that_grows_or_shrinks_while_it_is_read(tmp_path):
    """The kernel's own files say that they hold nothing; what is read is more than what was there
    at the start.
    """
    if os.path.exists("/proc/self/status"):
        with pytest.raises(OSError, match="changed while it was read"):
            files.read_bytes("/proc/self/status", 1000)
    (tmp_path / "fine").write_bytes(b"abc")
    assert files.read_bytes(tmp_path / "fine", 3) == b"abc"


# one read: what is checked is what is used


def test_a_store_that_is_truncated_or_replaced_after_its_check(tmp_path, store, monkeypatch):
    """Mapped into memory it would end the process (SIGBUS), or be values that nobody checked."""
    clean, folder = store
    wanted = data.load_poison(folder, clean)[0].clone()
    delta, _ = data.load_poison(folder, clean)
    content = (folder / "poison.safetensors").read_bytes()
    os.truncate(folder / "poison.safetensors", 10)
    assert torch.equal(delta, wanted)
    (folder / "poison.safetensors").write_bytes(content)
    real = data.poison.safetensors.torch.load

    def replaced(content):
        (folder / "poison.safetensors").write_bytes(b"somebody else's")
        return real(content)

    monkeypatch.setattr(data.poison.safetensors.torch, "load", replaced)
    assert torch.equal(data.load_poison(folder, clean)[0], wanted)
    with pytest.raises(ValueError, match="sha256"):
        data.load_poison(folder, clean)


def test_weights_and_checkpoints_have_memory_of_their_own(tmp_path):
    state = {"w": torch.randn(1000, 1000)}
    torch.save(state, tmp_path / "w.pt")
    data.poison.safetensors.torch.save_file(state, tmp_path / "w.safetensors")
    checkpoint.save(tmp_path / "c.safetensors", state, {"epoch": 1})
    found = [
        read_state(tmp_path / "w.pt"),
        read_state(tmp_path / "w.safetensors"),
        checkpoint.load(tmp_path / "c.safetensors")[0],
    ]
    for path in tmp_path.iterdir():
        os.truncate(path, 10)
    assert all(torch.equal(tensors["w"], state["w"]) for tensors in found)


# files of torch.save


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize(
    "dtype",
    [
        torch.float32,
        torch.float64,
        torch.float16,
        torch.bfloat16,
        torch.int64,
        torch.int8,
        torch.bool,
    ],
)
def test_what_torch_saves_is_read(tmp_path, dtype, zipped):
    base = (torch.randn(6, 5, 4) * 9).to(dtype)
    content = {
        "whole": base,
        "view": base[1:5:2, 1:],
        "transposed": base.transpose(0, 2),
        "empty": base[:0],
        "scalar": base[0, 0, 0],
        "parameter": torch.nn.Parameter(base.float()),
    }
    torch.save(content, tmp_path / "a.pt", _use_new_zipfile_serialization=zipped)
    found = read_torch(tmp_path / "a.pt", 1 << 20)
    assert list(found) == list(content)
    assert all(
        torch.equal(found[name], value) and found[name].dtype == value.dtype
        for name, value in content.items()
    )


@pytest.mark.parametrize("zipped", [True, False])
def test_state_dicts_are_read(tmp_path, zipped):
    model = torch.nn.Sequential(
        torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4), torch.nn.Linear(4, 2)
    )
    torch.save(model.state_dict(), tmp_path / "a.pt", _use_new_zipfile_serialization=zipped)
    found = read_state(tmp_path / "a.pt")
    assert found.keys() == model.state_dict().keys() and all(
        torch.equal(found[k], v) for k, v in model.state_dict().items()
    )


@pytest.mark.parametrize("zipped", [True, False])
def test_flipped_bytes_of_torch_files(tmp_path, zipped):
    """Each gives one line or a state dict; in a zip, whose members have checksums, never other
    values.
    """
    state = {"a": torch.arange(12.0).reshape(3, 4), "b": torch.ones(2, dtype=torch.int64)}
    torch.save(state, tmp_path / "a.pt", _use_new_zipfile_serialization=zipped)
    whole, random, refused = (tmp_path / "a.pt").read_bytes(), np.random.default_rng(0), 0
    for place in random.permutation(len(whole))[:600].tolist():
        changed = bytearray(whole)
        changed[place] ^= 1 << int(random.integers(8))
        (tmp_path / "a.pt").write_bytes(changed)
        try:
            found = read_state(tmp_path / "a.pt")
            assert not zipped or all(
                torch.equal(found[name], value) for name, value in state.items()
            )
        except ValueError as error:
            refused += 1
            assert str(error).startswith("evaluate: init: ") and str(error).isprintable()
    assert refused > 100


def test_opcodes_are_bounded_by_the_file():
    assert inert.loads(pickle.dumps(list(range(40_000)))) == list(range(40_000))
    with pytest.raises(inert.ERRORS, match=f"more than {inert.SMALL + 1_000_001 // 4} opcodes"):
        inert.loads(b"N" * 1_000_000 + b".")
