"""A command given again, or beside other files: what goes on, what is refused, what is replaced,
and what is never touched.
"""

import json
import subprocess
import sys

import pytest
import torch
from _commands import TINY, complaint, files, run
from PIL import Image, ImageCms

from miue_fast import data, generate
from miue_fast.cli import commands
from miue_fast.data import atomic
from miue_fast.generation import Interrupted
from miue_fast.generation.run import BiLevelRun

RANDOM = [*TINY, "--objective", "random"]


@pytest.fixture
def start(root, tmp_path):
    """A function: `generate` into tmp_path/out with more options, returning the exit code."""
    return lambda *words: run(
        "generate", "--data", root / "train", "--out", tmp_path / "out", *words
    )


def test_another_objective_does_not_replace_a_run(start, root, tmp_path, capsys):
    out = tmp_path / "out"
    assert start(*TINY, "--export", "png") == 0
    before = files(out)
    capsys.readouterr()
    assert start(*RANDOM, "--export", "png") == 2 and "checkpoint.safetensors" in complaint(capsys)
    assert files(out) == before
    assert start(*RANDOM, "--export", "png", "--overwrite") == 0
    assert {path.name for path in out.iterdir()} == {
        "poison.safetensors",
        "manifest.json",
        "images",
        data.LIST,
    }
    noise = files(out)
    assert start(*RANDOM, "--export", "png") == 0 and files(out) == noise  # the same command again
    capsys.readouterr()
    for words in (TINY, [*RANDOM, "--seed", "3"], [*RANDOM, "--no-resume"]):
        assert start(*words) == 2 and "overwrite" in complaint(capsys)
        assert files(out) == noise
    assert run("verify", root / "train", out / "images") == 0


def test_a_new_export_format_needs_overwrite_and_leaves_no_old_images(
    start, root, tmp_path, capsys
):
    assert start(*TINY, "--export", "png") == 0
    before = files(tmp_path / "out")
    capsys.readouterr()
    assert start(*TINY, "--export", "webp") == 2 and "--overwrite" in complaint(capsys)
    assert files(tmp_path / "out") == before
    assert start(*TINY, "--export", "webp", "--overwrite") == 0
    assert {path.suffix for path in (tmp_path / "out/images").glob("*/*")} == {".webp"}
    assert start(*TINY, "--export", "webp", "--overwrite", "--per-class", "5") == 0
    assert run("verify", root / "train", tmp_path / "out/images", "--per-class", "5") == 0
    assert len(list((tmp_path / "out/images").rglob("*.webp"))) == 15


@pytest.mark.parametrize(
    "name", ["manifest.json", "metrics.csv", "poison.safetensors", "poison.pt", "poison.pkl"]
)
def test_files_of_others_are_never_replaced(start, tmp_path, capsys, name):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / name).write_text("precious")
    form = {".pt": "pt", ".pkl": "pickle"}.get((tmp_path / name).suffix, "png")
    for words in (TINY, RANDOM):
        assert start(*words, "--export", form) == 2 and name in complaint(capsys)
        assert (tmp_path / "out" / name).read_text() == "precious"


def test_overwrite_says_how_to_go_on_and_leaves_no_stale_poison(tmp_path, monkeypatch):
    shapes = data.shapes(30, seed=0, size=16, classes=3, difficulty=0)
    small = dict(model="small_resnet", width=4, steps=2, batch=30, progress=False)
    generate(shapes, tmp_path, epochs=1, **small)
    before, whole = files(tmp_path), BiLevelRun.epoch

    def stop_at(last):
        def epoch(self, number, tick):
            if number == last:
                raise KeyboardInterrupt
            return whole(self, number, tick)

        monkeypatch.setattr(BiLevelRun, "epoch", epoch)

    stop_at(1)
    with pytest.raises(Interrupted, match="no epoch was finished, nothing is saved"):
        generate(shapes, tmp_path, epochs=3, seed=9, overwrite=True, **small)
    assert files(tmp_path) == before
    stop_at(2)
    with pytest.raises(
        Interrupted, match=r"epoch 1 of 3 is saved .* the same command without overwrite goes on"
    ):
        generate(shapes, tmp_path, epochs=3, seed=9, overwrite=True, **small)
    assert (
        not (tmp_path / "poison.safetensors").exists() and not (tmp_path / "manifest.json").exists()
    )
    stop_at(None)
    resumed = generate(shapes, tmp_path, epochs=3, seed=9, **small)
    assert torch.equal(resumed.delta, generate(shapes, epochs=3, seed=9, **small).delta)


