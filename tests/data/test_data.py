"""Images in (folders, CIFAR files, archives, arrays) and out again, each against what the files
hold.
"""

import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from miue_fast import data


def picture(seed, width=12, height=12, mode="RGB"):
    channels = {"RGB": 3, "L": 1, "RGBA": 4}[mode]
    array = np.random.default_rng(seed).integers(0, 256, (height, width, channels), dtype=np.uint8)
    return Image.fromarray(array[..., 0] if channels == 1 else array)


def tree(root, classes=("cat", "dog"), count=3, **size):
    for c, label in enumerate(classes):
        (root / label).mkdir(parents=True)
        for k in range(count):
            picture(100 * c + k, **size).save(root / label / f"{k:04d}.png")
    return root


def pixels(path):
    return torch.from_numpy(np.array(Image.open(path).convert("RGB"))).permute(2, 0, 1)


# folders


def test_folder(tmp_path):
    root = tree(tmp_path / "clean", classes=("dog", "ant", "cat"))
    (root / "ant" / "deep" / "er").mkdir(parents=True)
    picture(7).save(root / "ant" / "deep" / "er" / "x.bmp")
    (root / "README.txt").write_text("beside the classes: ignored")
    (root / "ant" / ".hidden.png").write_bytes(b"ignored")
    clean = data.load(root)
    assert clean.classes == ["ant", "cat", "dog"] and clean.unreadable == []
    assert (
        clean.names == sorted(clean.names)
        and "ant/deep/er/x.bmp" in clean.names
        and len(clean) == 10
    )
    assert (
        clean.images.is_contiguous()
        and clean.images.dtype == torch.uint8
        and clean.sizes == [(12, 12)] * 10
    )
    for name, image, label in zip(clean.names, clean.images, clean.labels):
        assert (
            torch.equal(image, pixels(root / name)) and clean.classes[label] == name.split("/")[0]
        )
    assert data.load(str(root)).fingerprint == clean.fingerprint


