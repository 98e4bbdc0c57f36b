"""Kill, interrupt, fill the disk, flip a bit: a run resumes to the same bits, and nothing that
existed is lost.

MIUE_KILLS sets the number of SIGKILLs (default 6; `make fuzz` asks for more).
"""

import errno
import json
import multiprocessing
import os
import random
import signal
import time
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from _runs import SMALL
from torch import nn

from miue_fast import data
from miue_fast.data import atomic
from miue_fast.generation import Interrupted, checkpoint, generate
from miue_fast.generation.descent import Descent
from miue_fast.generation.run import BiLevelRun
from miue_fast.generation.training import Trainer

KILLS = int(os.environ.get("MIUE_KILLS", "6"))


@pytest.fixture(scope="module")
def images():
    return data.shapes(40, seed=5, size=16, classes=4)


def run(dataset, out, **options):
    return generate(dataset, out, **{**SMALL, "epochs": 4, **options})


def stop_after(monkeypatch, epochs, reason):
    """The run ends with `reason` in the middle of the poison step that follows `epochs` saved
    ones.
    """
    real, calls = Descent.__call__, []

    def descend(*args, **kwargs):
        calls.append(1)
        if len(calls) == 3 * epochs + 2:  # three batches per epoch
            raise reason
        return real(*args, **kwargs)

    monkeypatch.setattr(Descent, "__call__", descend)


@pytest.fixture
def half(images, tmp_path, monkeypatch):
    """A folder with a run that was stopped in its third epoch of four."""
    with monkeypatch.context() as patch:
        stop_after(patch, 2, KeyboardInterrupt())
        with pytest.raises(Interrupted):
            run(images, tmp_path)
    return tmp_path


