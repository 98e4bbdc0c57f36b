"""The command line: exit codes, one line per bad input, options that follow the dataclass, and the
whole path on tiny images.
"""

import argparse
import json
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import fields

import pytest
from _commands import TINY, complaint, files, run
from PIL import Image

from miue_fast import data
from miue_fast.cli import arguments, commands
from miue_fast.generation import OBJECTIVES, Options


def test_generate_export_verify_evaluate(root, capsys, tmp_path):
    assert run("verify", root / "train", root / "out/images", "--eps", "8/255") == 0
    assert "ok: 60 images compared, 0 problems" in capsys.readouterr().out
    assert run("verify", root / "train", root / "out") == 0
    assert (
        run(
            "export",
            root / "out",
            "--data",
            root / "train",
            "--to",
            tmp_path / "bmp",
            "--format",
            "bmp",
        )
        == 0
    )
    assert run("verify", root / "train", tmp_path / "bmp") == 0
    assert (
        run(
            "export",
            root / "out",
            "--data",
            root / "train",
            "--to",
            tmp_path / "p.pt",
            "--format",
            "pt",
        )
        == 0
    )
    assert (
        run(
            "export",
            tmp_path / "p.pt",
            "--data",
            root / "train",
            "--to",
            tmp_path / "p.npz",
            "--format",
            "npz",
        )
        == 0
    )
    assert run("verify", root / "train", tmp_path / "p.npz") == 0
    capsys.readouterr()
    words = [
        "--data",
        root / "train",
        "--test",
        root / "test",
        "--epochs",
        1,
        "--seeds",
        2,
        "--quiet",
    ]
    assert (
        run(
            "evaluate",
            *words,
            "--poisoned",
            root / "out/images",
            "--json",
            tmp_path / "new/a.json",
            "--figure",
            tmp_path / "a.png",
        )
        == 0
    )
    assert "random noise" in capsys.readouterr().out
    told = json.loads((tmp_path / "new/a.json").read_text())
    assert (
        told["options"]["seeds"] == [0, 1] and told["poison"]["options"]["model"] == "small_resnet"
    )
    assert (
        str(root) not in (tmp_path / "new/a.json").read_text()
        and (tmp_path / "a.png").stat().st_size > 10_000
    )
    for form in (root / "out", tmp_path / "p.npz"):
        assert run("evaluate", *words, "--poisoned", form, "--json", tmp_path / "b.json") == 0
        again = json.loads((tmp_path / "b.json").read_text())["rows"]
        assert [r["test_curve"] for r in again["poisoned"]["runs"]] == [
            r["test_curve"] for r in told["rows"]["poisoned"]["runs"]
        ]


def test_the_same_command_again_resumes_and_exports_again(root):
    before = files(root / "out")
    assert (
        run("generate", "--data", root / "train", "--out", root / "out", "--export", "png", *TINY)
        == 0
    )
    assert files(root / "out") == before


def test_verify_fails_with_1(root, tmp_path, capsys):
    data.export_folder(
        *(data.load(root / "train"), data.load(root / "train").images * 0.0),
        tmp_path / "copy",
        eps=0,
    )
    victim = sorted((tmp_path / "copy").rglob("*.png"))[7]
    with Image.open(victim) as image:
        image = image.copy()
    image.putpixel(
        (3, 3),
        tuple((value + 9) % 256 if value < 128 else value - 9 for value in image.getpixel((3, 3))),
    )
    image.save(victim)
    assert run("verify", root / "train", tmp_path / "copy") == 1
    assert victim.name in capsys.readouterr().out
    assert run("verify", root / "train", tmp_path / "copy", "--eps", "9/255") == 1
    assert (
        f"{victim.name}: within the budget, but not the file that was written"
        in capsys.readouterr().out
    )
    (tmp_path / "copy" / data.LIST).unlink()
    (tmp_path / "copy/miue-export.json").unlink()  # as a folder of another program
    assert run("verify", root / "train", tmp_path / "copy", "--eps", "9/255") == 0
    victim.unlink()
    assert run("verify", root / "train", tmp_path / "copy", "--eps", "9/255") == 1


