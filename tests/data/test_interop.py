"""Poison formats of other tools: pickles, PNG folders, channels-last tensors, both ways, and
pickles made to do harm.
"""

import collections
import json
import os
import pickle
import subprocess
import sys

import numpy as np
import pytest
import torch

from miue_fast import data
from miue_fast.cli import commands
from miue_fast.data import inert
from miue_fast.evaluation import poisoned_images

EPS = 8 / 255


@pytest.fixture(scope="module")
def clean():
    return data.shapes(24, size=8)


@pytest.fixture(scope="module")
def delta(clean):
    return data.random_noise(clean, EPS, 1)


@pytest.fixture(scope="module")
def levels(clean):
    """int8 [N, C, H, W] with both ends of int8 in it."""
    values = np.random.default_rng(0).integers(-8, 9, clean.images.shape).astype(np.int8)
    values[0, 0, 0, :2] = -128, 127
    return values


def dumped(path, value, protocol=4):
    path.write_bytes(pickle.dumps(value, protocol))
    return path


def last(array):
    return array.transpose(0, 2, 3, 1)


# reading


@pytest.mark.parametrize("protocol", range(6))
@pytest.mark.parametrize("kind", ["i1", "<i2", ">i2", "<i8"])
def test_integer_levels_are_exact(tmp_path, clean, levels, protocol, kind):
    wanted = torch.from_numpy(levels.astype(np.float32)) / 255
    for array in (
        levels,
        last(levels),
        np.ascontiguousarray(last(levels)),
        np.asfortranarray(levels),
    ):
        back, manifest = data.load_poison(
            dumped(tmp_path / "p.pkl", array.astype(kind, order="K"), protocol), clean
        )
        assert torch.equal(back, wanted) and manifest is None and back.is_contiguous()
    changed = data.apply_poison(clean.images, back, 1.0).numpy()
    assert np.array_equal(changed, np.clip(clean.images.numpy().astype(int) + levels, 0, 255))


@pytest.mark.parametrize("kind", ["<f2", ">f4", "<f8"])
@pytest.mark.parametrize("protocol", [2, 4, 5])
def test_floats_are_on_the_unit_scale(tmp_path, clean, delta, kind, protocol):
    array = delta.numpy().astype(kind)
    for form in (array, last(array)):
        back, _ = data.load_poison(dumped(tmp_path / "p.pickle", form, protocol), clean)
        assert torch.equal(back, torch.from_numpy(array.astype(np.float32)))


@pytest.mark.parametrize("protocol", [0, 2, 4, 5])
def test_containers_of_arrays(tmp_path, clean, levels, protocol):
    wanted = torch.from_numpy(levels.astype(np.float32)) / 255
    images = [np.ascontiguousarray(image) for image in last(levels)]
    shuffled = np.random.default_rng(0).permutation(24)
    for value in (
        images,
        tuple(images),
        list(levels.copy()),
        {int(k): images[k] for k in shuffled},
        {np.int64(k): images[k] for k in shuffled},
        {clean.names[k]: images[k] for k in shuffled},
    ):
        assert torch.equal(
            data.load_poison(dumped(tmp_path / "p.pkl", value, protocol), clean)[0], wanted
        )
    with pytest.raises(ValueError, match="need the data set"):
        data.load_poison(tmp_path / "p.pkl")
    assert torch.equal(data.read_pickle(tmp_path / "p.pkl", clean.names), wanted)


@pytest.mark.parametrize("protocol", range(6))
def test_the_inert_reader_agrees_with_pickle(protocol):
    array = np.random.default_rng(2).integers(-9, 9, (2, 3, 4, 5)).astype(np.int16)
    for axes in ((0, 1, 2, 3), (0, 2, 3, 1), (3, 0, 1, 2), (3, 2, 1, 0), (1, 0, 3, 2)):
        found = inert.loads(pickle.dumps(array.transpose(axes), protocol)).numpy()
        assert np.array_equal(found, array.transpose(axes)) and found.dtype == array.dtype
    value = {
        1: [1.5, "\u00e9", b"\xff", None, True, False, -(2**70), (), [], {}],
        "a": (np.int64(3), np.float32(0.5)),
    }
    assert inert.loads(pickle.dumps(value, protocol)) == value