def contents(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


# ---- going on


@pytest.mark.skipif(
    "forkserver" not in multiprocessing.get_all_start_methods(),
    reason="this system has no forkserver",
)
def test_killed_at_random_moments_the_result_has_the_same_bits(images, tmp_path):
    npz = tmp_path / "images.npz"
    np.savez(npz, images=images.images.numpy(), labels=images.labels.numpy())
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["miue_fast.generation"])

    def start(out):
        process = context.Process(
            target=generate, args=(str(npz), str(out)), kwargs={**SMALL, "epochs": 8}
        )
        process.start()
        return process

    for folder in ("warm-up", "whole"):  # the first start waits for the fork server
        clock = time.perf_counter()
        process = start(tmp_path / folder)
        process.join()
        took = time.perf_counter() - clock
        assert process.exitcode == 0
    dice, kills, resumed, rounds = random.Random(5), 0, 0, 0
    while kills < KILLS:
        out = tmp_path / f"killed-{rounds}"
        rounds += 1
        while True:
            before = checkpoint.saved_epoch(out / checkpoint.NAME)
            resumed += before > 0
            process = start(out)
            process.join(dice.uniform(0, took))
            if process.exitcode is None:
                os.kill(process.pid, signal.SIGKILL)
                process.join()
            assert process.exitcode in (0, -signal.SIGKILL)
            assert checkpoint.saved_epoch(out / checkpoint.NAME) >= before
            if process.exitcode == 0:
                break
            kills += 1
        for name in ("poison.safetensors", "manifest.json"):
            assert (out / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
        assert sorted(path.name for path in out.iterdir()) == sorted(
            path.name for path in (tmp_path / "whole").iterdir()
        )
    assert resumed > 0


@pytest.mark.parametrize(
    "options", [{}, {"delta_dtype": "int8", "random_start": True}, {"momentum": 0.0}]
)
def test_interrupted_and_resumed_is_the_uninterrupted_run(images, tmp_path, monkeypatch, options):
    whole = run(images, tmp_path / "whole", **options)
    with monkeypatch.context() as patch:
        stop_after(patch, 2, KeyboardInterrupt())
        with pytest.raises(Interrupted) as told:
            run(images, tmp_path / "cut", **options)
    assert str(told.value).startswith(
        "interrupted: epoch 2 of 4 is saved in "
    ) and "the same command goes on" in str(told.value)
    assert "\n" not in str(told.value)
    rest = run(images, tmp_path / "cut", **options)
    assert torch.equal(whole.delta, rest.delta)
    timeless = [
        [
            {k: v for k, v in row.items() if "second" not in k and "per_s" not in k}
            for row in r.history
        ]
        for r in (whole, rest)
    ]
    assert timeless[0] == timeless[1] and len(timeless[0]) == 4
    left, right = (
        checkpoint.load(tmp_path / name / checkpoint.NAME)[0] for name in ("whole", "cut")
    )
    assert left.keys() == right.keys() and all(torch.equal(left[k], right[k]) for k in left)
    assert (tmp_path / "cut" / "metrics.csv").read_text().count("\n") == 5


def test_a_finished_run_is_returned_again(images, tmp_path, monkeypatch):
    first = run(images, tmp_path)
    monkeypatch.setattr(Trainer, "epoch", lambda *args, **kwargs: pytest.fail("worked again"))
    assert torch.equal(run(images, tmp_path).delta, first.delta)


def test_the_network_chunk_may_change(images, half):
    assert run(images, half, network_chunk=4).delta.any()


def test_interrupted_before_anything_is_saved(images, tmp_path, monkeypatch):
    stop_after(monkeypatch, 0, KeyboardInterrupt())
    with pytest.raises(Interrupted, match="no epoch was finished, nothing is saved"):
        run(images, tmp_path)
    assert contents(tmp_path) == {}


def test_interrupted_without_an_output_folder(images, monkeypatch):
    stop_after(monkeypatch, 1, KeyboardInterrupt())
    with pytest.raises(Interrupted, match="nothing is saved \\(no output folder\\)"):
        run(images, None)


# ---- nothing is lost


FOREIGN = {
    "zeta": ({"zeta": 0.5}, "the same options, got zeta = 0.1 (now 0.5)"),
    "epochs": ({"epochs": 9}, "epochs = 4 (now 9)"),
    "seed": ({"seed": 8}, "seed = 7 (now 8)"),
    "width": ({"width": 3}, "width = 2 (now 3)"),
    "model": ({"model": "resnet18"}, "model = 'small_resnet' (now 'resnet18')"),
    "store": ({"delta_dtype": "float16"}, "delta_dtype = 'float32' (now 'float16')"),
    "no resume": ({"resume": False}, "expected an empty folder or a run to resume"),
}


@pytest.mark.parametrize("name", FOREIGN)
def test_a_checkpoint_of_other_options_is_refused_and_kept(images, half, name):
    options, part = FOREIGN[name]
    before = contents(half)
    with pytest.raises(ValueError) as error:
        run(images, half, **options)
    assert (
        part in str(error.value)
        and "overwrite" in str(error.value)
        and "\n" not in str(error.value)
    )
    assert contents(half) == before


@pytest.mark.parametrize("what", ["pixel", "label"])
def test_a_checkpoint_of_other_data_is_refused_and_kept(images, half, what):
    other = images.select(range(len(images)))
    (other.images if what == "pixel" else other.labels).view(-1)[0] ^= 1
    before = contents(half)
    with pytest.raises(ValueError, match="these images and labels, got one of another data set"):
        run(other, half)
    assert contents(half) == before


def test_a_checkpoint_of_another_network_is_refused(images, tmp_path):
    class Net(torch.nn.Sequential):
        def __init__(self, width):
            super().__init__(
                torch.nn.Conv2d(3, width, 3),
                torch.nn.AdaptiveAvgPool2d(1),
                torch.nn.Flatten(),
                torch.nn.Linear(width, 4),
            )

    run(images, tmp_path, model=Net(4), feature="1")
    with pytest.raises(
        ValueError, match="expected a checkpoint of this model, got one with other layers"
    ):
        run(images, tmp_path, model=Net(5), feature="1")


def test_overwrite_starts_again(images, half, tmp_path):
    fresh = run(images, half, overwrite=True, seed=8)
    assert torch.equal(fresh.delta, run(images, None, seed=8).delta) and len(fresh.history) == 4


def test_a_poison_without_a_checkpoint_is_not_replaced(images, tmp_path):
    run(images, tmp_path)
    (tmp_path / checkpoint.NAME).unlink()
    before = contents(tmp_path)
    with pytest.raises(ValueError, match=r"got .*poison\.safetensors; set overwrite"):
        run(images, tmp_path)
    assert contents(tmp_path) == before


def _small(folder):
    """A checkpoint of a few hundred bytes, so that every bit of it can be tried."""
    path = folder / checkpoint.NAME
    checkpoint.save(
        path,
        {"delta": torch.arange(4.0), "model.w": torch.ones(3, dtype=torch.int64)},
        {"epoch": 3, "options": {"eps": 0.5}},
    )
    return path


def test_every_flipped_bit_is_found(tmp_path):
    """ValueError of one line, or (where JSON means the same) exactly the same content."""
    path = _small(tmp_path)
    good = path.read_bytes()
    tensors, header = checkpoint.load(path)
    harmless = 0
    for bit in range(len(good) * 8):
        bad = bytearray(good)
        bad[bit // 8] ^= 1 << bit % 8
        path.write_bytes(bad)
        try:
            got, got_header = checkpoint.load(path)
        except ValueError as error:
            assert "checkpoint" in str(error) and "\n" not in str(error), str(error)
            continue
        harmless += 1
        assert (
            got_header == header
            and got.keys() == tensors.keys()
            and all(torch.equal(got[k], tensors[k]) for k in got)
        )
    assert harmless < 16


def test_every_truncation_is_found(tmp_path):
    path = _small(tmp_path)
    good = path.read_bytes()
    for length in range(len(good)):
        path.write_bytes(good[:length])
        with pytest.raises(ValueError, match="checkpoint") as error:
            checkpoint.load(path)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "kind", ["flipped", "text", "other safetensors", "other format", "not json"]
)
def test_a_corrupt_or_foreign_file_is_refused_and_kept(images, half, kind):
    path = half / checkpoint.NAME
    if kind == "flipped":
        content = bytearray(path.read_bytes())
        content[-100] ^= 16
        path.write_bytes(content)
    elif kind == "text":
        path.write_text("my thesis\n" * 100)
    elif kind == "other safetensors":
        safetensors.torch.save_file({"weight": torch.ones(2)}, path)
    else:
        tensors, text = (
            {"delta": torch.ones(2)},
            json.dumps({"format": "miue_fast checkpoint 99"}) if kind == "other format" else "[1]",
        )
        safetensors.torch.save_file(
            tensors, path, {"header": text, "sha256": checkpoint._digest(tensors, text)}
        )
    before = contents(half)
    with pytest.raises(ValueError) as error:
        run(images, half)
    assert (
        checkpoint.NAME in str(error.value)
        and "move it away" in str(error.value)
        and "\n" not in str(error.value)
    )
    with pytest.raises(
        ValueError, match=r"checkpoint\.safetensors, which was changed since; move it away"
    ):
        run(images, half, overwrite=True)
    assert contents(half) == before


# ---- a full disk


@pytest.mark.parametrize("after", [0, 1, 1000])
@pytest.mark.parametrize("call", ["write", "fsync"])
def test_a_full_disk_keeps_the_last_checkpoint(images, half, monkeypatch, call, after):
    """Nothing but the write fails: the old file stays whole, no temporary file stays, and the run
    goes on from it later.
    """
    before = contents(half)
    full = OSError(errno.ENOSPC, "No space left on device")
    with monkeypatch.context() as patch:
        if call == "fsync":

            def fsync(descriptor):
                raise full

            patch.setattr(atomic.os, "fsync", fsync)
        else:

            def write(self, content):
                view = memoryview(content).cast("B")
                os.write(self.fileno(), view[:after])
                self.error = full
                raise full

            patch.setattr(atomic._Sink, "write", write)
        with pytest.raises(OSError, match="No space left") as error:
            run(images, half)
    assert error.value.errno == errno.ENOSPC and "\n" not in str(error.value)
    assert contents(half) == before
    assert torch.equal(run(images, half).delta, run(images, None).delta)


def test_leftovers_of_a_killed_write_are_swept(images, half):
    leftover = half / f".0123456789abcdef{atomic.TEMPORARY}"
    leftover.write_bytes(b"half a checkpoint")
    run(images, half)
    assert not leftover.exists()


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full on this system")
def test_the_kernels_own_error_of_a_full_disk(monkeypatch, tmp_path):
    path = _small(tmp_path)
    before = path.read_bytes()
    real = atomic._Sink.__init__
    monkeypatch.setattr(
        atomic._Sink, "__init__", lambda self, name, mode: real(self, "/dev/full", "w")
    )
    with pytest.raises(OSError, match="No space left"):
        checkpoint.save(path, {"delta": torch.zeros(9)}, {"epoch": 4})
    assert path.read_bytes() == before and sorted(os.listdir(tmp_path)) == [path.name, data.LIST]


class Remembering(nn.Module):
    """A buffer that training changes and the state dict leaves out."""

    def __init__(self, p=0.1):
        super().__init__()
        torch.manual_seed(5)
        self.conv, self.avgpool, self.drop, self.fc = (
            nn.Conv2d(3, 4, 3),
            nn.AdaptiveAvgPool2d(1),
            nn.Dropout(p),
            nn.Linear(4, 3),
        )
        self.register_buffer("seen", torch.ones(()), persistent=False)

    def forward(self, x):
        if self.training:
            self.seen += x.detach().mean()
        return self.fc(self.drop(self.avgpool(self.conv(x).relu() * self.seen).flatten(1)))


@pytest.mark.parametrize("p", [0.1, 0.9])
def test_buffers_outside_the_state_dict_are_resumed_and_another_model_is_told(
    tmp_path, monkeypatch, caplog, p
):
    shapes = data.shapes(30, seed=0, size=16, classes=3, difficulty=0)
    small = dict(steps=2, batch=30, epochs=3, progress=False)
    whole, straight = BiLevelRun.epoch, generate(shapes, model=Remembering(), **small).delta

    def stop(self, number, tick):
        if number == 2:
            raise KeyboardInterrupt
        return whole(self, number, tick)

    monkeypatch.setattr(BiLevelRun, "epoch", stop)
    with pytest.raises(Interrupted):
        generate(shapes, tmp_path, model=Remembering(), **small)
    monkeypatch.setattr(BiLevelRun, "epoch", whole)
    resumed = generate(shapes, tmp_path, model=Remembering(p), **small).delta
    assert ("prints differently" in caplog.text) == (p == 0.9) and (
        p == 0.9 or torch.equal(resumed, straight)
    )