def test_a_run_that_ended_before_its_table_was_written(tmp_path, monkeypatch):
    shapes = data.shapes(30, seed=0, size=16, classes=3, difficulty=0)
    small = dict(model="small_resnet", width=4, steps=2, batch=30, epochs=2, progress=False)
    generate(shapes, tmp_path / "whole", **small)
    write = data.Owned.write

    def stop(self, writers, **options):
        if "metrics.csv" in writers:
            raise KeyboardInterrupt
        write(self, writers, **options)

    monkeypatch.setattr(data.Owned, "write", stop)
    with pytest.raises(Interrupted, match="epoch 1 of 2 is saved"):
        generate(shapes, tmp_path / "cut", **small)
    with pytest.raises(Interrupted, match="epoch 2 of 2 is saved"):
        generate(shapes, tmp_path / "cut", **small)
    monkeypatch.setattr(data.Owned, "write", write)
    generate(shapes, tmp_path / "cut", **small)
    table = (tmp_path / "cut/metrics.csv").read_text().splitlines()
    assert [row.split(",")[:6] for row in table] == [
        row.split(",")[:6] for row in (tmp_path / "whole/metrics.csv").read_text().splitlines()
    ]


def test_the_first_step_may_be_zero():
    shapes = data.shapes(30, seed=0, size=16, classes=3, difficulty=0)
    assert generate(
        shapes,
        model="small_resnet",
        width=4,
        steps=2,
        batch=30,
        epochs=2,
        progress=False,
        alpha_0=0.0,
    ).delta.any()


def test_two_files_are_replaced_together_or_not_at_all(tmp_path):
    shapes = data.shapes(30, seed=0, size=16, classes=3, difficulty=0)
    noise = data.random_noise(shapes, 8 / 255, 0)
    data.save_poison(tmp_path, noise, shapes, {"eps": 8 / 255})
    (tmp_path / "manifest.json").unlink()
    (tmp_path / "manifest.json").mkdir()
    before = (tmp_path / "poison.safetensors").read_bytes()
    with pytest.raises(
        OSError, match=r"manifest.json: it is a folder; what was there before is unchanged"
    ):
        data.save_poison(tmp_path, noise / 2, shapes, {"eps": 8 / 255})
    assert (tmp_path / "poison.safetensors").read_bytes() == before


def test_ctrl_c_during_an_export(start, root, tmp_path, capsys, monkeypatch):
    whole = data.export_folder

    def stop(dataset, *arguments, **options):
        if len(dataset):
            whole(dataset.select([0]), arguments[0][:1], *arguments[1:], **options)
            raise KeyboardInterrupt
        return whole(dataset, *arguments, **options)

    for words in (TINY, RANDOM):
        monkeypatch.setattr(data, "export_folder", stop)
        assert start(*words, "--export", "png", "--overwrite") == 130
        assert "the poison is saved" in complaint(capsys)
        monkeypatch.setattr(data, "export_folder", whole)
        assert start(*words, "--export", "png") == 0  # as the message says
        assert run("verify", root / "train", tmp_path / "out/images") == 0
        capsys.readouterr()
    monkeypatch.setattr(data, "export_folder", stop)
    export = ["export", tmp_path / "out", "--data", root / "train", "--to", tmp_path / "copy"]
    assert run(*export) == 130 and "--overwrite" in complaint(capsys)
    monkeypatch.setattr(data, "export_folder", whole)
    assert run(*export, "--overwrite") == 0


def test_the_folder_of_the_images_is_no_place_for_the_run(root, capsys):
    before = files(root)
    for out in (root / "train", root / "train/out"):
        assert run("generate", "--data", root / "train", "--out", out, *TINY) == 2
        assert (
            "outside the images' own" in complaint(capsys)
            and files(root) == before
            and not (root / "train/out").exists()
        )
    with pytest.raises(ValueError, match="outside the images' own"):
        generate(data.load(root / "train"), root / "train/a", model="small_resnet")
    (root / "train/a").rmdir()