def test_arrays_as_python_2_writes_them(tmp_path, levels):
    raw = levels.tobytes()
    shape = b"(" + b"".join(b"M" + side.to_bytes(2, "little") for side in levels.shape) + b"t"
    dtype = (
        b"cnumpy\n"
        b"dtype\n"
        b"U\x02i1K\x00K\x01\x87R(K\x03U\x01|NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb"
    )
    array = b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85U\x01b\x87R"
    state = b"(K\x01" + shape + dtype + b"\x89T" + len(raw).to_bytes(4, "little") + raw + b"tb"
    (tmp_path / "p.pkl").write_bytes(b"\x80\x02" + array + state + b".")
    assert torch.equal(
        data.load_poison(tmp_path / "p.pkl")[0], torch.from_numpy(levels.astype(np.float32)) / 255
    )


def test_class_wise_arrays_are_expanded(tmp_path, clean):
    levels = np.random.default_rng(1).integers(-8, 9, (10, 3, 8, 8)).astype(np.int8)
    wanted = torch.from_numpy(levels.astype(np.float32)) / 255
    for value in (levels, last(levels), list(levels.copy()), {k: levels[k] for k in range(10)}):
        path = dumped(tmp_path / "p.pkl", value)
        assert torch.equal(data.load_poison(path, clean)[0], wanted[clean.labels]) and torch.equal(
            data.load_poison(path)[0], wanted
        )
        report = data.verify(clean, path, eps=EPS)
        assert report.ok and report.count == 24


@pytest.mark.parametrize(
    "value, words",
    [
        (np.full((24, 3, 8, 8), 128, np.int16), "within int8, got values from 128 to 128"),
        (np.full((24, 3, 8, 8), -129, np.int64), "within int8"),
        (np.full((24, 3, 8, 8), 8.0, np.float32), "finite values in"),
        (np.full((24, 3, 8, 8), 3.5), "finite values in"),
        (np.full((24, 3, 8, 8), np.nan, np.float32), "finite values in"),
        (np.zeros((24, 3, 8, 8), np.uint8), "uint8 .*not signed or float"),
        (np.zeros((24, 3, 8, 8), bool), "refused the dtype b1"),
        (np.zeros((24, 3, 8, 8), np.complex64), "refused the dtype c8"),
        (np.zeros((24, 3, 8, 8), object), "refused the dtype O8"),
        (np.array(["abc"] * 3), "refused the dtype U3"),
        (np.zeros(3, "datetime64[s]"), "refused the dtype M8"),
        (np.zeros(3, [("a", "i1")]), "refused the dtype V1"),
        (np.zeros((24, 3, 8, 3), np.int8), "no doubt which"),
        (np.zeros((24, 8, 8, 8), np.int8), "no doubt which"),
        (np.zeros((24, 3, 8), np.int8), "not signed or float"),
        (np.zeros((24, 3, 8, 8, 1), np.int8), "0 to 4 positive"),
        (np.zeros((0, 3, 8, 8), np.int8), "0 to 4 positive"),
        (np.zeros((23, 3, 8, 8), np.int8), "delta: expected .*class-wise"),
        ([np.zeros((3, 8, 8), np.int8), np.zeros((3, 8, 9), np.int8)], "different types or shapes"),
        (
            [np.zeros((3, 8, 8), np.int8), np.zeros((3, 8, 8), np.float32)],
            "different types or shapes",
        ),
        ([np.zeros((3, 8, 8), np.int8), None], "a list that is not"),
        ([[np.zeros((3, 8, 8), np.int8)]], "a list that is not"),
        ({"delta": np.zeros((24, 3, 8, 8), np.int8)}, "1 keys where 24"),
        ({1: np.zeros((3, 8, 8), np.int8)}, "differing in '0'"),
        (
            {0: np.zeros((3, 8, 8), np.int8), "a": np.zeros((3, 8, 8), np.int8)},
            "keys are not 0 to N",
        ),
        ([], "a list that is not"),
        ({}, "a dict"),
        (7, "a int that is not"),
        ("text", "a str"),
        (None, "NoneType"),
        (torch.zeros(24, 3, 8, 8), "refused torch._utils._rebuild_tensor_v2"),
    ],
)
def test_what_is_no_poison_is_told_in_one_line(tmp_path, clean, value, words):
    with pytest.raises(ValueError, match=rf"^poison: .*{words}") as told:
        data.load_poison(dumped(tmp_path / "p.pkl", value), clean)
    assert "\n" not in str(told.value) and len(str(told.value)) < 500


