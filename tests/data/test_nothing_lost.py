"""Nobody's files are lost: what others put into an output folder, what changes while a run works,
and what can only be seen at its end.
"""

import json
import os
import shlex
import shutil
import subprocess
import sys

import pytest
from _commands import TINY, complaint, files, run
from PIL import Image

from miue_fast import data, generate, models
from miue_fast.cli import commands
from miue_fast.data import export, preflight
from miue_fast.generation.run import BiLevelRun

RANDOM = [*TINY, "--objective", "random"]


@pytest.fixture
def start(root, tmp_path):
    """A function: `generate` into tmp_path/out with more options, returning the exit code."""
    return lambda *words: run(
        "generate", "--data", root / "train", "--out", tmp_path / "out", *words
    )


@pytest.fixture
def photos(tmp_path):
    """Two classes of three pictures of 24 x 16 pixels."""
    noise = data.shapes(6, seed=3, size=24, classes=2, difficulty=1)
    for k, picture in enumerate(noise.images):
        path = tmp_path / "photos" / "ab"[k % 2] / f"{k}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(picture[:, :16].permute(1, 2, 0).contiguous().numpy()).save(path)
    return tmp_path / "photos"


# other people's files


@pytest.mark.parametrize(
    "place",
    [
        "images/holiday/1.png",
        "images/square/00000000.png",
        "images/miue-export.json",
        "checkpoint.safetensors",
    ],
)
@pytest.mark.parametrize("again", [False, True])
def test_overwrite_keeps_what_others_put_into_the_folder(
    start, root, tmp_path, capsys, place, again, monkeypatch
):
    if again:
        assert start(*TINY, "--export", "png") == 0
    theirs = tmp_path / "out" / place
    theirs.parent.mkdir(parents=True, exist_ok=True)
    shutil.copy(next((root / "train").rglob("*.png")), theirs)
    if again and place == "images/square/00000000.png":
        theirs.write_bytes(theirs.read_bytes() + b"edited by hand")
    before = files(tmp_path / "out")
    capsys.readouterr()
    monkeypatch.setattr(BiLevelRun, "finish", lambda *a: pytest.fail("the work began"))
    assert start(*TINY, "--seed", "9", "--export", "png", "--overwrite") == 2
    assert str(theirs) in (told := complaint(capsys)) and "move it away" in told
    assert files(tmp_path / "out") == before


def test_what_is_edited_while_a_run_works_stays(start, root, tmp_path, capsys, caplog, monkeypatch):
    assert start(*TINY, "--export", "png") == 0
    mine = next((tmp_path / "out/images").rglob("*.png"))
    whole = BiLevelRun.epoch

    def edit(self, *arguments):
        mine.write_bytes(b"my own picture")
        return whole(self, *arguments)

    monkeypatch.setattr(BiLevelRun, "epoch", edit)
    capsys.readouterr()
    assert start(*TINY, "--seed", "9", "--export", "png", "--overwrite") == 2
    told = complaint(capsys)
    assert (
        mine.read_bytes() == b"my own picture"
        and "left as they are" in caplog.text
        and str(mine) in told
    )
    command = shlex.split(told.split("this exports it: ")[1])
    assert command[0] == "miue-fast" and commands.main(command[1:]) == 0
    assert run("verify", root / "train", command[command.index("--to") + 1]) == 0


def test_export_and_the_single_files_keep_what_others_wrote(start, root, tmp_path, capsys):
    assert start(*RANDOM) == 0
    for name, form in (
        ("new/poison.pt", "pt"),
        ("new/x.npz", "npz"),
        ("new/x.pkl", "pickle"),
        ("new/images", "png"),
    ):
        target = tmp_path / name
        theirs = target / "a" / "1.png" if form == "png" else target
        theirs.parent.mkdir(parents=True, exist_ok=True)
        theirs.write_bytes(b"precious")
        command = [
            "export",
            tmp_path / "out",
            "--data",
            root / "train",
            "--to",
            target,
            "--format",
            form,
        ]
        capsys.readouterr()
        for words in (command, [*command, "--overwrite"]):
            assert run(*words) == 2 and str(target) in complaint(capsys)
            assert theirs.read_bytes() == b"precious"
        shutil.rmtree(target) if form == "png" else theirs.unlink()
        assert run(*command) == run(*command, "--overwrite") == 0


