"""Files made to do harm. Nothing crashes, no code runs, nothing is written elsewhere, and each
one is listed.
"""

import collections
import io
import os
import pickle
import socket
import struct
import tarfile
import zipfile
import zlib

import numpy as np
import pytest
import torch
from PIL import Image

from miue_fast import data

FORMATS = {
    ".png": "PNG",
    ".jpg": "JPEG",
    ".webp": "WEBP",
    ".bmp": "BMP",
    ".tif": "TIFF",
    ".ppm": "PPM",
    ".gif": "GIF",
}


def encoded(suffix, seed=0, size=16):
    image = Image.fromarray(
        np.random.default_rng(seed).integers(0, 256, (size, size, 3), dtype=np.uint8)
    )
    stream = io.BytesIO()
    image.save(stream, FORMATS[suffix])
    return stream.getvalue()


def chunk(kind, content):
    return (
        struct.pack(">I", len(content))
        + kind
        + content
        + struct.pack(">I", zlib.crc32(kind + content))
    )


def png(width, height, depth=8, colour=2, content=b"", extra=b""):
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0))
    return (
        b"\x89PNG\r\n\x1a\n"
        + header
        + extra
        + chunk(b"IDAT", zlib.compress(content))
        + chunk(b"IEND", b"")
    )


def surely_unreadable():
    """name -> bytes of files that hold no usable image."""
    random = np.random.default_rng(0)
    for suffix in FORMATS:
        whole = encoded(suffix)
        yield f"empty{suffix}", b""
        yield f"text{suffix}", b"this is not an image\n" * 5
        yield f"html{suffix}", b"<html><body>404</body></html>"
        for part in range(1, 8):
            yield f"cut{part}{suffix}", whole[: len(whole) * part // 10]
        for k in range(8):
            yield f"random{k}{suffix}", random.bytes(int(random.integers(1, 3000)))
        for k in range(4):
            magic = 12 if suffix == ".webp" else 4
            yield f"magic{k}{suffix}", whole[:magic] + random.bytes(500)
    yield "bomb1.png", png(30_000, 30_000)
    yield "bomb2.png", png(2**31 - 1, 2**31 - 1)
    yield "bomb3.png", png(9_500, 9_500, content=b"\0" * 10_000)
    yield (
        "bomb4.bmp",
        encoded(".bmp")[:18] + struct.pack("<ii", 60_000, 60_000) + encoded(".bmp")[26:],
    )
    yield "bomb5.gif", b"GIF89a" + struct.pack("<HH", 65535, 65535) + encoded(".gif")[10:]
    yield "bomb6.ppm", b"P6\n100000 100000\n255\n" + b"x" * 100
    yield (
        "bomb7.png",
        png(
            4,
            4,
            content=b"\0" * 52,
            extra=chunk(b"zTXt", b"k\0\0" + zlib.compress(b"\0" * 80_000_000)),
        ),
    )
    yield "short.png", png(64, 64, content=b"\0" * 100)
    yield "zero.png", png(0, 0)
    yield "deep_rgb.png", png(4, 4, depth=16, content=b"\0" * 4 * (1 + 4 * 6))
    yield "deep_gray.png", png(4, 4, depth=16, colour=0, content=b"\0" * 4 * (1 + 4 * 2))
    yield "deep.ppm", b"P6\n4 4\n65535\n" + b"\1\2" * 48
    yield "deep.tif", tiff16()
    yield "script.ppm", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n(x) run\n"
    yield "pickle.png", pickle.dumps(Evil())
    yield "archive.png", b"PK\3\4" + bytes(100)
    yield (
        "vector.png",
        b"<svg xmlns='http://www.w3.org/2000/svg'><image href='file:///etc/passwd'/></svg>",
    )
    yield "notes.txt", b"text"
    yield "photo.heic", b"\0\0\0\x18ftypheic"
    yield "evil.pkl", pickle.dumps(Evil())
    yield "no_suffix", encoded(".png")


def tiff16():
    stream = io.BytesIO()
    Image.fromarray(np.arange(16, dtype=np.uint16).reshape(4, 4)).save(stream, "TIFF")
    return stream.getvalue()


class Evil:
    def __reduce__(self):
        return exec, ("import os; os.environ['MIUE_EVIL_RAN'] = '1'",)


@pytest.fixture(autouse=True)
def nothing_ran():
    yield
    assert os.environ.pop("MIUE_EVIL_RAN", None) is None


def test_the_evil_object_would_run():
    pickle.loads(pickle.dumps(Evil()))
    assert os.environ.pop("MIUE_EVIL_RAN") == "1"


class EvilSystem:
    def __reduce__(self):
        return os.system, (f"touch {EvilSystem.target}",)


def good_tree(root):
    for label in ("cat", "dog"):
        (root / label).mkdir(parents=True)
        for k in range(2):
            (root / label / f"{k}.png").write_bytes(encoded(".png", seed=k))
    return root


@pytest.mark.filterwarnings("error::PIL.Image.DecompressionBombWarning")
def test_hostile_images_are_listed(tmp_path):
    root = good_tree(tmp_path / "clean")
    hostile = dict(surely_unreadable())
    assert len(hostile) >= 150
    for name, content in hostile.items():
        (root / "cat" / name).write_bytes(content)
    for source in (data.load(root), data.load(root, size=8)):
        listed = dict(source.unreadable)
        assert set(listed) | set(source.skipped) == {f"cat/{name}" for name in hostile}
        assert source.skipped == ["cat/evil.pkl", "cat/notes.txt"]
        assert all(
            reason and "\n" not in reason and len(reason) < 300 for reason in listed.values()
        )
        assert source.names == ["cat/0.png", "cat/1.png", "dog/0.png", "dog/1.png"]
    assert "decompression bomb" in listed["cat/bomb1.png"] and "empty" in listed["cat/empty.png"]
    assert all("8 bits" in listed[f"cat/{name}"] for name in hostile if name.startswith("deep"))
    clean = data.load(root)
    data.export_folder(clean, torch.zeros(clean.images.shape), tmp_path / "out", eps=8 / 255)
    assert (
        data.verify(clean, tmp_path / "out", eps=0).ok
        and data.verify(root, tmp_path / "out", eps=0).ok
    )
    assert sorted(p.name for p in tmp_path.iterdir()) == ["clean", "out"]


def test_bombs_are_found_without_pillows_own_limit(tmp_path, monkeypatch):
    monkeypatch.setattr(
        Image, "MAX_IMAGE_PIXELS", None
    )  # as other code in the process may have done
    root = good_tree(tmp_path)
    bombs = {name: content for name, content in surely_unreadable() if name.startswith("bomb")}
    for name, content in bombs.items():
        (root / "dog" / name).write_bytes(content)
    listed = dict(data.load(root).unreadable)
    assert set(listed) == {f"dog/{name}" for name in bombs}
    assert "89478485" in listed["dog/bomb1.png"] and "89478485" in listed["dog/bomb3.png"]


def test_damaged_images_are_listed_or_hold_an_image(tmp_path):
    """Random bit flips and cuts: some leave an image that can still be decoded; every other file is
    listed.
    """
    root = good_tree(tmp_path / "clean")
    random = np.random.default_rng(3)
    count = 0
    for suffix in FORMATS:
        whole = encoded(suffix, seed=9)
        for k in range(60):
            changed = bytearray(whole)
            for _ in range(int(random.integers(1, 6))):
                changed[int(random.integers(len(changed) if k % 2 else min(64, len(changed))))] = (
                    int(random.integers(256))
                )
            (root / "dog" / f"x{k}{suffix}").write_bytes(
                changed if k % 5 else changed[: int(random.integers(len(changed)))]
            )
            count += 1
    clean = data.load(root, size=16)
    assert len(clean) + len(clean.unreadable) == count + 4 and len(clean.unreadable) > count // 4
    data.export_folder(clean, data.random_noise(clean, 8 / 255, 0), tmp_path / "out", eps=8 / 255)
    report = data.verify(root, tmp_path / "out", eps=8 / 255)
    assert report.ok and report.count == len(clean), report


def test_links_and_special_files(tmp_path):
    root = good_tree(tmp_path / "clean")
    outside = tmp_path / "outside"
    good_tree(outside)
    (root / "cat/inside.png").symlink_to("../dog/0.png")
    (root / "cat/broken.png").symlink_to("nowhere.png")
    (root / "cat/self.png").symlink_to("self.png")
    (root / "cat/a.png").symlink_to("b.png")
    (root / "cat/b.png").symlink_to("a.png")
    (root / "cat/leaves.png").symlink_to(outside / "cat/0.png")
    (root / "cat/passwd.png").symlink_to("/etc/passwd")
    (root / "cat/up").symlink_to("..")
    (root / "cat/here").symlink_to(".")
    (root / "bird").symlink_to(outside / "cat")
    (root / "loop").symlink_to("loop")
    os.mkfifo(root / "cat/pipe.png")
    server = socket.socket(socket.AF_UNIX)
    here = os.open(".", os.O_RDONLY)
    try:
        os.chdir(root / "cat")  # the name of a socket is limited to about 100 bytes
        server.bind("socket.png")
    finally:
        os.fchdir(here)
        os.close(here)
        server.close()
    (root / "loose.png").write_bytes(encoded(".png"))
    with open(os.fsencode(root) + b"/cat/latin\xe9.png", "wb") as file:
        file.write(encoded(".png"))
    (root / "empty").mkdir()
    clean = data.load(root)
    assert clean.names == [
        "cat/0.png",
        "cat/1.png",
        "cat/inside.png",
        "dog/0.png",
        "dog/1.png",
    ] and clean.classes == ["cat", "dog"]
    assert [name for name, _ in clean.unreadable] == sorted(
        [
            "bird",
            "cat/a.png",
            "cat/b.png",
            "cat/broken.png",
            "cat/here",
            "cat/latin\\udce9.png",
            "cat/leaves.png",
            "cat/passwd.png",
            "cat/pipe.png",
            "cat/self.png",
            "cat/socket.png",
            "cat/up",
            "loop",
            "loose.png",
        ]
    )
    assert all(reason for _, reason in clean.unreadable)


def test_export_stays_inside(tmp_path):
    """A folder in OUT that is a link elsewhere, and names that climb, as an archive of somebody
    else may hold them.
    """
    clean = data.load(good_tree(tmp_path / "clean"))
    delta = torch.zeros(clean.images.shape)
    (tmp_path / "out").mkdir()
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "out/cat").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ValueError, match="link out of it"):
        data.export_folder(clean, delta, tmp_path / "out", eps=8 / 255, overwrite=True)
    images, labels = clean.images.numpy(), clean.labels.numpy()
    for k, (classes, names) in enumerate(
        [
            (["a", "b"], ["../../x", "1", "2", "3"]),
            (["a", "b"], ["/tmp/x", "1", "2", "3"]),
            (["..", "b"], ["0", "1", "2", "3"]),
            (["/etc", "b"], ["0", "1", "2", "3"]),
            (["a", "b"], ["a/../../x", "1", "2", "3"]),
            (["", "b"], ["0", "1", "2", "3"]),
            (["a", "b"], ["a/1", "1", "2", "3"]),
            (["a/c", "b"], ["0", "1", "2", "3"]),
            (["a", "b"], [".", "1", "2", "3"]),
        ]
    ):
        np.savez(
            tmp_path / "evil.npz",
            images=images,
            labels=labels,
            classes=np.array(classes),
            names=np.array(names),
        )
        with pytest.raises(ValueError, match="export: "):
            data.export_folder(
                data.load(tmp_path / "evil.npz"), delta, tmp_path / f"new{k}", eps=8 / 255
            )
    assert list((tmp_path / "elsewhere").iterdir()) == []
    assert not (tmp_path.parent / "x").exists() and not (tmp_path / "x").exists()