def test_channels_last_tensors(tmp_path, clean, delta):
    for name in ("poison.pt", "perturbation.pt"):
        torch.save(delta.permute(0, 2, 3, 1).contiguous(), tmp_path / name)
        back, _ = data.load_poison(tmp_path / name, clean)
        assert torch.equal(back, delta) and back.is_contiguous()
    np.savez(tmp_path / "p.npz", delta=last(delta.numpy()))
    assert torch.equal(data.load_poison(tmp_path / "p.npz", clean)[0], delta)
    assert data.verify(clean, tmp_path / "p.npz", eps=EPS).ok
    torch.save(
        torch.zeros(4, 3, 8, 3), tmp_path / "doubt.pt"
    )  # stays [N, C, H, W], the form the docstring names
    assert data.load_poison(tmp_path / "doubt.pt")[0].shape == (4, 3, 8, 3)
    torch.save(torch.zeros(4, 8, 8, 5), tmp_path / "strange.pt")
    with pytest.raises(ValueError, match="delta: expected"):
        data.load_poison(tmp_path / "strange.pt", clean)


# writing, and round trips


@pytest.mark.parametrize("layout", ["nhwc", "nchw"])
def test_pickle_round_trip(tmp_path, clean, delta, layout):
    data.export_pickle(clean, delta, tmp_path / "a.pkl", eps=EPS, layout=layout)
    data.export_pickle(
        clean,
        delta.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2),
        tmp_path / "b.pickle",
        eps=EPS,
        layout=layout,
    )
    assert (tmp_path / "a.pkl").read_bytes() == (tmp_path / "b.pickle").read_bytes()
    array = pickle.loads((tmp_path / "a.pkl").read_bytes())
    first = array.transpose(0, 3, 1, 2) if layout == "nhwc" else array
    assert array.dtype == np.int8 and np.array_equal(first, data.quantise(delta, EPS).numpy())
    back, _ = data.load_poison(tmp_path / "a.pkl", clean)
    wanted = data.apply_poison(clean.images, delta, EPS)
    assert torch.equal(data.apply_poison(clean.images, back, 1.0), wanted) and torch.equal(
        poisoned_images(clean, tmp_path / "a.pkl")[1], wanted
    )
    data.export_pickle(clean, back, tmp_path / "c.pkl", eps=EPS, layout=layout)
    assert (tmp_path / "c.pkl").read_bytes() == (tmp_path / "a.pkl").read_bytes()
    assert (
        data.verify(clean, tmp_path / "a.pkl", eps=EPS).max_linf == 8
        and not data.verify(clean, tmp_path / "a.pkl", eps=7 / 255).ok
    )
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.pkl", "b.pickle", "c.pkl", data.LIST]
    data.export_pickle(clean, delta * 2, tmp_path / "wide.pkl", eps=EPS)
    assert data.verify(clean, tmp_path / "wide.pkl", eps=EPS).max_linf == 8


def test_every_int8_level_survives(tmp_path):
    values = torch.arange(-127, 128).repeat(2)[:507].reshape(3, 1, 13, 13) / 255
    clean = data.Dataset(
        torch.full((3, 1, 13, 13), 128, dtype=torch.uint8),
        torch.arange(3),
        list("abc"),
        list("123"),
    )
    data.export_pickle(clean, values, tmp_path / "p.pkl", eps=127 / 255)
    assert torch.equal(
        data.quantise(data.load_poison(tmp_path / "p.pkl")[0], 1.0), data.quantise(values, 1.0)
    )