def test_an_overwriting_run_removes_the_run_it_replaces_and_nothing_else(
    start, root, tmp_path, monkeypatch
):
    """Evaluations and exports under names of their own are on the same list, and are not the
    replaced run's.
    """
    longer, out = [*TINY, "--epochs", "3"], tmp_path / "out"
    assert start(*longer, "--export", "npz") == 0
    assert (
        run("export", out, "--data", root / "train", "--to", out / "mine.npz", "--format", "npz")
        == 0
    )
    assert run("export", out, "--data", root / "train", "--to", out / "copy") == 0
    words = ["--test", root / "test", "--victim", "linear", "--epochs", "1", "--quiet"]
    assert start(*longer, "--export", "png") == 0
    for place in ("result.json", "images/result.json"):
        assert (
            run(
                "evaluate",
                "--data",
                root / "train",
                "--poisoned",
                out,
                *words,
                "--json",
                out / place,
            )
            == 0
        )
    assert run("verify", root / "train", out / "images") == 0
    kept = {
        name: (out / name).read_bytes()
        for name in ("mine.npz", "result.json", "images/result.json", "copy/miue-files.sha256")
    }
    with monkeypatch.context() as patch:
        stop_at(patch, 2)
        assert start(*longer, "--seed", "9", "--overwrite") == 130
    assert not (out / "poisoned.npz").exists() and not (out / "poison.safetensors").exists()
    assert start(*longer, "--seed", "9") == 0
    assert start(*RANDOM, "--overwrite", "--export", "png") == 0
    assert {name: (out / name).read_bytes() for name in kept} == kept
    assert run("verify", root / "train", out / "copy") == 0


# an image that changes while a run works


@pytest.mark.parametrize("how", ["replaced", "removed", "damaged"])
def test_an_image_that_is_replaced_during_a_run_gets_nobody_elses_perturbation(
    photos, tmp_path, capsys, monkeypatch, how
):
    whole = BiLevelRun.epoch

    def replace(self, *arguments):
        other = Image.open(photos / "a/0.png").transpose(Image.Transpose.ROTATE_180)
        if how == "removed":
            (photos / "a/2.png").unlink()
        elif how == "damaged":
            (photos / "a/2.png").write_bytes(b"no image")
        else:
            other.save(photos / "a/2.png")
        return whole(self, *arguments)

    monkeypatch.setattr(BiLevelRun, "epoch", replace)
    words = [
        "generate",
        "--data",
        photos,
        "--out",
        tmp_path / "out",
        *TINY,
        "--size",
        "12",
        "--export",
        "png",
    ]
    assert run(*words) == 2
    told = complaint(capsys)
    assert "a/2.png: expected the image that was loaded" in told and "the poison is saved" in told
    assert (
        not (tmp_path / "out/images/a/2.png").exists()
        and (tmp_path / "out/poison.safetensors").exists()
    )


def test_verify_knows_the_images_that_were_poisoned(photos, tmp_path, capsys):
    words = [
        "generate",
        "--data",
        photos,
        "--out",
        tmp_path / "out",
        *TINY,
        "--size",
        "12",
        "--export",
        "png",
    ]
    assert run(*words) == 0 and run("verify", photos, tmp_path / "out/images") == 0
    with Image.open(photos / "a/2.png") as image:
        image = image.copy()
    for x in range(16):
        for y in range(16):
            image.putpixel((x, y), tuple(min(255, value + 1) for value in image.getpixel((x, y))))
    image.save(photos / "a/2.png")  # another picture, within the budget of the poisoned one
    capsys.readouterr()
    assert run("verify", photos, tmp_path / "out/images", "--eps", "12/255") == 1
    assert "not those that were poisoned (fingerprint)" in capsys.readouterr().out
    assert not data.verify(data.load(photos, size=16), tmp_path / "out/images", eps=12 / 255).ok