def _bad_inputs(root, tmp):
    """(command line, words of its complaint)."""
    train, out = root / "train", tmp / "never"
    (tmp / "file").write_text("a file")
    (tmp / "one/a").mkdir(parents=True)
    Image.new("RGB", (16, 16)).save(tmp / "one/a/1.png")
    generate = ["generate", "--data", train, "--out", out, *TINY]
    evaluate = [
        "evaluate",
        "--data",
        train,
        "--poisoned",
        root / "out",
        "--test",
        root / "test",
        "--quiet",
    ]
    return [
        ([], "COMMAND"),
        (["poison"], "invalid choice"),
        (["generate", "--out", out], "--data"),
        ([*generate, "--eps", "eight"], "8/255"),
        ([*generate, "--eps", "8/0"], "8/255"),
        ([*generate, "--eps", "8"], "eps: expected"),
        ([*generate, "--eps", "-8/255"], "eps: expected"),
        ([*generate, "--eps=-8/255"], "eps: expected"),
        ([*generate, "--preset", "best"], "--preset"),
        ([*generate, "--bat", "5"], "--bat"),
        ([*generate, "--batch", "1"], "batch: expected"),
        ([*generate, "--temperature", "nan"], "temperature: expected"),
        ([*generate, "--denominator", "some"], "denominator: expected"),
        ([*generate, "--dtype", "int8"], "dtype: expected"),
        ([*generate, "--device", "cuda:99"], "device: expected"),
        ([*generate, "--device", "tpu"], "device: expected"),
        ([*generate, "--backend", "fortran"], "backend: expected"),
        ([*generate, "--feature", "nose"], "feature: expected"),
        ([*generate, "--size", "0"], "size: expected"),
        ([*generate, "--lr", "1e30", "--epochs", "2"], "lower --lr"),
        ([*generate, "--export", "jpeg"], "--allow-lossy"),
        (["generate", "--data", tmp / "nowhere", "--out", out], "nowhere"),
        (["generate", "--data", tmp / "one", "--out", out], "at least 2 classes"),
        (["generate", "--data", train, "--out", tmp / "file", *TINY], "the file"),
        (["generate", "--data", train, "--out", "/proc/nobody/can/write", *TINY], "cannot write"),
        (
            ["generate", "--data", train, "--out", train / "inside", "--export", "png", *TINY],
            "outside the images' own",
        ),
        (["generate", "--data", root / "other", "--out", root / "out", *TINY], "another data set"),
        (
            ["generate", "--data", train, "--out", root / "out", *TINY, "--steps", "3"],
            "same options",
        ),
        (["generate", "--data", train, "--out", root / "out", "--no-resume", *TINY], "overwrite"),
        (["export", root / "out", "--data", root / "other", "--to", out], "fingerprint"),
        (["export", root / "out", "--data", train, "--to", root / "out/images"], "new or empty"),
        (
            ["export", root / "out", "--data", train, "--to", out, "--format", "jpeg"],
            "--allow-lossy",
        ),
        (["export", tmp / "nowhere.pt", "--data", train, "--to", out], "no such file"),
        (["export", tmp / "file", "--data", train, "--to", out], "poison"),
        (["verify", train, tmp / "nowhere"], "nowhere"),
        (["verify", tmp / "nowhere", train], "nowhere"),
        (["verify", train, root / "out/images", "--eps", "2"], "eps: expected"),
        ([*evaluate, "--epochs", "0"], "epochs: expected"),
        ([*evaluate, "--seeds", "0"], "seeds: expected"),
        ([*evaluate, "--victim", "vgg"], "--victim"),
        ([*evaluate, "--lr", "-1"], "lr: expected"),
        ([*evaluate, "--poisoned", tmp / "nowhere"], "nowhere"),
        ([*evaluate, "--test", tmp / "one"], "classes"),
        ([*evaluate, "--data", root / "other"], "fingerprint"),
        ([*evaluate, "--json", "/proc/nobody/a.json"], "cannot write"),
        (["demo", "--out", train], "one of an earlier demo"),
    ]