def test_bad_exports_write_nothing(tmp_path, clean, delta):
    (tmp_path / "old.pkl").write_bytes(b"old")
    for name, change, words in (
        ("p.pkl", dict(eps=128 / 255), "eps: expected at most 127/255"),
        ("p.pkl", dict(eps=8), "eps: expected"),
        ("p.pkl", dict(layout="hwc"), "layout: expected 'nhwc' or 'nchw'"),
        ("p.npz", {}, r"ending in \.pkl or \.pickle"),
        ("old.pkl", {}, "a new file"),
        ("p.pkl", dict(delta=delta[1:]), "delta: expected"),
        ("p.pkl", dict(delta=delta * float("nan")), "finite"),
    ):
        with pytest.raises(ValueError, match=words) as told:
            data.export_pickle(
                **{"dataset": clean, "delta": delta, "path": tmp_path / name, "eps": EPS, **change}
            )
        assert "\n" not in str(told.value)
    assert [p.name for p in tmp_path.iterdir()] == ["old.pkl"] and (
        tmp_path / "old.pkl"
    ).read_bytes() == b"old"
    with pytest.raises(ValueError, match=r"old\.pkl, which miue_fast did not write; move it away"):
        data.export_pickle(clean, delta, tmp_path / "old.pkl", eps=EPS, overwrite=True)
    assert (tmp_path / "old.pkl").read_bytes() == b"old"
    data.export_pickle(clean, delta, tmp_path / "new.pkl", eps=4 / 255)
    data.export_pickle(clean, delta, tmp_path / "new.pkl", eps=EPS, overwrite=True)
    assert data.load_poison(tmp_path / "new.pkl", clean)[0].abs().max() == 8 / 255


def test_images_give_the_perturbation_back(tmp_path, clean, delta):
    data.export_folder(clean, clean.images * 0.0, tmp_path / "clean", eps=0)
    tree = data.load(tmp_path / "clean")
    order = torch.tensor(
        [clean.names.index(name.split("/")[1].split(".")[0]) for name in tree.names]
    )
    data.export_folder(clean, delta, tmp_path / "png", eps=EPS)
    data.export_npz(clean, delta, tmp_path / "p.npz", eps=EPS)
    wanted = data.apply_poison(clean.images, delta, EPS)
    exact = (wanted.double() - clean.images).float() / 255
    for source, copy, rows in (
        (clean, tmp_path / "png", slice(None)),
        (clean, tmp_path / "p.npz", slice(None)),
        (tree, tmp_path / "png", order),
        (clean, (wanted.numpy(), clean.labels.numpy()), slice(None)),
        (clean, (last(wanted.numpy()), clean.labels), slice(None)),
    ):
        found = data.poison_from_images(source, copy)
        assert found.dtype == torch.float32 and torch.equal(found, exact[rows])
        assert torch.equal(data.apply_poison(source.images, found, 1.0), wanted[rows])
    data.export_pt(clean, exact, tmp_path / "perturbation.pt")
    assert torch.equal(data.load_poison(tmp_path / "perturbation.pt", clean)[0], exact)
    other = data.Dataset(
        255 - clean.images, clean.labels, clean.classes, clean.names
    )  # changes of up to 255 levels
    assert torch.equal(
        data.apply_poison(clean.images, data.poison_from_images(clean, other), 1.0), other.images
    )


def test_images_without_a_poisoned_copy(tmp_path, clean, delta):
    rows = torch.tensor([20, 3, 7, 11])
    part = data.Dataset(
        data.apply_poison(clean.images, delta, EPS), clean.labels, clean.classes, clean.names
    ).select(rows)
    with pytest.raises(
        ValueError, match=r"all 24 images \(or partial=True.*none of 00000000 and 19 more"
    ):
        data.poison_from_images(clean, part)
    found = data.poison_from_images(clean, part, partial=True)
    assert torch.equal(data.apply_poison(clean.images[rows], found[rows], 1.0), part.images)
    assert found.flatten(1).any(1).nonzero()[:, 0].tolist() == [3, 7, 11, 20]
    kept, images = data.align(clean, part)
    assert kept.tolist() == [3, 7, 11, 20] and torch.equal(images, part.images[[1, 2, 3, 0]])


def test_images_that_do_not_fit(clean):
    def changed(images=clean.images, labels=clean.labels, classes=clean.classes, names=clean.names):
        return data.Dataset(images, labels, classes, names)

    numbers = [str(k) for k in range(10)]
    for copy, words in (
        (changed(labels=(clean.labels + 1) % 10), "poisoned: expected class"),
        (changed(labels=(clean.labels + 1) % 10, classes=numbers), "poisoned: expected class"),
        (changed(classes=[f"x{name}" for name in clean.classes]), "poisoned: expected class"),
        (
            changed(names=[f"x{name}" for name in clean.names]),
            "x00000000 and 23 more without a clean image",
        ),
        (changed(images=clean.images[..., :7]), r"expected images \[3, 8, 8\]"),
    ):
        with pytest.raises(ValueError, match=words):
            data.poison_from_images(clean, copy)
    assert not data.poison_from_images(
        clean, changed(classes=numbers)
    ).any()  # label numbers instead of names