def test_only_the_images_of_a_run_are_credited_to_it(start, root, tmp_path, capsys):
    out = tmp_path / "out"
    assert start(*TINY, "--export", "png") == 0
    assert run("generate", "--data", root / "train", "--out", tmp_path / "noise", *RANDOM) == 0
    assert run("export", tmp_path / "noise", "--data", root / "train", "--to", out / "other") == 0
    (tmp_path / "web").mkdir()
    (tmp_path / "web/manifest.json").write_text('{"name": "my web app"}')
    (out / "images").rename(tmp_path / "web/images")
    assert start(*TINY, "--export", "png") == 0
    for poisoned, credited in (
        (out / "images", True),
        (out, True),
        (out / "other", False),
        (tmp_path / "web/images", False),
    ):
        words = [
            "--data",
            root / "train",
            "--poisoned",
            poisoned,
            "--test",
            root / "test",
            "--epochs",
            1,
            "--quiet",
        ]
        assert run("evaluate", *words, "--json", tmp_path / "told.json") == 0
        assert (
            json.loads((tmp_path / "told.json").read_text())["poison"] is not None
        ) == credited, poisoned


def test_verify_lists_what_nobody_could_poison_and_what_is_unchanged(root, tmp_path, capsys):
    clean = data.load(root / "train")
    data.export_folder(clean, clean.images * 0.0, tmp_path / "data", eps=0)
    bad = sorted((tmp_path / "data").rglob("*.png"))[3]
    bad.write_bytes(bad.read_bytes()[:50])
    (tmp_path / "data/linked").symlink_to(root / "train", target_is_directory=True)
    rest = data.load(tmp_path / "data")
    data.export_folder(rest, rest.images * 0.0, tmp_path / "copy", eps=0)
    capsys.readouterr()
    for words in ([], ["--size", 16]):
        assert run("verify", tmp_path / "data", tmp_path / "copy", *words) == 3
        told = capsys.readouterr()
        assert "ok: 59 images" in told.out and "unchanged: 59 of 59" in told.err
        assert bad.name in told.err and "linked: a link to a folder" in told.err


def test_a_perturbation_below_half_a_level_is_told(caplog):
    shapes = data.shapes(30, seed=0, size=16, classes=3, difficulty=0)
    generate(
        shapes,
        model="small_resnet",
        width=4,
        steps=2,
        epochs=1,
        batch=30,
        progress=False,
        eps=0.4 / 255,
    )
    assert "30 of 30 images stay as they are" in caplog.text


@pytest.mark.parametrize("form", ["png", "webp", "tiff", "jpeg"])
def test_an_export_looks_like_its_original(tmp_path, form):
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    exif = Image.Exif()
    exif[274], exif[271] = 6, "a camera"
    for k, label in enumerate("ab"):
        (tmp_path / "clean" / label).mkdir(parents=True)
        noise = torch.randint(
            256, (20, 60, 3), generator=torch.Generator().manual_seed(k), dtype=torch.uint8
        )
        Image.fromarray(noise.numpy()).save(
            tmp_path / "clean" / label / "x.png", exif=exif, icc_profile=profile
        )
    for size in (None, 24):  # as they are, and read again at full size
        clean = data.load(tmp_path / "clean", size=size)
        out = tmp_path / f"out{size}"
        data.export_folder(
            clean, clean.images * 0.0, out, eps=0, image_format=form, allow_lossy=True
        )
        for path in out.rglob("x.*"):
            with Image.open(path) as image:
                assert image.info["icc_profile"] == profile and image.size == (60, 20)
                assert (
                    image.getexif().get(274, 1) == (1 if form == "tiff" else 6)
                    and 271 not in image.getexif()
                )
        if form != "jpeg":
            assert data.verify(tmp_path / "clean", out, eps=0).ok


def test_a_turned_tiff_is_upright_in_the_export(tmp_path):
    exif = Image.Exif()
    exif[274] = 6
    for label in "ab":
        (tmp_path / "clean" / label).mkdir(parents=True)
        Image.new("RGB", (20, 10)).save(tmp_path / "clean" / label / "x.tiff", exif=exif)
    clean = data.load(tmp_path / "clean")
    data.export_folder(clean, clean.images * 0.0, tmp_path / "out", eps=0)
    with Image.open(tmp_path / "out/a/x.png") as image:
        assert image.size == (10, 20) and 274 not in image.getexif()
    assert data.verify(tmp_path / "clean", tmp_path / "out", eps=0).ok