@pytest.mark.parametrize(
    "suffix",
    [".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".ppm", ".gif", ".PNG", ".Jpeg"],
)
def test_every_format(tmp_path, suffix):
    root = tree(tmp_path, count=1)
    picture(5).save(root / "cat" / f"x{suffix}")
    clean = data.load(root)
    assert torch.equal(
        clean.images[clean.names.index(f"cat/x{suffix}")], pixels(root / "cat" / f"x{suffix}")
    )


def test_modes_become_rgb_as_trainers_see_them(tmp_path):
    root = tree(tmp_path, count=1)
    picture(1, mode="L").save(root / "cat/gray.png")
    picture(2).quantize(16).save(root / "cat/palette.png")
    picture(3, mode="RGBA").save(root / "cat/alpha.png")
    picture(4, mode="L").convert("1").save(root / "cat/bits.png")
    picture(5).convert("CMYK").save(root / "cat/cmyk.jpg")
    frames = [picture(6).quantize(), picture(7).quantize()]
    frames[0].save(root / "cat/moving.gif", save_all=True, append_images=frames[1:])
    clean = data.load(root)
    assert clean.unreadable == [] and len(clean) == 8
    for name, image in zip(clean.names, clean.images):
        assert torch.equal(image, pixels(root / name)), name
    rgba = torch.from_numpy(np.array(Image.open(root / "cat/alpha.png")))
    assert torch.equal(
        clean.images[clean.names.index("cat/alpha.png")], rgba[..., :3].permute(2, 0, 1)
    )  # alpha dropped, not composited


def test_exif_orientation_is_not_applied(tmp_path):
    root = tree(tmp_path, count=1)
    exif = Image.Exif()
    exif[0x0112] = 6
    picture(1).save(root / "cat/turned.png", exif=exif)
    clean = data.load(root)
    assert torch.equal(
        clean.images[clean.names.index("cat/turned.png")], pixels(root / "cat/turned.png")
    )


def test_sizes(tmp_path):
    root = tree(tmp_path, count=1)
    picture(9, width=40, height=24).save(root / "dog" / "wide.png")
    with pytest.raises(
        ValueError, match=r"size: expected .* got cat/0000.png is 12 x 12, dog/wide.png is 40 x 24"
    ) as error:
        data.load(root)
    assert "\n" not in str(error.value)
    clean = data.load(root, size=16)
    assert clean.images.shape == (3, 3, 16, 16) and clean.sizes == [(12, 12), (12, 12), (40, 24)]
    wanted = Image.open(root / "dog" / "wide.png").resize((16, 16), Image.Resampling.BILINEAR)
    assert torch.equal(clean.images[2], torch.from_numpy(np.array(wanted)).permute(2, 0, 1))
    same = data.load(tree(tmp_path / "same"), size=12)
    assert torch.equal(same.images, data.load(tmp_path / "same").images)


def test_split_and_per_class(tmp_path):
    tree(tmp_path / "train", count=5)
    tree(tmp_path / "test", count=2)
    assert (
        len(data.load(tmp_path, split="train")) == 10
        and len(data.load(tmp_path, split="test")) == 4
    )
    few = data.load(tmp_path / "train", per_class=2)
    assert few.names == ["cat/0000.png", "cat/0001.png", "dog/0000.png", "dog/0001.png"]
    drawn = data.load(data.shapes(200), per_class=3)
    assert drawn.labels.bincount().tolist() == [3] * 10 and drawn.names == sorted(drawn.names)
    with pytest.raises(ValueError, match="source: expected a folder"):
        data.load(tmp_path, split="validation")
    with pytest.raises(ValueError, match="split"):
        data.load(drawn, split="train")


@pytest.mark.parametrize(
    "build",
    ["empty", "one class", "only one readable class", "nothing", "archive", "file", "number"],
)
def test_nothing_to_learn_from(tmp_path, build):
    """R12: fewer than two classes would give a zero perturbation."""
    source = tmp_path / "data"
    if build == "one class":
        tree(source, classes=["cat"])
    elif build == "only one readable class":
        tree(source, classes=["cat", "dog"])
        for file in (source / "dog").iterdir():
            file.write_bytes(b"no image")
    elif build == "empty":
        source.mkdir()
    elif build in ("archive", "file"):
        source = tmp_path / ("data.tar.gz" if build == "archive" else "data.txt")
        source.write_bytes(b"x")
    elif build == "number":
        source = 7
    with pytest.raises(ValueError, match=r"^data: .*: expected .*, got .*") as error:
        data.load(source)
    assert "\n" not in str(error.value)


def test_export_keeps_tree_and_names(tmp_path):
    root = tree(tmp_path / "clean")
    (root / "cat/deep").mkdir()
    for name in (
        "cat/0001.jpg",
        "cat/0001.bmp",
        "cat/deep/a.b.webp",
        "cat/0001.png.png",
        "dog/UPPER.TIF",
    ):
        picture(3).save(root / name)
    (root / "cat/0002.jpg").write_bytes(b"damaged, and of the same stem as 0002.png")
    clean = data.load(root)
    seen = []
    count = data.export_folder(
        clean,
        torch.zeros(clean.images.shape),
        tmp_path / "out",
        eps=8 / 255,
        progress=lambda *a: seen.append(a),
    )
    files = sorted(
        str(p.relative_to(tmp_path / "out")) for p in (tmp_path / "out").rglob("*") if p.is_file()
    )
    assert files == sorted(
        [
            "cat/0000.png",
            "cat/0001.bmp.png",
            "cat/0001.jpg.png",
            "cat/0001.png.png",
            "cat/0001.png.png.png",
            "cat/0002.png.png",
            "cat/deep/a.b.png",
            "dog/0000.png",
            "dog/0001.png",
            "dog/0002.png",
            "dog/UPPER.png",
            data.LIST,
            "miue-export.json",
        ]
    )
    assert count == 11 and seen == [(k + 1, 11) for k in range(11)]
    for reference in (root, clean):
        report = data.verify(reference, tmp_path / "out", eps=0)
        assert report.ok and report.count == 11 and report.max_linf == 0, report
    assert data.verify(root, tmp_path / "out", eps=0, per_class=100).ok


def test_export_refuses_bad_places(tmp_path):
    root = tree(tmp_path / "clean")
    clean = data.load(root)
    delta = torch.zeros(clean.images.shape)
    (tmp_path / "full").mkdir()
    (tmp_path / "full/keep.txt").write_text("keep")
    (tmp_path / "file").write_text("keep")
    (tmp_path / "link").symlink_to(root)
    before = sorted(tmp_path.rglob("*"))
    places = {
        root: "apart",
        root / "out": "apart",
        tmp_path: "apart",
        tmp_path / "link" / "x": "apart",
    }
    for out, text in {**places, tmp_path / "full": "empty", tmp_path / "file": "file"}.items():
        with pytest.raises(ValueError, match=text):
            data.export_folder(clean, delta, out, eps=8 / 255)
    for options, text in [
        ({"image_format": "gif"}, "image_format"),
        ({"rounding": "x"}, "rounding"),
        ({"eps": 8}, "eps"),
    ]:
        with pytest.raises(ValueError, match=text):
            data.export_folder(clean, delta, tmp_path / "new", **{"eps": 8 / 255, **options})
    with pytest.raises(ValueError, match="delta"):
        data.export_folder(clean, delta[1:], tmp_path / "new", eps=8 / 255)
    assert sorted(tmp_path.rglob("*")) == before
    data.export_folder(clean, delta, tmp_path / "full", eps=8 / 255, overwrite=True)
    assert (tmp_path / "full/keep.txt").read_text() == "keep" and data.verify(
        clean, tmp_path / "full", eps=0
    ).ok


# verification


@pytest.mark.parametrize(
    "damage, text",
    [
        (lambda out: (out / "cat/0001.png").unlink(), "cat/0001.png: missing"),
        (lambda out: picture(1).save(out / "cat/more.png"), "cat/more.png: no such clean image"),
        (
            lambda out: picture(1, width=13).save(out / "cat/0001.png"),
            "cat/0001.png: 13 x 12, the clean image is 12 x 12",
        ),
        (
            lambda out: Image.open(out / "cat/0001.png").convert("RGBA").save(out / "cat/0001.png"),
            "cat/0001.png: mode RGBA, expected RGB",
        ),
        (
            lambda out: (out / "cat/0001.png").write_bytes(
                (out / "cat/0001.png").read_bytes()[:150]
            ),
            "cat/0001.png: image file is truncated",
        ),
        (lambda out: (out / "dog/0000.png").rename(out / "dog/0009.png"), "dog/0000.png: missing"),
        (lambda out: (out / "dog/0000.png").replace(out / "dog/0001.png"), "levels, more than 8"),
        (lambda out: (out / "cat/notes.txt").write_text("x"), "cat/notes.txt: not an image type"),
        (lambda out: nudge(out / "dog/0002.png", 9), "dog/0002.png: 9 levels, more than 8"),
    ],
)
def test_verify_finds(tmp_path, damage, text):
    clean = data.load(tree(tmp_path / "clean"))
    data.export_folder(clean, torch.zeros(clean.images.shape), tmp_path / "out", eps=8 / 255)
    assert data.verify(clean, tmp_path / "out", eps=8 / 255).ok
    damage(tmp_path / "out")
    report = data.verify(clean, tmp_path / "out", eps=8 / 255)
    assert not report.ok and any(text in problem for problem in report.problems), report.problems


def nudge(path, levels):
    array = np.array(Image.open(path))
    array[3, 4, 1] += levels if array[3, 4, 1] < 200 else -levels
    Image.fromarray(array).save(path)


def test_verify_lists_twenty_and_counts_all(tmp_path):
    clean = data.load(tree(tmp_path / "clean", count=15))
    (tmp_path / "empty").mkdir()
    report = data.verify(clean, tmp_path / "empty", eps=8 / 255)
    assert (
        not report.ok
        and len(report.problems) == 20
        and report.problem_count == 30
        and report.count == 0
    )


def test_unreadable_clean_images(tmp_path):
    root = tree(tmp_path / "clean")
    (root / "cat/0001.png").write_bytes(b"broken")
    clean = data.load(root)
    assert clean.unreadable == [("cat/0001.png", "not an image")]
    data.export_folder(clean, torch.zeros(clean.images.shape), tmp_path / "out", eps=0)
    assert (
        data.verify(root, tmp_path / "out", eps=0).ok
        and data.verify(clean, tmp_path / "out", eps=0).ok
    )
    picture(0).save(tmp_path / "out/cat/0001.png")
    assert (
        "unreadable"
        in data.verify(root, tmp_path / "out", eps=0).problems[0]
        + data.verify(root, tmp_path / "out", eps=0).problems[-1]
    )


# CIFAR


class _Python2(pickle._Pickler):
    """Arrays and text as the original files have them: protocol 2, numpy.core, byte strings."""

    def save_bytes(self, value):
        self.write(pickle.BINSTRING + len(value).to_bytes(4, "little") + value)
        self.memoize(value)

    def save_array(self, value):
        _, arguments, state = value.__reduce__()
        self.write(b"cnumpy.core.multiarray\n_reconstruct\n")
        self.save(arguments)
        self.write(pickle.REDUCE)
        self.memoize(value)
        self.save(state)
        self.write(pickle.BUILD)

    dispatch = pickle._Pickler.dispatch | {bytes: save_bytes, np.ndarray: save_array}


def write_cifar(folder, fine=False, python2=True, count=20):
    folder.mkdir(parents=True)
    random = np.random.default_rng(0)
    text = (lambda s: s.encode()) if python2 else str
    names = [text(f"class{k}") for k in range(100 if fine else 10)]
    parts = ["train", "test"] if fine else [f"data_batch_{k}" for k in range(1, 6)] + ["test_batch"]
    truth = {}

    def dump(name, content):
        with open(folder / name, "wb") as file:
            (_Python2 if python2 else pickle.Pickler)(file, 2).dump(content)

    dump(
        "meta" if fine else "batches.meta",
        {text("fine_label_names" if fine else "label_names"): names, text("num_vis"): 3072},
    )
    for part in parts:
        pixels, labels = (
            random.integers(0, 256, (count, 3072), dtype=np.uint8),
            random.integers(0, len(names), count).tolist(),
        )
        labels[:2] = [0, len(names) - 1]
        truth[part] = torch.from_numpy(pixels).reshape(-1, 3, 32, 32), torch.tensor(labels)
        content = {
            text("data"): pixels,
            text("fine_labels" if fine else "labels"): labels,
            text("filenames"): [text("x.png")],
        }
        dump(part, content)
    return truth


def test_the_test_part_of_cifar_files_is_the_test_part(tmp_path):
    """`load` takes the training part where nothing is said; judging a victim on it would be a
    leak.
    """
    folder = tmp_path / "cifar-10-batches-py"
    write_cifar(folder)
    train, test = data.load(folder), data.load_test(folder)
    assert torch.equal(test.images, data.load(folder, split="test").images) and not torch.equal(
        test.images, train.images[: len(test)]
    )
    assert torch.equal(data.load_test(folder, split="train").images, train.images)


@pytest.mark.parametrize("fine", [False, True])
@pytest.mark.parametrize("python2", [False, True])
def test_cifar(tmp_path, fine, python2):
    folder = tmp_path / ("cifar-100-python" if fine else "cifar-10-batches-py")
    truth = write_cifar(folder, fine, python2)
    for source in (folder, tmp_path):
        train, test = data.load(source), data.load(source, split="test")
        assert train.classes == test.classes == [f"class{k}" for k in range(100 if fine else 10)]
        wanted = [part for part in truth if "test" not in part]
        assert torch.equal(train.images, torch.cat([truth[part][0] for part in wanted]))
        assert torch.equal(train.labels, torch.cat([truth[part][1] for part in wanted]))
        assert torch.equal(test.images, truth["test" if fine else "test_batch"][0])
    with pytest.raises(ValueError, match="split"):
        data.load(folder, split="both")
    (folder / ("train" if fine else "data_batch_3")).unlink()
    with pytest.raises(ValueError, match="no such file"):
        data.load(folder)


# arrays and archives


@pytest.mark.parametrize("kind", [torch.from_numpy, np.asarray])
def test_arrays(kind):
    array = np.random.default_rng(0).integers(0, 256, (6, 3, 10, 8), dtype=np.uint8)
    labels = np.array([5, -2, 5, 9, -2, 9])
    clean = data.load((kind(array), kind(labels)))
    assert torch.equal(clean.images, torch.from_numpy(array)) and clean.classes == ["-2", "5", "9"]
    assert (
        clean.labels.tolist() == [1, 0, 1, 2, 0, 2]
        and clean.names[3] == "00000003"
        and clean.root is None
        and clean.sizes is None
    )
    last = data.load(
        (kind(np.ascontiguousarray(array.transpose(0, 2, 3, 1))), kind(labels.astype(np.int16)))
    )
    assert torch.equal(last.images, clean.images) and last.fingerprint == clean.fingerprint
    gray = data.load((kind(array[:, :1]), kind(labels)))
    assert gray.images.shape == (6, 1, 10, 8)
    assert data.load((kind(array), kind(labels)), size=5).images.shape == (6, 3, 5, 5)
    image = Image.fromarray(array[2].transpose(1, 2, 0)).resize((5, 5), Image.Resampling.BILINEAR)
    assert torch.equal(
        data.load((kind(array), kind(labels)), size=5).images[2],
        torch.from_numpy(np.array(image)).permute(2, 0, 1),
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_float_images(dtype, caplog):
    levels = torch.randint(0, 256, (4, 3, 8, 8), dtype=torch.uint8)
    labels = torch.tensor([0, 1, 0, 1])
    assert (
        torch.equal(data.load((levels.to(dtype) / 255, labels)).images, levels)
        and not caplog.messages
    )
    near = (levels.to(dtype) / 255 + 0.3 / 255).clamp(0, 1)
    assert (
        torch.equal(data.load((near, labels)).images, levels) and "rounded to 8 bits" in caplog.text
    )


@pytest.mark.parametrize(
    "images, labels, text",
    [
        (torch.zeros(4, 3, 8, 8), torch.zeros(4), "labels"),
        (torch.zeros(4, 3, 8, 8), torch.zeros(3, dtype=torch.int64), "labels"),
        (torch.zeros(4, 3, 8, 8), torch.zeros(4, dtype=torch.int64), "2 classes"),
        (torch.full((4, 3, 8, 8), 1.5), torch.arange(4), r"floats in \[0, 1\]"),
        (torch.full((4, 3, 8, 8), float("nan")), torch.arange(4), r"floats in \[0, 1\]"),
        (torch.zeros(4, 3, 8, 8, dtype=torch.int32), torch.arange(4), "uint8"),
        (torch.zeros(4, 5, 8, 8), torch.arange(4), "C = 1 or 3"),
        (torch.zeros(4, 3, 8), torch.arange(4), "images"),
        (np.array([object()]), torch.arange(4), "images"),
        ([[1], [2, 3]], torch.arange(4), "images"),
        (torch.zeros(0, 3, 8, 8), torch.zeros(0, dtype=torch.int64), "2 classes"),
    ],
)
def test_bad_arrays(images, labels, text):
    with pytest.raises(ValueError, match=text) as error:
        data.load((images, labels))
    assert str(error.value).startswith("data: ")


@pytest.mark.parametrize(
    "options", [{"size": 0}, {"size": 1.5}, {"size": True}, {"per_class": 0}, {"per_class": "3"}]
)
def test_bad_options(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        data.load(data.shapes(20), **options)


def test_npz_and_its_export(tmp_path):
    clean = data.load(tree(tmp_path / "clean"))
    delta = data.random_noise(clean, 8 / 255, 0)
    data.export_npz(clean, delta, tmp_path / "out.npz", eps=8 / 255)
    back = data.load(tmp_path / "out.npz")
    assert torch.equal(
        back.images, data.apply_poison(clean.images, delta, 8 / 255)
    ) and torch.equal(back.labels, clean.labels)
    assert back.classes == clean.classes and back.names == clean.names
    for reference in (clean, tmp_path / "clean"):
        report = data.verify(reference, tmp_path / "out.npz", eps=8 / 255)
        assert report.ok and report.max_linf == 8 and report.count == 6
        assert not data.verify(reference, tmp_path / "out.npz", eps=7 / 255).ok
    assert data.verify(clean, (back.images, back.labels), eps=8 / 255).ok
    report = data.verify(clean, (back.images, 1 - back.labels), eps=8 / 255)
    assert not report.ok and "labels" in report.problems[0]
    with pytest.raises(ValueError, match="exists"):
        data.export_npz(clean, delta, tmp_path / "out.npz", eps=8 / 255)
    data.export_npz(clean, delta * 0, tmp_path / "out.npz", eps=8 / 255, overwrite=True)
    assert torch.equal(data.load(tmp_path / "out.npz").images, clean.images)
    np.savez(tmp_path / "plain.npz", images=clean.images.numpy(), labels=clean.labels.numpy())
    assert data.load(tmp_path / "plain.npz").classes == ["0", "1"]


def test_gray_arrays_go_out_and_come_back(tmp_path):
    clean = data.load((torch.randint(0, 256, (6, 1, 9, 9), dtype=torch.uint8), torch.arange(6) % 2))
    delta = data.random_noise(clean, 4 / 255, 0)
    data.export_folder(clean, delta, tmp_path / "out", eps=4 / 255)
    assert data.verify(clean, tmp_path / "out", eps=4 / 255).ok
    assert Image.open(tmp_path / "out/0/00000000.png").mode == "L"


# the drawn shapes


def test_shapes():
    drawn = data.shapes(300, seed=4)
    assert (
        drawn.images.shape == (300, 3, 32, 32)
        and drawn.labels.bincount().tolist() == [30] * 10
        and len(drawn.classes) == 10
    )
    assert (
        drawn.fingerprint
        == data.shapes(300, seed=4).fingerprint
        != data.shapes(300, seed=5).fingerprint
    )
    assert data.shapes(50, size=48, classes=4).images.shape == (50, 3, 48, 48)
    for options in ({"classes": 1}, {"classes": 11}, {"size": 4}, {"difficulty": 2}, {"count": 0}):
        with pytest.raises(ValueError, match="shapes"):
            data.shapes(**{"count": 10, **options})


def test_colour_does_not_tell_the_shape():
    """Least squares on the mean and spread of each channel, and on the raw pixels, stays near
    chance (10 %).
    """
    train, test = data.shapes(2000, seed=1), data.shapes(1000, seed=2)

    def colours(d):
        x = d.images.float().flatten(2) / 255
        return torch.cat([x.mean(2), x.std(2), x.mean(2) ** 2, torch.ones(len(x), 1)], 1)

    def raw(d):
        return torch.cat([d.images.float().flatten(1) / 255, torch.ones(len(d), 1)], 1)

    for features, limit in ((colours, 0.2), (raw, 0.35)):
        x, y = features(train), torch.nn.functional.one_hot(train.labels, 10).float()
        weights = torch.linalg.solve(x.T @ x + 30 * torch.eye(x.shape[1]), x.T @ y)
        accuracy = ((features(test) @ weights).argmax(1) == test.labels).float().mean()
        assert accuracy < limit, (features.__name__, accuracy)


def test_dataset_checks_itself():
    images, labels = torch.zeros(3, 3, 4, 4, dtype=torch.uint8), torch.tensor([0, 1, 1])
    good = data.Dataset(images, labels, ["a", "b"], ["x", "y", "z"])
    changed = {
        "pixel": data.Dataset(
            images.clone().index_fill_(0, torch.tensor(1), 1), labels, ["a", "b"], ["x", "y", "z"]
        ),
        "label": data.Dataset(images, torch.tensor([1, 1, 0]), ["a", "b"], ["x", "y", "z"]),
        "class": data.Dataset(images, labels, ["a", "c"], ["x", "y", "z"]),
        "shape": data.Dataset(images.reshape(3, 3, 2, 8), labels, ["a", "b"], ["x", "y", "z"]),
    }
    assert len({good.fingerprint, *(d.fingerprint for d in changed.values())}) == 5
    part = good.select([2, 0])
    assert part.names == ["z", "x"] and part.labels.tolist() == [1, 0]
    names = ["x", "y", "z"]
    for bad in (
        (images.float(), labels, names),
        (images, labels[:2], names),
        (images, labels + 1, names),
        (images, labels, ["x", "y"]),
        (images, labels, ["x", "y", "x"]),
    ):
        with pytest.raises(ValueError, match="data: "):
            data.Dataset(*bad[:2], ["a", "b"], bad[2])


def test_a_dataset_is_shown_in_one_line():
    drawn = data.shapes(20, seed=1, classes=10)
    shown = repr(drawn)
    assert shown == (
        f"Dataset(20 images of 3 x 32 x 32, 10 classes ({', '.join(drawn.classes[:3])}, ...), "
        "from arrays)"
    )
    images, labels = torch.zeros(2, 3, 4, 4, dtype=torch.uint8), torch.tensor([0, 1])
    odd = data.from_arrays(images, labels, classes=["a\nb", "c" * 500])
    assert "\n" not in repr(odd) and len(repr(odd)) < 250
    left_out = data.Dataset(
        images, labels, ["a", "b"], ["a/1.png", "b/1.png"], Path("photos"), unreadable=[("x", "y")]
    )
    assert repr(left_out) == (
        "Dataset(2 images of 3 x 4 x 4, 2 classes (a, b), from photos, 1 unreadable)"
    )