def test_command_line(tmp_path, clean, delta, capsys):
    data.export_folder(clean, clean.images * 0.0, tmp_path / "clean", eps=0)
    tree = data.load(tmp_path / "clean")
    data.save_poison(tmp_path / "store", delta, tree, {"eps": EPS})
    words = ["--data", str(tmp_path / "clean")]
    assert (
        commands.main(
            [
                "export",
                str(tmp_path / "store"),
                *words,
                "--to",
                str(tmp_path / "p.pkl"),
                "--format",
                "pickle",
            ]
        )
        == 0
    )
    assert pickle.loads((tmp_path / "p.pkl").read_bytes()).shape == (24, 8, 8, 3)
    assert (
        commands.main(["export", str(tmp_path / "p.pkl"), *words, "--to", str(tmp_path / "png")])
        == 0
    )
    assert (
        commands.main(["export", str(tmp_path / "store"), *words, "--to", str(tmp_path / "ours")])
        == 0
    )
    for path in (tmp_path / "ours").rglob("*.png"):
        assert (
            tmp_path / "png" / path.relative_to(tmp_path / "ours")
        ).read_bytes() == path.read_bytes()
    assert commands.main(["verify", str(tmp_path / "clean"), str(tmp_path / "p.pkl")]) == 0
    tiny = [
        "--model",
        "small_resnet",
        "--width",
        "4",
        "--epochs",
        "1",
        "--steps",
        "1",
        "--batch",
        "24",
        "--quiet",
    ]
    assert (
        commands.main(
            ["generate", *words, "--out", str(tmp_path / "out"), "--export", "pickle", *tiny]
        )
        == 0
    )
    made = data.apply_poison(tree.images, data.load_poison(tmp_path / "out", tree)[0], EPS)
    assert torch.equal(poisoned_images(tree, tmp_path / "out/poison.pkl")[1], made)
    capsys.readouterr()
    data.export_pt(tree, delta, tmp_path / "p.pt")
    assert (
        commands.main(
            [
                "export",
                str(tmp_path / "p.pt"),
                *words,
                "--to",
                str(tmp_path / "q.pkl"),
                "--format",
                "pickle",
            ]
        )
        == 2
    )
    assert "--eps" in capsys.readouterr().err and not (tmp_path / "q.pkl").exists()


# pickles made to do harm


class Evil:
    def __init__(self, function, *arguments):
        self.reduced = function, arguments

    def __reduce__(self):
        return self.reduced