def test_archives_are_not_unpacked(tmp_path):
    inside = tmp_path / "work"
    inside.mkdir()
    with tarfile.open(inside / "data.tar", "w") as archive:
        entry = tarfile.TarInfo("../../escaped.png")
        entry.size = 3
        archive.addfile(entry, io.BytesIO(b"abc"))
    for name in ("data.zip", "data.npz", "poison.npz", "poison.pt"):
        with zipfile.ZipFile(inside / name, "w") as archive:
            archive.writestr("../../escaped.npy", b"abc")
            archive.writestr("images.npy", b"\x93NUMPY\x01\x00garbage")
            archive.writestr("labels.npy", b"abc")
    for name in ("data.tar", "data.zip", "data.npz"):
        with pytest.raises(ValueError, match=r"^data: "):
            data.load(inside / name)
    for name in ("poison.npz", "poison.pt"):
        with pytest.raises(ValueError, match=r"^poison: "):
            data.load_poison(inside / name)
    assert not list(tmp_path.parent.rglob("escaped*"))


# pickles


def evil_objects(target):
    EvilSystem.target = target
    yield Evil()
    yield EvilSystem()
    yield {"data": Evil()}
    yield {b"data": EvilSystem(), b"labels": [0]}
    yield [Evil(), np.zeros(3)]
    yield np.array([Evil()], dtype=object)
    yield collections.OrderedDict(a=Evil())
    yield print
    yield type
    yield torch.zeros(3)
    yield np.dtype([("a", "O")])
    yield 7
    yield {b"data": np.zeros((1, 3072)), b"labels": [0]}  # float64, not uint8
    yield {b"data": np.zeros((1, 3071), dtype=np.uint8), b"labels": [0]}
    yield {b"data": np.zeros((1, 3072), dtype=np.uint8), b"labels": [10]}
    yield {b"data": np.zeros((1, 3072), dtype=np.uint8), b"labels": [True]}
    yield {b"data": np.zeros((2, 3072), dtype=np.uint8), b"labels": [0]}
    yield {b"data": np.zeros((4, 3072), dtype=np.uint8), b"labels": [0, 1.5, 0, 1]}
    yield {b"labels": [0]}


