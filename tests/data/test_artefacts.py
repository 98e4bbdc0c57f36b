"""The poison's files: what was written comes back, what was damaged is found, and a failed write
loses nothing.
"""

import errno
import json
import os
import resource
import shutil
import subprocess
import sys
import time
import zipfile

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from miue_fast import data
from miue_fast.data import atomic

EPS = 8 / 255


@pytest.fixture(scope="module")
def clean():
    return data.shapes(24, size=8)


@pytest.fixture
def store(tmp_path, clean):
    data.save_poison(
        tmp_path / "poison",
        data.random_noise(clean, EPS, 0),
        clean,
        {"eps": EPS, "seed": 7, "name": "é"},
    )
    return tmp_path / "poison"


def files_of(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


# round trips


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.int8])
def test_store_round_trip(tmp_path, clean, dtype):
    delta = data.random_noise(clean, EPS, 1)
    delta = (delta * (127 / EPS)).round().to(torch.int8) if dtype == torch.int8 else delta.to(dtype)
    data.save_poison(tmp_path, delta, clean, {"eps": EPS, "path": tmp_path, "steps": (1, 2)})
    back, manifest = data.load_poison(tmp_path, clean)
    wanted = delta.float() * torch.tensor(EPS / 127) if dtype == torch.int8 else delta.float()
    assert torch.equal(back, wanted) and back.dtype == torch.float32
    assert (
        manifest["store"] == str(dtype)[6:]
        and manifest["fingerprint"] == clean.fingerprint
        and manifest["eps"] == EPS
    )
    assert set(manifest["versions"]) == {"miue_fast", "torch", "python"} and manifest["options"][
        "steps"
    ] == [1, 2]
    assert torch.equal(data.load_poison(tmp_path / "poison.safetensors")[0], wanted)
    assert sorted(files_of(tmp_path)) == ["manifest.json", data.LIST, "poison.safetensors"]
    first = files_of(tmp_path)
    data.save_poison(tmp_path, delta, clean, {"eps": EPS, "path": tmp_path, "steps": (1, 2)})
    assert files_of(tmp_path) == first  # same input, same bytes
    assert (
        data.verify(clean, tmp_path, eps=EPS).ok
        and not data.verify(clean, tmp_path, eps=4 / 255).ok
    )