def test_bad_input_is_one_line_exit_code_2_and_nothing_is_lost(root, tmp_path, capsys):
    for words, expected in _bad_inputs(root, tmp_path):
        before = files(root)
        code = run(*words)
        assert expected in complaint(capsys), words
        assert code == 2, words
        assert files(root) == before, words
        assert not list((tmp_path / "never").rglob("*.safetensors")), words


@pytest.mark.parametrize("damage", ["truncated", "flipped", "foreign"])
def test_a_bad_checkpoint_is_refused_and_kept(root, tmp_path, capsys, damage):
    out = tmp_path / "out"
    assert run("generate", "--data", root / "train", "--out", out, *TINY) == 0
    path = out / "checkpoint.safetensors"
    content = bytearray(path.read_bytes())
    if damage == "flipped":
        content[-100] ^= 1
    path.write_bytes(
        {
            "truncated": content[: len(content) // 2],
            "flipped": content,
            "foreign": b"not a checkpoint",
        }[damage]
    )
    capsys.readouterr()
    before = files(out)
    assert run("generate", "--data", root / "train", "--out", out, *TINY) == 2
    assert "checkpoint" in complaint(capsys) and files(out) == before
    assert (
        run("generate", "--data", root / "train", "--out", out, "--overwrite", *TINY) == 2
    )  # not what was written there
    assert "move it away" in complaint(capsys) and files(out) == before
    path.rename(out / "away")
    assert run("generate", "--data", root / "train", "--out", out, "--overwrite", *TINY) == 0


def test_a_damaged_poison_is_never_used(root, tmp_path, capsys):
    out = tmp_path / "out"
    assert run("generate", "--data", root / "train", "--out", out, *TINY) == 0
    content = bytearray((out / "poison.safetensors").read_bytes())
    content[-100] ^= 1
    (out / "poison.safetensors").write_bytes(content)
    capsys.readouterr()
    assert run("export", out, "--data", root / "train", "--to", tmp_path / "images") == 2
    assert "sha256" in complaint(capsys) and not (tmp_path / "images").exists()


def test_unreadable_images_are_listed_and_the_run_goes_on(root, tmp_path, capsys):
    clean = data.load(root / "train")
    data.export_folder(clean, clean.images * 0.0, tmp_path / "data", eps=0)
    bad = sorted((tmp_path / "data").rglob("*.png"))[3]
    bad.write_bytes(bad.read_bytes()[:50])
    assert (
        run(
            "generate",
            "--data",
            tmp_path / "data",
            "--out",
            tmp_path / "out",
            "--export",
            "png",
            *TINY,
        )
        == 3
    )
    assert f"{bad.parent.name}/{bad.name}" in complaint(capsys)
    assert len(list((tmp_path / "out/images").rglob("*.png"))) == 59
    assert run("verify", tmp_path / "data", tmp_path / "out/images") == 3
    capsys.readouterr()
    words = [
        "--data",
        tmp_path / "data",
        "--poisoned",
        tmp_path / "out/images",
        "--test",
        root / "test",
        "--epochs",
        1,
        "--quiet",
    ]
    assert run("evaluate", *words) == 3
    assert bad.name in complaint(capsys)


def test_jpeg_is_written_when_asked_for(root, tmp_path):
    words = [
        "export",
        root / "out",
        "--data",
        root / "train",
        "--to",
        tmp_path / "jpeg",
        "--format",
        "jpeg",
        "--allow-lossy",
    ]
    assert (
        run(*words) == 0 and run("verify", root / "train", tmp_path / "jpeg", "--eps", "1/255") == 1
    )


def test_every_command_has_its_arguments(capsys):
    with pytest.raises(SystemExit):
        commands.main(["--help"])
    assert set(re.findall(r"^    (\w+) ", capsys.readouterr().out, re.MULTILINE)) == set(
        commands.COMMANDS
    )


def test_options_are_those_of_the_dataclass(capsys):
    own = [name for objective in OBJECTIVES.values() for name in objective.options]
    assert sorted([*arguments.HELP, *own]) == sorted(field.name for field in fields(Options))
    with pytest.raises(SystemExit) as left:
        commands.main(["generate", "--help"])
    told = capsys.readouterr().out
    assert left.value.code == 0
    for field in fields(Options):
        assert f"--{field.name.replace('_', '-')} " in told
    assert "(8/255)" in told and "(0.2/255)" in told


def test_every_option_reaches_generate(monkeypatch, root, tmp_path):
    given = Options(
        zeta=0.5,
        denominator="negatives",
        normalize_dim=False,
        temperature=0.25,
        eps=4 / 255,
        eps_0=1 / 255,
        alpha_0=1 / 255,
        alpha_K=0.5 / 255,
        steps=3,
        epochs=4,
        poison_every=2,
        batch=20,
        train_batch=10,
        lr=0.02,
        mixed=0.25,
        attack=2 / 255,
        attack_steps=3,
        momentum=0.8,
        weight_decay=0.0,
        seed=11,
        flip=0.0,
        random_start=True,
        robust="crop,grid:3",
        eot=2,
        width=3,
        network_chunk=7,
        device="cpu",
        dtype="bfloat16",
        delta_dtype="float16",
        channels_last=False,
        backend="reference",
        fused=False,
        fp8=True,
        objective="tap",
        classwise=True,
        target_shift=3,
    )
    words = []
    for field in fields(Options):
        value = getattr(given, field.name)
        assert value != field.default
        flag = field.name.replace("_", "-")
        words += (
            [f"--{flag}" if value else f"--no-{flag}"]
            if isinstance(value, bool)
            else [f"--{flag}", repr(value).strip("'")]
        )
    seen = {}

    def stop(dataset, out, **options):
        seen.update(options)
        raise ValueError("seen")

    monkeypatch.setattr(commands, "generate", stop)
    assert run("generate", "--data", root / "train", "--out", tmp_path, *words) == 2
    assert {name: seen[name] for name in given.as_dict()} == given.as_dict()
    assert (
        run("generate", "--data", root / "train", "--out", tmp_path, "--alpha-0", "0.5/255") == 2
        and seen["alpha_0"] == 0.5 / 255
    )


def test_a_bug_still_shows_its_traceback(monkeypatch, root):
    def broken(*args, **options):
        raise TypeError("a bug")

    monkeypatch.setattr(commands, "evaluate", broken)
    with pytest.raises(TypeError):
        run(
            "evaluate",
            "--data",
            root / "train",
            "--poisoned",
            root / "out",
            "--test",
            root / "test",
        )


def test_number():
    assert arguments._number("8/255") == 8 / 255 and arguments._number("0.1") == 0.1
    for text in ("", "a", "1/0", "1/2/3", "/"):
        with pytest.raises(argparse.ArgumentTypeError):
            arguments._number(text)


def test_info_and_version(capsys):
    assert run("info") == 0
    assert "nt_xent" in capsys.readouterr().out
    with pytest.raises(SystemExit) as left:
        commands.main(["--version"])
    assert left.value.code == 0


def test_ctrl_c_saves_and_says_how_to_go_on(root, tmp_path):
    """The installed command as a process of its own, interrupted after an epoch was saved.

    Of a shell that runs the tests in the background it would inherit that Ctrl-C is ignored.
    """
    out = tmp_path / "out"
    words = [
        "generate",
        "--data",
        root / "train",
        "--out",
        out,
        "--model",
        "small_resnet",
        "--width",
        4,
        "--steps",
        2,
        "--epochs",
        100_000,
    ]
    command = [sys.executable, "-m", "miue_fast", *map(str, words)]
    process = subprocess.Popen(
        command,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    deadline = time.monotonic() + 120
    while not (out / "metrics.csv").exists():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, told = process.communicate(timeout=60)
    assert process.returncode == 130 and "Traceback" not in told
    assert (
        told.splitlines()[-1].startswith("miue-fast: interrupted: epoch ")
        and "goes on from there" in told
    )