ARRAY = b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(I0\ntS'b'\ntR"
INT8 = b"cnumpy\ndtype\n(Vi1\ntR"


def evil_pickles():
    """name -> bytes. Everything that could run would write `pwned` in the current folder."""
    calls = {
        "system": Evil(os.system, "touch pwned"),
        "eval": Evil(eval, "open('pwned', 'w')"),
        "exec": Evil(exec, "open('pwned', 'w')"),
        "open": Evil(open, "pwned", "w"),
        "getattr": Evil(getattr, Evil(__import__, "os"), "system"),
        "load": Evil(np.load, "x.npy", None, True),
        "save": Evil(np.save, "pwned", 1),
        "ndarray": Evil(np.ndarray, (10**6, 10**6), "i1"),
        "zeros": Evil(np.zeros, 10**12),
        "frombuffer": Evil(np.frombuffer, b"aaaaaaaa", "O"),
        "bytearray": Evil(bytearray, 10**12),
        "popen": Evil(subprocess.Popen, ["touch", "pwned"]),
    }
    values = {
        **calls,
        "objects": np.array([calls["system"]], dtype=object),
        "ordered": collections.OrderedDict(a=1),
        "function": print,
        "class": type,
        "record": np.zeros(3, [("a", "O")]),
        "set": {1, 2},
        "complex": 1j,
        "tensor": torch.zeros(3),
    }
    for name, value in values.items():
        for protocol in (0, 2, 4, 5):
            yield f"{name}{protocol}", pickle.dumps(value, protocol)
            yield (
                f"{name}{protocol} beside an array",
                pickle.dumps([np.zeros((8, 8, 3), np.int8), value], protocol),
            )
            yield f"{name}{protocol} as a value", pickle.dumps({0: value}, protocol)
    yield "instance", b"(S'touch pwned'\nios\nsystem\n."
    yield "object", b"(cos\nsystem\nS'touch pwned'\no."
    yield "new object", b"\x80\x02cos\nsystem\n(S'touch pwned'\nt\x81."
    yield "attribute path", b"\x80\x04\x8c\x05numpy\x8c\x0dndarray.dumps\x93."
    yield "state of a name", ARRAY[:36] + b"}S'__doc__'\nI1\nsb."
    yield "tuple state of a name", ARRAY[:36] + b"(I1\ntb."
    yield "text as a name", b"Vnumpy.dtype\n(Vi1\ntR."
    yield "call of a call", b"cnumpy\ndtype\n(Vi1\ntR(tR."
    yield "call of ndarray", b"cnumpy\nndarray\n((I99999999\nI99999999\ntVi1\ntR."
    yield "persistent", b"Pname\n."
    yield "extension", b"\x80\x02\x82\x01."
    yield "buffer", b"\x80\x05\x97."
    yield "rot13", b"c_codecs\nencode\n(S'a'\nS'rot13'\ntR."
    yield "pointer dtype", ARRAY + b"(I1\n(I1\ntcnumpy\ndtype\n(VO8\ntRI00\nS'aaaaaaaa'\ntb."
    yield (
        "pointer state",
        ARRAY + b"(I1\n(I1\nt" + INT8 + b"(I3\nV|\ncnumpy\ndtype\n(VO8\ntR}tbI00\nS'aaaaaaaa'\ntb.",
    )
    yield (
        "pointer scalar",
        b"cnumpy.core.multiarray\nscalar\n(cnumpy\ndtype\n(VO8\ntRS'aaaaaaaa'\ntR.",
    )
    for name, shape in {
        "huge": b"I999999\nI999999\nI999999\nI999999\n",
        "negative": b"I-1\nI-4\n",
        "truth": b"I01\nI4\n",
        "float": b"F4.0\n",
        "long": b"\x8b\x00\x00\x10\x00" + b"\x7f" * (1 << 20),
        "deep": b"I1\n" * 100_000,
        "wrong": b"I2\nI4\n",
    }.items():
        yield f"{name} shape", ARRAY + b"(I1\n(" + shape + b"t" + INT8 + b"I00\nC\x04aaaatb."
    yield "no content", ARRAY + b"."
    yield "marks", b"(" * 100_000 + b"."
    yield "nested lists", b"]" * 100_000 + b"a" * 99_999 + b"."
    yield "nested tuples as a key", b"\x80\x04})" + b"\x85" * 300_000 + b"K\x01s."
    yield "itself", b"]q\x00h\x00a."
    yield "memo index", b"]r\xff\xff\xff\x7f."
    yield "memo index of 1 GB", b"]r\x00\x00\x00\x04."
    yield "missing memo", b"h\x07."
    text = b"X" + (1 << 20).to_bytes(4, "little") + b"a" * (1 << 20)
    yield (
        "encoded again and again",
        b"c_codecs\nencode\nq\x00"
        + text
        + b"q\x01(U\x06latin1q\x02"
        + b"h\x00h\x01h\x02\x86R" * 3000
        + b"l.",
    )
    image = pickle.dumps(np.zeros((1000, 1000, 3), np.int8), 2)[2:-1]
    yield "one array 1000 times", b"\x80\x02(" + image + b"q\x63" + b"h\x63" * 1000 + b"l."
    yield "sizes", b"\x80\x04\x8e\xff\xff\xff\xff\xff\xff\xff\x7fabc."
    yield "bytearray size", b"\x80\x05\x96\x00\x00\x00\x00\x10\x00\x00\x00abc."
    yield "digits", b"L" + b"9" * 100_000 + b"L\n."
    yield "empty", b""
    yield "stop", b"."
    yield "noise", b"\xff" * 100
    whole = pickle.dumps(np.zeros((4, 8, 8, 3), np.int8), 4)
    for k in range(0, len(whole) - 1, 17):
        yield f"cut at {k}", whole[:k]


CHILD = """
import json, os, resource, sys
from pathlib import Path
from miue_fast import data
files = sorted(Path(sys.argv[1]).iterdir())
data.load_poison(sys.argv[2])  # whatever is imported late is imported now, \
the codec of protocol 0 too
b"a".decode("raw_unicode_escape")
used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + 10**9, used + 10**9))
events, active = [], False
def hook(event, arguments):
    if active and event not in ("os.listdir", "object.__getattr__") \
and not (event == "open" and arguments[2] % 4 == os.O_RDONLY):
        events.append([event, str(arguments)])
sys.addaudithook(hook)
told = {}
for path in files:
    active = True
    try:
        data.load_poison(path)
        told[path.name] = "nothing"
    except Exception as error:
        told[path.name] = f"{type(error).__name__}: {error}"
    active = False
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print(json.dumps([told, events, peak]))
"""


def test_evil_pickles_run_nothing_write_nothing_and_take_little_memory(tmp_path, levels):
    """In a process with 1 GB of address space beyond its imports, watched by an audit hook (import,
    open, find_class, ...).
    """
    (tmp_path / "evil").mkdir()
    names = {}
    for k, (name, content) in enumerate(evil_pickles()):
        names[f"{k:04d}.pkl"] = name
        (tmp_path / "evil" / f"{k:04d}.pkl").write_bytes(content)
    with open(tmp_path / "evil/sparse.pkl", "wb") as file:
        file.truncate(100 << 30)
    names["sparse.pkl"] = "sparse"
    fine = dumped(tmp_path / "fine.pkl", levels)
    work = tmp_path / "work"
    work.mkdir()
    command = [sys.executable, "-c", CHILD, str(tmp_path / "evil"), str(fine)]
    done = subprocess.run(
        command,
        cwd=work,
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr[-2000:]
    told, events, peak = json.loads(done.stdout)
    assert set(told) == set(names) and len(names) > 150
    for file, text in told.items():
        assert text.startswith("ValueError: poison: ") and "\n" not in text and len(text) < 600, (
            names[file],
            text,
        )
        assert "MemoryError" not in text, (names[file], text)
    by_name = {names[file]: text for file, text in told.items()}
    assert events == [] and os.listdir(work) == []
    assert peak < 1_500_000  # KB, with torch in it
    assert (
        "refused posix.system" in by_name["system4"] and "refused builtins.eval" in by_name["eval4"]
    )
    assert (
        "refused numpy.load" in by_name["load4 beside an array"]
        and "refused the opcode PERSID" in by_name["persistent"]
    )
    assert (
        "refused a call of numpy.ndarray" in by_name["ndarray4"]
        and "share their bytes" in by_name["one array 1000 times"]
    )
    assert (
        "refused a state for numpy." in by_name["state of a name"]
        and "more encoded bytes" in by_name["encoded again and again"]
    )
    assert (
        "refused the dtype O8" in by_name["objects4"]
        and "refused the dtype O8" in by_name["pointer state"]
    )
    assert (
        "refused a state for numpy." in by_name["tuple state of a name"]
        and "refused a call of" in by_name["text as a name"]
    )
    assert (
        "other than latin1" in by_name["rot13"] and "unknown memo index" in by_name["missing memo"]
    )
    assert "declares 8 bytes" in by_name["wrong shape"]


def test_the_evil_objects_would_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    pickle.loads(dict(evil_pickles())["system4"])
    assert (tmp_path / "pwned").exists()


def test_the_number_of_opcodes_is_limited(tmp_path, monkeypatch):
    monkeypatch.setattr(inert, "MAX_OPCODES", 1000)
    with pytest.raises(ValueError, match="more than 1000 opcodes"):
        path = tmp_path / "p.pkl"
        path.write_bytes(b"]" + b"0]" * 1000 + b".")
        data.load_poison(path)


def test_flipped_bytes_give_a_poison_or_one_clear_error(tmp_path, levels):
    random = np.random.default_rng(0)
    refused = 0
    for protocol in (2, 4, 5):
        fine = pickle.dumps({k: image.copy() for k, image in enumerate(levels[:3])}, protocol)
        for _ in range(300):
            changed = bytearray(fine)
            changed[int(random.integers(len(fine)))] = int(random.integers(256))
            (tmp_path / "p.pkl").write_bytes(changed)
            try:
                assert data.load_poison(tmp_path / "p.pkl")[0].abs().max() <= 1
            except ValueError as error:
                refused += 1
                assert str(error).startswith("poison: ") and "\n" not in str(error)
    assert refused > 100