def test_pt_round_trip(tmp_path, clean):
    delta = data.random_noise(clean, EPS, 1)
    data.export_pt(clean, delta, tmp_path / "poison.pt")
    bare = torch.load(tmp_path / "poison.pt", weights_only=True)
    assert torch.equal(bare, delta) and bare.dtype == torch.float32
    back, manifest = data.load_poison(tmp_path / "poison.pt", clean)
    assert torch.equal(back, delta) and manifest is None
    np.savez(tmp_path / "poison.npz", delta=delta.numpy())
    assert torch.equal(data.load_poison(tmp_path / "poison.npz", clean)[0], delta)
    report = data.verify(clean, tmp_path / "poison.pt", eps=EPS)
    assert report.ok and report.count == 24 and report.max_linf == 8
    assert not data.verify(clean, tmp_path / "poison.pt", eps=7.9 / 255).ok
    torch.save(delta.half(), tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    assert torch.equal(data.load_poison(tmp_path / "old.pt")[0], delta.half().float())


def test_class_wise_poison_is_expanded(tmp_path, clean):
    per_class = torch.rand(10, 3, 8, 8) / 40
    torch.save(per_class, tmp_path / "poison.pt")
    assert torch.equal(data.load_poison(tmp_path / "poison.pt", clean)[0], per_class[clean.labels])
    assert torch.equal(data.load_poison(tmp_path / "poison.pt")[0], per_class)
    assert data.verify(clean, tmp_path / "poison.pt", eps=EPS).ok


# what does not belong


def test_poison_of_another_data_set(store, clean, tmp_path):
    for other in (
        data.shapes(24, size=8, seed=1),
        data.shapes(25, size=8),
        data.shapes(24, size=9),
        clean.select(list(range(24))[::-1]),
    ):
        with pytest.raises(ValueError, match="fingerprint"):
            data.load_poison(store, other)
        assert not data.verify(other, store, eps=EPS).ok
    delta, _ = data.load_poison(store)
    for shape in ((23, 3, 8, 8), (24, 1, 8, 8), (24, 3, 9, 9), (11, 3, 8, 8)):
        torch.save(torch.zeros(shape), tmp_path / "poison.pt")
        with pytest.raises(
            ValueError, match=r"delta: expected \[24, 3, 8, 8\] or class-wise \[10, 3, 8, 8\]"
        ):
            data.load_poison(tmp_path / "poison.pt", clean)
    with pytest.raises(ValueError, match="delta"):
        data.save_poison(store, delta[1:], clean, {"eps": EPS})
    with pytest.raises(ValueError, match="eps"):
        data.save_poison(store, delta, clean, {})
    with pytest.raises(ValueError, match="delta: expected finite"):
        data.save_poison(store, delta * float("nan"), clean, {"eps": EPS})
    assert torch.equal(data.load_poison(store, clean)[0], delta)


@pytest.mark.parametrize(
    "content",
    [
        {"delta": torch.zeros(24, 3, 8, 8)},
        [1],
        torch.zeros(3),
        torch.zeros(24, 3, 8, 8, dtype=torch.int64),
        torch.full((24, 3, 8, 8), float("nan")),
        torch.full((24, 3, 8, 8), 8.0),
    ],
)
def test_pt_that_is_no_poison(tmp_path, clean, content):
    torch.save(content, tmp_path / "poison.pt")
    with pytest.raises(ValueError, match="poison: ") as error:
        data.load_poison(tmp_path / "poison.pt", clean)
    assert "\n" not in str(error.value)


def test_missing_or_foreign_manifest(store, clean):
    manifest = json.loads((store / "manifest.json").read_text())
    changes = [
        {"format": "miue_fast poison 2"},
        {"eps": 9},
        {"eps": "8/255"},
        {"files": []},
        {"shape": None},
        {"store": "int8"},
    ]
    for change in changes:
        (store / "manifest.json").write_bytes(
            data.poison._manifest_text({**manifest, **change})
        )  # a fitting checksum, wrong content
        with pytest.raises(ValueError, match="poison: "):
            data.load_poison(store, clean)
    (store / "manifest.json").write_text(json.dumps({**manifest, "eps": 0.5}))
    with pytest.raises(ValueError, match="manifest"):
        data.load_poison(store)
    (store / "manifest.json").unlink()
    with pytest.raises(ValueError, match="manifest"):
        data.load_poison(store)
    with pytest.raises(ValueError, match="no such file"):
        data.load_poison(store / "nowhere")


# damage


def test_every_damage_is_found(store, clean):
    """1,000 bit flips and 200 truncations over both files of the store."""
    random = np.random.default_rng(0)
    whole = {
        name: content for name, content in files_of(store).items() if name in data.POISON_FILES
    }
    for name, content in whole.items():
        for _ in range(500):
            bit = int(random.integers(8 * len(content)))
            flipped = bytearray(content)
            flipped[bit // 8] ^= 1 << bit % 8
            refused(store, name, flipped, clean)
        for cut in random.integers(0, len(content), 100):
            refused(store, name, content[:cut], clean)
        refused(store, name, content + b"\0", clean)
        (store / name).write_bytes(content)
    assert data.load_poison(store, clean)[1] is not None


def test_every_bit_of_the_manifest_counts(store, clean):
    content = (store / "manifest.json").read_bytes()
    for bit in range(0, 8 * len(content), 7):
        flipped = bytearray(content)
        flipped[bit // 8] ^= 1 << bit % 8
        refused(store, "manifest.json", flipped, clean)


def refused(store, name, content, clean):
    (store / name).write_bytes(content)
    with pytest.raises(ValueError, match=r"^poison: ") as error:
        data.load_poison(store, clean)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("kind", ["pt", "npz"])
def test_damaged_bare_files_never_give_other_values(tmp_path, clean, kind):
    """A .pt or .npz has zip checksums only: a flip is found, or lies where it changes nothing."""
    delta, path = data.random_noise(clean, EPS, 0), tmp_path / f"poison.{kind}"
    if kind == "pt":
        data.export_pt(clean, delta, path)
    else:
        np.savez(path, delta=delta.numpy())
    content, random, found = path.read_bytes(), np.random.default_rng(0), 0
    for k in range(400):
        bit = int(random.integers(8 * len(content)))
        changed = bytearray(content)
        changed[bit // 8] ^= 1 << bit % 8
        path.write_bytes(changed if k < 300 else content[: bit // 8])
        try:
            assert torch.equal(data.load_poison(path, clean)[0], delta)
        except ValueError as error:
            found += 1
            assert str(error).startswith("poison: ") and "\n" not in str(error)
    assert found > 350


def test_data_damaged_in_an_exported_npz(tmp_path, clean):
    data.export_npz(clean, data.random_noise(clean, EPS, 0), tmp_path / "x.npz", eps=EPS)
    content, wanted, random = (
        (tmp_path / "x.npz").read_bytes(),
        data.load(tmp_path / "x.npz").fingerprint,
        np.random.default_rng(1),
    )
    for _ in range(200):
        bit = int(random.integers(8 * len(content)))
        changed = bytearray(content)
        changed[bit // 8] ^= 1 << bit % 8
        (tmp_path / "x.npz").write_bytes(changed)
        try:
            assert data.load(tmp_path / "x.npz").fingerprint == wanted
        except ValueError as error:
            assert "\n" not in str(error)


# failing writes


def writers(clean, folder):
    """Every artefact, as (what was there before is read by, what writes the new one)."""
    delta = data.random_noise(clean, EPS, 5)
    return {
        "store": lambda: data.save_poison(folder, delta, clean, {"eps": EPS}),
        "pt": lambda: data.export_pt(clean, delta, folder / "poison.pt", overwrite=True),
        "npz": lambda: data.export_npz(clean, delta, folder / "out.npz", eps=EPS, overwrite=True),
        "checkpoint-like": lambda: data.write_file(
            folder / "state.pt", lambda file: torch.save({"a": delta, "b": [1, 2]}, file)
        ),
        "folder": lambda: data.export_folder(
            clean, delta, folder / "images", eps=EPS, overwrite=True
        ),
    }


@pytest.mark.parametrize("which", ["store", "pt", "npz", "checkpoint-like"])
def test_full_disk_at_every_write(tmp_path, clean, monkeypatch, which):
    """The k-th write (or fsync) fails for every k: a one-line OSError, the old files intact, no
    temporary file.
    """
    write = writers(clean, tmp_path)[which]
    write()
    before = files_of(tmp_path)
    plain_write, plain_sync = atomic.io.FileIO.write, os.fsync
    calls = {"count": 0, "fail_at": 0}

    def step():
        calls["count"] += 1
        if calls["count"] == calls["fail_at"]:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    class FullDisk(atomic._Sink):
        def write(self, content):
            try:
                step()
            except OSError as error:
                self.error = error
                plain_write(
                    self, bytes(memoryview(content).cast("B")[:7])
                )  # part of it got through
                raise
            return super().write(content)

    def full_sync(descriptor):
        step()
        plain_sync(descriptor)

    monkeypatch.setattr(atomic, "_Sink", FullDisk)
    monkeypatch.setattr(atomic.os, "fsync", full_sync)
    after = (
        1 if which == "checkpoint-like" else 2
    )  # the sync of the folder and the tidy list come when everything is there
    write()
    total = calls["count"] - after
    assert total >= 2
    before = files_of(tmp_path)
    for k in range(1, total + 1):
        calls.update(count=0, fail_at=k)
        with pytest.raises(OSError, match="No space left on device") as error:
            write()
        assert (
            error.value.errno == errno.ENOSPC
            and "\n" not in str(error.value)
            and "cannot write" in str(error.value)
        )
        assert files_of(tmp_path) == before, (k, total)
    calls.update(fail_at=0)
    write()


@pytest.mark.parametrize("which", ["store", "pt", "npz", "checkpoint-like", "folder"])
def test_real_write_failure(tmp_path, clean, which):
    """The kernel itself refuses to let files grow (RLIMIT_FSIZE), at several sizes."""
    (tmp_path / "images").mkdir()
    write = writers(clean, tmp_path)[which]
    write()
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    for limit in (0, 100, 257):
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
        try:
            with pytest.raises(OSError, match="cannot write") as error:
                write()
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        assert error.value.errno == errno.EFBIG and "\n" not in str(error.value)
        assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_interrupted_writer_leaves_nothing(tmp_path):
    (tmp_path / "a").write_bytes(b"old")

    def interrupted(file):
        file.write(b"half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        data.write_files(
            {tmp_path / "b": lambda file: file.write(b"new"), tmp_path / "a": interrupted}
        )
    assert files_of(tmp_path) == {"a": b"old"}
    with pytest.raises(RuntimeError, match="mine"):
        data.write_file(tmp_path / "a", lambda file: (_ for _ in ()).throw(RuntimeError("mine")))
    assert files_of(tmp_path) == {"a": b"old"}


def test_killed_writers_leave_only_temporary_files(tmp_path):
    (tmp_path / "a").write_bytes(b"old")
    child = os.fork()
    if child == 0:
        data.write_file(tmp_path / "a", lambda file: (file.write(b"half"), os._exit(9)))
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
    assert (tmp_path / "a").read_bytes() == b"old" and len(list(tmp_path.iterdir())) == 2
    data.sweep(tmp_path)
    assert files_of(tmp_path) == {"a": b"old"}


def test_export_with_a_failing_image(tmp_path, clean, monkeypatch):
    """No half image under a final name; the error comes out, the pool stops."""
    plain, count = atomic._write, []

    def failing(temporary, path, writer, durable):
        count.append(path)
        if len(count) > 10:
            temporary.write_bytes(b"half")
            raise OSError(errno.ENOSPC, f"cannot write {path}: No space left on device")
        return plain(temporary, path, writer, durable)

    monkeypatch.setattr(atomic, "_write", failing)
    with pytest.raises(OSError, match="No space left"):
        data.export_folder(clean, torch.zeros(clean.images.shape), tmp_path / "out", eps=EPS)
    left = [
        path for path in (tmp_path / "out").rglob("*") if path.is_file() and path.name != data.LIST
    ]
    assert len(left) == 10 and all(path.suffix == ".png" for path in left)
    problems = data.verify(clean, tmp_path / "out", eps=EPS).problems
    assert len(problems) == 15 and all("missing" in problem for problem in problems)


EXPORT = """
import sys, torch
from miue_fast import data
torch.set_num_threads(1)
clean = data.shapes(3000, seed=3)
print("ready", flush=True)
data.export_folder(clean, data.random_noise(clean, 8 / 255, 0), sys.argv[1], eps=8 / 255)
"""


def test_killed_export_leaves_whole_images_only(tmp_path):
    clean = data.shapes(3000, seed=3)
    wanted = data.apply_poison(clean.images, data.random_noise(clean, EPS, 0), EPS)
    for k, enough in enumerate((1, 400)):
        out = tmp_path / str(k)
        child = subprocess.Popen([sys.executable, "-c", EXPORT, str(out)], stdout=subprocess.PIPE)
        assert child.stdout.readline() == b"ready\n"
        while child.poll() is None and len(list(out.rglob("*.png"))) < enough:
            time.sleep(0.005)
        child.kill()
        child.wait()
        child.stdout.close()
        done = [path for path in out.rglob("*.png") if not path.name.startswith(".")]
        assert enough <= len(done) < 3000
        for path in done:
            image = torch.from_numpy(np.array(Image.open(path))).permute(2, 0, 1)
            assert torch.equal(image, wanted[int(path.stem)])
        assert data.verify(clean, out, eps=EPS).count == len(done)


# folders that cannot be written


def as_nobody(action):
    """Runs `action` in a child without root's rights; True if it raised an OSError of one line."""
    child = os.fork()
    if child == 0:
        if os.getuid() == 0:
            os.setgid(65534)
            os.setuid(65534)
        try:
            action()
        except OSError as error:
            os._exit(10 if "cannot write" in str(error) and "\n" not in str(error) else 11)
        os._exit(12)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 10


@pytest.mark.skipif(sys.platform == "win32", reason="permission bits of POSIX")
def test_unwritable_folder_is_found_first(tmp_path, clean):
    for folder in (
        tmp_path,
        *[p for p in tmp_path.parents if p.name.startswith(("pytest-", "popen-"))],
    ):
        os.chmod(folder, 0o755)
    locked = tmp_path / "locked"
    locked.mkdir(mode=0o555)
    started = []
    assert as_nobody(lambda: data.check_writable(locked))
    assert as_nobody(lambda: data.check_writable(locked / "new" / "er"))
    assert as_nobody(
        lambda: data.export_folder(
            clean,
            torch.zeros(clean.images.shape),
            locked,
            eps=EPS,
            progress=lambda *a: started.append(a),
        )
    )
    assert as_nobody(
        lambda: data.save_poison(locked, torch.zeros(clean.images.shape), clean, {"eps": EPS})
    )
    assert list(locked.iterdir()) == []


def test_check_writable(tmp_path):
    assert data.check_writable(tmp_path / "new" / "er") == tmp_path / "new" / "er"
    assert list((tmp_path / "new" / "er").iterdir()) == []
    (tmp_path / "file").write_text("x")
    with pytest.raises(ValueError, match="the file"):
        data.check_writable(tmp_path / "file")
    with pytest.raises(OSError, match="cannot write"):
        data.check_writable("/proc/miue" if os.path.isdir("/proc") else tmp_path / "file" / "x")


NAMES = st.text("ab./", min_size=1, max_size=6).map(lambda s: s + ".png") | st.sampled_from(
    ["a.jpg", "a.png", "a.jpg.png", "a.png.png"]
)


@settings(max_examples=200, deadline=None)
@given(st.lists(NAMES))
def test_target_names_never_meet(names):
    from miue_fast.data.tree import target_names

    names = sorted(set(names))
    for suffix in (".png", ".tiff"):
        targets = target_names(names, [], suffix)
        assert list(targets) == names and len(set(targets.values())) == len(names)
        assert all(target.endswith(suffix) for target in targets.values())
        half = target_names(names[::2], names[1::2], suffix)
        assert half == {name: targets[name] for name in names[::2]}


def test_zip_container_of_pt_is_checked(tmp_path, clean):
    """The checksum that torch.load itself ignores."""
    data.export_pt(clean, data.random_noise(clean, EPS, 0), tmp_path / "poison.pt")
    with zipfile.ZipFile(tmp_path / "poison.pt") as archive:
        (member,) = [info for info in archive.infolist() if info.filename.endswith("data/0")]
    content = bytearray((tmp_path / "poison.pt").read_bytes())
    start = content.index(
        torch.load(tmp_path / "poison.pt", weights_only=True).numpy().tobytes()[:64]
    )
    content[start + member.file_size // 2] ^= 1
    (tmp_path / "poison.pt").write_bytes(content)
    torch.load(tmp_path / "poison.pt", weights_only=True)  # notices nothing
    with pytest.raises(ValueError, match="damaged"):
        data.load_poison(tmp_path / "poison.pt")
    shutil.copy(tmp_path / "poison.pt", tmp_path / "poison.zip")
    with pytest.raises(ValueError, match=r"\.safetensors, \.pt"):
        data.load_poison(tmp_path / "poison.zip")