def test_a_gray_profile_is_not_put_on_rgb_pixels(tmp_path):
    for label in "ab":
        (tmp_path / "clean" / label).mkdir(parents=True)
        Image.new("L", (8, 8)).save(
            tmp_path / "clean" / label / "x.png", icc_profile=bytes(16) + b"GRAY" + bytes(108)
        )
    clean = data.load(tmp_path / "clean")
    data.export_folder(clean, clean.images * 0.0, tmp_path / "out", eps=0)
    with Image.open(tmp_path / "out/a/x.png") as image:
        assert "icc_profile" not in image.info


def test_eps_and_rounding_of_an_export(root, tmp_path, capsys):
    words = ["export", root / "out", "--data", root / "train"]
    for name in ("p.pt", "p.pkl", "p.npz"):
        form = {"p.pt": "pt", "p.pkl": "pickle", "p.npz": "npz"}[name]
        assert run(*words, "--to", tmp_path / name, "--format", form, "--eps", "1/255") == 0
        assert run("verify", root / "train", tmp_path / name, "--eps", "1/255") == 0
    capsys.readouterr()
    for form, name in (("pt", "q.pt"), ("pickle", "q.pkl")):
        assert run(*words, "--to", tmp_path / name, "--format", form, "--rounding", "truncate") == 2
        assert "rounding" in complaint(capsys) and not (tmp_path / name).exists()


@pytest.mark.parametrize("name", ["A.PT", "A.NPZ", "A.PKL"])
def test_suffixes_in_capitals_are_the_same_files(root, tmp_path, name):
    small = tmp_path / name.lower()
    form = {".pt": "pt", ".npz": "npz", ".pkl": "pickle"}[small.suffix]
    assert (
        run("export", root / "out", "--data", root / "train", "--to", small, "--format", form) == 0
    )
    small.rename(tmp_path / name)
    assert run("verify", root / "train", tmp_path / name) == 0


def test_what_can_be_told_before_the_work_is(root, tmp_path, capsys, monkeypatch):
    def work(*arguments, **options):
        raise AssertionError("the work was begun")

    monkeypatch.setattr(commands, "generate", work)
    monkeypatch.setattr(commands, "evaluate", work)
    generated = ["generate", "--data", root / "train", "--out", tmp_path / "new", *TINY]
    evaluated = [
        "evaluate",
        "--data",
        root / "train",
        "--poisoned",
        root / "out",
        "--test",
        root / "test",
        "--quiet",
    ]
    for words, expected in (
        ([*generated, "--export", "pickle", "--eps", "1"], "127/255"),
        ([*generated, "--alpha-0", "1e300"], "--alpha-0: expected"),
        ([*generated, "--seed", "99999999999999999999999"], "seed: expected"),
        ([*evaluated, "--json", tmp_path], "got the folder"),
        ([*evaluated, "--figure", tmp_path / "a.xyz"], "ending in"),
    ):
        assert run(*words) == 2 and expected in complaint(capsys), words


def test_no_memory_is_one_line(root, tmp_path, capsys):
    words = [
        "generate",
        "--data",
        root / "train",
        "--out",
        tmp_path / "out",
        *TINY,
        "--width",
        3_000_000,
    ]
    assert run(*words) == 2 and "memory: expected enough" in complaint(capsys)


def test_a_folder_has_one_writer(tmp_path):
    """A second run would sweep the first one's temporary files and write its own checkpoint between
    them.
    """
    run = {"model": "small_resnet", "epochs": 1, "steps": 1, "progress": False}
    dataset = data.shapes(40, seed=1)
    holder = (
        "import sys; from miue_fast import data\n"
        "with data.only_writer(sys.argv[1]):\n"
        "    print('held', flush=True); sys.stdin.read()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", holder, tmp_path],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as other:
        assert other.stdout.readline() == "held\n"
        unfinished = tmp_path / f".0123{atomic.TEMPORARY}"
        unfinished.touch()
        zeros = torch.zeros(dataset.images.shape)
        for work in (
            lambda: generate(dataset, tmp_path, **run),
            lambda: data.export_folder(dataset, zeros, tmp_path, eps=8 / 255, overwrite=True),
        ):
            with pytest.raises(
                ValueError,
                match=(
                    r"^output: folder: expected one that no other run is writing to, "
                    r"got .* is at work$"
                ),
            ):
                work()
        assert unfinished.exists() and len(list(tmp_path.iterdir())) == 1
        other.kill()
    generate(dataset, tmp_path, **run)  # a killed run holds nothing
    assert not unfinished.exists() and (tmp_path / "manifest.json").exists()