# what verify reads beside the pixels


def test_any_changed_byte_of_an_export_is_found(tmp_path):
    clean = data.shapes(6, seed=0, size=8, classes=2, difficulty=0)
    for form in ("png", "webp", "tiff", "bmp"):
        out = tmp_path / form
        data.export_folder(
            clean, data.random_noise(clean, 8 / 255, 0), out, eps=8 / 255, image_format=form
        )
        report = data.verify(clean, out, eps=8 / 255)
        assert report.ok and report.listed
        for path in sorted(out.rglob("*")):
            if not path.is_file() or path.name == data.LIST:
                continue
            content = path.read_bytes()
            for at in range(0, len(content), max(1, len(content) // 9)):
                path.write_bytes(content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :])
                assert not data.verify(clean, out, eps=8 / 255).ok, (path, at)
            path.write_bytes(content)
        assert data.verify(clean, out, eps=8 / 255).ok


def test_an_export_that_was_cut_short_over_another_one_is_found(tmp_path, monkeypatch):
    clean = data.shapes(12, seed=0, size=8, classes=2, difficulty=0)
    one, two = (data.random_noise(clean, 8 / 255, seed) for seed in (0, 1))
    data.export_folder(clean, one, tmp_path / "out", eps=8 / 255)

    def stop(done, _):
        if done == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        data.export_folder(clean, two, tmp_path / "out", eps=8 / 255, overwrite=True, progress=stop)
    report = data.verify(clean, tmp_path / "out", eps=8 / 255)
    assert not report.ok and "the last export was not finished" in report.problems[0]
    data.export_folder(clean, two, tmp_path / "out", eps=8 / 255, overwrite=True)
    assert data.verify(clean, tmp_path / "out", eps=8 / 255).ok


# advice


def stop_at(monkeypatch, last):
    whole = BiLevelRun.epoch

    def epoch(self, number, tick):
        if number == last:
            raise KeyboardInterrupt
        return whole(self, number, tick)

    monkeypatch.setattr(BiLevelRun, "epoch", epoch)


def test_the_advice_of_an_interrupted_overwrite_works(start, root, tmp_path, capsys, monkeypatch):
    longer = [*TINY, "--epochs", "3"]
    assert start(*longer, "--export", "webp") == 0
    again = [*longer, "--seed", "9", "--export", "png"]
    with monkeypatch.context() as patch:
        stop_at(patch, 2)
        capsys.readouterr()
        assert start(*again, "--overwrite") == 130
        assert "the same command without --overwrite goes on" in complaint(capsys)
    assert start(*again) == 0
    assert (
        len(data.load_poison(tmp_path / "out")[1]["files"]) == 1
        and run("verify", root / "train", tmp_path / "out/images") == 0
    )
    assert {path.suffix for path in (tmp_path / "out/images").glob("*/*")} == {".png"}
    assert (tmp_path / "out/metrics.csv").read_text().count("\n") == 4


def test_a_kill_between_the_checkpoint_and_the_removal_of_the_old_run(
    start, root, tmp_path, monkeypatch
):
    longer = [*TINY, "--epochs", "3"]
    assert start(*longer, "--export", "webp") == 0
    with monkeypatch.context() as patch:
        patch.setattr(
            "miue_fast.generation.run.remove_run",
            lambda *a, **k: (_ for _ in ()).throw(KeyboardInterrupt),
        )
        assert start(*longer, "--seed", "9", "--export", "png", "--overwrite") == 130
    assert (tmp_path / "out/poison.safetensors").exists()  # the old one's
    assert start(*longer, "--seed", "9", "--export", "png") == 0
    assert {path.suffix for path in (tmp_path / "out/images").glob("*/*")} == {".png"}
    assert run("verify", root / "train", tmp_path / "out/images") == 0


def test_the_advice_of_an_interrupted_export_works(start, root, tmp_path, capsys, monkeypatch):
    whole = data.export_folder

    def stop(dataset, *arguments, **options):
        whole(dataset.select([0]), arguments[0][:1], *arguments[1:], **options)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(data, "export_folder", stop)
        assert start(*TINY, "--export", "png", "--no-resume") == 130
    assert "the same command without --no-resume exports it again" in complaint(capsys)
    assert (
        start(*TINY, "--export", "png") == 0
        and run("verify", root / "train", tmp_path / "out/images") == 0
    )


# what only the end of a run would show


def limits(tmp_path):
    """(name of the case, options of generate, what it makes of the images, words of the
    complaint).
    """

    def wide(folder):
        Image.new("RGB", (16390, 2)).save(folder / "a/1.png")

    def wider(folder):
        Image.new("RGB", (2, 65510)).save(folder / "a/1.png")

    def long_name(folder):
        shutil.copy(folder / "a/0.png", folder / "a" / ("x" * 251 + ".png"))

    def folder_of_the_name(folder):
        (folder / "a/0.webp").mkdir()
        shutil.copy(folder / "a/0.png", folder / "a/0.webp/2.png")

    return [
        ("wide", ["webp"], wide, "webp"),
        ("wider", ["jpeg", "--allow-lossy"], wider, "jpeg"),
        ("long", ["webp"], long_name, "too long"),
        ("folder", ["webp"], folder_of_the_name, "a/0.webp"),
    ]


@pytest.mark.parametrize("case", range(4))
def test_limits_of_an_export_are_found_before_the_first_epoch(
    photos, tmp_path, capfd, monkeypatch, case
):
    name, form, make, words = limits(tmp_path)[case]
    make(photos)
    monkeypatch.setattr(BiLevelRun, "finish", lambda *a: pytest.fail("the work began"))
    before = files(tmp_path)
    assert (
        run(
            "generate",
            "--data",
            photos,
            "--out",
            tmp_path / "out",
            *TINY,
            "--size",
            "12",
            "--export",
            *form,
        )
        == 2
    ), name
    told = [line for line in capfd.readouterr().err.splitlines() if line.startswith("miue-fast: ")]
    assert len(told) == 1 and words in told[0], told
    assert files(tmp_path) == before
    monkeypatch.undo()
    if name != "long":
        assert (
            run(
                "generate",
                "--data",
                photos,
                "--out",
                tmp_path / "out",
                *RANDOM,
                "--size",
                "12",
                "--export",
                "png",
            )
            == 0
        )
        assert run("verify", photos, tmp_path / "out/images") == 0


@pytest.mark.parametrize("form", ["png", "webp", "tiff", "bmp"])
def test_the_room_on_the_disk_is_measured_before_the_first_epoch(
    photos, tmp_path, capsys, monkeypatch, form
):
    images = export._needed(data.load(photos, size=12), 8 / 255, export.FORMATS[form][1])
    weights = sum(
        tensor.nbytes
        for tensor in models.build("small_resnet", 2, width=4, size=12).state_dict().values()
    )
    needed = (
        images + 3 * 4 * 6 * 3 * 12 * 12 + 4 * weights
    )  # the poison and two checkpoints lie on the same disk
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(
        preflight.shutil, "disk_usage", lambda path: usage._replace(free=needed - 1)
    )
    with monkeypatch.context() as patch:
        patch.setattr(BiLevelRun, "finish", lambda *a: pytest.fail("the work began"))
        assert (
            run(
                "generate",
                "--data",
                photos,
                "--out",
                tmp_path / "out",
                *TINY,
                "--size",
                "12",
                "--export",
                form,
            )
            == 2
        )
        assert "of room for 6 " in (told := complaint(capsys)) and "free in" in told
        patch.setattr(preflight.shutil, "disk_usage", lambda path: usage._replace(free=needed))
        with pytest.raises(pytest.fail.Exception, match="the work began"):
            run(
                "generate",
                "--data",
                photos,
                "--out",
                tmp_path / "out",
                *TINY,
                "--size",
                "12",
                "--export",
                form,
            )
        patch.setattr(preflight.shutil, "disk_usage", lambda path: usage._replace(free=100))
        with pytest.raises(
            ValueError, match=r"room for the poison and its checkpoints, got .* free"
        ):
            generate(
                data.load(photos, size=12),
                tmp_path / "out",
                model="small_resnet",
                width=4,
                progress=False,
            )
    monkeypatch.undo()
    assert (
        run(
            "generate",
            "--data",
            photos,
            "--out",
            tmp_path / "out",
            *TINY,
            "--size",
            "12",
            "--export",
            form,
        )
        == 0
    )
    written = sum(
        preflight.file_bytes(path.stat().st_size) for path in (tmp_path / "out/images").glob("*/*")
    )
    assert written <= images <= 2 * written


@pytest.mark.parametrize("stream", ["ascii", "closed", "broken"])
def test_a_failed_print_never_prevents_an_export(photos, tmp_path, stream):
    out = tmp_path / "é"
    words = [
        sys.executable,
        "-m",
        "miue_fast",
        "generate",
        "--data",
        photos,
        "--out",
        out,
        *RANDOM,
        "--size",
        "12",
        "--export",
        "png",
    ]
    environment = {
        **os.environ,
        **({"PYTHONIOENCODING": "ascii:strict"} if stream == "ascii" else {}),
    }
    if stream == "ascii":
        code = subprocess.run(words, env=environment, stdout=subprocess.DEVNULL).returncode
    elif stream == "closed":
        code = subprocess.run(
            ["/bin/sh", "-c", f"exec {shlex.join(map(str, words))} >&- 2>&-"]
        ).returncode
    else:
        with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as child:
            child.stdout.close()
            child.stderr.close()
            code = child.wait()
    assert code == 0
    assert data.verify(photos, out / "images", eps=8 / 255).ok and json.loads(
        (out / "manifest.json").read_text()
    )


def test_the_progress_bar_of_a_run_survives_a_broken_stderr(photos, tmp_path):
    words = [
        sys.executable,
        "-m",
        "miue_fast",
        "generate",
        "--data",
        photos,
        "--out",
        tmp_path / "out",
        *[word for word in TINY if word != "--quiet"],
        "--size",
        "12",
    ]
    with subprocess.Popen(words, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL) as child:
        child.stderr.close()
        assert child.wait() == 0
    assert (tmp_path / "out/poison.safetensors").exists()


def test_an_export_that_cannot_be_written_is_told_before_the_images_are_read(
    start, root, tmp_path, capsys, monkeypatch
):
    assert start(*RANDOM) == 0
    (tmp_path / "full").mkdir()
    (tmp_path / "full/mine.txt").write_text("mine")
    (tmp_path / "x.npz").write_text("mine")
    monkeypatch.setattr(data, "load", lambda *a, **k: pytest.fail("the images were read"))
    capsys.readouterr()
    for to, form, words in (
        ("full", "png", "not empty"),
        ("x.npz", "npz", "a new file"),
        ("x.txt", "pt", "ending in .pt"),
    ):
        assert (
            run(
                "export",
                tmp_path / "out",
                "--data",
                root / "train",
                "--to",
                tmp_path / to,
                "--format",
                form,
            )
            == 2
        )
        assert words in complaint(capsys)


def test_verify_says_when_there_is_no_list_of_checksums(start, root, tmp_path, capsys):
    assert start(*RANDOM, "--export", "png") == 0
    for gone in (False, True):
        capsys.readouterr()
        assert run("verify", root / "train", tmp_path / "out/images") == 0
        assert ("no miue-files.sha256" in capsys.readouterr().out) == gone
        for name in (data.LIST, data.NOTE):  # as another program's folder
            (tmp_path / "out/images" / name).unlink(missing_ok=True)


def test_a_list_of_something_else_is_no_list_of_an_export(tmp_path):
    clean = data.shapes(6, seed=0, size=8, classes=2, difficulty=0)
    data.export_folder(clean, data.random_noise(clean, 8 / 255, 0), tmp_path, eps=8 / 255)
    for name in (data.LIST, data.NOTE):  # as another program's folder
        (tmp_path / name).unlink()
    data.write_owned({tmp_path / "result.json": lambda file: file.write(b"{}")})
    report = data.verify(clean, tmp_path, eps=8 / 255)
    assert report.ok and report.listed is False