def raw_pickles():
    """Hand-written opcodes: globals by every route, endless memo, forged array states, deep
    nesting.
    """
    yield b"cos\nsystem\n(S'touch pwned'\ntR."
    yield b"\x80\x04\x8c\x02os\x8c\x06system\x93\x8c\x0btouch pwned\x85R."
    yield b"cbuiltins\neval\n(S'1'\ntR."
    # made, never filled
    array = b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(I0\ntS'b'\ntR"
    yield array + b"(I1\n(I9999999999\ntcnumpy\ndtype\n(S'O8'\ntRI00\nS'aaaaaaaa'\ntb."
    yield array + b"(I1\n(I99\ntcnumpy\ndtype\n(S'u1'\ntRI00\nS'aaaa'\ntb."
    yield b"cnumpy.core.multiarray\nscalar\n(cnumpy\ndtype\n(S'O8'\ntRS'aaaaaaaa'\ntR."
    yield b"cnumpy\nload\n(S'x.npy'\ntR."
    yield b"ccodecs\nopen\n(S'pwned'\nS'w'\ntR."
    yield b"c_codecs\nencode\n(S'a'\nS'rot13'\ntR."
    yield b"cmiue_fast.data.cifar\n_unpickle\n(S'x'\ntR."
    yield b"(" * 100_000 + b"."
    yield b"]" * 100_000 + b"a" * 99_999 + b"."
    yield b"I1\nr\xff\xff\xff\x7f."
    yield b"\x80\x04\x8e\xff\xff\xff\xff\xff\xff\xff\x7fabc."
    yield b"Pname\n."
    yield b"\x80\x02\x82\x01."
    yield b""
    yield b"."
    yield b"\xff" * 100


def test_evil_cifar_pickles(tmp_path):
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    target = tmp_path / "pwned"
    meta = pickle.dumps({b"label_names": [b"a", b"b"]}, 2)
    contents = [
        pickle.dumps(value, protocol) for protocol in (0, 2, 4, 5) for value in evil_objects(target)
    ] + list(raw_pickles())
    random = np.random.default_rng(0)
    fine = pickle.dumps({b"data": np.zeros((4, 3072), dtype=np.uint8), b"labels": [0, 1, 0, 1]}, 2)
    contents += [fine[: int(random.integers(len(fine)))] for _ in range(40)]
    here = os.getcwd()
    os.chdir(tmp_path)
    try:
        for content in contents:
            for names, batch in ((meta, content), (content, fine)):
                (folder / "batches.meta").write_bytes(names)
                (folder / "test_batch").write_bytes(batch)
                with pytest.raises(ValueError, match=r"^data: ") as error:
                    data.load(folder, split="test")
                assert "\n" not in str(error.value)
    finally:
        os.chdir(here)
    assert sorted(os.listdir(tmp_path)) == ["cifar-10-batches-py"]
    (folder / "batches.meta").write_bytes(meta)
    (folder / "test_batch").write_bytes(fine)
    assert len(data.load(folder, split="test")) == 4


def test_flipped_cifar_pickles(tmp_path):
    """Any damage gives the data set, a data set of other values, or one clear error: never another
    exception.
    """
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    (folder / "batches.meta").write_bytes(pickle.dumps({b"label_names": [b"a", b"b"]}, 2))
    fine = pickle.dumps({b"labels": [0, 1, 0, 1], b"data": np.zeros((4, 3072), dtype=np.uint8)}, 2)
    random = np.random.default_rng(0)
    refused = 0
    for _ in range(500):
        changed = bytearray(fine)
        changed[int(random.integers(250))] = int(random.integers(256))
        (folder / "test_batch").write_bytes(changed)
        try:
            assert data.load(folder, split="test").images.shape == (4, 3, 32, 32)
        except ValueError as error:
            refused += 1
            assert str(error).startswith("data: ") and "\n" not in str(error)
    assert refused > 100


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("names", [5, {"a": 1}, [b"a", 7], [b"a", (b"b",)]])
def test_class_names_that_are_no_text(tmp_path, names):
    (tmp_path / "batches.meta").write_bytes(pickle.dumps({b"label_names": names}, 2))
    (tmp_path / "test_batch").write_bytes(
        pickle.dumps({b"data": np.zeros((4, 3072), dtype=np.uint8), b"labels": [0, 1, 0, 1]}, 2)
    )
    with pytest.raises(
        ValueError, match=r"^data: .*batches.meta: expected a list of text 'label_names'"
    ):
        data.load(tmp_path, split="test")


def test_names_in_another_encoding_are_kept(tmp_path):
    (tmp_path / "batches.meta").write_bytes(pickle.dumps({b"label_names": [b"\xff", b"b"]}, 2))
    (tmp_path / "test_batch").write_bytes(
        pickle.dumps({b"data": np.zeros((4, 3072), dtype=np.uint8), b"labels": [0, 1, 0, 1]}, 2)
    )
    assert data.load(tmp_path, split="test").classes == ["\\xff", "b"]


def test_an_array_without_content_is_no_cifar_file(tmp_path):
    (tmp_path / "batches.meta").write_bytes(pickle.dumps({b"label_names": [b"a", b"b"]}, 2))
    # made, never filled
    array = b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(I0\ntS'b'\ntR"
    (tmp_path / "test_batch").write_bytes(b"(S'data'\n" + array + b"S'labels'\n(lI0\naI1\nad.")
    with pytest.raises(ValueError, match=r"^data: "):
        data.load(tmp_path, split="test")


def test_tensors_without_memory_of_their_own(tmp_path):
    made = {
        "sparse": torch.rand(4, 3, 4, 4).to_sparse(),
        "meta": torch.empty(4, 3, 4, 4, device="meta"),
        "bomb": torch.zeros(1).expand(600, 3, 1024, 1024),  # 1.5 kB in the file, 7.5 GB in use
    }
    for name, tensor in made.items():
        torch.save(tensor, tmp_path / f"{name}.pt")
        with pytest.raises(ValueError, match=r"^poison: .*expected a (dense )?tensor"):
            data.load_poison(tmp_path / f"{name}.pt")


def test_evil_poison_and_npz(tmp_path):
    clean = data.load(good_tree(tmp_path / "clean"))
    target = tmp_path / "pwned"
    contents = [
        pickle.dumps(value, protocol) for protocol in (0, 2, 4) for value in evil_objects(target)
    ] + list(raw_pickles())
    for content in contents:
        packed = io.BytesIO()
        with zipfile.ZipFile(packed, "w") as archive:
            archive.writestr("poison/data.pkl", content)
            archive.writestr("poison/version", "3\n")
        arrays = io.BytesIO()
        with zipfile.ZipFile(arrays, "w") as archive:
            for key in ("images", "labels", "delta"):
                archive.writestr(f"{key}.npy", content)
        for name, raw in {
            "poison.pt": content,
            "zipped.pt": packed.getvalue(),
            "poison.npz": arrays.getvalue(),
        }.items():
            (tmp_path / name).write_bytes(raw)
            with pytest.raises(ValueError, match=r"^poison: ") as error:
                data.load_poison(tmp_path / name, clean)
            assert "\n" not in str(error.value)
        with pytest.raises(ValueError, match=r"^data: "):
            data.load(tmp_path / "poison.npz")
    np.savez(tmp_path / "object.npz", images=np.array([Evil()], dtype=object), labels=np.arange(4))
    with pytest.raises(ValueError, match=r"^data: "):
        data.load(tmp_path / "object.npz")
    text = f"{{'descr': '|u1', 'fortran_order': False, 'shape': ({10**15},), }}"
    header = b"\x93NUMPY\x01\x00" + struct.pack("<H", 118) + text.encode().ljust(118)
    with zipfile.ZipFile(tmp_path / "huge.npz", "w") as archive:
        archive.writestr("images.npy", header)
        archive.writestr("labels.npy", header)
    with pytest.raises(ValueError, match=r"^data: "):
        data.load(tmp_path / "huge.npz")
    assert not target.exists()


def test_nothing_is_looked_up_and_memory_is_bounded(tmp_path):
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    for content in (
        b"\x80\x04})" + b"\x85" * 300_000 + b"K\x01s.",
        b"]r\x00\x00\x00\x04.",
    ):  # a C stack overflow, 1 GB of memo
        (folder / "batches.meta").write_bytes(content)
        (folder / "test_batch").write_bytes(content)
        with pytest.raises(ValueError, match=r"^data: "):
            data.load(folder, split="test")


def test_an_archive_larger_than_any_poison_is_not_unpacked(tmp_path, monkeypatch):
    """Zeros: 200 MB in 200 KB. Nothing of it is read."""
    dataset = data.shapes(20, seed=1)
    packed = tmp_path / "delta.npz"
    with (
        zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as archive,
        archive.open("delta.npy", "w", force_zip64=True) as file,
    ):
        np.lib.format.write_array_header_1_0(
            file, {"descr": "<f4", "fortran_order": False, "shape": (50_000_000,)}
        )
        for _ in range(200):
            file.write(bytes(1_000_000))
    monkeypatch.setattr(zipfile.ZipFile, "testzip", lambda self: pytest.fail("unpacked"))
    with pytest.raises(
        ValueError,
        match=(
            r"^poison: .*delta.npz: expected one bare tensor, "
            r"got .*200000128 bytes of content, where .*"
        ),
    ):
        data.load_poison(packed, dataset)
